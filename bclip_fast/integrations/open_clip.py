"""Make open_clip train with our losses by a single call, for users who can't edit its imports.

    from bclip_fast.integrations import open_clip

    open_clip.install()  # before open_clip's create_loss, or its trainer, builds the loss

open_clip's factory looks its loss classes up by name in its own module. `install` replaces only those four names, in
open_clip.loss and in all modules of open_clip's packages that have imported them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

from bclip_fast import loss

_NAMES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")
_PACKAGES = ("open_clip", "open_clip_train")

_originals: dict[str, type] = {}


def install() -> None:
    """Replace open_clip's losses by ours. Further calls replace them in modules imported since.

    Raises:
        ImportError: open_clip is not installed.
    """
    definitions = vars(importlib.import_module("open_clip.loss"))
    if not _originals:
        _originals.update({name: definitions[name] for name in _NAMES})
    for name, original in _originals.items():
        _replace(name, original, getattr(loss, name))


def uninstall() -> None:
    """Restore open_clip's own losses, also in modules imported since. Losses that exist already don't change."""
    for name, original in _originals.items():
        _replace(name, getattr(loss, name), original)
    _originals.clear()


def _replace(name: str, old: type, new: type) -> None:
    for module in _modules():
        # vars instead of getattr: getattr would make lazy modules import the name.
        if vars(module).get(name) is old:
            setattr(module, name, new)


def _modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _PACKAGES and isinstance(module, ModuleType):
            yield module
