"""Panels of composite figures against labels: python -m bclip_fast.benchmarks.panels DATA [options]

DATA holds the images and `pairs.jsonl` with their captions. The program prints precision and recall by set and by
layout, and why panels are missed. A panel is right if its box overlaps the labelled one by at least 0.7 (intersection
over union), and if its part of the caption has at least 90 % of the words that belong to the panel, and none that
belong to other panels only.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

LABELS = Path("tests/ingest/panels.json")
MIN_OVERLAP = 0.7
MIN_COVERAGE = 0.9
_PICTURE_COLUMNS, _CELL = 5, (320, 330)


@dataclass(frozen=True)
class Result:
    """What became of one panel, labelled or emitted.

    Attributes:
        group, layout: the set and the layout of the figure's labels.
        outcome: "right", "wrong box", "wrong text", "not labelled", or, without a box, why the panel is missed.
        box, text: of the emitted panel.
    """

    group: str
    layout: str
    image: str
    label: str
    outcome: str
    box: tuple[int, int, int, int] | None = None
    text: str = ""

    @property
    def is_labelled(self) -> bool:
        """Whether the panel counts for the recall."""
        return self.outcome != "not labelled"


def read_labels(path: Path) -> list[dict[str, Any]]:
    """Return the labelled figures: set, image, layout, and panels with label, box and spans of the caption."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_captions(folder: Path) -> dict[str, str]:
    """Return the caption of each image in `pairs.jsonl`."""
    with (folder / "pairs.jsonl").open(encoding="utf-8") as lines:
        return {row["image"]: row["caption"] for row in map(json.loads, lines)}


