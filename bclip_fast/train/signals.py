"""Signals that stop a run. It finishes the step, writes a checkpoint and exits with EXIT_STOPPED."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

EXIT_STOPPED = 75
"""Exit status (EX_TEMPFAIL of sysexits.h): a signal stopped the run after a checkpoint. Run it again to continue."""

# Windows has no SIGUSR1.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class Signals:
    """Context manager that records SIGTERM, SIGUSR1 and the first SIGINT. At its end it restores the former handlers.

    Schedulers, launchers and people stop a run with these signals. A second SIGINT raises KeyboardInterrupt at once.
    Outside the main thread, Python allows no handlers, so nothing is recorded.
    """

    def __init__(self) -> None:
        self.received: str = ""
        """Name of the first signal. Empty before it."""
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._record) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name
