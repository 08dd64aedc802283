"""BiomedCLIP: an image tower, a text tower and the logit scale."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast.errors import UserError

from .coca import CaptionDecoder, DecoderConfig
from .coca_towers import CocaTextTower, CocaVisionTower
from .packed import Packed
from .resnet import ResNetTower
from .siglip_text import SiglipTextTower
from .text import BertTower, GptTower, TextConfig
from .transformer import PreProjection, check_range
from .vision import VisionConfig, VisionTower


@dataclass(frozen=True)
class BiomedClipConfig:
    """Sizes of the model. The defaults are those of the published BiomedCLIP."""

    embed_dim: int = 512
    """Width of the shared embedding."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    quick_gelu: bool = False
    """Use OpenAI's approximate GELU in towers of kind clip and gpt. OpenAI's checkpoints need it."""
    init_logit_scale: float = math.log(1 / 0.07)
    """Initial value of the learned logarithm of the logit scale."""
    init_logit_bias: float | None = None
    """Initial logit bias of the sigmoid loss. None: the model has no bias."""

    def __post_init__(self) -> None:
        check_range("embed_dim", self.embed_dim, 1, 16384)
        if self.quick_gelu and self.vision.kind != "clip" and self.text.kind != "gpt":
            raise UserError("quick_gelu=True requires vision.kind clip or text.kind gpt: other towers use exact GELU")
        if self.vision.kind == "siglip" and self.embed_dim != self.vision.width:
            raise UserError(
                f"embed_dim={self.embed_dim} must be vision.width={self.vision.width}, because kind siglip has no "
                "projection"
            )
        if self.decoder.layers == 0:
            return
        if self.vision.kind != "clip" or self.text.kind != "gpt":
            raise UserError(
                f"decoder.layers={self.decoder.layers} needs vision.kind=clip and text.kind=gpt, not "
                f"{self.vision.kind} and {self.text.kind}: a bidirectional text tower sees the words that the decoder "
                "must predict; change the towers, or set decoder.layers=0"
            )
        self.decoder.check(self.embed_dim, self.text.width)


