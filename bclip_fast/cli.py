"""`bclip`: a table of commands. The configuration and function of a command are imported when it runs."""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TextIO

from bclip_fast import log
from bclip_fast.errors import BackendError, UserError, did_you_mean
from bclip_fast.version import __version__


@dataclass(frozen=True)
class Command:
    """A command of `bclip`.

    summary: line in the list of commands.
    config: the configuration's class, "module:Class".
    function: the function to call with the configuration, "module:function".
    extra: the extra of the package that the command needs.
    next: what to do after the command has succeeded, with fields of the configuration in braces.
    """

    summary: str
    config: str
    function: str
    extra: str
    next: str = ""


COMMANDS = {
    "quickstart": Command(
        "build a small dataset, pretrain, evaluate and report",
        "bclip_fast.quickstart:QuickstartConfig",
        "bclip_fast.quickstart:run",
        "quickstart",
    ),
    "ingest build": Command(
        "convert JATS articles to shards of figure-caption pairs",
        "bclip_fast.ingest.config:IngestConfig",
        "bclip_fast.ingest.build:build",
        "ingest",
        "bclip ingest report {out}, then bclip train CONFIG.toml --data.shards {out}",
    ),
    "ingest fetch": Command(
        "mirror articles of PubMed Central's bucket",
        "bclip_fast.ingest.fetch:FetchConfig",
        "bclip_fast.ingest.fetch:fetch",
        "ingest",
        "bclip ingest build {out} -o FOLDER",
    ),
    "ingest check": Command(
        "say what becomes of articles and images, and why",
        "bclip_fast.ingest.check:CheckConfig",
        "bclip_fast.ingest.check:run",
        "ingest",
        "bclip ingest build FOLDER -o OUT makes shards of articles",
    ),
    "ingest verify": Command(
        "re-read a dataset and list its problems",
        "bclip_fast.ingest.verify:VerifyConfig",
        "bclip_fast.ingest.verify:run",
        "ingest",
        "bclip train CONFIG.toml --data.shards {dataset}",
    ),
    "ingest label": Command(
        "tell the kind of each figure, and select pairs",
        "bclip_fast.ingest.label:LabelConfig",
        "bclip_fast.ingest.label:run",
        "ingest",
        "bclip ingest report {dataset}, then bclip train CONFIG.toml --data.shards {dataset}",
    ),
    "ingest report": Command(
        "write an HTML page about a dataset",
        "bclip_fast.ingest.report:ReportConfig",
        "bclip_fast.ingest.report:run",
        "ingest",
    ),
    "train replay": Command(
        "recompute the step at which a run gave up",
        "bclip_fast.train.replay:ReplayConfig",
        "bclip_fast.train.replay:replay",
        "train",
    ),
    "train report": Command(
        "write an HTML page about runs, with their curves",
        "bclip_fast.train.report:TrainReportConfig",
        "bclip_fast.train.report:run",
        "eval",
    ),
    "train": Command(
        "pretrain on shards",
        "bclip_fast.train.config:TrainConfig",
        "bclip_fast.plan.command:train",
        "train",
        "bclip train report {run}, and bclip eval {run} if the data have a split val",
    ),
    "plan": Command(
        "estimate the memory and time of a training run",
        "bclip_fast.plan.command:PlanCommand",
        "bclip_fast.plan.command:run",
        "train",
        "bclip train with the same arguments, without those of --scale",
    ),
    "finetune": Command(
        "finetune a model on your pairs, classes or questions",
        "bclip_fast.train.finetune:FinetuneConfig",
        "bclip_fast.train.finetune:run",
        "eval",
        "bclip eval {run} --data {data}",
    ),
    "export": Command(
        "write a model for other software: ONNX, transformers, ...",
        "bclip_fast.export.command:ExportConfig",
        "bclip_fast.export.command:run",
        "model",
        "bclip push {out} ORG/NAME shows what an upload to the hub would do",
    ),
    "push": Command(
        "upload an exported model to the Hugging Face hub",
        "bclip_fast.export.push:PushConfig",
        "bclip_fast.export.push:run",
        "model",
    ),
    "eval compare": Command(
        "compare evaluations, with paired significance tests",
        "bclip_fast.eval.compare:CompareCommand",
        "bclip_fast.eval.compare:run",
        "eval",
    ),
    "eval fetch": Command(
        "fetch the public data of tasks, after their licence is shown",
        "bclip_fast.eval.fetch:FetchCommand",
        "bclip_fast.eval.fetch:run",
        "eval",
    ),
    "eval suite": Command(
        "evaluate models on a benchmark, and write a leaderboard",
        "bclip_fast.eval.leaderboard:SuiteCommand",
        "bclip_fast.eval.leaderboard:run",
        "eval",
    ),
    "eval": Command(
        "evaluate a model: retrieval, zero-shot, probes, questions",
        "bclip_fast.eval:EvalCommand",
        "bclip_fast.eval:run",
        "eval",
        "open report.html, and compare two evaluations with bclip eval compare A B",
    ),
    "embed": Command(
        "embed the images of a folder or of shards to an index",
        "bclip_fast.search.index:EmbedConfig",
        "bclip_fast.search.index:run_embed",
        "search",
        "bclip search {out} TEXT, or bclip serve {out}",
    ),
    "search": Command(
        "find the images of an index that are like a text or image",
        "bclip_fast.search.searcher:SearchConfig",
        "bclip_fast.search.searcher:run",
        "search",
        "--gallery FILE.html shows the images",
    ),
    "serve": Command(
        "serve a local web page that searches an index",
        "bclip_fast.search.serve:ServeConfig",
        "bclip_fast.search.serve:run",
        "search",
    ),
    "bench": Command(
        "benchmark against other libraries",
        "bclip_fast.benchmarks.report:BenchConfig",
        "bclip_fast.benchmarks.report:run",
        "bench",
        "--record appends the rows to the results that docs and README show",
    ),
    "tune": Command(
        "measure the backends, so that `auto` takes the fastest",
        "bclip_fast.tune:TuneConfig",
        "bclip_fast.tune:run",
        "model",
        "bclip doctor shows the backends that are now in use",
    ),
    "doctor": Command(
        "print versions, devices and the backend of each operator",
        "bclip_fast.doctor:DoctorConfig",
        "bclip_fast.doctor:run",
        "model",
    ),
    "completion": Command(
        "print the completion script of bash, zsh or fish",
        "bclip_fast.completion:CompletionConfig",
        "bclip_fast.completion:run",
        "model",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(args)
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        return 128 + signal.SIGPIPE


def _main(args: list[str]) -> int:
    if args[:1] in (["--version"], ["-V"]):
        print(f"bclip_fast {__version__}")
        return 0
    if args[:1] == ["__complete"]:
        from bclip_fast.completion import candidates

        print("\n".join(candidates(args[1:], {name: command.config for name, command in COMMANDS.items()})))
        return 0
    name = next((name for name in COMMANDS if args[: len(name.split())] == name.split()), None)
    if name is None:
        if not args or args[0] in ("-h", "--help", "help"):
            print(_usage())
            return 0
        return _unknown(args)
    command = COMMANDS[name]
    log.configure(os.environ.get("BCLIP_LOG"), main_rank=log.rank() == "0")
    try:
        with _ended_by_sigterm():
            return _run(name, command, args[len(name.split()) :])
    except (UserError, BackendError) as error:
        print(f"bclip {name}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "bclip_fast":
            raise
        print(
            f"bclip {name} needs the package {error.name}: pip install 'bclip_fast[{command.extra}]'", file=sys.stderr
        )
        return 2
    except OSError as error:
        if not isinstance(error.filename, str | bytes):
            raise
        print(f"bclip {name}: {os.fsdecode(error.filename)}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bclip {name}: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print(f"bclip {name}: ended by SIGTERM", file=sys.stderr)
        return 128 + signal.SIGTERM


def _is_closed(stream: TextIO) -> bool:
    """Whether the reader of a stream has ended, such as `head`. If so, what Python still has to write goes nowhere."""
    try:
        stream.flush()
        poll = select.poll()
        poll.register(stream, 0)
        closed = bool(poll.poll(0))
    except BrokenPipeError:
        closed = True
    except (AttributeError, OSError, ValueError):  # no poll on Windows, no descriptor behind the stream
        closed = False
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return closed


class _Terminated(BaseException):
    """SIGTERM. No command catches it, so each removes its temporary files."""


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Raise _Terminated at SIGTERM. Outside the main thread, Python allows no handlers, so nothing changes."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)


def _run(name: str, command: Command, args: list[str]) -> int:
    for place, word in enumerate(args):
        if word in ("-h", "--help") or word.startswith("--help="):
            from bclip_fast.command_help import command_help

            topic = word.partition("=")[2] or "".join(args[place + 1 : place + 2])
            print(command_help(name, command.summary, command.config, topic))
            return 0
    from bclip_fast import config

    parsed = config.parse(_load(command.config), args, prog=f"bclip {name}")
    result = _load(command.function)(parsed)
    status = result if isinstance(result, int) else 0
    if command.next and not status and log.rank() == "0":
        values = {key: config.word(value) for key, value in config.plain(parsed).items()}
        print(f"Next: {command.next.format(**values)}", file=sys.stderr)
    return status


def _load(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


def _unknown(args: list[str]) -> int:
    """Say which commands are like the unknown one."""
    name = " ".join(args[:2])
    group = [command for command in COMMANDS if command.split()[0] == args[0]]
    # One word of a longer name, such as `ingest`, or a name with one typing error.
    hint = f"; the commands are {', '.join(group)}" if group else did_you_mean(args[0], COMMANDS)
    hint = hint or did_you_mean(name, COMMANDS) or "; `bclip --help` lists the commands"
    print(f"bclip: unknown command {name if group else args[0]!r}{hint}", file=sys.stderr)
    return 2


def _usage() -> str:
    rows = "\n".join(f"  {name:<14}{command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: bclip COMMAND [FLAGS]\n\n{rows}\n\n"
        "`bclip COMMAND --help` describes a command. `bclip quickstart` tries them all."
    )


if __name__ == "__main__":
    sys.exit(main())
