"""README's generated parts: the figure, its caption, and the claims."""

from __future__ import annotations

import re
from pathlib import Path

from . import figures
from .results import ROOT, Results, Row, load, megabytes, seconds

README = ROOT / "README.md"
FIGURE = ROOT / "docs/figures/loss-and-step.svg"
XEON = "Intel(R) Xeon(R) Processor"
_STEP = dict(device=XEON, operator="step", case="biomedclip_b16-16-bf16-dropout-0.1")
_IMAGES = dict(device=XEON, operator="images", num_threads=1)


def write() -> list[Path]:
    """Write README's generated parts and its figure. Returns the files."""
    results = load()
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(figure(results), encoding="utf-8")
    README.write_text(filled(README.read_text(encoding="utf-8"), results), encoding="utf-8")
    return [README, FIGURE]


def figure(results: Results) -> str:
    """Return the SVG. Its description holds the numbers, so a test can compare them under any matplotlib."""
    numbers, paint = figures.loss_and_step(results)
    return figures.draw((9.0, 3.1), paint, repr(numbers))


def filled(text: str, results: Results) -> str:
    """Return README with its blocks `<!-- generated: NAME -->` with new content.

    Raises:
        KeyError: a block has an unknown name.
    """
    blocks = {"caption": caption, "claims": claims}
    pattern = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{blocks[match[2]](results)}\n{match[3]}", text)


def machine(row: Row) -> str:
    """Return the machine and the date of a row."""
    return f"{row['threads']} cores of an {row['device']}, torch {row['torch'].partition('+')[0]}, {row['date']}"


def caption(results: Results) -> str:
    """Return the figure's caption, which also names the machine, date and commands of the claims."""
    loss, step = _loss(results, "ours:cpu"), results.row(**_STEP, contender="ours")
    images = results.row(**_IMAGES, contender="ours exact")
    assert machine(loss) == machine(step), "the panels show different machines; the caption names only one"
    assert images["date"] == loss["date"], "the claims are of different days; the caption names only one"
    return (
        f"*Figure and claims: {machine(loss)}, no GPU. Lower is better.\n"
        "By `bclip bench contrastive`, `step`, `images`. Left, middle: D = 512. "
        "Right: ViT-B/16, BERT-base, bf16, dropout 0.1.*"
    )


def claims(results: Results) -> str:
    """Return the three claims with their numbers and links."""
    ours, rival = _loss(results, "ours:cpu"), _loss(results, "open_clip")
    step, rival_step = (results.row(**_STEP, contender=name) for name in ("ours", "open_clip"))
    exact, pillow = (results.row(**_IMAGES, contender=name) for name in ("ours exact", "Pillow"))
    assert exact["mean_error"] == 0, "the claim says that the pixels are equal"
    return "\n".join(
        [
            f"- **The loss takes {rival['extra_bytes'] / ours['extra_bytes']:.0f} times less memory.** "
            f"{ours['batch']} pairs in fp32: {megabytes(ours)} beyond the inputs,",
            f"  against {megabytes(rival)} of open_clip, in {ours['seconds'] / rival['seconds']:.2f} of its time. "
            "[Contrastive loss](docs/results.md#contrastive-loss)",
            f"- **A training step is {step['speedup']:.1f} times as fast.** {seconds(step['seconds'])} against "
            f"{seconds(rival_step['seconds'])} of open_clip.",
            "  Captions carry no padding, and attention, linear layers and norms have kernels. "
            "[Training step](docs/results.md#training-step)",
            f"- **Images decode {exact['times_pillow']:.1f} times as fast as with Pillow, to the same bits.** "
            f"{_rate(exact)} files/s on one thread,",
            f"  against {_rate(pillow)}. [Decoding](docs/results.md#loader-and-decoding)",
        ]
    )


def _loss(results: Results, contender: str) -> Row:
    return results.row(device=XEON, operator="contrastive", case="clip-8192-float32", contender=contender)


def _rate(row: Row) -> str:
    return f"{row['num_units'] / row['seconds']:.0f}"