class BiomedClip(nn.Module):
    """An image tower, a text tower, one learned logit scale and, in a CoCa, a caption decoder.

    The parameters `logit_scale` (a logarithm) and `logit_bias` (if configured) are scalars.

    Attributes:
        vectors: names of parameters that are vectors in open_clip, whatever their shape is here. They don't decay.
    """

    def __init__(self, config: BiomedClipConfig) -> None:
        super().__init__()
        self.config = config
        self.vectors = ("visual.cls_token",) if config.vision.kind == "clip" else ()
        self.visual: VisionTower | ResNetTower
        if config.vision.kind == "resnet":
            self.visual = ResNetTower(config.vision, config.embed_dim)
        else:
            self.visual = VisionTower(config.vision, config.embed_dim, config.quick_gelu)
        self.text: BertTower | GptTower | SiglipTextTower
        self.decoder: CaptionDecoder | None = None
        if config.decoder.layers:
            sizes, text = config.decoder, config.text
            self.visual = CocaVisionTower(
                config.vision, config.embed_dim, config.quick_gelu, sizes.pool_queries, sizes.pool_heads
            )
            self.text = CocaTextTower(text, config.embed_dim, config.quick_gelu)
            self.decoder = CaptionDecoder(sizes, text.width, text.vocab_size, config.quick_gelu)
        elif config.text.kind == "bert":
            self.text = BertTower(config.text, config.embed_dim)
        elif config.text.kind == "gpt":
            self.text = GptTower(config.text, config.embed_dim, config.quick_gelu)
        else:
            self.text = SiglipTextTower(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
        self.logit_bias: nn.Parameter | None = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.init_logit_bias)))

    def encode_image(self, image: Tensor | PreProjection, normalize: bool = True) -> Tensor:
        """Embed images -> (B, embed_dim).

        Args:
            image: (B, 3, S, S) from `Preprocess`, or raw uint8 (B, S, S, 3) or (B, 3, S, S).
            normalize: scale the embeddings to unit length.
        """
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Packed | Tensor | PreProjection, normalize: bool = True) -> Tensor:
        """Embed captions -> (B, embed_dim).

        Args:
            text: the output of `Tokenizer.packed`, or (B, L) int64 from `Tokenizer`. Padded ids are packed first,
                which waits for an accelerator.
            normalize: scale the embeddings to unit length.
        """
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self,
        image: Tensor | PreProjection | None = None,
        text: Packed | Tensor | PreProjection | None = None,
        *,
        captions: bool = False,
    ) -> dict[str, Tensor | None]:
        """Embed images and captions, and return them like open_clip's CustomTextCLIP with `output_dict`.

        Args:
            image, text: as for `encode_image` and `encode_text`.
            captions: predict each caption from its image, too. Needs a decoder, an image and packed or padded captions.

        Returns:
            caption_losses: the sum of the cross-entropies of all tokens after a caption's first one, a scalar in
                float32 or wider. Padding counts nothing. Only with `captions`.
            image_features, text_features: (B, embed_dim) of unit length, or None without an input.
            logit_scale: exp of the parameter, a scalar.
            logit_bias: a scalar. Absent if the model has none.
        """
        output: dict[str, Tensor | None]
        if captions:
            output = self._caption(image, text)
        else:
            output = {
                "image_features": None if image is None else self.encode_image(image),
                "text_features": None if text is None else self.encode_text(text),
            }
        output["logit_scale"] = self.logit_scale.exp()
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias
        return output

    def caption_logits(self, image: Tensor, text: Packed | Tensor) -> Tensor:
        """Logits (T, vocab_size) of the token after each of the T tokens of n captions, in packed order.

        Raises:
            UserError: the model has no caption decoder.
        """
        return self._decode(image, text)["logits"]

    @torch.no_grad()
    def generate(self, image: Tensor, start_id: int, end_id: int, max_tokens: int | None = None) -> Tensor:
        """Caption images greedily: each token is the one with the highest logit.

        Args:
            image: as for `encode_image`.
            start_id, end_id: the first and the last token of a caption. `Tokenizer.encode` frames captions with them.
            max_tokens: number of tokens after which a caption ends, at most and by default text.context_length.

        Returns:
            (B, L) int64: the captions with start and end, padded with text.pad_id. L is the length of the longest one.

        Raises:
            UserError: the model has no caption decoder, or it takes fewer tokens.
        """
        decoder, text = self._captioner()
        limit = self.config.text.context_length if max_tokens is None else max_tokens
        check_range("max_tokens", limit, 2, self.config.text.context_length)
        tokens = self.visual(image, captions=True)[1]
        ids = torch.full((len(tokens), 1), start_id, device=tokens.device)
        is_open = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        while ids.shape[1] < limit and bool(is_open.any()):
            packed = Packed.of(ids.flatten().cpu(), [ids.shape[1]] * len(ids)).to(ids.device)
            states = text(packed, captions=True)[1]
            following = decoder(tokens, states, packed).unflatten(0, ids.shape)[:, -1].argmax(-1)
            ids = torch.cat([ids, torch.where(is_open, following, self.config.text.pad_id)[:, None]], dim=1)
            is_open &= following != end_id
        return ids

    def _captioner(self) -> tuple[CaptionDecoder, CocaTextTower]:
        if self.decoder is None or not isinstance(self.text, CocaTextTower):
            raise UserError("this model has no caption decoder; load a CoCa, or set model.decoder.layers")
        return self.decoder, self.text

    def _caption(self, image: Any, text: Any) -> dict[str, Any]:
        features = self._decode(image, text, ignored=self.config.text.pad_id)
        return {**features, "caption_losses": features.pop("logits")}

    def _decode(self, image: Any, text: Any, **options: Any) -> dict[str, Any]:
        """Features of unit length, and `logits`, the decoder's result."""
        decoder, tower = self._captioner()
        text = tower.packed(text)
        image_features, image_tokens = self.visual(image, captions=True)
        text_features, states = tower(text, captions=True)
        return {
            "image_features": F.normalize(image_features, dim=-1),
            "text_features": F.normalize(text_features, dim=-1),
            "logits": decoder(image_tokens, states, text, **options),
        }

    def set_grad_checkpointing(self, enable: bool = True, offload: bool = False) -> None:
        """Recompute each layer in the backward pass of training, instead of keeping its activations.

        offload: keep the inputs of the recomputed layers on the host.
        """
        for tower in (self.visual, self.text, self.decoder):
            if tower is not None:
                tower.grad_checkpointing, tower.offload_activations = enable, offload

    def compile_layers(self, cuda_graphs: bool = False, **options: Any) -> None:
        """Compile each layer to one graph by torch.compile, for any batch size and caption length.

        Args:
            cuda_graphs: replay the image tower's layers as CUDA graphs, one set for each batch size.
            options: further arguments of torch.compile.

        Raises:
            UserError: cuda_graphs with a ResNet. Its running statistics change, and nobody has tried that.
        """
        if isinstance(self.visual, VisionTower):
            self.visual.cuda_graphs = cuda_graphs
        elif cuda_graphs:
            raise UserError("engine.cuda_graphs=True isn't supported with vision.kind resnet: turn it off")
        else:
            # The blocks share one function but differ in their shapes. By default torch compiles 8 variants of it.
            limits: Any = torch._dynamo.config
            limits.cache_size_limit = max(limits.cache_size_limit, 8 * len(self.visual.layers))
        for layer in self.visual.layers:
            static: dict[str, Any] = {"dynamic": False, "mode": "reduce-overhead"} if cuda_graphs else {"dynamic": True}
            layer.compile(fullgraph=True, **static, **options)
        for layer in [*self.text.layers, *(self.decoder.layers if self.decoder is not None else ())]:
            layer.compile(dynamic=True, fullgraph=True, **options)
