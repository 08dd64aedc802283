"""Logging set-up; called by the command line only, so that the library never touches a user's loggers."""

from __future__ import annotations

import logging
import os
import sys


def configure(level: str | None = None, *, main_rank: bool = True) -> None:
    """Sends the package's log to stderr: INFO on the main rank, WARNING on the others, unless `level` says more."""
    logger = logging.getLogger("bclip_fast")
    handler = logging.StreamHandler(sys.stderr)
    rank = "" if main_rank else f" [rank {os.environ.get('RANK', '?')}]"
    handler.setFormatter(logging.Formatter(f"%(asctime)s{rank} %(levelname).1s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level or ("INFO" if main_rank else "WARNING"))
    logger.propagate = False
