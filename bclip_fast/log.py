"""Logging set-up; called by the command line only, so that the library never touches a user's loggers."""

from __future__ import annotations

import logging
import os
import sys


def configure(level: str | None = None, *, main_rank: bool = True) -> None:
    """Sends the package's log to stderr: INFO on the main rank, WARNING on the others, unless `level` says more."""
    logger = logging.getLogger("bclip_fast")
    handler = logging.StreamHandler(sys.stderr)
    where = "" if main_rank else f" [rank {rank()}]"
    handler.setFormatter(logging.Formatter(f"%(asctime)s{where} %(levelname).1s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level or ("INFO" if main_rank else "WARNING"))
    logger.propagate = False


def rank() -> str:
    """What the launcher says, before there is a group: torchrun, deepspeed or srun."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
