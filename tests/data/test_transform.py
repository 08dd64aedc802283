"""Preprocessing against open_clip's own, and the random crop against its definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import import_open_clip, import_torchvision
from PIL import Image

from bclip_fast.data.transform import (
    Preprocess,
    PreprocessConfig,
    normalize,
    random_resized_crop_box,
    shortest_edge_size,
)
from bclip_fast.errors import UserError


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, shape, dtype=np.uint8), mode)


def theirs(**settings):
    open_clip = import_open_clip()
    config = open_clip.transform.PreprocessCfg(**settings)
    return open_clip.transform.image_transform_v2(config, is_train=False)


def real_images(folder: Path, count: int) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    chosen = []
    for path in paths[:: max(1, len(paths) // (4 * count))]:
        with Image.open(path) as image:
            if image.mode == "RGB":
                chosen.append(path)
        if len(chosen) == count:
            return chosen
    pytest.fail(f"only {len(chosen)} RGB images below {folder}")


def test_equals_open_clip_on_real_images(shared_data: Path) -> None:
    expected, ours = theirs(), Preprocess()
    paths = real_images(shared_data / "pmc_articles", 24) + real_images(shared_data / "classification", 6)
    sizes = set()
    for path in paths:
        with Image.open(path) as image:
            sizes.add(image.size)
            assert torch.equal(ours(image), expected(image)), path.name
    assert len(sizes) > 15


@pytest.mark.parametrize(
    "size", [(224, 224), (225, 224), (224, 227), (100, 37), (37, 100), (1, 9), (500, 333), (223, 640)]
)
def test_equals_open_clip_on_awkward_sizes(size: tuple[int, int]) -> None:
    image = noise(*size)
    assert torch.equal(Preprocess()(image), theirs()(image))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 336},
        {"size": 97, "interpolation": "bilinear"},
        {"resize_mode": "squash"},
        {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0)},
    ],
)
def test_equals_open_clip_with_other_settings(settings: dict) -> None:
    image = noise(310, 205)
    assert torch.equal(Preprocess(PreprocessConfig(**settings))(image), theirs(**settings)(image))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA"])
def test_other_modes_are_converted_before_the_resize(mode: str) -> None:
    image = noise(300, 250, mode)
    assert torch.equal(Preprocess()(image), theirs()(image.convert("RGB")))


def test_a_palette_image_is_resized_in_colours() -> None:
    smooth = Image.linear_gradient("L").resize((600, 600)).convert("RGB")
    palette = smooth.quantize(64)
    difference = (Preprocess()(palette) - Preprocess()(smooth)).abs().max()
    assert difference < 0.2
    # open_clip resizes the indices, nearest neighbour: what the docstring warns of.
    assert not torch.equal(Preprocess()(palette), theirs()(palette))


def test_16_bit_images_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 40000, 300 * 300).reshape(300, 300).astype(np.uint16)
    pixels = Preprocess().to_uint8(Image.fromarray(values))
    assert pixels.float().mean() == pytest.approx(127.5, abs=2)
    assert Preprocess().to_uint8(Image.new("I;16", (30, 30), 700)).unique().tolist() == [0]


def test_a_picture_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(UserError, match="100000 x 1 pixels"):
        Preprocess()(Image.new("RGB", (100_000, 1)))


def test_uint8_and_normalize_give_what_the_call_gives() -> None:
    images = [noise(300, 260), noise(224, 301)]
    ours = Preprocess()
    batch = torch.stack([ours.to_uint8(image) for image in images])
    assert batch.dtype == torch.uint8 and batch.shape == (2, 224, 224, 3)
    assert torch.equal(normalize(batch), torch.stack([ours(image) for image in images]))
    half = normalize(batch, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.is_contiguous()
    assert torch.equal(half, normalize(batch).bfloat16())


def test_shortest_edge_rule_is_torchvisions() -> None:
    functional = import_torchvision().transforms.functional
    for width, height in [(500, 333), (333, 500), (1000, 3), (224, 224), (641, 479)]:
        expected = functional._compute_resized_output_size((height, width), [224])
        assert shortest_edge_size(width, height, 224) == (expected[1], expected[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"size": 1.5},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (1.0,)},
        {"interpolation": "nearest"},
        {"resize_mode": "longest"},
    ],
)
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        PreprocessConfig(**settings)


def test_crop_box_is_a_function_of_its_arguments_alone() -> None:
    keys = [(seed, epoch, sample) for seed in (0, 1) for epoch in (0, 1) for sample in range(50)]
    boxes = {key: random_resized_crop_box(300, 400, *key, scale=(0.3, 1.0)) for key in keys}
    for key in reversed(keys):
        assert random_resized_crop_box(300, 400, *key, scale=(0.3, 1.0)) == boxes[key]
    assert len(set(boxes.values())) > 190


@pytest.mark.parametrize("size", [(300, 400), (1, 1), (1, 1000), (1000, 1), (7, 5), (224, 224)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
def test_crop_box_lies_inside_and_keeps_its_bounds(size: tuple[int, int], scale: tuple[float, float]) -> None:
    for sample in range(200):
        top, left, height, width = random_resized_crop_box(*size, 0, 0, sample, scale)
        assert 0 <= top and 0 <= left and height >= 1 and width >= 1
        assert top + height <= size[0] and left + width <= size[1]
        if min(size) > 100:
            assert scale[0] * 0.98 <= height * width / (size[0] * size[1]) <= 1.0
            assert 0.74 <= width / height <= 1.35


def test_crop_box_is_distributed_as_torchvisions() -> None:
    transforms = import_torchvision().transforms
    count, image = 4000, torch.zeros(1, 300, 420)
    expected = torch.tensor(
        [transforms.RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    ).double()
    ours = torch.tensor([random_resized_crop_box(300, 420, 5, 3, i, (0.3, 1.0)) for i in range(count)]).double()
    # Means of 4000 draws: five standard errors of their difference.
    allowed = 5 * expected.std(0) * math.sqrt(2 / count)
    assert ((ours.mean(0) - expected.mean(0)).abs() < allowed).all()
    assert torch.allclose(ours.std(0), expected.std(0), rtol=0.1)


def test_crop_of_a_strip_falls_back_to_the_allowed_ratio() -> None:
    assert random_resized_crop_box(100, 1000, 0, 0, 0, (0.9, 1.0)) == (0, 433, 100, 133)
    assert random_resized_crop_box(1000, 100, 0, 0, 0, (0.9, 1.0)) == (433, 0, 133, 100)


def test_bad_crops_are_refused() -> None:
    with pytest.raises(UserError, match="0 x 5"):
        random_resized_crop_box(0, 5, 0, 0, 0)
    with pytest.raises(UserError, match="rising"):
        random_resized_crop_box(5, 5, 0, 0, 0, scale=(1.0, 0.5))
