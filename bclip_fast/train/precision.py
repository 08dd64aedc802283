"""The precision for `engine.precision = "auto"`, the same on all ranks and in all steps of a run.

GPUs of sm_80 or newer multiply bf16 in hardware, and so do processors with AMX, AVX512-BF16 or arm64 BF16. Other
processors compute in fp32 and round the results: bf16 takes as long as fp32 there, and is less exact.
"""

from __future__ import annotations

import logging
import socket
from typing import Literal

from bclip_fast import distributed
from bclip_fast.hardware import Precision
from bclip_fast.ops.processor import native_precision

log = logging.getLogger(__name__)


def resolve_precision(precision: Precision | Literal["auto"], earlier: Precision | None = None) -> Precision:
    """The precision of all ranks: `precision`, or for "auto" bf16 if every rank's device has it, else fp32.

    Log the choice and its reason. Collective for "auto".

    Args:
        earlier: precision of a resumed run so far, the same on all ranks. "auto" keeps it.
    """
    if precision != "auto":
        return precision
    native, reason = native_precision(distributed.device())
    prefix = f"on rank {distributed.rank()} ({socket.gethostname()}) " if distributed.world_size() > 1 else ""
    answers = distributed.all_gather_object((native, prefix + reason))
    # All ranks would wait for a single rank without bf16.
    native, reason = next((answer for answer in answers if answer[0] == "fp32"), answers[0])
    chosen = earlier or native
    if distributed.is_main():
        if chosen == native:
            log.info("engine.precision auto: %s, because %s", native, reason)
        else:
            log.info(
                "engine.precision auto: %s, as in the run so far; a new run here takes %s, because %s",
                chosen, native, reason,
            )  # fmt: skip
    return chosen
