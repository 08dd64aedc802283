"""The loss of a run, by its name in the configuration.

A loss is a module that `grad_cache.py` calls with the embeddings of this rank's part of a global batch. It returns the
loss of the global batch. `ClipLoss` and `SigLipLoss` are such modules. `Loss` is what another class must offer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from bclip_fast import distributed
from bclip_fast.errors import UserError, first_line
from bclip_fast.loss import ClipLoss, DistillClipLoss, SigLipLoss
from bclip_fast.model.biomedclip import BiomedClipConfig

from .captions import CaptionLoss
from .own_class import import_class

KINDS = ("clip", "siglip", "distill", "coca")
# The initial factor and bias of the logits in the paper of the sigmoid loss (arXiv 2303.15343, section 3.2).
SIGLIP_LOGITS = 10.0, -10.0
CONSTANTS = ("groups", "teacher")
"""The fields of `Batch` with a row for each sample that a loss gets as keywords, if the batch has them."""


class Loss(Protocol):
    """A loss that can train. The arguments are features (b, D) of this rank, with scalar scale and bias.

    The result is the loss of the global batch, a scalar, or its terms by their keys in metrics.jsonl, which end with
    _loss. The sum of the terms is the loss. Its gradients are those that an average over ranks turns into the gradients
    of the global batch.
    """

    operand_dtype: torch.dtype | None
    """The dtype of the products, if the features are wider than the towers' output."""

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        **constants: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss.

        Args:
            constants: without gradients, those of `CONSTANTS` that the batches have. `groups` is a pair of ids (b,) of
                images and texts, where equal ids are positives. `teacher` (b, 2, E) are a teacher's features of the
                images and of the texts.
        """


def total(loss: Tensor | dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar loss, and its detached terms if it has several.

    Raises:
        UserError: a loss of the user's own returns something else than `Loss` says.
    """
    terms = loss if isinstance(loss, dict) else {"": loss}
    for name, term in terms.items():
        if len(terms) > 1 and not str(name).endswith("_loss"):
            raise UserError(
                f"the term {name} of the loss could be another key of metrics.jsonl; rename it to {name}_loss"
            )
        if not (isinstance(term, Tensor) and term.dim() == 0 and term.is_floating_point() and term.requires_grad):
            raise UserError(f"{_named(name)} is {_described(term)}, but must be a scalar tensor with a gradient")
    if not terms:
        raise UserError("the loss has no terms: its class returns an empty dictionary; return a scalar tensor")
    if isinstance(loss, Tensor):
        return loss, {}
    value = torch.stack(list(loss.values())).sum()
    return value, {name: term.detach() for name, term in loss.items()} if len(loss) > 1 else {}


def _named(term: str) -> str:
    return f"the term {term} of the loss" if term else "the result of the loss"


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    gradient = "with" if value.requires_grad else "without"
    return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, {gradient} a gradient"


