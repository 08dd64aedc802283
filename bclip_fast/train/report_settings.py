"""The settings of runs, as rows of the training report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .config import TrainConfig


def settings_rows(settings: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of settings that differ between runs, and the other rows. A single run is compared with the defaults.

    Args:
        settings: the `flat` configuration of each run.
    """
    # A run writes its model section in full, without a preset.
    defaults = {key: _text(value) for key, value in flat(dataclasses.asdict(TrainConfig(preset="")))}
    columns = [{key: _text(value) for key, value in run.items()} for run in settings]
    differing: list[dict[str, Any]] = []
    same: list[dict[str, Any]] = []
    for name in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(name, "") for column in columns]
        differs = values[0] != defaults.get(name, "") if len(columns) == 1 else len(set(values)) > 1 and name != "run"
        (differing if differs else same).append({"name": name, "values": values})
    return differing, same


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a file's table and of the tables in it, by dotted name."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_text(item)}" for key, item in value.items() if item != "")
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)
