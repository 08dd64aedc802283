"""Panels of composite figures: rules for captions, drawn layouts, and precision on composites labelled by eye."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from articles import article_xml, encode_image, manifest_rows, write_files
from PIL import Image, ImageDraw, ImageFont

from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.ingest.panels import layout, split_caption, split_panels


@pytest.mark.parametrize(
    ("caption", "expected"),
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
        # Labels after their text, out of order, with a gap, repeated, or without text.
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
def test_split_caption_needs_one_style_of_labels(caption, expected):
    assert split_caption(caption) == expected


def draw_panels(
    boxes: list[tuple[int, int, int, int]],
    size: tuple[int, int] = (600, 400),
    background: int = 255,
    letters: str = "",
    place: tuple[int, int] = (18, 16),
    style: str = "{}",
) -> Image.Image:
    """Draw panels of noise. Each letter stands on a white patch of its panel, at `place` from its corner."""
    pixels = np.full((size[1], size[0], 3), background, np.uint8)
    rng = np.random.default_rng(0)
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = rng.integers(120, 180, (bottom - top, right - left, 3))
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for letter, (left, top, _, _) in zip(letters, boxes, strict=False):
        x, y = left + place[0], top + place[1]
        draw.rectangle((x - 4, y - 4, x + 44, y + 30), fill="white")
        draw.text((x, y), style.format(letter), fill="black", font=ImageFont.load_default(24))
    return image


Box = tuple[int, int, int, int]
ROW = [(10, 10, 190, 380), (210, 10, 390, 380), (410, 10, 590, 380)]
GRID = [(10, 10, 290, 190), (310, 10, 590, 190), (10, 210, 290, 390), (310, 210, 590, 390)]
SHORT = [*GRID[:2], (160, 210, 440, 390)]


def assert_around(boxes: list[Box], panels: list[Box]) -> None:
    """Check that each box contains its panel, and at most half a gap around it."""
    margin = (np.array(panels) - np.array(boxes)) * [1, 1, -1, -1]
    assert margin.min() >= -1
    assert margin.max() <= 10


@pytest.mark.parametrize("background", [255, 0])
@pytest.mark.parametrize("boxes", [ROW, GRID, SHORT, GRID[:2]])
def test_layout_clear_gaps_give_boxes(boxes, background):
    letters = "ABCD"[: len(boxes)]
    assert_around(layout(draw_panels(boxes, background=background, letters=letters), list(letters)), boxes)


SIX = [(x, y, x + 180, y + 180) for y in (10, 210) for x in (10, 210, 410)]
LEFT_LAST = GRID[:3]


@pytest.mark.parametrize(
    ("boxes", "letters", "options"),
    [
        (SIX, "ACEBDF", {}),
        (SIX, "ABCDEF", {}),
        (GRID, "ACBD", {"place": (240, 150)}),
        (GRID, "ABCD", {"style": "({})"}),
        (GRID, "acbd", {"style": "{}."}),
        (LEFT_LAST, "ABC", {}),
        (LEFT_LAST, "ACB", {}),
    ],
)
def test_layout_follows_the_printed_letters_of_a_grid(boxes, letters, options):
    labels = sorted(letters.upper())
    expected = [box for _, box in sorted(zip(letters.upper(), boxes, strict=True))]
    assert_around(layout(draw_panels(boxes, letters=letters, **options), labels), expected)


@pytest.mark.parametrize("letters", ["", "ABDC", "A", "AB", "WXYZ"])
def test_layout_of_a_grid_without_clear_letters_gives_no_boxes(letters):
    assert layout(draw_panels(GRID, letters=letters), list("ABCD")) == []


@pytest.mark.parametrize(
    ("boxes", "labels"),
    [
        (GRID, "ABC"),
        (ROW, "AB"),
        (ROW, "ABCD"),
        ([(10, 10, 590, 390)], "AB"),
        ([], "AB"),
        (SIX, "ABCDEF"),  # without printed letters, they may run along the rows or down the columns
        ([(10, 10, 500, 390), (520, 10, 590, 100)], "AB"),  # an inset or a legend
        ([(10, 10, 200, 190), (220, 10, 590, 190), (10, 210, 380, 390), (400, 210, 590, 390)], "ABCD"),
        (GRID[:1] + GRID[2:], "ABC"),  # one above, two below
    ],
)
def test_layout_unclear_gives_no_boxes(boxes, labels):
    assert layout(draw_panels(boxes), list(labels)) == []


def test_layout_must_fit_labels_that_name_positions():
    assert len(layout(draw_panels(GRID[:2]), ["left", "right"])) == 2
    assert layout(draw_panels(GRID[:2]), ["top", "bottom"]) == []
    assert len(layout(draw_panels([GRID[0], GRID[2]]), ["upper", "lower"])) == 2
    assert layout(draw_panels(GRID[:2]), ["right", "left"]) == []


def test_build_panels_become_pairs_in_addition_to_the_figure(tmp_path):
    xml = article_xml(("f", "Cells. (a) Control. (b) Treated."), ("g", "No labels."), number=5)
    images = {"f.png": draw_panels(GRID[:2]), "g.png": draw_panels(GRID)}
    files = {name: encode_image(image, "PNG") for name, image in images.items()}
    write_files(tmp_path / "in", {"x.nxml": xml, **files})
    config = IngestConfig(str(tmp_path / "in"), tmp_path / "out", workers=1, panels=True, max_short_side=0)
    build(config)
    rows = manifest_rows(tmp_path / "out")
    assert sorted(rows) == ["PMC5_f1", "PMC5_f1_pA", "PMC5_f1_pB", "PMC5_f2"]
    assert rows["PMC5_f1"]["caption"] == "Cells. (a) Control. (b) Treated."
    assert rows["PMC5_f1"]["panel"] is None
    panel = rows["PMC5_f1_pB"]
    assert (panel["panel"], panel["caption"], panel["figure"]) == ("B", "Cells. Treated.", "F1")
    left, top, right, bottom = json.loads(panel["panel_box"])
    assert_around([(left, top, right, bottom)], [GRID[1]])
    assert (panel["width"], panel["height"]) == (right - left, bottom - top)


def overlap(one: tuple[int, ...], two: tuple[int, ...]) -> float:
    """Return the intersection over union."""
    sides = [max(0, min(one[i + 2], two[i + 2]) - max(one[i], two[i])) for i in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])


def test_split_panels_labelled_composites_precision_and_recall(shared_data):
    """The data are 50 random figures whose captions name panels.

    A person counted the panels of each figure, and judged whether each box shows the panel of its letter. A box without
    a judgement counts as wrong.
    """
    folder = shared_data / "pmc_articles"
    captions = {row["image"]: row["caption"] for row in map(json.loads, (folder / "pairs.jsonl").open())}
    num_boxes = num_right = num_panels = 0
    for row in json.loads((Path(__file__).with_name("panels.json")).read_text()):
        num_panels += len(row["panels"])
        for panel in split_panels((folder / row["image"]).read_bytes(), captions[row["image"]]):
            num_boxes += 1
            box = row["boxes"].get(panel.label)
            num_right += box is not None and overlap(panel.box, box) > 0.7
    precision, recall = num_right / num_boxes, num_right / num_panels
    print(f"{num_right} of {num_boxes} boxes are right ({precision=:.3f}), {num_panels} panels ({recall=:.3f})")
    assert num_panels == 185
    assert precision >= 0.9
    assert recall >= 0.2
