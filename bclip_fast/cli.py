"""`bclip`: a table of commands. The configuration and function of a command are imported when it runs."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from bclip_fast import log
from bclip_fast.errors import BackendError, UserError
from bclip_fast.version import __version__


@dataclass(frozen=True)
class Command:
    """A command of `bclip`.

    summary: line in the list of commands.
    config: the configuration's class, "module:Class".
    function: the function to call with the configuration, "module:function".
    extra: the extra of the package that the command needs.
    """

    summary: str
    config: str
    function: str
    extra: str


COMMANDS = {
    "quickstart": Command(
        "build a small set of real images, pretrain, evaluate and report",
        "bclip_fast.quickstart:QuickstartConfig",
        "bclip_fast.quickstart:run",
        "quickstart",
    ),
    "ingest build": Command(
        "convert JATS articles to figure-caption pairs in WebDataset shards",
        "bclip_fast.ingest.build:IngestConfig",
        "bclip_fast.ingest.build:build",
        "ingest",
    ),
    "ingest fetch": Command(
        "mirror articles of PubMed Central's bucket and check every object",
        "bclip_fast.ingest.fetch:FetchConfig",
        "bclip_fast.ingest.fetch:fetch",
        "ingest",
    ),
    "ingest check": Command(
        "say what becomes of articles and images, and why",
        "bclip_fast.ingest.check:CheckConfig",
        "bclip_fast.ingest.check:run",
        "ingest",
    ),
    "ingest verify": Command(
        "re-read a dataset and list its problems",
        "bclip_fast.ingest.verify:VerifyConfig",
        "bclip_fast.ingest.verify:run",
        "ingest",
    ),
    "ingest report": Command(
        "write an HTML page about a dataset: counts, sizes, captions, rejects, a gallery",
        "bclip_fast.ingest.report:ReportConfig",
        "bclip_fast.ingest.report:run",
        "ingest",
    ),
    "train export": Command(
        "convert a trained model to the layout of open_clip or transformers",
        "bclip_fast.train.export:ExportConfig",
        "bclip_fast.train.export:run",
        "train",
    ),
    "train replay": Command(
        "recompute the step at which a run gave up",
        "bclip_fast.train.replay:ReplayConfig",
        "bclip_fast.train.replay:replay",
        "train",
    ),
    "train report": Command(
        "write an HTML page about runs: curves, time per stage, validation, settings, events",
        "bclip_fast.train.report:TrainReportConfig",
        "bclip_fast.train.report:run",
        "eval",
    ),
    "train": Command(
        "pretrain: bclip train CONFIG.toml ... --flags",
        "bclip_fast.train.config:TrainConfig",
        "bclip_fast.plan.command:train",
        "train",
    ),
    "plan": Command(
        "estimate memory, operations and hours of a training run; fail if it cannot fit",
        "bclip_fast.train.config:TrainConfig",
        "bclip_fast.plan.command:run",
        "train",
    ),
    "finetune": Command(
        "finetune a trained model on your pairs or questions, fully or with LoRA",
        "bclip_fast.train.finetune:FinetuneConfig",
        "bclip_fast.train.finetune:run",
        "eval",
    ),
    "eval compare": Command(
        "compare evaluations side by side, with paired significance tests",
        "bclip_fast.eval.compare:CompareCommand",
        "bclip_fast.eval.compare:run",
        "eval",
    ),
    "eval": Command(
        "evaluate a run or checkpoint (retrieval, zero-shot, probes, questions): report, JSON, CSV",
        "bclip_fast.eval:EvalCommand",
        "bclip_fast.eval:run",
        "eval",
    ),
    "embed": Command(
        "embed the images of a folder or of shards to an index: Parquet and faiss",
        "bclip_fast.search.index:EmbedConfig",
        "bclip_fast.search.index:run_embed",
        "search",
    ),
    "search": Command(
        "find the images of an index nearest to a text or an image",
        "bclip_fast.search.searcher:SearchConfig",
        "bclip_fast.search.searcher:run",
        "search",
    ),
    "serve": Command(
        "serve a local web page that searches an index",
        "bclip_fast.search.serve:ServeConfig",
        "bclip_fast.search.serve:run",
        "search",
    ),
    "bench": Command(
        "benchmark against other libraries: operators, images, loader, retrieval, step, trainer",
        "bclip_fast.benchmarks.report:BenchConfig",
        "bclip_fast.benchmarks.report:run",
        "bench",
    ),
    "tune": Command(
        "measure the backends on this machine, so that `auto` takes the fastest",
        "bclip_fast.tune:TuneConfig",
        "bclip_fast.tune:run",
        "model",
    ),
    "doctor": Command(
        "print backends, versions, devices, and the backend that each operator takes here, with reasons",
        "bclip_fast.doctor:DoctorConfig",
        "bclip_fast.doctor:run",
        "model",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] in (["--version"], ["-V"]):
        print(f"bclip_fast {__version__}")
        return 0
    name = next((name for name in COMMANDS if args[: len(name.split())] == name.split()), None)
    if name is None:
        if not args or args[0] in ("-h", "--help", "help"):
            print(_usage())
            return 0
        print(f"bclip: unknown command {' '.join(args[:2])!r}\n{_usage()}", file=sys.stderr)
        return 2
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
    from bclip_fast import config

    parsed = config.parse(_load(command.config), args, prog=f"bclip {name}")
    result = _load(command.function)(parsed)
    return result if isinstance(result, int) else 0


def _load(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


def _usage() -> str:
    rows = "\n".join(f"  {name:<14}{command.summary}" for name, command in COMMANDS.items())
    return f"usage: bclip COMMAND [--help] ...\n\n{rows}"


if __name__ == "__main__":
    sys.exit(main())
