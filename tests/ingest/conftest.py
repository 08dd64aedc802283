from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from bclip_fast.ingest import object_store

if TYPE_CHECKING:
    from bucket import Bucket


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket on loopback. Waits between attempts are a hundredth of the usual ones, except for Retry-After."""
    from bucket import Bucket

    sleep = time.sleep
    monkeypatch.setattr(object_store.time, "sleep", lambda seconds: sleep(seconds if seconds > 0.9 else seconds / 100))
    monkeypatch.setattr(object_store, "_MAX_WAIT_SECONDS", 0.9)
    server = Bucket()
    yield server
    server.close()
