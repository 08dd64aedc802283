"""`bclip`: a table of commands, each a configuration and a function, imported when it runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import log
from .errors import BackendError, UserError
from .version import __version__


@dataclass(frozen=True)
class Command:
    summary: str
    config: str  # "module:Class"
    function: str  # "module:function", called with the configuration
    extra: str  # the extra of the package that brings what it imports


COMMANDS = {
    "quickstart": Command(
        "build a small set of real images, pretrain, evaluate, report",
        "bclip_fast.quickstart:QuickstartConfig",
        "bclip_fast.quickstart:run",
        "quickstart",
    ),
    "ingest build": Command(
        "JATS articles to figure-caption pairs to WebDataset shards",
        "bclip_fast.ingest.build:IngestConfig",
        "bclip_fast.ingest.build:build",
        "ingest",
    ),
    "ingest fetch": Command(
        "mirror articles of PubMed Central's bucket, every object checked",
        "bclip_fast.ingest.fetch:FetchConfig",
        "bclip_fast.ingest.fetch:fetch",
        "ingest",
    ),
    "ingest verify": Command(
        "re-read a dataset and say what is wrong",
        "bclip_fast.ingest.verify:VerifyConfig",
        "bclip_fast.ingest.verify:run",
        "ingest",
    ),
    "ingest report": Command(
        "an HTML page about a dataset: counts, sizes, captions, rejects, a gallery",
        "bclip_fast.ingest.report:ReportConfig",
        "bclip_fast.ingest.report:run",
        "ingest",
    ),
    "train export": Command(
        "a trained model in the layout of open_clip or transformers",
        "bclip_fast.train.export:ExportConfig",
        "bclip_fast.train.export:run",
        "train",
    ),
    "train replay": Command(
        "compute again the step at which a run gave up",
        "bclip_fast.train.replay:ReplayConfig",
        "bclip_fast.train.trainer:replay",
        "train",
    ),
    "train report": Command(
        "an HTML page about runs: curves, where the time went, validation, settings, events",
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
        "memory, operations and hours of a training run; refuses what cannot fit",
        "bclip_fast.train.config:TrainConfig",
        "bclip_fast.plan.command:run",
        "train",
    ),
    "finetune": Command(
        "fit a trained model to pairs or questions of one's own, whole or by LoRA",
        "bclip_fast.train.finetune:FinetuneConfig",
        "bclip_fast.train.finetune:run",
        "eval",
    ),
    "eval compare": Command(
        "evaluations side by side, with paired significance",
        "bclip_fast.eval.compare:CompareCommand",
        "bclip_fast.eval.compare:run",
        "eval",
    ),
    "eval": Command(
        "retrieval, zero-shot, probes and questions of a run or checkpoint: report, JSON, CSV",
        "bclip_fast.eval:EvalCommand",
        "bclip_fast.eval:run",
        "eval",
    ),
    "embed": Command(
        "pictures of a folder or of shards to an index: Parquet and faiss",
        "bclip_fast.search.index:EmbedConfig",
        "bclip_fast.search.index:run_embed",
        "search",
    ),
    "search": Command(
        "the pictures of an index nearest to a text or a picture",
        "bclip_fast.search.searcher:SearchConfig",
        "bclip_fast.search.searcher:run",
        "search",
    ),
    "serve": Command(
        "a local web page to search an index",
        "bclip_fast.search.serve:ServeConfig",
        "bclip_fast.search.serve:run",
        "search",
    ),
    "bench": Command(
        "ours against the rivals: operators, images, loader, retrieval, a step, a trainer; bclip bench --help",
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
        "backends, versions and devices, what each operator takes here, and why",
        "bclip_fast.doctor:DoctorConfig",
        "bclip_fast.doctor:run",
        "model",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
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
    except KeyboardInterrupt:
        print(f"bclip {name}: interrupted", file=sys.stderr)
        return 130


def _run(name: str, command: Command, args: list[str]) -> int:
    from . import config

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
