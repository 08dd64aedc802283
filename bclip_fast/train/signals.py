"""What a run does when it is told to stop: it finishes the step, writes a checkpoint and exits with EXIT_STOPPED."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

EXIT_STOPPED = 75
"""sysexits.h's EX_TEMPFAIL: stopped by a signal with a checkpoint written; the same command goes on."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """Takes note of SIGTERM, SIGUSR1 and the first SIGINT, with which schedulers, launchers and people stop a run.

    A second SIGINT is a KeyboardInterrupt at once. A context manager, which gives the former handlers back; outside
    the main thread, where Python lets nobody set any, it takes note of nothing.
    """

    def __init__(self) -> None:
        self.received: str = ""
        """The name of the first that came, empty before."""
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name
