"""The benchmark page: plots and tables of the newest rows of benchmarks/results."""

from __future__ import annotations

from typing import Any

from . import figures as draw
from .markdown import table
from .results import Results, Row, megabytes, seconds

XEON, EPYC = "Intel(R) Xeon(R) Processor", "AMD EPYC"
_STEP = "biomedclip_b16-16-bf16-dropout-0.0"
_HOW = {
    "contrastive": 'bclip bench contrastive --only "clip and (8192 or 4096)"',
    "attention": "bclip bench attention",
    "step": "bclip bench step",
    "trainer": "bclip bench trainer",
    "images": "bclip bench images",
    "loader": "bclip bench loader",
    "busy": "bclip bench busy",
}


def figures(results: Results) -> dict[str, str]:
    """Return the plots, by their path in the site, each for light and for dark pages."""
    plots = {
        "loss": _loss(results),
        "attention": _bars(results.latest().select(device=XEON, operator="attention"), "seconds", "s"),
        "step": _bars(results.latest().select(device=XEON, operator="step", case=_STEP), "seconds", "s"),
        "images": _bars(
            results.latest().select(device=XEON, operator="images", num_threads=1), "times_pillow", "times Pillow"
        ),
        "loader": _bars(results.latest().select(device=XEON, operator="loader"), "samples_per_second", "samples/s"),
    }
    return {
        f"plots/{name}-{theme}.svg": draw.draw(size, paint, f"benchmark {name}", theme)
        for name, (size, paint) in plots.items()
        for theme in draw.THEMES
    }


def _loss(results: Results) -> tuple[tuple[float, float], Any]:
    curves = [draw.loss_curves(results, XEON, dtype) for dtype in ("float32", "bfloat16")]

    def paint(figure: Any) -> None:
        for axes, curve, dtype in zip(figure.subplots(2, 2), curves, ("fp32", "bf16"), strict=True):
            for axis, column, label in zip(axes, (1, 2), ("memory, MB", "time, s"), strict=True):
                draw.plot_curves(axis, curve, column)
                axis.set_title(f"{label}, {dtype}", loc="left", fontsize=10)
        axes[1].legend(frameon=False, fontsize=8)

    return (7.0, 5.0), paint


def _bars(results: Results, column: str, label: str) -> tuple[tuple[float, float], Any]:
    groups = [(case, [row for row in rows.rows if row.get(column) is not None]) for case, rows in results.cases()]
    num_bars = sum(len(rows) for _, rows in groups)

    def paint(figure: Any) -> None:
        axes = figure.subplots(len(groups), 1, height_ratios=[len(rows) + 1.2 for _, rows in groups], squeeze=False)
        for axis, (case, rows) in zip(axes[:, 0], groups, strict=True):
            names = [row["contender"] for row in rows]
            colors = [draw.OURS if "ours" in name or name.startswith("+") else draw.GREY for name in names]
            bars = axis.barh(range(len(rows)), [row[column] for row in rows], color=colors, tick_label=names)
            axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.set_title(case, loc="left", fontsize=9)
        axis.set_xlabel(label)

    return (7.0, 0.27 * num_bars + 0.62 * len(groups) + 0.4), paint


def page(results: Results) -> str:
    """Return the page."""
    parts = [
        "# Benchmarks",
        "Every row of this page is a line of `benchmarks/results/*.jsonl`. If a case was measured several times, the\n"
        "newest row counts. Contenders of a case ran in one process on the same inputs. [Results](results.md) has the\n"
        "conditions and the conclusions. **No GPU has been measured**: [bounds](bounds.md) are computed.",
    ]
    titles = {
        "loss": ("Contrastive loss", "contrastive", _loss_table(results)),
        "attention": ("Attention", "attention", ""),
        "step": ("Training step", "step", _step_table(results)),
        "images": ("Files to 224 x 224 pixels", "images", ""),
        "loader": ("Shards to batches", "loader", ""),
    }
    for name, (title, operator, rows) in titles.items():
        parts += [f"## {title}", _conditions(results.latest().select(device=XEON, operator=operator))]
        for theme in draw.THEMES:
            parts.append(f":::{{image}} plots/{name}-{theme}.svg\n:alt: {title}\n:class: only-{theme}\n:::")
        parts.append(rows)
    parts += [
        "## Beside other processes",
        _conditions(results.latest().select(operator="busy")),
        "Share of the idle speed that remains. `left` is the share of the cores that remains.",
        _busy_table(results),
        _SUBMIT,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_SUBMIT = """## Submit a row

Measurements of other machines are welcome, GPUs above all.

1. Clone the repository, and let nothing else run on the machine.
2. On a CPU, run `bclip bench contrastive --record`, or any other benchmark. On a GPU, run `make gpu`, which takes nine
   minutes.
3. The command appends lines to `benchmarks/results/DEVICE.jsonl`. Each line holds device, threads, versions, commit and
   date. Don't edit them.
4. Run `make readme`, and send a pull request with the changed files. Say what else ran on the machine."""


def _conditions(results: Results) -> str:
    """Return the command, the machines and the dates of rows."""
    rows = results.rows
    machines = sorted({f"{row['device']}, {row['threads']} threads" for row in rows})
    dates = sorted({row["date"] for row in rows})
    commits = sorted({row["commit"].removesuffix("-dirty") for row in rows})
    until = f" to {dates[-1]}" if len(dates) > 1 else ""
    return (
        f"`{_HOW[rows[0]['operator']]}` · {'; '.join(machines)} · torch {rows[-1]['torch']} · {dates[0]}{until} · "
        f"commits {', '.join(commits)}"
    )


def _loss_table(results: Results) -> str:
    rows = results.latest().select(device=XEON, operator="contrastive", case="clip-*").rows
    rows.sort(key=lambda row: (row["dtype"], row["batch"], row["contender"]))
    cells = [
        [
            str(row["batch"]),
            row["dtype"],
            row["contender"],
            seconds(row["seconds"]),
            megabytes(row),
            f"{row['error']:.1e}",
        ]
        for row in rows
    ]
    return table(["B", "dtype", "contender", "time", "memory beyond the inputs", "error against float64"], cells)


def _step_table(results: Results) -> str:
    def cells(row: Row) -> list[str]:
        parts = [seconds(row[f"{part}_seconds"]) for part in draw.PARTS]
        return [row["contender"], seconds(row["seconds"]), *parts, f"{row['speedup']:.2f}x"]

    rows = results.latest().select(device=XEON, operator="step", case=_STEP).rows
    headings = ["contender", "step", "forward and loss", "backward", "optimiser", "speed"]
    return table(headings, [cells(row) for row in rows if "speedup" in row])


def _busy_table(results: Results) -> str:
    rows = results.latest().select(operator="busy", contender="bclip").rows
    torch = {row["case"]: row for row in results.latest().select(operator="busy", contender="torch").rows}
    cells = [
        [row["case"], f"{row['left']:.0%}", f"{row['of_idle']:.0%}", f"{torch[row['case']]['of_idle']:.0%}"]
        for row in rows
    ]
    return table(["case", "left", "ours", "torch's wait policy"], cells)
