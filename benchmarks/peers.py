"""Other people's implementations, for comparison in tests and benchmarks. The package never imports them.

Their dependencies would replace torch, so install them without:
`pip install --no-deps open_clip_torch timm torchvision==0.28.0` and `pip install ftfy regex transformers`.
On a machine with a GPU, also `pip install --no-deps inf-cl memeff siglip-kernel`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

# The operators of a library exist as long as this object.
_operators: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """Return torchvision, even if its compiled part was built for another torch and cannot be loaded.

    Its transforms are Python code, but its import fails unless the operators that it describes exist.
    Raises ImportError if torchvision is not installed.
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
    """Return open_clip. Raises ImportError if open_clip, timm or transformers is not installed."""
    import_torchvision()
    for name in ("timm", "transformers"):
        importlib.import_module(name)
    return importlib.import_module("open_clip")
