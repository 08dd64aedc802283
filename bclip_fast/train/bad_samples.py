"""Agreement of the ranks before each step: they count the damaged samples, and the failure of one stops all."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from bclip_fast import distributed
from bclip_fast.data.batch import BadRecord
from bclip_fast.errors import UserError
from bclip_fast.io.jsonl import JsonLinesWriter, read_lines, truncate_after_step

log = logging.getLogger(__name__)

NAME = "bad_samples.jsonl"
_NUM_SHOWN = 20
# Weight of a stop in the sum of `agree`: larger than the number of damaged samples of all ranks in a step.
_STOP = 1 << 40


class BadSamples:
    """RUN/bad_samples.jsonl: one line for each damaged sample in each batch of the training.

    A line has the keys step, rank, epoch, position, index, key, shard and reason. The lines follow the order of
    training, not that of prefetching. So a resumed run ends with the same file as an uninterrupted one. Build it on
    every rank.

    Args:
        folder: run folder.
        first_step: step after which the run continues. Lines of later steps are removed.
        limit: largest number of different damaged samples, over all ranks and steps.
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
        """Number of different damaged samples, over all ranks."""
        return len(self._bad)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def agree(self, step: int, bad: list[BadRecord], problem: str | None, stop: bool = False) -> bool:
        """Report this rank's state before a step to all ranks. Collective. Without news, it sends one number.

        Args:
            bad: damaged samples of this rank's batch.
            problem: error of this rank, if it has no batch.
            stop: whether a signal asked this rank to stop.

        Returns:
            Whether any rank was asked to stop. Then nothing is recorded, and the step must not be made.

        Raises:
            UserError: on every rank, if any rank has a problem, or if too many samples are damaged.
        """
        num_stops, num_reports = divmod(distributed.total(stop * _STOP + len(bad) + (problem is not None)), _STOP)
        if num_stops or not num_reports:
            return num_stops > 0
        rank = distributed.rank()
        local_records = [{"step": step, "rank": rank, **dataclasses.asdict(record)} for record in bad]
        gathered = distributed.all_gather_object((problem, local_records))
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
                f"{len(self._bad)} samples are damaged, more than data.max_bad_samples={self._limit}: {shown} "
                f"({self._path} lists all)"
            )
        return False


def _describe(record: dict[str, Any]) -> str:
    return f"sample {record['key']} (index {record['index']}) of {record['shard']}: {record['reason']}"
