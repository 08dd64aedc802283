"""The pages of the reference: a page for each command, configurations, tasks, and the Python interface."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from typing import Any

import griffe

from bclip_fast import command_fields
from bclip_fast.cli import COMMANDS
from bclip_fast.command_fields import Field
from bclip_fast.command_help import usage

from . import source
from .markdown import directive, from_docstring, table
from .results import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The public interface in Python: a page's sections, and the objects in them.
PYTHON = {
    "Losses": """
        bclip_fast:ClipLoss bclip_fast:SigLipLoss bclip_fast:CoCaLoss bclip_fast:DistillClipLoss
        bclip_fast.loss:CollectiveError""",
    "Models": """
        bclip_fast:load bclip_fast:save bclip_fast.pretrained:save_transformers
        bclip_fast:BiomedClip bclip_fast:BiomedClipConfig bclip_fast.model.presets:preset
        bclip_fast.model.tokenizer:Tokenizer
        bclip_fast.data.transform:Preprocess bclip_fast.data.transform:PreprocessConfig""",
    "Training": "bclip_fast.train.trainer:train bclip_fast.train.finetune:finetune",
    "Evaluation and search": """
        bclip_fast.eval:evaluate bclip_fast.search.index:embed
        bclip_fast.search.searcher:OpenConfig bclip_fast.search.searcher:Searcher""",
    "In other libraries": """
        bclip_fast.integrations.open_clip:install bclip_fast.integrations.open_clip:uninstall
        bclip_fast.integrations.transformers:install bclip_fast.integrations.transformers:uninstall
        bclip_fast.integrations.sentence_transformers:MultipleNegativesRankingLoss
        bclip_fast.integrations.sentence_transformers:multiple_negatives_ranking_loss""",
    "Errors": "bclip_fast.errors:UserError bclip_fast.errors:BackendError",
}
# Modules whose docstrings describe the files that they write.
FORMATS = {
    "Run folder": "bclip_fast.train.run_folder",
    "Checkpoints": "bclip_fast.train.checkpoint",
    "Shards": "bclip_fast.data.shards.format",
    "Index of images": "bclip_fast.search.index",
}


def pages() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each page."""
    for name in COMMANDS:
        yield f"reference/commands/{slug(name)}.md", command_page(name)
    yield "reference/commands.md", commands_page()
    yield "reference/configurations.md", configurations_page()
    yield "reference/tasks.md", tasks_page()
    yield "reference/formats.md", formats_page()
    yield "reference/python.md", python_page()
    yield "reference/operators.md", operators_page()


def slug(command: str) -> str:
    """Return the name of a command's page."""
    return command.replace(" ", "-")


# Commands.


def commands_page() -> str:
    """Return the list of the commands."""
    rows = [[f"[`bclip {name}`](commands/{slug(name)}.md)", c.summary, f"`{c.extra}`"] for name, c in COMMANDS.items()]
    names = "\n".join(f"commands/{slug(name)}" for name in COMMANDS)
    return (
        "# Commands\n\n`bclip COMMAND --help all` prints the same text as these pages. An extra is installed with\n"
        "`pip install 'bclip_fast[EXTRA]'`.\n\n"
        f"{table(['command', 'purpose', 'extra'], rows)}\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"
    )


def command_page(name: str) -> str:
    """Return a command's page: usage, description, and every flag with type, default, unit and meaning."""
    command = COMMANDS[name]
    fields, sections = command_fields.fields(command.config), command_fields.sections(command.config)
    parts = [f"# bclip {name}", f"{command.summary[0].upper()}{command.summary[1:]}."]
    parts += [f"```text\n{usage(name, fields, sections)}\n```", from_docstring(command_fields.about(command.config))]
    parts += [_manual(command.config), directive("program", f"bclip {name}", "")]
    section = ""
    for field in fields:
        if field.section != section:
            section = field.section
            parts.append(f"## `{section}`\n\n{from_docstring(sections[section])}")
        parts.append(option(field))
    if any(field.name == "preset" for field in fields):
        parts.append("A configuration file sets the same fields. See [configurations](../configurations.md).")
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def _manual(config: str) -> str:
    """Return the docstring of the module that defines a command, without its first line."""
    text = command_fields.module_about(config)
    return from_docstring(text.partition("\n\n")[2]) if text.startswith("`bclip") else ""


def option(field: Field) -> str:
    """Return the entry of a flag or of a positional argument."""
    facts = [f"`{field.type}`", f"default `{field.default}`" if field.default else "required"]
    unit = source.unit(field.name, field.meaning)
    facts += [f"unit: {unit}"] if unit else []
    name = field.flags[-1] if field.flags else field.name
    return directive("option", name, f"{from_docstring(field.meaning)}\n*{', '.join(facts)}*")


# Files of the package.


