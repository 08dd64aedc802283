"""Writing of checkpoints in a background thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from bclip_fast.errors import UserError

log = logging.getLogger(__name__)


class BackgroundWriter:
    """Runs one write at a time, in a thread if `background` is true, else in the caller.

    A write that fails with UserError is logged as a warning. The next success clears it, so a run survives a disk that
    is full for a while.
    """

    def __init__(self, background: bool) -> None:
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Start `write()` after the end of the previous one."""
        self.wait()
        # A daemon thread does not delay the end of the process. A killed write leaves only a partial folder.
        self._thread = threading.Thread(target=self._run, args=(write,), name="bclip-checkpoint", daemon=True)
        self._thread.start()
        if not self._background:
            self.wait()

    def wait(self) -> None:
        """Wait for the end of the current write. Raise its error, unless it is a UserError."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None and not isinstance(self._error, UserError):
            raise self._error

    def finish(self) -> None:
        """Wait for the end of the last write. Raise its error."""
        self.wait()
        if self._error is not None:
            raise self._error

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
            self._error = None
        except UserError as error:
            log.warning("%s; training goes on, and the next checkpoint is written when it is due", error)
            self._error = error
        except Exception as error:
            self._error = error
