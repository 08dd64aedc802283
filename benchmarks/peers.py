"""Other people's implementations that tests and benchmarks compare with. The project itself never imports any of them.

They are installed without their dependencies, since theirs would replace torch:
`pip install --no-deps open_clip_torch timm torchvision==0.28.0` and `pip install ftfy regex transformers`; on a machine
with a GPU also `pip install --no-deps inf-cl memeff siglip-kernel`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

# A library's operators live as long as this object.
_operators: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """torchvision's Python code, also where its compiled part is for another build of torch and doesn't load.

    Its transforms need nothing compiled, but the package refuses to be imported without the operators it describes.
    Raises ImportError where it isn't installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    global _operators
    _operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


def import_open_clip() -> ModuleType:
    """open_clip with timm and transformers behind it. Raises ImportError where one of them isn't installed."""
    import_torchvision()
    for name in ("timm", "transformers"):
        importlib.import_module(name)
    return importlib.import_module("open_clip")
