"""The teacher of a distillation: a trained model that embeds the samples and never trains."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast import distributed
from bclip_fast.data.transform import Preprocess, PreprocessConfig, normalize
from bclip_fast.errors import UserError, first_line
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.pretrained.any_model import load_model

from .engine.config import DTYPES
from .transfers import packed_to_device, to_device

log = logging.getLogger(__name__)

# Their tokens tell whether a resumed run has the same tokenizer.
_TEXTS = [
    "Chest radiograph (A) and CT scan (B) of a 45-year-old woman with bilateral pleural effusions.",
    "H&E-stained section, x400; scale bar = 50 µm. IL-6 ≥ 3.2 pg/mL, p < 0.05.",
    "naïve T-cells ‘CD4+’ — flow cytometry",
]


class Teacher:
    """A model on this rank's device, without gradients.

    Args:
        name: as in `LossConfig.teacher`, for messages.
        model, tokenizer: as `load_model` returns them.
        pixels: the size and normalisation of the model's images.
        precision: number format of the towers, by autocast: fp32, bf16 or fp16.

    Attributes:
        scale: factor of the logits.
        width: number of features.

    Raises:
        UserError: the model is not contrastive, or its features are not finite.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        pixels: PreprocessConfig,
        device: torch.device | None = None,
        precision: str = "fp32",
    ) -> None:
        self.name, self.pixels = name, pixels
        self.device, self._dtype = device or torch.device("cpu"), DTYPES[precision]
        self.model, self.tokenizer = model.to(self.device).eval().requires_grad_(False), tokenizer
        if not isinstance(scale := getattr(model, "logit_scale", None), Tensor):
            raise UserError(f"loss.teacher={name} has no logit scale; use a model that was trained on image-text pairs")
        self.scale = float(scale.exp())
        blank = torch.zeros((1, pixels.size, pixels.size, 3), dtype=torch.uint8)
        try:
            features = self.embed(blank, _TEXTS[:1])
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"loss.teacher={name} cannot embed a pair: {first_line(error)}") from error
        if not features.isfinite().all() or not 0 < self.scale < float("inf"):
            raise UserError(f"loss.teacher={name} gives features or a logit scale that are not finite; choose another")
        self.width = features.shape[2]

    @torch.no_grad()
    def embed(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """The features (b, 2, E) of images and captions, float32 of unit length, on the device.

        Args:
            images: (b, S, S, 3) uint8. Another size than the teacher's is resized (bicubic with antialiasing).
        """
        size, pixels = self.pixels.size, to_device(images, self.device)
        if pixels.shape[1] != size:
            channels = pixels.permute(0, 3, 1, 2).float()
            resized = F.interpolate(channels, (size, size), mode="bicubic", antialias=True, align_corners=False)
            pixels = resized.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        text: Any
        if isinstance(self.tokenizer, Tokenizer):
            text = packed_to_device(self.tokenizer.packed(list(captions)), self.device)
        else:
            text = to_device(self.tokenizer(list(captions)), self.device)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            image = self.model.encode_image(normalize(pixels, self.pixels.mean, self.pixels.std))
            features = image.float(), self.model.encode_text(text).float()
        return torch.stack([F.normalize(each, dim=1) for each in features], dim=1)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the features: weights, preprocessing and tokens of some texts."""
        digest = hashlib.sha256(repr((self.pixels, self.scale)).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        digest.update(self.tokenizer(_TEXTS).numpy().tobytes())
        return digest.hexdigest()


def load_teacher(name: str, device: torch.device, precision: str) -> Teacher:
    """The teacher `name` on this rank. Writes nothing. Collective.

    Raises:
        UserError: on every rank, if the model cannot be loaded or does not fit. The message names `loss.teacher`.
    """
    # Rank 0 goes first: only one rank downloads from the hub, and its error stops every rank.
    teachers: list[Teacher] = []
    distributed.run_on_rank0(lambda: teachers.append(_load(name, device, precision)))
    return teachers[0] if teachers else _load(name, device, precision)


def _load(name: str, device: torch.device, precision: str) -> Teacher:
    try:
        model, preprocess, tokenizer = load_model(name)
    except (UserError, ImportError) as error:
        raise UserError(f"loss.teacher={name} cannot be loaded: {first_line(error)}") from error
    pixels = preprocess.config if isinstance(preprocess, Preprocess) else _open_clip_pixels(name, model)
    teacher = Teacher(name, model, tokenizer, pixels, device, precision)
    log.info("teacher %s: %d features, images of %d px", name, teacher.width, pixels.size)
    return teacher


def _open_clip_pixels(name: str, model: Any) -> PreprocessConfig:
    """The preprocessing that an open_clip model carries."""
    content = dict(getattr(model.visual, "preprocess_cfg", None) or {})
    size = content.get("size", model.visual.image_size)
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(f"loss.teacher={name} takes images of {height} x {width} px, which must be square")
    names = ("mean", "std", "interpolation", "resize_mode")
    options = {key: content[key] for key in names if key in content}
    for key in ("mean", "std"):
        if key in options:
            options[key] = tuple(options[key])
    return PreprocessConfig(size=height, **options)