def measure(folder: Path, figures: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Return what became of each panel of labelled figures."""
    captions = read_captions(folder)
    return [result for row in figures for result in _measure_figure(folder, row, captions[row["image"]])]


def _measure_figure(folder: Path, row: Mapping[str, Any], caption: str) -> list[Result]:
    from bclip_fast.ingest.panels import caption_parts, split_panels

    emitted = {panel.label: panel for panel in split_panels((folder / row["image"]).read_bytes(), caption)}
    parts = {part.label: part for part in caption_parts(caption)}
    labelled = {panel["label"]: panel for panel in row["panels"]}
    results = []
    for label in dict.fromkeys([*labelled, *emitted]):
        common = row["set"], row["layout"], row["image"], label
        if label in emitted:
            panel = emitted[label]
            outcome = _judge(panel.box, panel.spans, label, labelled, caption)
            results.append(Result(*common, outcome, panel.box, panel.caption))
        elif label not in parts:
            results.append(Result(*common, "not in the caption's labels"))
        elif not parts[label].is_certain:
            results.append(Result(*common, "caption in doubt"))
        else:
            results.append(Result(*common, "letters or layout in doubt"))
    return results


def _judge(
    box: tuple[int, ...],
    spans: Iterable[tuple[int, int]],
    label: str,
    labelled: Mapping[str, Mapping[str, Any]],
    caption: str,
) -> str:
    if label not in labelled:
        return "not labelled"
    panel = labelled[label]
    if not panel["box"] or _overlap(box, panel["box"]) < MIN_OVERLAP:
        return "wrong box"
    emitted, own = _characters(spans, caption), _characters(panel["text"], caption)
    others = [_characters(other["text"], caption) for name, other in labelled.items() if name != label]
    foreign = set().union(*others) - own
    return "right" if len(emitted & own) >= MIN_COVERAGE * len(own) > 0 and not emitted & foreign else "wrong text"


def _characters(spans: Iterable[Iterable[int]], caption: str) -> set[int]:
    """Return the positions of the letters and digits of spans."""
    return {at for start, end in spans for at in range(start, end) if caption[at].isalnum()}


def _overlap(one: tuple[int, ...], two: tuple[int, ...]) -> float:
    """Return the intersection over union."""
    sides = [max(0, min(one[i + 2], two[i + 2]) - max(one[i], two[i])) for i in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])


def precision_and_recall(results: Iterable[Result]) -> tuple[float, float, int, int, int]:
    """Return precision, recall, and the numbers of right, emitted and labelled panels."""
    outcomes = list(results)
    num_right = sum(result.outcome == "right" for result in outcomes)
    num_emitted = sum(result.box is not None for result in outcomes)
    num_labelled = sum(result.is_labelled for result in outcomes)
    return num_right / max(1, num_emitted), num_right / max(1, num_labelled), num_right, num_emitted, num_labelled


def draw(folder: Path, results: Iterable[Result], path: Path, *, count: int = 20, seed: int = 0) -> None:
    """Draw emitted panels, chosen at random, with label and caption part."""
    emitted = [result for result in results if result.box is not None]
    chosen = random.Random(seed).sample(emitted, min(count, len(emitted)))
    rows = -(-len(chosen) // _PICTURE_COLUMNS)
    sheet = Image.new("RGB", (_PICTURE_COLUMNS * _CELL[0], rows * _CELL[1]), "white")
    canvas = ImageDraw.Draw(sheet)
    for index, result in enumerate(chosen):
        left, top = index % _PICTURE_COLUMNS * _CELL[0], index // _PICTURE_COLUMNS * _CELL[1]
        with Image.open(folder / result.image) as image:
            panel = image.convert("RGB").crop(result.box)
        panel.thumbnail((_CELL[0] - 10, _CELL[1] - 100))
        sheet.paste(panel, (left, top))
        text = f"{result.label} ({result.outcome}): {result.text}"
        lines = [text[start : start + 50] for start in range(0, min(len(text), 350), 50)]
        canvas.text((left, top + _CELL[1] - 98), "\n".join(lines), fill="black")
    sheet.save(path)


def convert(source: Path, target: Path, group: str) -> int:
    """Write labels of a set into `target` without their captions, and return the number of figures.

    Args:
        source: a list of figures with image, figure, layout and panels.
        target: the figures of other sets in it stay.
    """
    figures = [row for row in read_labels(target) if row["set"] != group] if target.exists() else []
    added = json.loads(source.read_text(encoding="utf-8"))
    for row in added:
        panels = [
            {"label": panel["label"], "box": [round(value) for value in panel["box"]], "text": panel["text"]}
            for panel in row["panels"]
        ]
        place = {"set": group, "image": row["image"], "figure": row["figure"], "layout": row["layout"]}
        figures.append(place | {"panels": panels})
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in figures)
    target.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return len(added)


def _print_table(results: list[Result]) -> None:
    print(f"{'set':8}{'layout':12}{'right':>7}{'emitted':>9}{'labelled':>10}{'precision':>11}{'recall':>8}")
    for group in dict.fromkeys(result.group for result in results):
        of_group = [result for result in results if result.group == group]
        for layout in ("", *sorted({result.layout for result in of_group})):
            chosen = [result for result in of_group if layout in ("", result.layout)]
            precision, recall, right, emitted, labelled = precision_and_recall(chosen)
            name = layout or "all"
            print(f"{group:8}{name:12}{right:7}{emitted:9}{labelled:10}{precision:11.3f}{recall:8.3f}")
    print()
    for outcome, number in Counter(result.outcome for result in results).most_common():
        print(f"{number:6} {outcome}")
    for result in results:
        if result.box is not None and result.outcome != "right":
            print(f"{result.outcome}: {result.image} {result.label}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with the images and pairs.jsonl")
    parser.add_argument("--labels", type=Path, default=LABELS, help=f"labels (default: {LABELS})")
    parser.add_argument("--sets", nargs="*", help="only these sets of the labels")
    parser.add_argument("--picture", type=Path, help="draw emitted panels at random into this file")
    parser.add_argument("--count", type=int, default=20, help="number of panels in the picture")
    parser.add_argument("--seed", type=int, default=0, help="of the panels in the picture")
    parser.add_argument("--convert", nargs=2, metavar=("FILE", "SET"), help="add labels to --labels, and end")
    options = parser.parse_args()
    if options.convert:
        source, group = options.convert
        print(f"{convert(Path(source), options.labels, group)} figures of the set {group} in {options.labels}")
        return
    figures = [row for row in read_labels(options.labels) if not options.sets or row["set"] in options.sets]
    results = measure(options.data, figures)
    _print_table(results)
    if options.picture:
        draw(options.data, results, options.picture, count=options.count, seed=options.seed)


if __name__ == "__main__":
    main()
