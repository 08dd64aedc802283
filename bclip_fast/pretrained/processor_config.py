"""preprocessor_config.json of transformers' image processors for CLIP and SigLIP: reading and writing."""

from __future__ import annotations

from typing import Any

from bclip_fast.data.transform import PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.io.json_files import read_object
from bclip_fast.model.vision import VisionConfig

from .sources import Source

FILE = "preprocessor_config.json"
# transformers 5 writes the settings of image processor and tokenizer into one file.
JOINT_FILE = "processor_config.json"
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_MUST_BE_TRUE = ("do_resize", "do_rescale", "do_normalize")
_FACTOR = 1 / 255


def read(source: Source, vision: VisionConfig) -> PreprocessConfig:
    """The conversion of images that the checkpoint's file describes, or that of its kind of model without a file.

    Raises:
        UserError: a setting isn't supported. The message names it.
    """
    path = source.find(FILE)
    content = {} if path is None else read_object(path)
    if path is None and (path := source.find(JOINT_FILE)) is not None:
        content = read_object(path).get("image_processor", {})
    siglip = vision.kind == "siglip"
    for name in _MUST_BE_TRUE:
        if content.get(name, True) is not True:
            raise UserError(f"{path}: {name}={content[name]!r} isn't supported, only true")
    if abs(content.get("rescale_factor", _FACTOR) - _FACTOR) > 1e-9:
        raise UserError(f"{path}: rescale_factor={content['rescale_factor']!r} must be 1/255")
    resample = content.get("resample", 3)
    if resample not in _RESAMPLE:
        raise UserError(f"{path}: resample={resample!r} must be 2 (bilinear) or 3 (bicubic)")
    mean, std = vision.pixel_statistics
    return PreprocessConfig(
        size=vision.image_size,
        mean=_triple(content.get("image_mean"), mean),
        std=_triple(content.get("image_std"), std),
        interpolation=_RESAMPLE[resample],  # type: ignore[arg-type]
        resize_mode="squash" if _is_squashed(content, vision.image_size, siglip, str(path)) else "shortest",
    )


def write(config: PreprocessConfig, kind: str) -> dict[str, Any]:
    """The content of the file. kind: name of the processor's class without "ImageProcessor"."""
    square, is_squashed = {"height": config.size, "width": config.size}, config.resize_mode == "squash"
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "size": square if is_squashed else {"shortest_edge": config.size},
        "do_center_crop": not is_squashed,
        "crop_size": square,
        "resample": {name: number for number, name in _RESAMPLE.items()}[config.interpolation],
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def _is_squashed(content: dict[str, Any], image_size: int, siglip: bool, source: str) -> bool:
    """Whether both edges become the image size. Otherwise the shorter one does, and a centre crop follows."""
    square = {"height": image_size, "width": image_size}
    size = content.get("size", square if siglip else image_size)
    if size == square:
        # A centre crop to the same size changes nothing.
        if content.get("do_center_crop") and content.get("crop_size", square) not in (square, image_size):
            raise UserError(f"{source}: crop_size={content['crop_size']!r} must be the model's, {image_size}")
        return True
    if size not in (image_size, {"shortest_edge": image_size}):
        raise UserError(f"{source}: size={size!r} must be the model's image size, {image_size}")
    if not content.get("do_center_crop", not siglip) or content.get("crop_size", image_size) not in (
        image_size,
        square,
    ):
        raise UserError(
            f"{source}: size={size!r} needs do_center_crop=true and crop_size={image_size}, because the model takes "
            "squares"
        )
    return False


def _triple(values: Any, default: tuple[float, float, float]) -> Any:
    """PreprocessConfig checks the numbers."""
    return tuple(values) if isinstance(values, list) else default if values is None else values
