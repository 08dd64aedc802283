"""BiomedCLIP: the two towers, the logit scale, and the presets of the paper's model and its ablations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .packed import Packed
from .resnet import ResNetTower
from .text import TextConfig, text_tower
from .transformer import Pooled, check_range
from .vision import VisionConfig, VisionTower


@dataclass(frozen=True)
class BiomedClipConfig:
    """Sizes of the whole model; the defaults are the published BiomedCLIP."""

    embed_dim: int = 512
    """Width of the shared embedding."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    quick_gelu: bool = False
    """OpenAI's approximate GELU in the towers of kind clip and gpt, as its checkpoints want it."""
    init_logit_scale: float = math.log(1 / 0.07)
    """Initial learned logarithm of the logit scale."""
    init_logit_bias: float | None = None
    """Initial logit bias of the sigmoid loss; None: the model has no bias."""

    def __post_init__(self) -> None:
        check_range("embed_dim", self.embed_dim, 1, 16384)
        if self.quick_gelu and self.vision.kind != "clip" and self.text.kind != "gpt":
            raise UserError(
                "quick_gelu is True, but the exact GELU is all that vision.kind vit and text.kind bert have"
            )


class BiomedClip(nn.Module):
    """Image and text tower with one learned logit scale.

    The parameters `logit_scale` (the logarithm) and, if configured, `logit_bias` are scalars.
    """

    def __init__(self, config: BiomedClipConfig) -> None:
        super().__init__()
        self.config = config
        self.visual: VisionTower | ResNetTower
        if config.vision.kind == "resnet":
            self.visual = ResNetTower(config.vision, config.embed_dim)
        else:
            self.visual = VisionTower(config.vision, config.embed_dim, config.quick_gelu)
        self.text = text_tower(config.text, config.embed_dim, config.quick_gelu)
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        self.logit_bias: nn.Parameter | None = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(config.init_logit_bias))

    def encode_image(self, image: Tensor | Pooled, normalize: bool = True) -> Tensor:
        """(B, 3, S, S) as `Preprocess` gives it, or raw uint8 (B, S, S, 3) or (B, 3, S, S) -> (B, embed_dim), of unit
        length if normalize."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Packed | Tensor | Pooled, normalize: bool = True) -> Tensor:
        """What `Tokenizer.packed` gives, or (B, L) int64 as `Tokenizer` gives it -> (B, embed_dim), of unit length if
        normalize. Padded ids are packed first, for which an accelerator has to wait."""
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self, image: Tensor | Pooled | None = None, text: Packed | Tensor | Pooled | None = None
    ) -> dict[str, Tensor | None]:
        """What open_clip's CustomTextCLIP returns with `output_dict`: features of unit length and exp(logit_scale).

        Returns:
            image_features and text_features (B, embed_dim), None where no input was given; logit_scale (), the
            factor itself; logit_bias () where the model has one.
        """
        output: dict[str, Tensor | None] = {
            "image_features": None if image is None else self.encode_image(image),
            "text_features": None if text is None else self.encode_text(text),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias
        return output

    def set_grad_checkpointing(self, enable: bool = True, offload: bool = False) -> None:
        """Recomputes each layer in the backward pass of training instead of keeping its activations.

        offload: what it is recomputed from waits on the host.
        """
        for tower in (self.visual, self.text):
            tower.grad_checkpointing, tower.offload_activations = enable, offload

    def compile_layers(self, cuda_graphs: bool = False, **options: Any) -> None:
        """Has torch.compile make one graph of each layer, for batches and captions of any length.

        cuda_graphs: those of the image tower, for each batch size that comes, replayed as CUDA graphs.
        options: torch.compile's.

        Raises:
            UserError: CUDA graphs of a ResNet, whose statistics move; that was never tried.
        """
        if isinstance(self.visual, VisionTower):
            self.visual.cuda_graphs = cuda_graphs
        elif cuda_graphs:
            raise UserError("engine.cuda_graphs: not with vision.kind resnet, whose batch norms keep statistics")
        else:
            # Its blocks differ in their shapes, and are of one function, of which torch compiles 8 variants by itself.
            limits: Any = torch._dynamo.config
            limits.cache_size_limit = max(limits.cache_size_limit, 8 * len(self.visual.layers))
        for layer in self.visual.layers:
            static: dict[str, Any] = {"dynamic": False, "mode": "reduce-overhead"} if cuda_graphs else {"dynamic": True}
            layer.compile(fullgraph=True, **static, **options)
        for layer in self.text.layers:
            layer.compile(dynamic=True, fullgraph=True, **options)