def configurations_page() -> str:
    """Return the list of the TOML files that the package has."""
    rows = []
    for path in sorted((ROOT / "bclip_fast/configs").glob("*.toml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = []
        for line in lines:
            if not line.startswith("#"):
                break
            comment.append(line.lstrip("# "))
        about = re.split(r"(?<=\.) |:? *bclip train", " ".join(comment))[0]
        rows.append([f"`{path.name}`", about])
    return (
        "# Configurations\n\n`bclip train` and `bclip plan` take TOML files before their flags. Files\n"
        "apply from left to right, then flags. A file that doesn't exist as a path is looked up in the package.\n"
        "The sections and fields are those of [bclip train](commands/train.md). An unknown key is an error.\n\n"
        + table(["file", "content"], rows)
    )


def tasks_page() -> str:
    """Return the list of the evaluation tasks that the package has."""
    rows = []
    for path in sorted((ROOT / "bclip_fast/eval/tasks").glob("*.toml")):
        task = tomllib.loads(path.read_text(encoding="utf-8"))
        rows.append([f"`{path.stem}`", task["protocol"], task["title"], str(task.get("num_samples", ""))])
    return (
        "# Tasks\n\n`bclip eval MODEL --task NAME --data FOLDER` evaluates a task. A task is a TOML file, and you can\n"
        "pass one of your own. [Evaluation](../evaluation.md) explains the protocols.\n\n"
        + table(["task", "protocol", "data and method", "samples"], rows)
    )


def formats_page() -> str:
    """Return the descriptions of the files and folders that commands write, from the modules that write them."""
    parts = ["# Files", "Files that commands write. Every file is written to a temporary name first, and then renamed."]
    for title, module in FORMATS.items():
        parts.append(f"## {title}\n\n{from_docstring(source.member(module).docstring.value)}\nSource: `{module}`")
    return "\n\n".join(parts) + "\n"


# Python.


def python_page() -> str:
    """Return the page of the public classes and functions."""
    parts = [
        "# Python",
        "`import bclip_fast` has the losses, `load`, `save` and `ops`. Other names are in their modules.",
    ]
    for title, names in PYTHON.items():
        parts += [f"## {title}", *(described(source.member(name), name.replace(":", ".")) for name in names.split())]
    parts.append("[Operators](operators.md) describes `bclip_fast.ops`.")
    return "\n\n".join(parts) + "\n"


def operators_page() -> str:
    """Return the page of `bclip_fast.ops`."""
    parts = ["# Operators in Python", "[Operators](../operators.md) explains backends, dropout and threads."]
    for module in ("bclip_fast.ops", "bclip_fast.ops.image"):
        tree = source.member(module)
        parts.append(f"## `{module}`")
        for name in sorted(ast.literal_eval(str(tree["__all__"].value))):
            item = source.member(f"{module}.{name}")
            if isinstance(item, griffe.Function | griffe.Class) and name != "BackendError":
                parts.append(described(item, f"{module}.{name}"))
    return "\n\n".join(parts) + "\n"


def described(item: Any, name: str) -> str:
    """Return the entry of a function, or of a class with its public methods. name: the path to import it from."""
    text = from_docstring(item.docstring.value) if item.docstring else ""
    if isinstance(item, griffe.Function):
        return directive("py:function", f"{name}{signature(item)}", text)
    if item.has_labels("dataclass"):
        return directive("py:class", name, f"{text}\n{_attributes(item)}", level=1)
    constructor = item.members.get("__init__")
    if isinstance(constructor, griffe.Function) and constructor.docstring:
        text += "\n" + from_docstring(constructor.docstring.value)
    methods = [
        directive("py:method", f"{method.name}{signature(method)}", from_docstring(method.docstring.value))
        for method in item.members.values()
        if isinstance(method, griffe.Function) and method.docstring and not method.name.startswith("_")
    ]
    arguments = signature(constructor).removesuffix(" -> None") if isinstance(constructor, griffe.Function) else ""
    return directive("py:class", f"{name}{arguments}", "\n\n".join([text, *methods]), level=1)


def _attributes(item: griffe.Class) -> str:
    entries = []
    for name, attribute in source.dataclass_fields(item).items():
        text = from_docstring(attribute.docstring.value) if attribute.docstring else ""
        default = f", default `{source.default_of(attribute)}`" if attribute.value is not None else ""
        kind = f"*`{source.type_of(str(attribute.annotation), attribute)}`{default}*"
        entries.append(directive("py:attribute", name, f"{text}\n{kind}"))
    return "\n".join(entries)


def signature(function: griffe.Function) -> str:
    """Return the parameters of a function as Python writes them, without `self`."""
    parts: list[str] = []
    is_keyword = False
    for parameter in function.parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind.value if parameter.kind else ""
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        if kind == "keyword-only" and not is_keyword and not any(part.startswith("*") for part in parts):
            parts.append("*")
        is_keyword |= kind == "keyword-only"
        annotation = f": {parameter.annotation}" if parameter.annotation else ""
        default = f" = {parameter.default}" if parameter.default is not None and not stars else ""
        parts.append(f"{stars}{parameter.name}{annotation}{default}")
    returns = f" -> {function.returns}" if function.returns else ""
    return f"({', '.join(parts)}){returns}"
