"""open_clip trains with our losses after one line, for whoever can't edit its imports.

    from bclip_fast.integrations import open_clip

    open_clip.install()  # before open_clip's create_loss, or its trainer, builds the loss

open_clip's factory looks its loss classes up by name in its own module. Those four names are all that changes: in
open_clip.loss, and wherever in open_clip's packages they have been imported to.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

from .. import loss as ours

_NAMES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")
_PACKAGES = ("open_clip", "open_clip_train")

_originals: dict[str, type] = {}


def install() -> None:
    """Puts our losses in open_clip's place, once however often it is called.

    Raises:
        ImportError: open_clip is not installed.
    """
    definitions = vars(importlib.import_module("open_clip.loss"))
    if not _originals:
        _originals.update({name: definitions[name] for name in _NAMES})
    for name, original in _originals.items():
        _replace(name, original, getattr(ours, name))


def uninstall() -> None:
    """Gives open_clip its own losses back, also in modules imported since; losses already built stay what they are."""
    for name, original in _originals.items():
        _replace(name, getattr(ours, name), original)
    _originals.clear()


def _replace(name: str, old: type, new: type) -> None:
    for module in _modules():
        # vars, not getattr: a module that loads its names when asked must not be asked.
        if vars(module).get(name) is old:
            setattr(module, name, new)


def _modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _PACKAGES and isinstance(module, ModuleType):
            yield module
