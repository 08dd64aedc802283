"""Tuning records for tests. Use them with the fixture `fresh_records`."""

from __future__ import annotations

from pathlib import Path

import torch

from bclip_fast import ops
from bclip_fast.ops import dispatch, fingerprint, record_files, tuning
from bclip_fast.ops.record_files import Entry, Record

GELU = ("gelu", "float32", "small")


def make_record(*order: str, key=GELU, made="2026-01-01T00:00:00+00:00", **changed: str) -> Record:
    """Return a record with one entry.

    order: backends, fastest first. changed: fields of the fingerprint that differ from this machine's.
    """
    return Record({**fingerprint.fingerprint("cpu"), **changed}, made, {key: Entry(order, {order[0]: 1.0})})


def keep(record: Record) -> Path:
    """Save a record as the one of this machine. Returns its path."""
    path = tuning.path_for(fingerprint.fingerprint("cpu"))
    record_files.save(record, path)
    tuning.reset()
    return path


def gelu_backend(rows: int = 2) -> str:
    """Return the backend that `auto` takes for gelu on (rows, 2)."""
    return dispatch.explain(lambda: ops.gelu(torch.zeros(rows, 2))).chosen


def half_off(x: torch.Tensor) -> torch.Tensor:
    """Return gelu with an error that exceeds the rounding of float32, but not of bfloat16."""
    return torch.nn.functional.gelu(x) + 0.002 * x
