"""Figures as SVG files whose bytes depend only on the data and on matplotlib's release."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from .results import Results

# Colours of the lines and bars, from Okabe and Ito 2008. They differ for colour-blind readers, too.
OURS, OPEN_CLIP, COMPILED, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
# Parts of a step: the prefix of their columns, the label and the colour.
PARTS = {
    "forward": ("forward and loss", "#56B4E9"),
    "backward": ("backward", "#0072B2"),
    "optimizer": ("optimiser", "#E69F00"),
}
STYLES = {"ours:cpu": (OURS, "o", "-"), "open_clip": (OPEN_CLIP, "s", "--"), "open_clip compiled": (COMPILED, "^", ":")}
LABELS = {"ours:cpu": "bclip_fast", "ours": "bclip_fast"}
THEMES = {"light": ("white", "#1a1a1a"), "dark": ("#131416", "#e6e6e6")}


def draw(size: tuple[float, float], paint: Callable[[Any], None], description: str, theme: str = "light") -> str:
    """Return an SVG. `paint` draws on the matplotlib figure that it receives. size: width and height in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    background, ink = THEMES[theme]
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = dict.fromkeys(inks, ink) | {"svg.hashsalt": "bclip_fast", "font.size": 9, "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        figure = pyplot.figure(figsize=size, layout="constrained", facecolor=background)
        paint(figure)
        for axis in figure.axes:
            axis.set_facecolor(background)
            axis.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        creator = f"matplotlib {matplotlib.__version__}"
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": creator, "Description": description})
        pyplot.close(figure)
    # matplotlib leaves spaces at the ends of lines.
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def loss_and_step(results: Results) -> tuple[list[Any], Callable[[Any], None]]:
    """Return the numbers of README's figure, and the function that draws them."""
    curves = loss_curves(results, "Intel(R) Xeon(R) Processor")
    step = [(LABELS.get(name, name), step_parts(results, name)) for name in ("open_clip", "ours")]

    def paint(figure: Any) -> None:
        memory, time, bars = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
        for axis, column, label in ((memory, 1, "memory beyond the inputs, MB"), (time, 2, "forward and backward, s")):
            plot_curves(axis, curves, column)
            axis.set_ylabel(label)
            axis.set_xlabel("pairs in the batch, B")
        memory.set_title("Memory of the loss, fp32", loc="left", fontsize=10, fontweight="bold")
        time.set_title("Time of the loss, fp32", loc="left", fontsize=10, fontweight="bold")
        time.legend(frameon=False, fontsize=8, loc="upper left")
        stacked_bars(bars, step)
        bars.set_title("Training step, 16 pairs", loc="left", fontsize=10, fontweight="bold")

    return [curves, step], paint


def loss_curves(results: Results, device: str, dtype: str = "float32") -> dict[str, list[tuple[int, float, float]]]:
    """Return (B, MB, seconds) of each contender, from the newest rows of `bclip bench contrastive`."""
    rows = results.latest().select(device=device, operator="contrastive", case="clip-*", dtype=dtype).rows
    curves = {}
    for name in STYLES:
        points = [row for row in rows if row["contender"] == name]
        points.sort(key=lambda row: row["batch"])
        curves[name] = [(row["batch"], round(row["extra_bytes"] / 1e6, 1), round(row["seconds"], 4)) for row in points]
    return curves


def plot_curves(axis: Any, curves: dict[str, list[tuple[int, float, float]]], column: int) -> None:
    """Draw one quantity of each contender against the batch, on logarithmic axes."""
    for name, points in curves.items():
        color, marker, line = STYLES[name]
        batches, values = [point[0] for point in points], [point[column] for point in points]
        axis.loglog(batches, values, color=color, marker=marker, linestyle=line, label=LABELS.get(name, name))
    axis.set_xscale("log", base=2)
    batches = sorted({point[0] for points in curves.values() for point in points})
    axis.set_xticks(batches, [f"{batch // 1024}k" for batch in batches])
    axis.minorticks_off()
    axis.grid(alpha=0.25)


def step_parts(results: Results, contender: str) -> dict[str, float]:
    """Return the seconds of each part of a training step with the published dropout."""
    row = results.row(operator="step", case="biomedclip_b16-16-bf16-dropout-0.1", contender=contender)
    return {name: round(row[f"{name}_seconds"], 3) for name in PARTS}


def stacked_bars(axis: Any, bars: Sequence[tuple[str, dict[str, float]]]) -> None:
    """Draw a bar for each contender, from the seconds of its parts."""
    names = [name for name, _ in bars]
    bottom = [0.0] * len(bars)
    for part, (label, color) in PARTS.items():
        values = [parts[part] for _, parts in bars]
        axis.bar(names, values, bottom=bottom, color=color, width=0.55, label=label)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    for index, total in enumerate(bottom):
        axis.text(index, total, f"{total:.1f} s", ha="center", va="bottom")
    axis.set_ylabel("seconds")
    axis.margins(y=0.12)
    axis.legend(frameon=False, fontsize=8)
