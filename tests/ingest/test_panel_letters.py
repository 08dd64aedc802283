"""The letters of panels are found on any ground, and have the same scores on every CPU."""

import time

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from bclip_fast.ingest.panels import glyphs
from bclip_fast.ingest.panels.letters import find_letters

_PLACES = {"A": (30, 30), "B": (430, 30), "C": (30, 330), "D": (430, 330)}


def _figure(form: str, ink: str, ground: str) -> Image.Image:
    figure = Image.new("RGB", (800, 600), ground)
    draw = ImageDraw.Draw(figure)
    for letter, (left, top) in _PLACES.items():
        text = form.replace("a", letter.lower()).replace("A", letter)
        draw.text((left, top), text, fill=ink, font=ImageFont.load_default(28))
    return figure


def _best_near(figure: Image.Image) -> dict[str, str]:
    """Return the best letter within 40 pixels of each place."""
    found = find_letters(figure, "ABCDEFGH")
    best = {}
    for name, (left, top) in _PLACES.items():
        near = [x for x in found if abs(x.box[0] - left) <= 40 and abs(x.box[1] - top) <= 40]
        best[name] = max(near, key=lambda x: x.score).letter if near else ""
    return best


@pytest.mark.parametrize(
    ("form", "ink", "ground"),
    [("A", "black", "white"), ("(a)", "black", "white"), ("a)", "black", "white"), ("A", "white", "black"),
     ("A.", "#a02020", "#f0f0f0"), ("A", "white", "#305080")],
)  # fmt: skip
def test_letters_are_found(form: str, ink: str, ground: str) -> None:
    assert _best_near(_figure(form, ink, ground)) == {name: name for name in _PLACES}


def test_letters_are_found_in_patches_on_pictures() -> None:
    rng = np.random.default_rng(0)
    figure = Image.fromarray(rng.integers(20, 110, (600, 800, 3), np.uint8))
    draw = ImageDraw.Draw(figure)
    for letter, (left, top) in _PLACES.items():
        draw.ellipse((left - 20, top - 20, left + 20, top + 20), fill="white")
        draw.text((left, top), letter, fill="black", font=ImageFont.load_default(28), anchor="mm")
    assert _best_near(figure) == {name: name for name in _PLACES}


def test_digits_of_a_small_font_may_stand_near_a_letter() -> None:
    figure = Image.new("RGB", (600, 200), "white")
    draw = ImageDraw.Draw(figure)
    draw.text((60, 60), "B", fill="black", font=ImageFont.load_default(60), anchor="ls")
    draw.text((112, 30), "0.027", fill="black", font=ImageFont.load_default(26), anchor="ls")
    assert [letter for letter in find_letters(figure, "B") if letter.height > 35]


@pytest.mark.parametrize("text", ["CAGED", "AB 12", "gene DHFB", "10 A5", "-0.8B"])
def test_letters_of_words_and_numbers_are_not_letters_of_panels(text: str) -> None:
    figure = Image.new("RGB", (600, 200), "white")
    ImageDraw.Draw(figure).text((60, 60), text, fill="black", font=ImageFont.load_default(28))
    assert not [letter for letter in find_letters(figure, "ABCDEFGH") if letter.height > 15]


def test_boxes_are_in_pixels_of_the_figure_at_any_size() -> None:
    for size in ((800, 600), (4000, 3000)):
        figure = Image.new("L", size, 255)
        font = ImageFont.load_default(size[0] // 25)
        place = size[0] // 2, size[1] // 2
        ImageDraw.Draw(figure).text(place, "B", fill=0, font=font)
        best = max(find_letters(figure, "AB"), key=lambda letter: letter.score)
        expected = Image.eval(figure, lambda value: 255 - value).getbbox()
        assert best.letter == "B"
        assert np.abs(np.subtract(best.box, expected)).max() <= 2 * size[0] / 800


def test_scores_do_not_depend_on_the_order_of_sums() -> None:
    """BLAS adds in another order on every CPU. Sums of integers below 2 ** 24 are exact in any order."""
    rng = np.random.default_rng(0)
    weights = dict(glyphs._weights())
    samples = rng.integers(0, 256, (50, glyphs.SIDE**2), np.uint8)
    samples[0] = 255
    largest = np.abs(weights["hidden.weight"].astype(np.int64)).sum(axis=1).max() * 255
    assert largest < 2**24
    hidden = samples.astype(np.int64) @ weights["hidden.weight"].T.astype(np.int64) + weights["hidden.bias"]
    hidden = np.clip(hidden >> glyphs.HIDDEN_SHIFT, 0, 256)
    exact = hidden @ weights["output.weight"].T.astype(np.int64) + weights["output.bias"]
    order = rng.permutation(glyphs.SIDE**2)
    shuffled = weights | {"hidden.weight": np.ascontiguousarray(weights["hidden.weight"][:, order])}
    assert np.array_equal(glyphs.logits(samples), exact)
    assert np.array_equal(glyphs.logits(samples[:, order], shuffled), exact)


def test_probabilities_are_integers_near_the_softmax() -> None:
    samples = np.random.default_rng(1).integers(0, 256, (50, glyphs.SIDE**2), np.uint8)
    values = glyphs.logits(samples) / int(glyphs._weights()["scale"][0])
    expected = np.exp(values - values.max(axis=1, keepdims=True))
    expected *= 1000 / expected.sum(axis=1, keepdims=True)
    probabilities = glyphs.probabilities(samples)
    assert probabilities.dtype == np.int64
    assert np.abs(probabilities - expected).max() <= 1000 / 64


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2), (300, 200)])
@pytest.mark.parametrize("shade", [0, 128, 255])
def test_figures_without_letters_have_none(size: tuple[int, int], shade: int) -> None:
    assert find_letters(Image.new("L", size, shade), "ABCDEFGH") == []


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (400, 400)])
def test_noise_has_no_large_letters(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, size[::-1]).astype(np.uint8) * 255
    assert not [letter for letter in find_letters(Image.fromarray(pixels), "ABCDEFGH") if letter.height > 7]


def test_noise_of_many_pixels_takes_little_time() -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (2000, 2000)).astype(np.uint8) * 255
    figure = Image.fromarray(pixels)
    start = time.process_time()
    assert find_letters(figure, "ABCDEFGH") == []
    assert time.process_time() - start < 1  # 0.02 s on an EPYC, 2 s without the limit
