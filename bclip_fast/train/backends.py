"""The backends of a run: rank 0's choices, which all ranks take and RUN/backends.json keeps.

So a resumed run goes on with them, whatever the machine's own record says by then.

The file maps each kind of device to a record (ops/tuning.py) with an order of backends for every call. Where the first
of an order cannot run any more, on another machine or after a reinstallation, the next one does, and a warning says
that the run is no longer bit for bit what it would have been.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from bclip_fast import distributed
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import write_text
from bclip_fast.ops import trials, tuning
from bclip_fast.ops.tuning import Entry, Record

log = logging.getLogger(__name__)

FILE = "backends.json"


def of_run(folder: Path, *, resumed: bool, keep: bool = True) -> AbstractContextManager[None]:
    """All ranks take rank 0's choices inside the block. Collective.

    Args:
        folder: where backends.json is, if `resumed`, or is to be written, if `keep`.

    Raises:
        UserError: on every rank, a file that is damaged, or a folder that takes none.
    """
    return tuning.in_force(from_json(distributed.run_on_rank0(lambda: _settle(folder, resumed, keep))))


def _settle(folder: Path, resumed: bool, keep: bool) -> dict[str, Any]:
    path = folder / FILE
    if resumed and path.exists():
        recorded = read(path)
        _tell_differences(recorded)
        return to_json(recorded)
    data = to_json({device.type: current(device) for device in _devices()})
    if resumed:
        log.warning(
            "%s is missing, so the run goes on with this machine's backends and may not be bit for bit what it would "
            "have been",
            path,
        )
    if not keep:
        return data
    try:
        write_text(path, json.dumps(data, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return data


def read(path: Path) -> dict[str, Record]:
    """The records of a file, by kind of device.

    Raises:
        UserError: it is damaged.
    """
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it to go on with this machine's backends, no longer bit for bit"
        ) from error


def current(device: torch.device) -> Record:
    """What `auto` takes on the device as of now, for every call; kernels that are still to be checked, are."""
    record = tuning.of_device(device.type, device.index or 0)
    found = {}
    for decision in trials.decisions(device, check=True):
        usable = [name for name in decision.order if name not in decision.refusals]
        found[decision.key] = Entry(tuple(usable))
    return dataclasses.replace(record, entries={**record.entries, **found}, checks=dict(record.checks))


def to_json(records: Mapping[str, Record]) -> dict[str, Any]:
    return {kind: tuning.to_json(record) for kind, record in records.items()}


def from_json(data: Mapping[str, Any]) -> dict[str, Record]:
    found = {kind: tuning.from_json(record) for kind, record in data.items()}
    for record in found.values():
        record.origin = "what the run has recorded"
    return found


def _devices() -> list[torch.device]:
    """What a rank computes on, and the CPU, on which it reads pictures."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available() and torch.cuda.device_count():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    return devices


def _tell_differences(recorded: Mapping[str, Record]) -> None:
    """Warns of calls that the recorded backend cannot run here."""
    with tuning.in_force(recorded):
        for device in _devices():
            record = recorded.get(device.type)
            if record is None:
                continue
            replaced = []
            for decision in trials.decisions(device, check=True):
                entry = record.entries.get(decision.key)
                if entry is not None and entry.order and decision.chosen != entry.order[0]:
                    reason = decision.refusals.get(entry.order[0], "not chosen")
                    call = ", ".join(filter(None, decision.key))
                    replaced.append(f"{call}: {decision.chosen} in place of {entry.order[0]} ({reason})")
            if replaced:
                differing = tuning.differences(record.fingerprint, tuning.fingerprint(device.type, device.index or 0))
                log.warning(
                    "the run continues with other backends, so it is no longer bit for bit what it would have been: "
                    "%s. The run / this machine: %s",
                    "; ".join(replaced),
                    differing or "the same",
                )
