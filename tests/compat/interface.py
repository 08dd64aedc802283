"""Everything of commands, configurations and files that a user can see or type, as JSON.

    python tests/compat/interface.py

rewrites `interface.json`. Do that after an intended change only, and name the change in CHANGELOG.md. Help texts and
the names of classes and modules don't count.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bclip_fast.cli import COMMANDS, main

HERE = Path(__file__).parent
RECORD = HERE / "interface.json"

# Keys that exist on some machines only.
_OPTIONAL_KEYS = ("mfu", "communication_seconds", "cuda")
# Objects whose keys are the versions, libraries or backends of a machine.
_OPEN_OBJECTS = ("environment", "fingerprint", "ms")


def commands() -> dict[str, Any]:
    return {name: _arguments(name) for name in COMMANDS}


def configurations() -> dict[str, Any]:
    return {name: _fields(_configuration(name)) for name in COMMANDS}


def differences(recorded: Any, current: Any, place: str = "") -> list[str]:
    """One line for each value that was removed, added or changed."""
    if not (isinstance(recorded, dict) and isinstance(current, dict)):
        return [] if recorded == current else [f"{place}: {json.dumps(recorded)} is now {json.dumps(current)}"]
    lines = []
    for key in dict.fromkeys([*recorded, *current]):
        inner = f"{place} > {key}" if place else key
        if key not in current:
            lines.append(f"{inner}: is gone")
        elif key not in recorded:
            lines.append(f"{inner}: is new")
        else:
            lines += differences(recorded[key], current[key], inner)
    return lines


# Commands and configurations


def _configuration(command: str) -> type:
    module, name = COMMANDS[command].config.split(":")
    return getattr(importlib.import_module(module), name)


def _arguments(command: str) -> dict[str, Any]:
    import tyro

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(_configuration(command), prog="bclip", use_underscores=True)
    return _options(parser)


def _options(parser: Any) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for action in parser._actions:
        if hasattr(action.choices, "items"):  # subcommands
            described |= {f"{action.dest} {name}": _options(inner) for name, inner in action.choices.items()}
        elif "--help" not in action.option_strings:
            words = [*action.option_strings] or ["positional"]
            words.append("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.metavar or "")
            words.append("" if action.nargs in (0, 1) else f"number of values: {action.nargs}")
            words.append("required" if action.required else "")
            described[action.dest or str(action.metavar)] = " ".join(filter(None, words))
    return described


def _fields(configuration: type, instance: Any = None) -> dict[str, Any]:
    """Type and default of each field, or the fields of a section. `instance` is the default of the section."""
    hints = typing.get_type_hints(configuration, include_extras=True)
    described: dict[str, Any] = {}
    for field in dataclasses.fields(configuration):
        hint, default = _plain(hints[field.name]), field.default
        if instance is not None:
            default = getattr(instance, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(hint):
            described[field.name] = _fields(typing.cast(type, hint), default)
        else:
            shown = "REQUIRED" if default is dataclasses.MISSING else json.dumps(_value(default))
            described[field.name] = f"{_type(hint)} = {shown}"
    return described


def _plain(hint: Any) -> Any:
    return _plain(hint.__origin__) if hasattr(hint, "__metadata__") else hint


def _type(hint: Any) -> str:
    hint = _plain(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type, arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type, arguments))}]"
    return {Ellipsis: "...", type(None): "None"}.get(hint) or getattr(hint, "__name__", str(hint))


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_value(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


# Files

_TRAIN = (
    *("train", "train.toml", "--max_steps", "2", "--checkpoint.every_steps", "1", "--validation.every_steps", "1"),
    *("--ema_decay", "0.5"),
)
_FINETUNE = (
    *("finetune", "train_ddp", "--batch_size", "8", "--epochs", "1", "--engine.precision", "fp32"),
    *("--num_workers", "1"),
)
_EVAL = ("--label", "colour", "--share", "1.0", "--num_seeds", "1", "--split", "test", "--no_progress")
_RUNS = (
    (0, ("ingest", "build", "articles", "-o", "ingest", "--workers", "1", "--val_fraction", "0.2")),
    (0, (*_TRAIN, "--run", "run")),
    (2, ("train", "train.toml", "--run", "given_up", "--spikes.window", "2", "--spikes.grad_norm", "1e-9",
         "--spikes.max_skipped", "1", "--max_steps", "40")),
    (0, (*_FINETUNE, "--data", "tables/pairs.csv", "--run", "pairs")),
    (0, (*_FINETUNE, "--data", "tables/questions.csv", "--task", "vqa", "--head_layers", "1", "--run", "answers")),
    (0, ("export", "run", "--out", "exported")),
    (0, ("export", "run", "--out", "exported_hf", "--to", "transformers")),
    (0, ("train", "report", "run")),
    (0, ("eval", "run", "--data", "tables/pairs.csv", "--task", "retrieval", "--task", "zero_shot", "--task", "probe",
         *_EVAL, "--out", "evaluated", "--cache", "embeddings")),
    (0, ("eval", "answers", "--data", "tables/questions.csv", "--task", "vqa", "--split", "train", "--no_progress",
         "--out", "evaluated_answers", "--cache", "none")),
    (0, ("eval", "compare", "evaluated", "evaluated", "--out", "compared")),
    (0, ("embed", "run", "--data", "tables/pairs.csv", "--split", "test", "--out", "index", "--no_progress")),
    (0, ("tune", "--device", "cpu", "--operators", "gelu", "--seconds", "0.01", "--out", "tuning.json")),
)  # fmt: skip


def files(folder: Path) -> dict[str, Any]:
    """The files that the commands leave in `folder`, by path: keys and types, columns, tensors."""
    inputs = ("articles", "shards", "tables", "train_ddp", "train.toml")
    for name in inputs:
        copy = shutil.copytree if (HERE / "written" / name).is_dir() else shutil.copy
        copy(HERE / "written" / name, folder / name)
    before = os.getcwd()
    os.chdir(folder)
    try:
        for status, arguments in _RUNS:
            if main(arguments) != status:
                raise RuntimeError(f"bclip {' '.join(arguments)} didn't end with {status}")
        paths = sorted(path for path in Path().rglob("*") if path.is_file() and path.parts[0] not in inputs)
        described: dict[str, Any] = {}
        first: dict[str, str] = {}
        for path in paths:
            name = re.sub(r"[0-9a-f]{64}", "HASH", re.sub(r"events\.out\..*", "EVENTS", str(path)))
            content = _file(path)
            key = json.dumps(content)
            described[name] = f"as {first[key]}" if isinstance(content, dict) and key in first else content
            first.setdefault(key, name)
        return described
    finally:
        os.chdir(before)


def _file(path: Path) -> Any:
    if path.suffix == ".json":
        return _shape(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".jsonl":
        return _merged(_shape(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return ",".join(next(csv.reader(file)))
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return {field.name: str(field.type) for field in pq.read_schema(path)}
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in sorted(slices.items())}
    if path.suffix == ".toml":
        return _shape(_read_toml(path))
    if path.name.startswith("events.out."):
        return "tfevents"  # The name ends with a count of the process's writers, which depends on the tests before.
    return path.suffix.removeprefix(".")


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))


def _shape(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        if key in _OPEN_OBJECTS:
            return "object"
        # A vocabulary has its tokens as keys.
        if key == "vocab":
            return _merged(map(_shape, value.values()))
        return {name: _shape(item, name) for name, item in sorted(value.items()) if name not in _OPTIONAL_KEYS}
    if isinstance(value, list):
        merged = _merged(map(_shape, value))
        return {"items": merged} if isinstance(merged, dict) else f"list of {merged}"
    if isinstance(value, bool) or value is None:
        return {True: "boolean", False: "boolean", None: "null"}[value]
    return "number" if isinstance(value, int | float) else "string"


def _merged(shapes: Iterable[Any]) -> Any:
    """One shape for several values: all their keys, and all their types."""
    unique = list({json.dumps(shape): shape for shape in shapes}.values())
    if unique and all(isinstance(shape, dict) for shape in unique):
        keys = sorted({key for shape in unique for key in shape})
        return {key: _merged(shape[key] for shape in unique if key in shape) for key in keys}
    if len(unique) == 1:
        return unique[0]
    return " | ".join(sorted(shape if isinstance(shape, str) else json.dumps(shape) for shape in unique)) or "nothing"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        record = {"commands": commands(), "configurations": configurations(), "files": files(Path(scratch))}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