class Distillation(DistillClipLoss):
    """`DistillClipLoss` for the trainer: contrastive loss + `weight` * cross-entropy under the teacher.

    Args:
        teacher_scale: factor of the teacher's logits.
        weight: factor of the distillation term. 1 is open_clip's.
        options: keywords of `DistillClipLoss`.
    """

    def __init__(self, teacher_scale: float, weight: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.teacher_scale, self.weight = teacher_scale, weight

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        teacher: Tensor,
    ) -> dict[str, Tensor]:
        """The terms, of the student's features (b, D) and those of the teacher (b, 2, E)."""
        teacher_image, teacher_text = teacher.unbind(1)
        terms: Any = super().forward(
            image_features, text_features, logit_scale, teacher_image, teacher_text, self.teacher_scale
        )
        contrastive, distill = terms
        if logit_bias is not None:
            # A bias cancels in a softmax, but data-parallel engines need a gradient of every parameter.
            contrastive = contrastive + 0.0 * logit_bias
        return {"contrastive_loss": contrastive, "distill_loss": self.weight * distill}


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss."""

    kind: str = "clip"
    """clip: the softmax loss of CLIP. siglip: the sigmoid loss, in which each pair is a separate decision. distill: the
    softmax loss and the cross-entropy under a teacher's similarities, as in open_clip. coca: the softmax loss and the
    cross-entropy of a caption decoder (section model.decoder). For your own class, write module:Class. It gets rank and
    world_size and works like bclip_fast.ClipLoss."""
    label_smoothing: float = 0.0
    """Share of the targets that goes to all pairs alike, within 0 and 1."""
    hardness: float = 0.0
    """Weight of hard negatives in the clip loss: negatives count by exp(hardness * cosine). 0 weighs all alike."""
    init_scale: float = 0.0
    """Initial factor of the logits. 0 takes that of the model, or SigLIP's 10 for siglip and a model without bias."""
    init_bias: float | None = None
    """Initial bias of the logits. None takes that of the model, or SigLIP's -10 for siglip and a model without bias."""

    teacher: str = ""
    """Teacher of distill: a run folder, a folder in the layout of open_clip or transformers, hf-hub:ORG/NAME, or
    open_clip:ARCHITECTURE/PRETRAINED. It never trains. Its own tokenizer reads the captions, and the crops are resized
    to its size."""
    teacher_cache: Literal["off", "fp32", "fp16"] = "off"
    """off: the teacher embeds each batch once. fp32 or fp16: the teacher embeds each sample once, before the first
    step. It sees the centre crop and the caption. The run folder keeps its features in this number format."""
    distill_weight: float = 1.0
    """Factor of the distillation term. 1 is that of open_clip."""
    caption_loss_weight: float = 2.0
    """Factor of the captions' cross-entropy in coca. 2 is that of open_clip."""
    clip_loss_weight: float = 1.0
    """Factor of the softmax loss in coca."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS and not self.is_own:
            raise UserError(f"loss.kind={self.kind} must be {', '.join(KINDS)} or module:Class")
        if not 0 <= self.label_smoothing <= 1:
            raise UserError(f"loss.label_smoothing={self.label_smoothing} must lie in [0, 1]")
        if (self.kind == "distill") != bool(self.teacher):
            reason = "needs loss.teacher" if self.kind == "distill" else f"takes no loss.teacher={self.teacher}"
            raise UserError(f"loss.kind={self.kind} {reason}; set both loss.kind=distill and loss.teacher, or neither")
        if self.teacher_cache not in ("off", "fp32", "fp16") or (self.teacher_cache != "off" and not self.teacher):
            raise UserError(f"loss.teacher_cache={self.teacher_cache} must be off, or fp32 or fp16 with loss.teacher")
        if not 0 <= self.distill_weight < math.inf:
            raise UserError(f"loss.distill_weight={self.distill_weight} must be a finite number of at least 0")
        if self.hardness and (self.kind != "clip" or self.label_smoothing):
            raise UserError(f"loss.hardness={self.hardness} needs loss.kind=clip without label_smoothing; set it to 0")
        if not 0 <= self.init_scale <= 100:
            raise UserError(f"loss.init_scale={self.init_scale} must lie in (0, 100], or be 0 for the loss's own")
        if self.init_bias is not None and self.kind in ("clip", "distill", "coca"):
            raise UserError(f"loss.init_bias={self.init_bias} needs loss.kind=siglip: a bias cancels in a softmax")
        if self.is_own and (self.label_smoothing or self.hardness):
            raise UserError(f"loss.kind={self.kind} takes no label_smoothing and no hardness; set them in your class")
        if not 0 < self.caption_loss_weight < math.inf:
            raise UserError(f"loss.caption_loss_weight={self.caption_loss_weight} must be a finite number above 0")
        if not 0 <= self.clip_loss_weight < math.inf:
            raise UserError(f"loss.clip_loss_weight={self.clip_loss_weight} must be a finite number of at least 0")

    def check_model(self, model: BiomedClipConfig) -> None:
        """Raise UserError unless the model has a caption decoder if, and only if, the loss is coca."""
        if self.kind == "coca" and not model.decoder.layers:
            raise UserError(
                "loss.kind=coca needs a model with a caption decoder; set preset=coca_b32, or model.decoder.layers"
            )
        if self.kind != "coca" and model.decoder.layers:
            raise UserError(
                f"loss.kind={self.kind} doesn't train the model's caption decoder; set loss.kind=coca, or "
                "model.decoder.layers=0"
            )

    def check_positives(self, field: str, positives: str) -> None:
        """Check that the loss takes the positives of a field. Raises UserError, unless they are pair."""
        name = next((name for name in ("label_smoothing", "hardness") if getattr(self, name)), "")
        if positives != "pair" and (name or self.kind == "distill"):
            raise UserError(
                f"{field}={positives} cannot be combined with loss.{name or 'kind=distill'}; set one of them to "
                "its default"
            )

    @property
    def is_own(self) -> bool:
        """Whether the loss is a class of the user's."""
        module, _, name = self.kind.partition(":")
        return bool(module) and name.isidentifier()

    def initial_logits(self, log_scale: float, bias: float | None) -> tuple[float, float | None]:
        """The initial logarithm of the logit scale and the initial bias, of a model with `log_scale` and `bias`."""
        if self.kind == "siglip" and bias is None:
            log_scale, bias = math.log(SIGLIP_LOGITS[0]), SIGLIP_LOGITS[1]
        scale = math.log(self.init_scale) if self.init_scale else log_scale
        return scale, bias if self.init_bias is None else self.init_bias


