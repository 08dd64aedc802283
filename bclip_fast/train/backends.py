"""The backends of a run: all ranks take rank 0's choices, and RUN/backends.json keeps them (run_folder.py writes it).

So a resumed run goes on with the same backends, even if the machine's tuning record has changed.

The file maps each kind of device to a record (ops/record_files.py) that orders the backends of every call. If the first
backend of an order cannot run any more, on another machine or after a reinstallation, the next one does. A warning then
says that the run no longer continues bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bclip_fast import distributed
from bclip_fast.errors import UserError
from bclip_fast.ops import fingerprint, record_files, trials, tuning
from bclip_fast.ops.record_files import Entry, Record

log = logging.getLogger(__name__)

FILE = "backends.json"


@dataclass(frozen=True)
class Choice:
    """The backends of a run.

    content: content of backends.json.
    """

    content: dict[str, Any]

    def in_force(self) -> AbstractContextManager[None]:
        """Context manager in which `auto` takes these backends."""
        return tuning.in_force(from_json(self.content))


def of_run(folder: Path, *, resumed: bool) -> Choice:
    """Rank 0's choices, for all ranks: those of the run's backends.json, or this machine's. Writes nothing. Collective.

    Args:
        folder: folder of backends.json.
        resumed: read backends.json if it exists.

    Raises:
        UserError: on every rank, if the file is damaged.
    """
    return Choice(distributed.run_on_rank0(lambda: _settle(folder, resumed)))


def _settle(folder: Path, resumed: bool) -> dict[str, Any]:
    path = folder / FILE
    if resumed and path.exists():
        recorded = read(path)
        _warn_of_differences(recorded)
        return to_json(recorded)
    if resumed:
        log.warning(
            "%s is missing, so the run goes on with this machine's backends and may not continue bit for bit", path
        )
    return to_json({device.type: current(device) for device in _devices()})


def read(path: Path) -> dict[str, Record]:
    """The records of a file, by kind of device.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it to go on with this machine's backends, but not bit for bit"
        ) from error


def current(device: torch.device) -> Record:
    """The current choices of `auto` on the device, for every call. Check the kernels that are not checked yet."""
    record = tuning.of_device(device.type, device.index or 0)
    entries = {}
    for decision in trials.decisions(device, check=True):
        usable = [name for name in decision.order if name not in decision.refusals]
        entries[decision.key] = Entry(tuple(usable))
    return dataclasses.replace(record, entries={**record.entries, **entries}, checks=dict(record.checks))


def to_json(records: Mapping[str, Record]) -> dict[str, Any]:
    """The content of backends.json."""
    return {kind: record_files.to_json(record) for kind, record in records.items()}


def from_json(data: Mapping[str, Any]) -> dict[str, Record]:
    """The inverse of `to_json`."""
    records = {kind: record_files.from_json(record) for kind, record in data.items()}
    for record in records.values():
        record.origin = "the run's record"
    return records


def _devices() -> list[torch.device]:
    """The device of a rank's computation, and the CPU, which decodes its images."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available() and torch.cuda.device_count():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    return devices


def _warn_of_differences(recorded: Mapping[str, Record]) -> None:
    """Log a warning about calls whose recorded backend cannot run here."""
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
                differing = fingerprint.differences(
                    record.fingerprint, fingerprint.fingerprint(device.type, device.index or 0)
                )
                log.warning(
                    "the run goes on with other backends, so it does not continue bit for bit: %s. "
                    "Differences (the run / this machine): %s",
                    "; ".join(replaced),
                    differing or "none",
                )
