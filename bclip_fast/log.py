"""Logging setup. Only the command line calls it, so the library never changes a user's loggers."""

from __future__ import annotations

import logging
import os
import sys


def configure(level: str | None = None, *, main_rank: bool = True) -> None:
    """Send the package's log to stderr, at `level`. Default: INFO on the main rank, WARNING on the others."""
    logger = logging.getLogger("bclip_fast")
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if main_rank else f" [rank {rank()}]"
    handler.setFormatter(logging.Formatter(f"%(asctime)s{prefix} %(levelname).1s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level or ("INFO" if main_rank else "WARNING"))
    logger.propagate = False


def rank() -> str:
    """The rank that torchrun, deepspeed or srun assigned. It is known before the process group exists."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
