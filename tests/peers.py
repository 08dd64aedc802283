"""Other people's implementations that tests compare against; a test is skipped, with the reason, without them.

They are installed without their dependencies, since theirs would replace torch:
`pip install --no-deps open_clip_torch timm torchvision==<the release for this torch>` and
`pip install ftfy regex transformers`. The project itself never imports any of them.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

# A library's operators live as long as this object.
_operators: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """torchvision's Python code, also where its compiled part is for another build of torch and doesn't load.

    Its transforms need nothing compiled, but the package refuses to be imported without the operators it describes.
    """
    try:
        return pytest.importorskip("torchvision", reason="the peer torchvision is not installed")
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
    """open_clip with timm and transformers behind it."""
    import_torchvision()
    for name in ("timm", "transformers"):
        pytest.importorskip(name, reason=f"the peer {name} is not installed")
    return pytest.importorskip("open_clip", reason="the peer open_clip is not installed")
