"""`bclip bench`: run the benchmarks, and show their results as a table, a JSONL file and plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bclip_fast.errors import UserError

from .busy import BusyConfig, measure_busy, show_busy
from .cases import Unavailable
from .images import ImagesConfig, measure_images, show_images
from .loader import LoaderConfig, measure_loader, show_loader
from .measure import environment, matmul_note, record, suite
from .retrieval import RetrievalConfig, measure_retrieval, show_retrieval
from .step import StepConfig, measure_step, show_step
from .table import print_table
from .trainer import TrainerConfig, measure_trainer, show_trainer

HERE = Path(__file__).parent


@dataclass(frozen=True)
class BenchConfig:
    """Compare ours with its peers on the same inputs in one process, and with the least possible work."""

    operator: tyro.conf.Positional[
        Literal[
            "affine",
            "attention",
            "busy",
            "contrastive",
            "image",
            "images",
            "loader",
            "pointwise",
            "retrieval",
            "step",
            "trainer",
            "all",
        ]
    ] = "all"
    """Operator to measure, or `all` operators. The other benchmarks are `images` (files to resized pixels), `loader`
    (shards to batches), `step` (a training step) and `trainer` (steps of a run from shards on several ranks).
    `retrieval` measures exact ranks, and `busy` the speed beside other processes."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("bench")
    """Folder for bench.jsonl and the plots."""
    step: StepConfig = field(default_factory=StepConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    busy: BusyConfig = field(default_factory=BusyConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    only: str = ""
    """Selection of cases and contenders, as for pytest's -k: "65536 and float32 and cpu"."""
    model: Literal["none", "a100", "h100", "h200"] = "none"
    """Measure nothing. Print a lower bound of each GPU kernel's time on this GPU, and the resource that sets it. The
    bounds come from machine code and published rates, without a GPU."""
    fresh: bool = False
    """With `model`, analyse this machine's build instead of reading the package's analysis. This takes a minute, and
    needs Triton, nvdisasm, cuobjdump and the CUDA module."""
    large: bool = False
    """Also measure, once, each case that takes minutes per call on a CPU."""
    record: bool = False
    """Also append the rows to benchmarks/results/<device>.jsonl of the source tree."""


def run(config: BenchConfig) -> int:
    """Measure, write the files and print the table, or print bounds. Returns the exit status."""
    if config.model != "none":
        from .bounds.report import show as show_bounds

        return show_bounds(config.model, config.fresh)
    if config.fresh:
        raise UserError("--fresh needs --model")
    special = SPECIAL.get(config.operator)
    rows, status = (_measured(config, special[0]), 0) if special else measure(config)
    if not rows:
        raise UserError(f"no results for {config}: pytest ended with status {status}, see its output above")
    config.output.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (config.output / "bench.jsonl").write_text(lines)
    if config.record:
        record(rows)
    if special:
        special[1](rows)
        print(config.output / "bench.jsonl")
        return status
    written = [config.output / "bench.jsonl", config.output / "bench.svg"]
    plot(rows, written[1])
    if any(row["curve"] for row in rows):
        written.append(config.output / "scaling.svg")
        plot_scaling([row for row in rows if row["curve"]], written[2])
    show(rows)
    print("  ".join(map(str, written)))
    return int(status)


# The benchmarks that are not cases of operators: how to measure them, and how to show their rows.
SPECIAL: dict[str, tuple[Callable[[BenchConfig], list[dict[str, Any]]], Callable[[list[dict[str, Any]]], None]]] = {
    "busy": (lambda config: measure_busy(config.busy), show_busy),
    "images": (lambda config: measure_images(config.images), show_images),
    "loader": (lambda config: measure_loader(config.loader), show_loader),
    "retrieval": (lambda config: measure_retrieval(config.retrieval), show_retrieval),
    "step": (lambda config: measure_step(config.step), show_step),
    "trainer": (lambda config: measure_trainer(config.trainer), show_trainer),
}


def _measured(config: BenchConfig, run: Callable[[BenchConfig], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    try:
        rows = run(config)
    except Unavailable as reason:
        hint = "; --step.no_open_clip measures only ours" if config.operator == "step" else ""
        raise UserError(f"{reason}{hint}") from None
    return [{**environment(), **row} for row in rows]


def measure(config: BenchConfig) -> tuple[list[dict[str, Any]], int]:
    """Return the suite's rows, one for each contender and case, and pytest's exit status."""
    words = [f"({word})" for word in (config.operator.replace("all", ""), config.only) if word]
    return suite(" and ".join(words), config.large)


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table for each case."""
    print(f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}")
    for case in dict.fromkeys((row["operator"], row["case"]) for row in rows):
        group = [row for row in rows if (row["operator"], row["case"]) == case]
        best = min((row for row in group if row["contender"].startswith("ours:")), key=_seconds, default=None)
        baseline = next((row for row in group if row["contender"] == "open_clip"), best)
        times = "x open_clip" if baseline is not best else "x ours"
        cells = [
            [
                row["contender"],
                f"{row['seconds'] * 1e3:.2f}",
                ratio(row, baseline, "seconds"),
                rate(row),
                f"{row['flops'] / row['seconds'] / row['matmul_flops_per_second']:.0%}" if row["flops"] else "",
                "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f}",
                ratio(row, baseline, "extra_bytes"),
                f"{row['error']:.1e}" + compared_results(row),
            ]
            for row in group
        ]
        title = f"{'-'.join(case)}{floor(group[0])}{matmul_note(group)}"
        headings = ["contender", "ms", times, "rate", "of matmul", "extra MB", times, "error"]
        print_table(title, headings, cells)


def ratio(row: dict[str, Any], other: dict[str, Any] | None, quantity: str) -> str:
    """Return how many times the other's quantity a row has, or "" if either is unknown."""
    return f"{row[quantity] / other[quantity]:.2f}" if other and other[quantity] and row[quantity] is not None else ""


def compared_results(row: dict[str, Any]) -> str:
    """Return an addition to the error of a peer that computes only some of the results."""
    return "" if row["num_compared"] == row["num_results"] else f" ({row['num_compared']} of {row['num_results']})"


def floor(row: dict[str, Any]) -> str:
    """Return the least work that any method has to do for the case."""
    return f": {row['flops'] / 1e9:.1f} GFLOP, {row['bytes'] / 1e6:.0f} MB" if row["flops"] else ""


def rate(row: dict[str, Any]) -> str:
    """Return the operations or units per second of a row."""
    if row["flops"]:
        return f"{row['flops'] / row['seconds'] / 1e9:.0f} GFLOP/s"
    return f"{row['num_units'] / row['seconds']:.0f} {row['unit']}/s"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of every contender, in one panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((row["operator"], row["case"]) for row in rows))
    figure, axes = pyplot.subplots(len(cases), 1, figsize=(8, 1.6 * len(cases) + 0.6), squeeze=False)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        group = [row for row in rows if (row["operator"], row["case"]) == case]
        names = [row["contender"] for row in group]
        colors = ["#1f77b4" if name.startswith("ours:") else "#999999" for name in names]
        bars = axis.barh(names, [row["seconds"] * 1e3 for row in group], color=colors)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.invert_yaxis()
        axis.set_title("-".join(case), fontsize=10, loc="left")
        axis.set_xlabel("ms, median")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def plot_scaling(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time and peak extra memory against the batch, in one column for each loss and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = list(dict.fromkeys(row["curve"] for row in rows))
    figure, axes = pyplot.subplots(2, len(curves), figsize=(5 * len(curves), 7), squeeze=False, sharex=True)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for column, curve in enumerate(curves):
        for index, name in enumerate(names):
            line = sorted((row for row in rows if (row["contender"], row["curve"]) == (name, curve)), key=_batch)
            if not line:
                continue
            style = f"C{index % 10}-o" if name.startswith("ours:") else f"C{index % 10}--o"
            axes[0, column].loglog([*map(_batch, line)], [row["seconds"] * 1e3 for row in line], style, label=name)
            measured = [row for row in line if row["extra_bytes"]]
            axes[1, column].loglog([*map(_batch, measured)], [row["extra_bytes"] / 1e6 for row in measured], style)
        axes[0, column].set_title(curve, fontsize=10, loc="left")
        axes[1, column].set_xlabel("batch")
        axes[0, column].legend(fontsize=8)
        axes[1, column].set_xscale("log", base=2)
    axes[0, 0].set_ylabel("ms, forward and backward")
    axes[1, 0].set_ylabel("peak extra memory, MB")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _seconds(row: dict[str, Any]) -> float:
    return row["seconds"]


def _batch(row: dict[str, Any]) -> int:
    return row["batch"]
