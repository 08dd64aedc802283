"""A DAB-DETR that finds the panels of composite figures. Only this module imports transformers.

The weights are read from a safetensors file only, and the model is built from its configuration by classes of
transformers, so that no file of a checkpoint runs code. A checkpoint with a ResNet of timm as its backbone, as
hf-hub:vector-institute/pmc-18m-dab-detr, is read into transformers' ResNet, so neither timm nor torchvision is needed.

References: Liu et al., DAB-DETR (arXiv 2201.12329); Baghbanzadeh et al., Open-PMC-18M (arXiv 2506.02738).
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from bclip_fast.errors import UserError, first_line
from bclip_fast.io.json_files import read_object

from .detector_files import FILES

# Images are padded to multiples of this, and a mask hides the padding. So images of similar shape share a batch.
CANVAS_STEP = 128
# Two boxes that overlap more are the same panel.
MAX_OVERLAP = 0.5
# Limits for the configuration of a checkpoint. The published model is far below them.
_MAX_SIDE = 4096
_LIMITS = {"encoder_layers": 48, "decoder_layers": 48, "num_queries": 2000, "hidden_size": 4096}
_LIMITS |= {"encoder_ffn_dim": 16384, "decoder_ffn_dim": 16384, "num_patterns": 64}
_PREFIX = "model.backbone.conv_encoder.model."
# Depths and kind of the layers of timm's ResNets.
_RESNETS = {
    "resnet18": ((2, 2, 2, 2), "basic"), "resnet34": ((3, 4, 6, 3), "basic"),
    "resnet50": ((3, 4, 6, 3), "bottleneck"), "resnet101": ((3, 4, 23, 3), "bottleneck"),
}  # fmt: skip
_WIDTHS = {"basic": (64, 128, 256, 512), "bottleneck": (256, 512, 1024, 2048)}


@dataclass(frozen=True)
class Detection:
    """A box of a panel. `box`: (left, top, right, bottom) in pixels of the image. `score`: from 0 to 1."""

    box: tuple[int, int, int, int]
    score: float


@dataclass(frozen=True)
class Preprocessing:
    """How a checkpoint's image processor prepares an image. `resample`: Pillow's number of a filter.

    Attributes:
        size: (shortest side, longest side) of the resized image, or its (height, width) if `is_exact`.
        scale: factor of the pixels' values, from 0 to 255. mean, std: of each channel, after the scaling.
    """

    size: tuple[int, int] = (800, 1333)
    is_exact: bool = False
    resample: int = int(Image.Resampling.BILINEAR)
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of an image after resizing, as DETR's image processors round it."""
        if self.is_exact:
            return self.size[1], self.size[0]
        shortest, longest = self.size
        short, long = min(width, height), max(width, height)
        exact = float(shortest)
        if long / short * shortest > longest:
            exact = longest * short / long
            shortest = round(exact)
        if short == shortest:
            return width, height
        other = max(1, int(exact * long / short))
        return (shortest, other) if width < height else (other, shortest)


