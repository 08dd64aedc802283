"""Panels of composite figures: captions by rule, layouts by drawing, both on composites labelled by eye."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_ingest import article, put

from bclip_fast.ingest.build import IngestConfig, build
from bclip_fast.ingest.panels import layout, split_caption, split_panels


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("Cells. (a) Control. (b) Treated.", {"A": "Cells. Control.", "B": "Cells. Treated."}),
        ("(A) One; (B) two; and (C) three.", {"A": "One", "B": "two", "C": "three."}),
        ("Scans. (A, B) CT. (C) MRI.", {"A": "Scans. CT.", "B": "Scans. CT.", "C": "Scans. MRI."}),
        ("(A-C) Growth. (D) Decay.", {"A": "Growth.", "B": "Growth.", "C": "Growth.", "D": "Decay."}),
        ("(a and b) Growth. (c to d) Decay.", {"A": "Growth.", "B": "Growth.", "C": "Decay.", "D": "Decay."}),
        ("A, heart; B, lung.", {"A": "heart", "B": "lung."}),
        ("A. Heart. B. Lung as in A. only", {"A": "Heart.", "B": "Lung as in A. only"}),
        ("Views. Left: axial. Right: sagittal.", {"left": "Views. axial.", "right": "Views. sagittal."}),
        ("Top panel: raw. Bottom panel: filtered.", {"top": "raw.", "bottom": "filtered."}),
        # Labels behind their text, out of order, with a gap, repeated, or without text of their own.
        ("A cell (a) and a nucleus (b).", {}),
        ("Cells. (b) One. (a) Two.", {}),
        ("Cells. (a) One. (c) Two.", {}),
        ("Cells. (a) One.", {}),
        ("Cells. (a) One. (b) 12.", {}),
        ("Left: one. Left: two.", {}),
        ("No labels at all, in vitamin A, say.", {}),
        ("", {}),
    ],
)
def test_captions_are_split_where_one_style_explains_them(caption, expected):
    assert split_caption(caption) == expected


def drawn(
    boxes: list[tuple[int, int, int, int]], size: tuple[int, int] = (600, 400), background: int = 255
) -> Image.Image:
    pixels = np.full((size[1], size[0], 3), background, np.uint8)
    rng = np.random.default_rng(0)
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = rng.integers(60, 200, (bottom - top, right - left, 3))
    return Image.fromarray(pixels)


Box = tuple[int, int, int, int]
ROW = [(10, 10, 190, 380), (210, 10, 390, 380), (410, 10, 590, 380)]
GRID = [(10, 10, 290, 190), (310, 10, 590, 190), (10, 210, 290, 390), (310, 210, 590, 390)]
SHORT = [*GRID[:2], (160, 210, 440, 390)]


def is_around(found: list[Box], boxes: list[Box]) -> bool:
    """Whether each box holds its panel, and no more of the figure than half a gap."""
    margin = (np.array(boxes) - np.array(found)) * [1, 1, -1, -1]
    return bool((margin >= -1).all() and (margin <= 10).all())


@pytest.mark.parametrize("background", [255, 0])
@pytest.mark.parametrize("boxes", [ROW, GRID, SHORT, GRID[:2]])
def test_layouts_with_clear_gaps_are_found(boxes, background):
    labels = list("ABCD"[: len(boxes)])
    found = layout(drawn(boxes, background=background), labels)
    assert len(found) == len(boxes) and is_around(found, boxes)


@pytest.mark.parametrize(
    "boxes, labels",
    [
        (GRID, "ABC"),
        (ROW, "AB"),
        (ROW, "ABCD"),
        ([(10, 10, 590, 390)], "AB"),
        ([], "AB"),
        ([(10, 10, 500, 390), (520, 10, 590, 100)], "AB"),  # an inset or a legend
        ([(10, 10, 200, 190), (220, 10, 590, 190), (10, 210, 380, 390), (400, 210, 590, 390)], "ABCD"),
        (GRID[:1] + GRID[2:], "ABC"),  # one above, two below
    ],
)
def test_layouts_in_doubt_give_nothing(boxes, labels):
    assert layout(drawn(boxes), list(labels)) == []


def test_places_need_the_layout_they_name():
    assert len(layout(drawn(GRID[:2]), ["left", "right"])) == 2
    assert layout(drawn(GRID[:2]), ["top", "bottom"]) == []
    assert len(layout(drawn([GRID[0], GRID[2]]), ["upper", "lower"])) == 2
    assert layout(drawn(GRID[:2]), ["right", "left"]) == []


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_panels_become_pairs_beside_the_whole_figure(tmp_path):
    xml = article(("f", "Cells. (a) Control. (b) Treated."), ("g", "No labels."), number=5)
    put(tmp_path / "in", {"x.nxml": xml, "f.png": encoded(drawn(GRID[:2])), "g.png": encoded(drawn(GRID))})
    config = IngestConfig(str(tmp_path / "in"), tmp_path / "out", workers=1, panels=True, max_short_side=0)
    build(config)
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "out/manifest.parquet").to_pylist()}
    assert sorted(rows) == ["PMC5_f1", "PMC5_f1_pA", "PMC5_f1_pB", "PMC5_f2"]
    assert rows["PMC5_f1"]["caption"] == "Cells. (a) Control. (b) Treated." and rows["PMC5_f1"]["panel"] is None
    panel = rows["PMC5_f1_pB"]
    assert (panel["panel"], panel["caption"], panel["figure"]) == ("B", "Cells. Treated.", "F1")
    left, top, right, bottom = json.loads(panel["panel_box"])
    assert is_around([(left, top, right, bottom)], [GRID[1]])
    assert (panel["width"], panel["height"]) == (right - left, bottom - top)


def overlap(one: tuple[int, ...], two: tuple[int, ...]) -> float:
    """Intersection over union."""
    sides = [max(0, min(one[i + 2], two[i + 2]) - max(one[i], two[i])) for i in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])


def test_precision_and_recall_on_labelled_composites(shared_data):
    """50 figures whose captions name panels, drawn by chance. How many panels each has, and whether a panel that was
    found is the one its letter names, was judged by eye; a box that nobody judged counts as wrong."""
    folder = shared_data / "pmc_articles"
    captions = {row["image"]: row["caption"] for row in map(json.loads, (folder / "pairs.jsonl").open())}
    emitted = right = there = 0
    for row in json.loads((Path(__file__).with_name("panels.json")).read_text()):
        there += len(row["panels"])
        for panel in split_panels((folder / row["image"]).read_bytes(), captions[row["image"]]):
            emitted += 1
            box = row["boxes"].get(panel.label)
            right += box is not None and overlap(panel.box, box) > 0.7
    print(f"{right} of {emitted} right (precision {right / emitted:.3f}), {there} panels (recall {right / there:.3f})")
    assert there == 185 and right / emitted >= 0.9 and right / there >= 0.2
