"""The precision that `engine.precision = "auto"` stands for, the same on all ranks and in all steps of a run.

bf16 is multiplied in hardware by GPUs of sm_80 or newer and by processors with AMX, AVX512-BF16 or arm64 BF16. Other
processors compute it in fp32 and round the results, which takes as long as fp32 and is less exact.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any, Literal

from bclip_fast import config as config_files
from bclip_fast import distributed
from bclip_fast.hardware import Precision
from bclip_fast.ops.processor import native_precision

log = logging.getLogger(__name__)


def resolve(asked: Precision | Literal["auto"], run: Path | None = None) -> Precision:
    """The precision of all ranks: the one asked for, or for "auto" bf16 if every rank's device has it, else fp32.

    Collective for "auto"; all ranks take rank 0's word. Logs the choice and its reason.

    Args:
        run: folder of a run that continues. "auto" keeps that run's precision; another one that is asked for is a
            warning, as the run then doesn't continue exactly.

    Raises:
        UserError: the run's config.toml can't be read.
    """
    earlier = None if run is None else _precision_of(run)
    if asked != "auto":
        if earlier not in (None, asked) and distributed.is_main():
            log.warning("engine.precision is %s, but %s was computed in %s so far", asked, run, earlier)
        return asked
    native, reason = native_precision(distributed.device())
    where = f"on rank {distributed.rank()} ({socket.gethostname()}) " if distributed.world_size() > 1 else ""
    answers = distributed.all_gather_object((native, where + reason, earlier))
    # One rank without bf16 would hold up all others.
    native, reason, _ = next((answer for answer in answers if answer[0] == "fp32"), answers[0])
    chosen: Any = answers[0][2] or native
    if distributed.is_main():
        if chosen == native:
            log.info("engine.precision auto: %s, because %s", native, reason)
        else:
            log.info(
                "engine.precision auto: %s, as in %s so far; a new run here takes %s, because %s",
                chosen, run, native, reason,
            )  # fmt: skip
    return chosen


def _precision_of(run: Path) -> str | None:
    """What the run in this folder computes in, by its config.toml; None where that doesn't say it."""
    path = run / "config.toml"
    found = config_files.read_toml(path).get("engine", {}).get("precision") if path.is_file() else None
    return found if found in ("fp32", "bf16", "fp16") else None