@dataclass(frozen=True)
class PreparedImage:
    """A resized image. `pixels`: (height, width, 3) uint8. `size`: (width, height) of the original."""

    pixels: np.ndarray
    size: tuple[int, int]

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) after padding."""
        height, width = (-(-side // CANVAS_STEP) * CANVAS_STEP for side in self.pixels.shape[:2])
        return height, width


class PanelDetector:
    """A detector in evaluation mode. Its boxes of an image depend on the batch only by rounding errors.

    Args:
        folder: folder with FILES.

    Raises:
        UserError: transformers is missing, or the files don't fit one another or exceed a limit.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = folder, torch.device(device)
        self.preprocessing = read_preprocessing(folder / FILES[1])
        self.model = _read_model(folder).eval().requires_grad_(False).to(self.device)

    def prepare(self, image: Image.Image) -> PreparedImage:
        """Resize an RGB image."""
        size = self.preprocessing.resized(*image.size)
        resized = image.resize(size, Image.Resampling(self.preprocessing.resample))
        return PreparedImage(np.asarray(resized.convert("RGB")), image.size)

    @torch.inference_mode()
    def detect(self, images: Sequence[PreparedImage], min_score: float) -> list[list[Detection]]:
        """Return the panels of each image: those of at least `min_score`, without repetitions, best first.

        Args:
            images: images of one `canvas`.
        """
        height, width = images[0].canvas
        pixels = torch.zeros((len(images), 3, height, width))
        mask = torch.zeros((len(images), height, width), dtype=torch.int64)
        mean, std = torch.tensor(self.preprocessing.mean), torch.tensor(self.preprocessing.std)
        for row, image in enumerate(images):
            # Before Pillow's array is read, it must be copied, because torch takes no read-only memory.
            content = torch.from_numpy(image.pixels.copy()).float() * self.preprocessing.scale
            rows, columns = image.pixels.shape[:2]
            pixels[row, :, :rows, :columns] = ((content - mean) / std).permute(2, 0, 1)
            mask[row, :rows, :columns] = 1
        output = self.model(pixel_values=pixels.to(self.device), pixel_mask=mask.to(self.device))
        scores = output.logits.float().sigmoid().amax(-1).cpu().numpy()
        boxes = output.pred_boxes.float().cpu().numpy()
        if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
            raise UserError(f"panel_model={self.folder} gives values that are not finite; its weights are damaged")
        return [
            _detections(each, box, image.size, min_score)
            for each, box, image in zip(scores, boxes, images, strict=True)
        ]


def _detections(scores: np.ndarray, boxes: np.ndarray, size: tuple[int, int], min_score: float) -> list[Detection]:
    """Return the boxes of an image in pixels. boxes: (Q, 4), middle x, middle y, width and height as shares."""
    middle, half = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64) / 2
    corners = np.concatenate([middle - half, middle + half], 1).clip(0, 1) * (*size, *size)
    found = []
    for score, corner in zip(scores.tolist(), np.rint(corners).astype(int).tolist(), strict=True):
        left, top, right, bottom = corner
        rounded = round(score, 3)
        if rounded >= min_score and right > left and bottom > top:
            found.append(Detection((left, top, right, bottom), rounded))
    found.sort(key=lambda each: (-each.score, each.box))
    kept: list[Detection] = []
    for each in found:
        if all(overlap(each.box, other.box) <= MAX_OVERLAP for other in kept):
            kept.append(each)
    return kept


def overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the area of the intersection of two boxes as a share of their union."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0, across) * max(0, down)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared)


