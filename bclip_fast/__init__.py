"""Fast BiomedCLIP: contrastive loss, attention, image decoding, pretraining and evaluation."""

from __future__ import annotations

import importlib
from typing import Any

from . import threads as _threads
from .version import __version__

_threads.start_watch()

# These names are resolved on first use. So `import bclip_fast` costs nothing beyond torch and loads no optional
# package.
_PUBLIC = {
    "BiomedClip": "bclip_fast.model.biomedclip",
    "BiomedClipConfig": "bclip_fast.model.biomedclip",
    "ClipLoss": "bclip_fast.loss",
    "CoCaLoss": "bclip_fast.loss",
    "DistillClipLoss": "bclip_fast.loss",
    "SigLipLoss": "bclip_fast.loss",
    "load": "bclip_fast.pretrained",
    "ops": "bclip_fast.ops",
    "save": "bclip_fast.pretrained",
}

# __init__.pyi gives type checkers the same names.
__all__ = [
    "BiomedClip",
    "BiomedClipConfig",
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "SigLipLoss",
    "__version__",
    "load",
    "ops",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bclip_fast' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    value = module if name == "ops" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
