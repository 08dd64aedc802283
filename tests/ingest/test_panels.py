"""Panels of composite figures: rules for captions, drawn layouts, and precision on composites labelled by eye."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from articles import article_xml, encode_image, manifest_rows, write_articles, write_files
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import load_file

from bclip_fast.benchmarks import panels as panel_benchmark
from bclip_fast.data.shards.positives import group_ids
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.ingest.panels import caption_parts, glyphs, layout, match_panels, split_caption
from bclip_fast.ingest.panels.regions import overlap


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
        ("A) Heart B) Lung", {"A": "Heart", "B": "Lung"}),
        ("Survival. a Overall; b free of relapse", {"A": "Survival. Overall", "B": "Survival. free of relapse"}),
        ("Panel (a) shows a cell. (b) shows a clique.", {"A": "shows a cell.", "B": "shows a clique."}),
        # Labels after their text.
        ("A cell (a) and a nucleus (b).", {"A": "A cell", "B": "a nucleus"}),
        ("Axial (a) and coronal (b) CT of E. coli.", {"A": "Axial CT of E. coli.", "B": "coronal CT of E. coli."}),
        ("Spectra of tea (A); milk (B); and rum (C).", {"A": "Spectra of tea", "B": "milk", "C": "and rum"}),
        ("A cell (left). A nucleus (right).", {"left": "A cell", "right": "A nucleus"}),
        # Groups, references to other panels, two kinds of labels, and sentences about all panels.
        (
            "(A-B) Counts of (A) cells and (B) nuclei. (C) Sizes of those in (A).",
            {"A": "Counts of cells", "B": "Counts of nuclei.", "C": "Sizes of those in (A)."},
        ),
        (
            "Oxygen (A) without drug (a) or with it (b); water (B) alone.",
            {"A": "Oxygen without drug (a) or with it (b)", "B": "water alone."},
        ),
        (
            "(A) Blot of nuclear (N) and other (C) parts. (B) Cells.",
            {"A": "Blot of nuclear (N) and other (C) parts.", "B": "Cells."},
        ),
        (
            "(A) One. (B) Two. Scale bars: 5 mm.",
            {"A": "One. Scale bars: 5 mm.", "B": "Two. Scale bars: 5 mm."},
        ),
        # A sentence ends without a full stop, or isn't about the last label.
        ("(A) Cells in mice (B) Nuclei in rats.", {"A": "Cells in mice", "B": "Nuclei in rats."}),
        (
            "Liver. Cells are round (arrows); veins are flat (a). Cells are lost (b).",
            {"A": "Liver. Cells are round (arrows); veins are flat", "B": "Liver. Cells are lost"},
        ),
        (
            "Cells (A). Nuclei (B). One is lost (arrow in B). Walls (C).",
            {"A": "Cells", "B": "Nuclei One is lost (arrow in B).", "C": "Walls"},
        ),
        ("(a, b) Cells. Mitosis was seen in (h).", {"A": "Cells.", "B": "Cells."}),
        (
            "(A) One. (B) Two. (C) Three. Lines are means (A,B).",
            {"A": "One. Lines are means (A,B).", "B": "Two. Lines are means (A,B).", "C": "Three."},
        ),
        (
            "(a) Eye. A: disc. (b) Wall. A: nerve. B: lens.",
            {"A": "Eye. A: disc.", "B": "Wall. A: nerve. B: lens."},
        ),
        ("Strains: a one, b two, and c three.", {"A": "Strains one", "B": "Strains two", "C": "Strains three."}),
        ("Scans on both (a) T1- and (b) T2-weighting.", {"A": "Scans on both T1-", "B": "Scans on both T2-weighting."}),
        # The words at the end may belong to all.
        ("Sizes of (A) cells and (B) nuclei of mice from Java.", {"B": "Sizes of nuclei of mice from Java."}),
        # It is open which words belong to both.
        ("(A, B) Genes found for tea (A) and rum (B). (C) Other ones.", {"C": "Other ones."}),
        # Labels out of order, with a gap, repeated, or without text.
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
@pytest.mark.parametrize("boxes", [ROW, SHORT, GRID[:2]])
def test_layout_clear_gaps_give_boxes(boxes, background):
    letters = "ABCD"[: len(boxes)]
    assert_around(layout(draw_panels(boxes, background=background), list(letters)), boxes)


SIX = [(x, y, x + 180, y + 180) for y in (10, 210) for x in (10, 210, 410)]
LEFT_LAST = GRID[:3]
UNEVEN = [(10, 10, 200, 390), (220, 10, 590, 120), (220, 140, 380, 390), (400, 140, 590, 390)]


def match_boxes(image: Image.Image, labels: str, boxes: list[Box] | None = None) -> dict[str, Box]:
    return {match.label: match.box for match in match_panels(image, list(labels), boxes)}


@pytest.mark.parametrize(
    ("boxes", "letters", "options"),
    [
        (ROW, "ABC", {"background": 0}),
        (SIX, "ACEBDF", {}),
        (SIX, "ABCDEF", {}),
        (GRID, "ACBD", {"place": (240, 150)}),
        (GRID, "ABCD", {"style": "({})"}),
        (GRID, "acbd", {"style": "{}."}),
        (LEFT_LAST, "ABC", {}),
        (LEFT_LAST, "ACB", {}),
        (UNEVEN, "ABCD", {}),
        (UNEVEN, "DBAC", {}),
    ],
)
def test_match_panels_follows_the_printed_letters(boxes, letters, options):
    order = sorted(letters.upper())
    expected = [box for _, box in sorted(zip(letters.upper(), boxes, strict=True))]
    matched = match_boxes(draw_panels(boxes, letters=letters, **options), "".join(order))
    assert list(matched) == order
    assert_around(list(matched.values()), expected)


@pytest.mark.parametrize("letters", ["", "A", "AB", "WXYZ"])
def test_match_panels_of_a_grid_without_clear_letters_gives_no_boxes(letters):
    assert match_boxes(draw_panels(GRID, letters=letters), "ABCD") == {}


def test_match_panels_leaves_out_a_region_that_may_hold_two_panels():
    # The letter of the last panel is missing, so the region of B or of C also holds the last panel.
    matched = match_boxes(draw_panels(GRID, letters="ABC"), "ABCD")
    assert len(matched) == 2
    assert_around(list(matched.values()), [GRID["ABC".index(label)] for label in matched])


def test_match_panels_of_touching_pictures_cuts_at_their_edge():
    image = draw_panels([(0, 0, 300, 400)], letters="A")
    image.paste(draw_panels([(0, 0, 300, 400)], letters="B").point(lambda value: min(255, value + 75)), (300, 0))
    matched = match_boxes(image, "AB")
    assert overlap(matched["A"], (0, 0, 300, 400)) > 0.95
    assert overlap(matched["B"], (300, 0, 600, 400)) > 0.95


def test_match_panels_takes_a_candidate_box_for_a_region_in_doubt():
    # Nothing separates the two halves of this picture but the boxes of a detector.
    image = draw_panels([(0, 0, 600, 400)], letters="A")
    patch = draw_panels([(0, 0, 60, 50)], letters="B").crop((10, 8, 60, 48))
    image.paste(patch, (310, 8))
    halves = [(0, 0, 300, 400), (300, 0, 600, 400)]
    assert match_boxes(image, "AB") == {}
    assert match_boxes(image, "AB", [*halves, (0, 0, 600, 400)]) == {}
    assert match_boxes(image, "AB", halves) == dict(zip("AB", halves, strict=True))


def test_match_panels_without_letters_takes_candidate_boxes_in_a_row():
    image = draw_panels([(0, 0, 600, 400)])
    halves = [(300, 0, 600, 400), (0, 0, 300, 400)]
    assert match_boxes(image, "AB", halves) == {"A": halves[1], "B": halves[0]}
    assert match_boxes(image, "ABC", halves) == {}


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
    assert match_panels(draw_panels(boxes), list(labels)) == []


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


def test_build_panels_and_their_figure_are_positives_of_one_another(tmp_path):
    source = write_articles(tmp_path / "in", 2, have_panels=True)
    build(IngestConfig(str(source), tmp_path / "out", workers=1, panels=True, val_fraction=0, test_fraction=0))
    dataset = ShardDataset(tmp_path / "out", "train")
    groups = group_ids(dataset, "figure")
    members: dict[int, set[str]] = {}
    for index, group in enumerate(groups.tolist()):
        members.setdefault(group, set()).add(dataset[index].key)
    assert sorted(map(sorted, members.values())) == [
        ["PMC1_f1", "PMC1_f1_pA", "PMC1_f1_pB"],
        ["PMC1_f2"],
        ["PMC2_f1", "PMC2_f1_pA", "PMC2_f1_pB"],
        ["PMC2_f2"],
    ]


def test_captions_of_odd_length_take_little_time():
    for text in ("(a)", "a, ", "(A) x. ", "(a) and ", "(a, left", "panel ", "; (A"):
        start = time.perf_counter()
        caption_parts((text * 20_000)[:19_999])
        assert time.perf_counter() - start < 3, text
    assert caption_parts("(A) One. (B) Two." + "x" * 20_000) == []


LABELS = panel_benchmark.read_labels(Path(__file__).with_name("panels.json"))


@pytest.mark.parametrize(
    "group", ["some", *(pytest.param(name, marks=pytest.mark.long) for name in ("old", "dev", "final"))]
)
def test_split_panels_labelled_composites_precision_and_recall(shared_data, group):
    """The figures were chosen at random among those whose captions name panels. `docs/ingest.md` tells how they are
    labelled.
    """
    figures = [row for row in LABELS if row["set"].startswith(group)] or LABELS[::27]
    results = panel_benchmark.measure(shared_data / "pmc_articles", figures)
    precision, recall, num_right, num_emitted, num_labelled = panel_benchmark.precision_and_recall(results)
    print(f"{num_right} of {num_emitted} panels are right ({precision=:.3f}), {num_labelled} labelled ({recall=:.3f})")
    assert precision >= 0.95
    assert recall >= 0.6


def test_panel_benchmark_counts_wrong_boxes_and_texts(shared_data, tmp_path):
    rows = [row for row in LABELS if row["layout"] == "row" and all(panel["box"] for panel in row["panels"])]
    row = next(row for row in rows if len(row["panels"]) == 2)
    folder = shared_data / "pmc_articles"
    assert {result.outcome for result in panel_benchmark.measure(folder, [row])} == {"right"}
    one, two = row["panels"]
    swapped = {**row, "panels": [{**one, "box": two["box"]}, {**two, "text": one["text"]}]}
    results = panel_benchmark.measure(folder, [swapped])
    assert [result.outcome for result in results] == ["wrong box", "wrong text"]
    assert panel_benchmark.precision_and_recall(results)[:2] == (0.0, 0.0)
    panel_benchmark.draw(folder, results, tmp_path / "panels.png")
    assert Image.open(tmp_path / "panels.png").height > 300


def test_letters_are_read_with_integers():
    weights = load_file(Path(glyphs.__file__).with_name("letters.safetensors"))
    samples = np.random.default_rng(0).integers(0, 256, (64, glyphs.SIDE**2), dtype=np.uint8)
    sums = samples.astype(np.int64) @ weights["hidden.weight"].T.astype(np.int64) + weights["hidden.bias"]
    hidden = np.clip(sums >> glyphs.HIDDEN_SHIFT, 0, 256)
    exact = hidden @ weights["output.weight"].T.astype(np.int64) + weights["output.bias"]
    np.testing.assert_array_equal(glyphs.logits(samples), exact)
    assert glyphs.logits(samples).dtype == np.int64
