"""The commands of the walk over faults, their inputs, and the content of their outputs without times and machines."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from articles import write_articles, write_composites
from benchmark_data import write_lc25000
from colours import COLOURS, jpeg
from panel_models import HALVES, write_fixed_model
from synthetic import write_shards
from towers import SMALL

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer

MODULES = (
    "torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.utils.tensorboard", "faiss", "pyarrow.parquet",
    "safetensors.torch", "jinja2", "lxml.etree",
    "rich.console", "rich.table", "tokenizers", "PIL.JpegImagePlugin", "bclip_fast.ingest.build",
    "bclip_fast.ingest.fetch", "bclip_fast.ingest.report", "bclip_fast.ingest.verify", "bclip_fast.export.command",
    "bclip_fast.train.report", "bclip_fast.train.replay", "bclip_fast.plan.command", "bclip_fast.train.trainer",
    "bclip_fast.train.finetune", "bclip_fast.eval", "bclip_fast.eval.command", "bclip_fast.eval.compare",
    "bclip_fast.search.searcher", "bclip_fast.tune", "detector_modules",
)  # fmt: skip
"""Modules that the commands import."""

_TRAIN = """\
preset = ""
batch_size = 8
max_steps = 4
[model]
embed_dim = 12
[model.vision]
image_size = 32
patch_size = 16
width = 8
layers = 1
heads = 1
[model.text]
context_length = 12
vocab_size = 64
width = 8
layers = 1
heads = 1
max_positions = 16
[data]
shards = "shards"
shuffle_block = 16
num_threads = 1
[optim]
warmup_steps = 1
[engine]
name = "ddp"
precision = "fp32"
[checkpoint]
every_steps = 2
keep = 1
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command with the files that exist before it.

    Attributes:
        argv: arguments of `bclip`.
        inputs: files and folders of `write_inputs`.
        before: commands that write the earlier output.
        prepare: function that changes the folder after these commands.
        again: arguments that repeat or resume the command. None: `argv`.
        outputs: files and folders that the command may write. All other files must stay.
        readers: functions that read an output with the package's reader and return its content as text.
        status: exit status without a fault.
        stop_status: exit statuses after SIGTERM.
    """

    argv: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    prepare: Callable[[Path], None] = lambda folder: None
    again: tuple[str, ...] | None = None
    readers: tuple[Callable[[Path], str], ...] = ()
    status: int = 0
    stop_status: tuple[int, ...] = (143,)


def write_inputs(folder: Path) -> None:
    """Write the inputs of all commands: shards, articles, two models, tables, and a recipe."""
    write_shards(folder / "shards", num_samples=16, num_val=4)
    write_articles(folder / "articles", 3)
    write_composites(folder / "composites", 2)
    write_fixed_model(folder / "panel_model", HALVES)
    (folder / "train.toml").write_text(_TRAIN)
    (folder / "tables").mkdir()
    pairs, questions = ["path,caption,colour,split"], ["image,question,answer,answer_type,split"]
    for name, colour in COLOURS.items():
        for shade in range(2):
            (folder / "tables" / f"{name}{shade}.jpg").write_bytes(jpeg(tuple(c - shade * 9 for c in colour), 40))
            pairs.append(f"{name}{shade}.jpg,a {name} square,{name},train")
        questions.append(f"{name}0.jpg,what colour is the square,{name},open,train")
        questions.append(f"{name}0.jpg,is it red,{'yes' if name == 'red' else 'no'},closed,train")
    (folder / "tables" / "pairs.csv").write_text("\n".join(pairs) + "\n")
    (folder / "tables" / "questions.csv").write_text("\n".join(questions) + "\n")
    texts = [row["caption"] for row in csv.DictReader(pairs)] + ["what colour is the square", "is it red"]
    for name, seed, width in (("model", 1, 24), ("other", 2, 32)):
        torch.manual_seed(seed)
        text = dataclasses.replace(SMALL.text, layers=1, context_length=12 + seed)
        vision = dataclasses.replace(SMALL.vision, layers=1, patch_size=16, width=width)
        model = BiomedClip(dataclasses.replace(SMALL, vision=vision, text=text))
        words = Tokenizer.train(texts * 3, 80 + seed, context_length=12 + seed)
        pretrained.save(folder / name, model, Preprocess(PreprocessConfig(size=32)), words)
    write_lc25000(folder / "benchmark")
    (folder / "notes").mkdir()
    (folder / "notes" / "note.txt").write_text("a file of the user\n")


def _files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def raw(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in _files(folder).items()}


def contents(folder: Path) -> dict[str, str]:
    """Return the content of every file below a folder, without what differs between two equal runs."""
    texts = {name: content(path) for name, path in _files(folder).items()}
    return {name: text for name, text in texts.items() if text}


def content(path: Path) -> str:
    """Return the content of a file as text. Empty if it may differ between equal runs in any way."""
    data = path.read_bytes()
    if "tfevents" in path.name or path.name == "events.jsonl":
        return ""
    try:
        if path.suffix == ".html":
            return "complete" if data.rstrip().endswith(b"</html>") and data.startswith(b"<!") else "damaged page"
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            return json.dumps([[row[name] for name in ("step", "loss", "lr", "grad_norm")] for row in rows])
        if path.name in ("results.json", "compare.json"):
            return json.dumps(_without(json.loads(data), {"time", "environment"}))
        if path.name == "tuning.json":
            return str(sorted(json.loads(data)))
        if path.name == "config.toml":
            return re.sub(r"(?m)^resume = .*\n", "", data.decode())
    except ValueError as error:
        return f"damaged: {error}"
    return hashlib.sha256(data).hexdigest()


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def _state_hash(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_at(name: str) -> Callable[[Path], str]:
    """Return a reader of the model in the folder `name`: weights, configuration and tokenizer together."""

    def read(folder: Path) -> str:
        model, preprocess, tokenizer = pretrained.load(folder / name)
        text = str(tokenizer(["a red square", "is it"]).tolist())
        return f"{_state_hash(model.state_dict())} {model.config} {preprocess.config} {text}"

    return read


def index_at(name: str) -> Callable[[Path], str]:
    """Return a reader of an index: what it finds, with all fields."""

    def read(folder: Path) -> str:
        from bclip_fast.search.searcher import OpenConfig, Searcher

        searcher = Searcher(OpenConfig(folder=str(folder / name)))
        return str([(hit.key, round(hit.score, 5)) for hit in searcher.text("a red square", 3)])

    return read


def evaluation_at(name: str) -> Callable[[Path], str]:
    """Return a reader of an evaluation: its scores with the samples of the same run."""

    def read(folder: Path) -> str:
        from bclip_fast.eval import results

        return json.dumps(_without(results.read(folder / name), {"time", "environment"}))

    return read


def dataset_at(name: str) -> Callable[[Path], str]:
    """Return a reader of a dataset, which verifies it."""

    def read(folder: Path) -> str:
        from bclip_fast.data.shards.verify import verify

        problems = verify(folder / name)
        assert problems == [], problems
        return json.loads((folder / name / "dataset.json").read_text())["fingerprint"]

    return read


def drop_last_checkpoint(run: str) -> Callable[[Path], None]:
    """Return a function that makes a finished run one that was killed after the first of two checkpoints."""

    def drop(folder: Path) -> None:
        shutil.rmtree(folder / run / "checkpoints" / "step-00000004")

    return drop


_INGEST = ("ingest", "build", "articles", "-o", "out/data", "--workers", "1", "--val_fraction", "0.3")
_TRAINING = ("train", "train.toml", "--run", "out/run")
_KEPT = ("--checkpoint.keep", "0")
_TUNING = ("--run", "out/run", "--epochs", "2", "--batch_size", "4", "--checkpoint_every", "2", "--num_workers", "1")
_PAIRS = ("finetune", "model", "--data", "tables/pairs.csv", *_TUNING, "--engine.precision", "fp32")
_QUESTIONS = (
    *("finetune", "model", "--data", "tables/questions.csv", "--task", "vqa", "--head_layers", "1"),
    *(*_TUNING, "--engine.precision", "fp32"),
)
_EVAL = (
    *("--data", "tables/pairs.csv", "--split", "train", "--task", "retrieval", "--task", "zero_shot"),
    *("--label", "colour", "--out", "out/eval", "--cache", "out/cache", "--num_workers", "1", "--no_progress"),
)
_EMBED = ("--data", "tables/pairs.csv", "--split", "train", "--out", "out/index", "--num_workers", "1", "--no_progress")
_SUITE = (
    *("eval", "suite", "--data", "benchmark", "--out", "out/suite", "--cache", "out/cache"),
    *("--num_workers", "1", "--no_progress"),
)
_EXPORT = ("export", "model", "--out", "out/exported")
_STOPPED = (75, 143, 0)

COMMANDS = {
    "ingest build": Command(_INGEST, ("articles",), ("out/data",), readers=(dataset_at("out/data"),)),
    "ingest build --overwrite": Command(
        (*_INGEST, "--overwrite"), ("articles",), ("out/data",),
        before=((*_INGEST, "--seed", "5"),), readers=(dataset_at("out/data"),),
    ),
    "ingest build --panel_model": Command(
        ("ingest", "build", "composites", *_INGEST[3:], "--panels", "--panel_model", "panel_model"),
        ("composites", "panel_model"), ("out/data",), readers=(dataset_at("out/data"),),
    ),
    "ingest label": Command(
        ("ingest", "label", "out/data", "--workers", "1", "--filter", "kind is not null"), ("articles",), ("out/data",),
        before=(_INGEST,), readers=(dataset_at("out/data"),),
    ),
    "ingest report": Command(
        ("ingest", "report", "out/data", "--out", "out/page.html"), ("articles",), ("out/page.html",),
        before=(_INGEST, ("ingest", "report", "out/data", "--out", "out/page.html")),
    ),
    "train": Command(
        _TRAINING, ("shards", "train.toml"), ("out/run",), again=(*_TRAINING, "--resume"),
        readers=(model_at("out/run"),), stop_status=_STOPPED,
    ),
    "train --resume": Command(
        (*_TRAINING, "--resume"), ("shards", "train.toml"), ("out/run",), before=((*_TRAINING, *_KEPT),),
        prepare=drop_last_checkpoint("out/run"), readers=(model_at("out/run"),), stop_status=_STOPPED,
    ),
    "export": Command(
        _EXPORT, ("model", "other"), ("out/exported",), before=(("export", "other", "--out", "out/exported"),),
        readers=(model_at("out/exported"),),
    ),
    "export transformers": Command(
        (*_EXPORT, "--to", "transformers"), ("model", "other"), ("out/exported",),
        before=(("export", "other", "--out", "out/exported", "--to", "transformers"),),
    ),
    "train report": Command(
        ("train", "report", "out/run", "--out", "out/page.html"), ("shards", "train.toml"), ("out/page.html",),
        before=(_TRAINING, ("train", "report", "out/run", "--out", "out/page.html")),
    ),
    "finetune": Command(
        _PAIRS, ("model", "tables"), ("out/run",), again=(*_PAIRS, "--resume"), readers=(model_at("out/run"),),
        stop_status=_STOPPED,
    ),
    "finetune --resume": Command(
        (*_QUESTIONS, "--resume"), ("model", "tables"), ("out/run",), before=(_QUESTIONS,),
        prepare=drop_last_checkpoint("out/run"), readers=(model_at("out/run"),), stop_status=_STOPPED,
    ),
    "eval": Command(
        ("eval", "model", *_EVAL), ("model", "other", "tables"), ("out/eval", "out/cache"),
        before=(("eval", "other", *_EVAL),), readers=(evaluation_at("out/eval"),),
    ),
    "eval suite": Command(
        (*_SUITE, "--models", "model,other"), ("model", "other", "benchmark"), ("out/suite", "out/cache"),
        before=((*_SUITE, "--models", "model"),),
    ),
    "eval compare": Command(
        ("eval", "compare", "out/eval", "out/eval", "--out", "out/compared"), ("model", "tables"), ("out/compared",),
        before=(("eval", "model", *_EVAL), ("eval", "compare", "out/eval", "out/eval", "--out", "out/compared")),
    ),
    "embed": Command(
        ("embed", "model", *_EMBED), ("model", "other", "tables"), ("out/index",), readers=(index_at("out/index"),)
    ),
    "embed again": Command(
        ("embed", "model", *_EMBED), ("model", "other", "tables"), ("out/index",),
        before=(("embed", "other", *_EMBED),), readers=(index_at("out/index"),),
    ),
    "search": Command(
        ("search", "out/index", "a red square", "--gallery", "out/page.html"), ("model", "tables"), ("out/page.html",),
        before=(("embed", "model", *_EMBED), ("search", "out/index", "a square", "--gallery", "out/page.html")),
    ),
    "tune": Command(
        ("tune", "--device", "cpu", "--operators", "gelu", "--seconds", "0.001", "--out", "out/tuning.json"), (),
        ("out/tuning.json",),
    ),
}  # fmt: skip
