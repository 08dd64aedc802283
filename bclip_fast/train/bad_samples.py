"""What the ranks agree on about their data before each step: damaged samples are counted, a failure stops them all."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from bclip_fast import distributed
from bclip_fast.data.loader import BadRecord
from bclip_fast.errors import UserError
from bclip_fast.io.jsonl import JsonLinesWriter, read_lines, truncate_after_step

log = logging.getLogger(__name__)

NAME = "bad_samples.jsonl"
_NUM_SHOWN = 20
# More than the damaged samples that all ranks can meet in a step.
_STOP = 1 << 40


class BadSamples:
    """RUN/bad_samples.jsonl: a line for each time that a damaged sample was met in a batch that was trained on.

    Keys of a line: step, rank, epoch, position, index, key, shard, reason. Lines are in the order of training, whatever
    was prefetched, and lines of later steps than `first_step` are removed, so a resumed run's file becomes that of an
    uninterrupted one. Made on every rank at once.

    Args:
        folder: the run folder.
        limit: different samples, over all ranks and steps, that may be damaged.
    """

    def __init__(self, folder: Path, first_step: int, limit: int) -> None:
        self._path = folder / NAME
        self._lines = JsonLinesWriter(self._path)
        self._limit = limit
        records: list[dict[str, Any]] = []
        if distributed.is_main():
            truncate_after_step(self._path, first_step)
            if self._path.is_file():
                records = read_lines(self._path)
        self._bad = {record["index"]: _describe(record) for record in distributed.broadcast_object(records)}

    @property
    def num_bad(self) -> int:
        """Different samples, over all ranks."""
        return len(self._bad)

    def close(self) -> None:
        self._lines.close()

    def agree(self, step: int, found: list[BadRecord], problem: str | None, stop: bool = False) -> bool:
        """Tells all ranks what this one met in the batch of a step, and whether it was told to stop.

        Collective: one number travels if there is nothing to tell.

        Returns:
            Whether a rank was told to stop; the step is then not to be made, and nothing of it is noted.

        Raises:
            UserError: on every rank, where a rank has a `problem` instead of a batch, or too many samples are damaged.
        """
        num_stops, num_found = divmod(distributed.total(stop * _STOP + len(found) + (problem is not None)), _STOP)
        if num_stops or not num_found:
            return num_stops > 0
        rank = distributed.rank()
        own = [{"step": step, "rank": rank, **dataclasses.asdict(record)} for record in found]
        gathered = distributed.all_gather_object((problem, own))
        records = sorted((line for _, lines in gathered for line in lines), key=lambda line: line["position"])
        if distributed.is_main() and records:
            for record in records:
                self._lines.write(record)
                log.warning("step %d: replaced %s", step, _describe(record))
        self._bad.update((record["index"], _describe(record)) for record in records)
        problems = [f"rank {number}: {text}" for number, (text, _) in enumerate(gathered) if text is not None]
        if problems:
            raise UserError("; ".join(problems) if distributed.world_size() > 1 else problems[0].partition(": ")[2])
        if len(self._bad) > self._limit:
            shown = "; ".join(list(self._bad.values())[:_NUM_SHOWN])
            raise UserError(
                f"{len(self._bad)} samples are damaged, data.max_bad_samples is {self._limit}: {shown} "
                f"({self._path} lists all)"
            )
        return False


def _describe(record: dict[str, Any]) -> str:
    return f"sample {record['key']} (index {record['index']}) of {record['shard']}: {record['reason']}"