class ContrastivePart(ClipLoss):
    """The softmax loss of CoCa, with its weight. GradCache adds the captions' part, whose inputs aren't cached.

    captions: the captions' part.
    """

    def __init__(self, weight: float, captions: CaptionLoss, **options: Any) -> None:
        super().__init__(**options)
        self.weight, self.captions = weight, captions

    def forward(self, *args: Any, **options: Any) -> Any:
        """`ClipLoss.forward`, times the weight."""
        loss: Any = super().forward(*args, **options)
        return self.weight * loss


def build_loss(config: LossConfig, teacher_scale: float = 0.0, pad_id: int = 0) -> Any:
    """The loss of this rank, a module that works as `Loss`.

    Args:
        teacher_scale: factor of the teacher's logits, for a loss with a teacher.
        pad_id: the token that pads captions, which coca doesn't predict.

    Raises:
        UserError: the user's class cannot be imported or made.
    """
    ranks: dict[str, Any] = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    if config.kind == "clip":
        return ClipLoss(**ranks, label_smoothing=config.label_smoothing, hardness=config.hardness)
    if config.kind == "coca":
        captions = CaptionLoss(config.caption_loss_weight, pad_id)
        smoothing = config.label_smoothing
        return ContrastivePart(config.clip_loss_weight, captions, **ranks, label_smoothing=smoothing)
    if config.kind == "siglip":
        return SigLipLoss(**ranks, label_smoothing=config.label_smoothing)
    if config.kind == "distill":
        smoothing = config.label_smoothing
        return Distillation(teacher_scale, config.distill_weight, **ranks, label_smoothing=smoothing)
    own = import_class("loss.kind", config.kind, nn.Module, "torch.nn.Module")
    try:
        loss = own(**ranks)
    except TypeError as error:
        raise UserError(f"loss.kind={config.kind} must take rank and world_size: {error}") from error
    except Exception as error:
        raise UserError(
            f"loss.kind={config.kind} fails when it is made: {type(error).__name__}: {first_line(error)}"
        ) from error
    if parameters := [name for name, _ in loss.named_parameters()]:
        raise UserError(
            f"loss.kind={config.kind} has the parameter {parameters[0]}, which would not train: only the model does; "
            "make it a buffer"
        )
    return loss
