"""Peers for tests. A test without its peer is skipped with the reason."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from bclip_fast.benchmarks import peers


def import_torchvision() -> ModuleType:
    return _or_skip(peers.import_torchvision)


def import_open_clip() -> ModuleType:
    return _or_skip(peers.import_open_clip)


def _or_skip(import_peer: Callable[[], ModuleType]) -> ModuleType:
    try:
        return import_peer()
    except ImportError as error:
        pytest.skip(f"the peer {error.name} is not installed")
