"""The precision of a run, the same on all ranks and in all steps.

GPUs of sm_80 or newer multiply bf16 in hardware, and so do processors with AMX, AVX512-BF16 or arm64 BF16. Other
processors compute in fp32 and round the results: bf16 takes as long as fp32 there, and is less exact. So
`engine.precision = "auto"` selects bf16 for the former and fp32 for the latter. It never selects fp8.
"""

from __future__ import annotations

import logging
import socket
from typing import Literal

from bclip_fast import distributed
from bclip_fast.errors import UserError
from bclip_fast.hardware import Precision
from bclip_fast.ops.processor import native_precision

from . import float8

log = logging.getLogger(__name__)


def autocast_precision(precision: str) -> str:
    """The precision of everything that fp8 leaves as it is: attention, norms, loss, and a teacher."""
    return "bf16" if precision == "fp8" else precision


def resolve_precision(precision: Precision | Literal["auto"], earlier: Precision | None = None) -> Precision:
    """The precision of all ranks: `precision`, or for "auto" bf16 if every rank's device has it, else fp32.

    Log the choice and its reason. Collective for "auto" and "fp8".

    Args:
        earlier: precision of a resumed run so far, the same on all ranks. "auto" keeps it.

    Raises:
        UserError: fp8, which a rank's device cannot compute, or torchao is missing. On every rank.
    """
    if precision == "auto":
        precision = _automatic(earlier)
    if precision == "fp8":
        reason = float8.refusal(distributed.device())
        answers = distributed.all_gather_object(reason and _on_this_rank() + reason)
        if refused := next(filter(None, answers), None):
            raise UserError(f"engine.precision=fp8 {refused}; or set engine.precision=bf16")
    return precision


def _on_this_rank() -> str:
    return f"on rank {distributed.rank()} ({socket.gethostname()}) " if distributed.world_size() > 1 else ""


def _automatic(earlier: Precision | None) -> Precision:
    native, reason = native_precision(distributed.device())
    answers = distributed.all_gather_object((native, _on_this_rank() + reason))
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
