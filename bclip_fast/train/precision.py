"""The precision for `engine.precision = "auto"`, the same on all ranks and in all steps of a run.

GPUs of sm_80 or newer multiply bf16 in hardware, and so do processors with AMX, AVX512-BF16 or arm64 BF16. Other
processors compute in fp32 and round the results: bf16 takes as long as fp32 there, and is less exact.
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


def resolve_precision(precision: Precision | Literal["auto"], run: Path | None = None) -> Precision:
    """The precision of all ranks: `precision`, or for "auto" bf16 if every rank's device has it, else fp32.

    Log the choice and its reason. Collective for "auto".

    Args:
        run: folder of a resumed run. "auto" keeps its precision. Another precision logs a warning, because the run then
            does not continue exactly.

    Raises:
        UserError: the run's config.toml cannot be read.
    """
    earlier = None if run is None else _precision_of(run)
    if precision != "auto":
        if earlier not in (None, precision) and distributed.is_main():
            log.warning("engine.precision is %s, but %s was computed in %s so far", precision, run, earlier)
        return precision
    native, reason = native_precision(distributed.device())
    prefix = f"on rank {distributed.rank()} ({socket.gethostname()}) " if distributed.world_size() > 1 else ""
    answers = distributed.all_gather_object((native, prefix + reason, earlier))
    # All ranks would wait for a single rank without bf16.
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
    """The precision in the run's config.toml. None if the file is missing or holds no precision."""
    path = run / "config.toml"
    precision = config_files.read_toml(path).get("engine", {}).get("precision") if path.is_file() else None
    return precision if precision in ("fp32", "bf16", "fp16") else None
