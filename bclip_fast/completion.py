"""`bclip completion SHELL`: a script with which a shell completes commands, flags and values of `bclip`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from . import command_fields

# A word with a dot, = or a dash is one word for bclip, but several for readline. So bash and zsh get whole words here.
_BASH = """\
_bclip() {
    local IFS=$'\\n' word=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=($(compgen -W "$(bclip __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)" -- "$word"))
}
complete -o default -F _bclip bclip
"""
_SCRIPTS = {
    "bash": _BASH,
    "zsh": "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + _BASH,
    "fish": """\
function __bclip
    set -l words (commandline -opc) (commandline -ct)
    bclip __complete $words[2..-1] 2>/dev/null
end
complete -c bclip -a '(__bclip)'
""",
}


@dataclass(frozen=True)
class CompletionConfig:
    """Print a script for a shell's start-up file, such as `bclip completion bash >> ~/.bashrc`."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell. zsh runs bash's script."""


def run(config: CompletionConfig) -> None:
    """Print the script."""
    print(_SCRIPTS[config.shell], end="")


def candidates(words: Sequence[str], configs: Mapping[str, str]) -> list[str]:
    """Return the words that can stand in place of the last one. None for a file, which the shell completes itself.

    Args:
        words: the words after `bclip`, up to the one to complete, which may be empty.
        configs: the configuration's class of each command, "module:Class".
    """
    *before, current = words or [""]
    # Long names first, because `eval compare` begins with the name of a command.
    name = next((name for name in configs if before[: len(name.split())] == name.split()), None)
    rests = {tuple(other.split()[len(before) :]) for other in configs if other.split()[: len(before)] == before}
    found = [rest[0] for rest in sorted(rests) if rest]
    if name is None:
        return _starting_with(current, [*found, "--help", "--version"] if not before else found)
    fields = command_fields.fields(configs[name])
    flags = {flag: field for field in fields for flag in field.flags}
    last = before[-1] if len(before) > len(name.split()) else ""
    if last in ("--help", "-h"):
        return _starting_with(current, ["all", *command_fields.sections(configs[name]), *(f.name for f in fields)])
    if last in flags and flags[last].type != "bool":
        return _starting_with(current, _values(last, flags[last].choices))
    if not current.startswith("-"):
        positional = [choice for field in fields if not field.flags for choice in field.choices]
        return _starting_with(current, [*found, *positional, *_configurations(configs[name])])
    negations = [
        f"--{section}{dot}no_{field}"
        for each in fields
        if each.type == "bool"
        for section, dot, field in [each.name.rpartition(".")]
    ]
    return _starting_with(current, [*flags, *negations, "--help"])


def _starting_with(current: str, names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name.startswith(current)))


def _values(flag: str, choices: Sequence[str]) -> Sequence[str]:
    if flag == "--task":
        return [path.stem for path in sorted((Path(__file__).parent / "eval/tasks").glob("*.toml"))]
    return choices


def _configurations(config: str) -> list[str]:
    """Return the package's TOML files, for the commands that take them."""
    if not config.endswith((":TrainConfig", ":PlanCommand")):
        return []
    return [path.name for path in sorted((Path(__file__).parent / "configs").glob("*.toml"))]
