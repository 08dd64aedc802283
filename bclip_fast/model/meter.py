"""METER's co-attention head for visual question answering (arXiv 2111.02387), on the towers of a BiomedCLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast.errors import UserError

from .biomedclip import BiomedClip
from .cross_attention import dense_attention
from .packed import Packed
from .text import BertTower, pack
from .transformer import Linear, check_range, check_sizes, mlp_width
from .vision import VisionTower

NORM_EPS = 1e-12


@dataclass(frozen=True)
class MeterConfig:
    """Sizes of the head. The defaults are METER's."""

    num_answers: int
    width: int = 768
    layers: int = 6
    """Number of co-attention layers in each stream."""
    heads: int = 12
    mlp_ratio: float = 4.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_range("meter.num_answers", self.num_answers, 1, 1_000_000)
        check_sizes("meter", self.width, self.layers, self.heads, self.mlp_ratio)
        check_range("meter.dropout", self.dropout, 0.0, 0.9)


class _Attention(nn.Module):
    """BERT's attention, x + attention(x over y) followed by the norm."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = Linear(config.width, config.width)
        self.key_value = Linear(config.width, 2 * config.width)
        self.proj = Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, D) over (B, M, D). mask: (B, 1, 1, M) bool, true at the tokens of y that aren't padding."""
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = dense_attention(query, key, value, mask, dropout)
        attended = self.proj(attended.transpose(1, 2).flatten(2))
        return self.norm(x + F.dropout(attended, self.dropout, self.training))


class CrossLayer(nn.Module):
    """METER's BertCrossLayer: self-attention, cross-attention and MLP, each with its residual and norm."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.own, self.cross = _Attention(config), _Attention(config)
        self.fc1 = Linear(config.width, mlp_width(config.width, config.mlp_ratio))
        self.fc2 = Linear(mlp_width(config.width, config.mlp_ratio), config.width)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)

    def forward(self, x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> Tensor:
        """Update the stream x (B, N, D) from itself and from the other stream y (B, M, D)."""
        x = self.cross(self.own(x, x, x_mask), y, y_mask)
        return self.norm(x + F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training))


class Fusion(nn.Module):
    """Two streams of co-attention layers. Each layer reads both streams' outputs of the previous layer."""

    def __init__(self, config: MeterConfig, image_width: int, text_width: int) -> None:
        super().__init__()
        self.image_in, self.text_in = Linear(image_width, config.width), Linear(text_width, config.width)
        self.kinds = nn.Embedding(2, config.width)
        self.image_layers = nn.ModuleList(CrossLayer(config) for _ in range(config.layers))
        self.text_layers = nn.ModuleList(CrossLayer(config) for _ in range(config.layers))
        self.image_pool, self.text_pool = (Linear(config.width, config.width) for _ in range(2))

    def forward(self, images: Tensor, texts: Tensor, text_mask: Tensor) -> Tensor:
        """(B, N, Di), (B, L, Dt) and text_mask (B, L) bool -> (B, 2 width): the pooled first tokens, concatenated."""
        kinds = self.kinds(torch.arange(2, device=images.device))
        text, image = self.text_in(texts) + kinds[0], self.image_in(images) + kinds[1]
        mask = text_mask[:, None, None]
        for text_layer, image_layer in zip(self.text_layers, self.image_layers, strict=True):
            text, image = text_layer(text, image, mask, None), image_layer(image, text, None, mask)
        return torch.cat([self.text_pool(text[:, 0]).tanh(), self.image_pool(image[:, 0]).tanh()], dim=1)


class VqaModel(nn.Module):
    """Towers, fusion and a classifier over the answers of the training set.

    lr_scales: METER's learning rates relative to those of the towers, by prefix of a parameter's name.
    """

    lr_scales: ClassVar[dict[str, float]] = {"classifier.": 50.0, "fusion.": 5.0}

    def __init__(
        self, clip: BiomedClip, config: MeterConfig, answers: tuple[str, ...], *, freeze: bool = False
    ) -> None:
        """Build the head on `clip`.

        Args:
            freeze: lock the towers' weights.

        Raises:
            ValueError: the number of answers isn't num_answers.
            UserError: a tower is neither a ViT with CLS token nor BERT, or BERT attends to padding.
        """
        super().__init__()
        if len(answers) != config.num_answers:
            raise ValueError(f"{len(answers)} answers were passed for num_answers={config.num_answers}")
        if not isinstance(clip.text, BertTower):
            raise UserError("METER's head reads the tokens of a BERT text tower; this model has another")
        if not isinstance(clip.visual, VisionTower) or clip.visual.cls_token is None:
            raise UserError(
                f"METER's head reads the tokens of a ViT with a CLS token; vision.kind is {clip.config.vision.kind}"
            )
        if clip.config.text.attend_padding:
            raise UserError("METER's head doesn't read padding; this model has text.attend_padding=True")
        self.meter_config, self.answers = config, answers
        self.fusion = Fusion(config, clip.config.vision.width, clip.config.text.width)
        inner = 2 * config.width
        self.classifier = nn.Sequential(
            Linear(inner, inner), nn.LayerNorm(inner), nn.GELU(), Linear(inner, config.num_answers)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.clip = clip
        # Parameters that only the contrastive embedding reads would get no gradient here.
        for name, parameter in clip.named_parameters():
            unread = name.startswith(("logit_", "visual.head.", "text.proj."))
            parameter.requires_grad_(not (freeze or unread))

    def forward(self, image: Tensor, text: Packed | Tensor) -> dict[str, Tensor]:
        """Images as `BiomedClip` takes them, and their questions -> logits (B, num_answers)."""
        tower: Any = self.clip.text
        if isinstance(text, Tensor):
            text = pack(text, text != tower.config.pad_id)[0]
        image_states = self.clip.visual(image, tokens=True)
        text_states = tower(text, tokens=True)
        lengths = text.lengths
        mask = torch.arange(text.max_seqlen, device=text_states.device) < lengths[:, None]
        padded = text_states.new_zeros(len(lengths), text.max_seqlen, text_states.shape[1])
        padded = padded.index_put((text.owners, text.positions), text_states)
        return {"logits": self.classifier(self.fusion(image_states, padded, mask))}

    def encode_image(self, image: Tensor, normalize: bool = True) -> Tensor:
        """The embeddings of the underlying `BiomedClip`."""
        return self.clip.encode_image(image, normalize)

    def encode_text(self, text: Packed | Tensor, normalize: bool = True) -> Tensor:
        """The embeddings of the underlying `BiomedClip`."""
        return self.clip.encode_text(text, normalize)

    def set_grad_checkpointing(self, enable: bool = True, offload: bool = False) -> None:
        """As `BiomedClip.set_grad_checkpointing`. The head isn't recomputed."""
        self.clip.set_grad_checkpointing(enable, offload)

    def compile_layers(self, cuda_graphs: bool = False, **options: Any) -> None:
        """As `BiomedClip.compile_layers`. The head isn't compiled."""
        self.clip.compile_layers(cuda_graphs, **options)


def vqa_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """METER's loss: binary cross-entropy, summed over answers and averaged over questions.

    logits, targets: (B, A). Targets lie in [0, 1], and are soft where a question has several answers.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float()) * logits.shape[1]
