"""Tests of help, completion, and of the fields that both read from the source."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from bclip_fast import cli, command_fields
from bclip_fast.command_help import command_help
from bclip_fast.completion import candidates

SCREEN, WIDTH = 50, 80
CONFIGS = {name: command.config for name, command in cli.COMMANDS.items()}
TOPICS = [(name, topic) for name in CONFIGS for topic in ["", *command_fields.sections(CONFIGS[name])]]


def _help(name: str, topic: str = "") -> str:
    return command_help(name, cli.COMMANDS[name].summary, CONFIGS[name], topic)


def _fields_of(configuration: type, prefix: str = "", instance: object = None) -> dict[str, object]:
    """The fields of a configuration and of its sections, with the defaults of the running program."""
    found: dict[str, object] = {}
    hints = typing.get_type_hints(configuration)
    for field in dataclasses.fields(configuration):  # type: ignore[arg-type]
        if not field.init:
            continue
        default = field.default
        if instance is not None:
            default = getattr(instance, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(hints[field.name]):
            found |= _fields_of(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.", default)
        else:
            found[prefix + field.name] = default
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_from_the_source_have_the_defaults_of_the_dataclass_and_a_meaning(name: str) -> None:
    module, class_name = CONFIGS[name].split(":")
    expected = _fields_of(getattr(importlib.import_module(module), class_name))
    fields = {field.name: field for field in command_fields.fields(CONFIGS[name])}
    assert sorted(fields) == sorted(expected)
    assert [field.name for field in fields.values() if not field.meaning] == [], "write a docstring below the field"
    for field in fields.values():
        default = expected[field.name]
        if default is dataclasses.MISSING:
            assert field.default == ""
        elif isinstance(default, bool | int | float | str | tuple | None):
            assert _value(field.default) == default, field.name


def _value(written: str) -> object:
    return eval(written, {"math": math, "__builtins__": {}}) if "math" in written else ast.literal_eval(written)


@pytest.mark.parametrize(("name", "topic"), TOPICS)
def test_help_of_a_section_fits_on_a_screen(name: str, topic: str) -> None:
    lines = _help(name, topic).splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_help_is_80_columns_wide_and_names_every_flag(name: str) -> None:
    text = _help(name, "all")
    assert max(map(len, text.splitlines())) <= WIDTH
    for field in command_fields.fields(CONFIGS[name]):
        assert (field.flags[-1] if field.flags else field.name.upper()) in text


def test_list_of_commands_is_80_columns_wide() -> None:
    assert max(map(len, cli._usage().splitlines())) <= WIDTH


def test_help_of_a_flag_has_its_choices_and_its_default() -> None:
    text = _help("train", "--data.loader")
    assert "native|dali" in text and "(default: native)" in text and "The same batches" not in text.partition("\n")[0]


def test_help_and_the_first_line_of_doctor_come_before_torch_is_imported(tmp_path: Path) -> None:
    code = "import sys; from bclip_fast import cli; cli.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for arguments in (["train", "--help"], ["--help"], ["__complete", "train", "--data."]):
        assert subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL).returncode == 0
    # Without torch, only what precedes its import is printed.
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    command, environment = (
        [sys.executable, "-m", "bclip_fast.cli", "doctor"],
        {**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    printed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert printed.returncode == 7
    assert printed.stdout.startswith("bclip_fast ") and "torch 2" in printed.stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["trai"], ["train"]),
        (["ingest", ""], ["build", "check", "fetch", "label", "report", "verify"]),
        (["train", "--data.loader", ""], ["native", "dali"]),
        (["train", "--data.loa"], ["--data.loader"]),
        (["train", "--data.no_aug"], ["--data.no_augment"]),
        (["plan", "pmc"], ["pmc_small.toml"]),
        (["eval", "run", "--task", "pca"], ["pcam", "pcam_probe"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["train", "--help", "optim.layer"], ["optim.layer_decay"]),
        (["train", "--run", ""], []),
        (["nothing", "x"], []),
    ],
)
def test_completion_offers_what_can_follow(words: list[str], found: list[str]) -> None:
    assert candidates(words, CONFIGS) == found


def test_bash_completes_a_flag_with_the_printed_script() -> None:
    script = subprocess.run(
        [sys.executable, "-m", "bclip_fast.cli", "completion", "bash"], capture_output=True, text=True
    )
    code = f"""bclip() {{ {sys.executable} -m bclip_fast.cli "$@"; }}
{script.stdout}
COMP_WORDS=(bclip train --data.loa); COMP_CWORD=2; _bclip; echo "${{COMPREPLY[@]}}"
COMP_WORDS=(bclip ev); COMP_CWORD=1; _bclip; echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["--data.loader", "eval"], done.stderr


@pytest.mark.parametrize("args", [["completion", "fish"], ["--help"], ["__complete", ""]], ids=" ".join)
def test_output_into_a_closed_pipe_ends_without_a_traceback(args: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    unbuffered = [sys.executable, "-u", "-m", "bclip_fast.cli", *args]
    done = subprocess.run(unbuffered, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert b"Traceback" not in done.stderr


def test_topic_of_help_after_an_equals_sign_is_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bclip_fast.cli", "train", "--help=loss"], capture_output=True, text=True
    )
    assert done.stdout.startswith("loss: The contrastive loss."), done.stderr


def test_doctor_prints_json() -> None:
    done = subprocess.run([sys.executable, "-m", "bclip_fast.cli", "doctor", "--json"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["backends"].keys() >= {"cpu", "reference"}
    assert {"clip_loss", "linear"} <= {row["operator"] for row in report["devices"]["cpu"]["operators"]}