def read_preprocessing(path: Path) -> Preprocessing:
    """Read preprocessor_config.json of a detector. Raises UserError for a step or size that we don't support."""
    content = read_object(path)
    default = Preprocessing()
    size = content.get("size", {"shortest_edge": 800, "longest_edge": 1333})
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": content.get("max_size", 1333)}
    try:
        if not (content.get("do_resize", True) and content.get("do_rescale", True)):
            raise ValueError("do_resize and do_rescale must be true")
        is_exact = "height" in size
        names = ("height", "width") if is_exact else ("shortest_edge", "longest_edge")
        sides = int(size[names[0]]), int(size[names[1]])
        if not all(1 <= side <= _MAX_SIDE for side in sides):
            raise ValueError(f"size={size} must lie between 1 and {_MAX_SIDE}")
        normalises = content.get("do_normalize", True)
        return Preprocessing(
            sides,
            is_exact,
            int(Image.Resampling(content.get("resample", default.resample))),
            float(content.get("rescale_factor", default.scale)),
            tuple(map(float, content.get("image_mean", default.mean))) if normalises else (0.0, 0.0, 0.0),
            tuple(map(float, content.get("image_std", default.std))) if normalises else (1.0, 1.0, 1.0),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: unsupported preprocessing: {first_line(error)}") from None


def _read_model(folder: Path) -> Any:
    """Build the model from its configuration, and give it exactly the weights of its file."""
    path = folder / FILES[2]
    config, is_timm = _model_config(read_object(folder / FILES[0]), folder / FILES[0])
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}; download it again") from None
    if is_timm:
        state = {_name_in_transformers(name): tensor for name, tensor in state.items()}
    head = "bbox_predictor."
    for name in [name for name in state if name.startswith(head)]:  # the decoder shares this head
        state.setdefault("model.decoder.bbox_embed." + name.removeprefix(head), state[name])
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    # Without memory, so that a wrong configuration takes none.
    with torch.device("meta"):
        model = _transformers("DabDetrForObjectDetection")(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [name for name in {**expected, **state} if expected.get(name) != getattr(state.get(name), "shape", None)]
    if wrong:
        raise UserError(f"{path} does not fit config.json beside it: {len(wrong)} tensors differ, such as {wrong[0]}")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model


def _model_config(content: dict[str, Any], path: Path) -> tuple[Any, bool]:
    """Return the configuration of the model, and whether the checkpoint has a backbone of timm."""
    content = dict(content)
    for name, limit in _LIMITS.items():
        if not (isinstance(content.get(name, 1), int) and 0 <= content.get(name, 1) <= limit):
            raise UserError(f"{path}: {name}={content[name]} must be an integer from 0 to {limit}")
    backbone = content.pop("backbone_config", None) or {}
    is_timm = backbone.get("model_type") == "timm_backbone" or (not backbone and content.get("use_timm_backbone", True))
    if is_timm:
        name = str(backbone.get("backbone") or content.get("backbone") or "resnet50")
        if name not in _RESNETS or content.get("dilation"):
            raise UserError(f"{path}: the backbone {name} is not supported; use a model with {', '.join(_RESNETS)}")
        depths, kind = _RESNETS[name]
        backbone = {"depths": depths, "layer_type": kind, "hidden_sizes": _WIDTHS[kind]}
    elif backbone.get("model_type", "resnet") != "resnet":
        raise UserError(f"{path}: the backbone {backbone.get('model_type')} is not supported; use a ResNet")
    sizes = [*backbone.get("depths", ()), *backbone.get("hidden_sizes", ())]
    if not all(isinstance(size, int) and 1 <= size <= 4096 for size in sizes):
        raise UserError(f"{path}: the backbone's sizes must be integers from 1 to 4096")
    removed = ("model_type", "auto_map", "architectures", "backbone", "use_timm_backbone", "use_pretrained_backbone")
    rest = {name: value for name, value in content.items() if name not in (*removed, "backbone_kwargs")}
    backbone = {name: value for name, value in backbone.items() if name not in ("model_type", "out_indices")}
    try:
        resnet = _transformers("ResNetConfig")(**{**backbone, "out_features": ["stage4"]})
        return _transformers("DabDetrConfig")(**rest, backbone_config=resnet), is_timm
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def _name_in_transformers(name: str) -> str:
    """Return the name of a weight in transformers' ResNet for its name in timm's. Other names stay."""
    if not name.startswith(_PREFIX):
        return name
    own = name.removeprefix(_PREFIX).removeprefix("_backbone.")
    own = re.sub(r"^conv1\.", "embedder.embedder.convolution.", own)
    own = re.sub(r"^bn1\.", "embedder.embedder.normalization.", own)

    def within_layer(match: re.Match[str]) -> str:
        stage, layer, part, number = match.groups()
        start = f"encoder.stages.{int(stage) - 1}.layers.{layer}."
        if part == "downsample.":
            return f"{start}shortcut.{('convolution', 'normalization')[int(number)]}."
        return f"{start}layer.{int(number) - 1}.{'convolution' if part == 'conv' else 'normalization'}."

    return _PREFIX + re.sub(r"^layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.", within_layer, own)


def _transformers(name: str) -> Any:
    """Return a class of transformers, without its optional torchvision if that cannot be imported."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError):
        # transformers imports any installed torchvision, also one that was built for another torch.
        if "transformers" not in sys.modules:
            sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    try:
        import transformers

        return getattr(transformers, name)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"panel_model needs transformers with {name}: pip install 'bclip_fast[panels]' ({first_line(error)[:200]})"
        ) from error


def as_lists(detections: Sequence[Detection]) -> list[list[float]]:
    """Return detections as values that JSON can hold: left, top, right, bottom, score."""
    return [[*each.box, each.score] for each in detections]


def from_lists(values: Sequence[Sequence[float]]) -> list[Detection]:
    """Return the detections that `as_lists` wrote."""
    return [Detection((int(v[0]), int(v[1]), int(v[2]), int(v[3])), float(v[4])) for v in values]
