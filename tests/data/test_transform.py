"""Preprocessing compared with open_clip's, and the random crop compared with torchvision's."""

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


def noise_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, shape, dtype=np.uint8), mode)


def open_clip_preprocess(**settings):
    open_clip = import_open_clip()
    config = open_clip.transform.PreprocessCfg(**settings)
    return open_clip.transform.image_transform_v2(config, is_train=False)


def real_images(folder: Path, count: int) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    selected = []
    for path in paths[:: max(1, len(paths) // (4 * count))]:
        with Image.open(path) as image:
            if image.mode == "RGB":
                selected.append(path)
        if len(selected) == count:
            return selected
    pytest.fail(f"only {len(selected)} RGB images below {folder}")


def test_preprocess_real_images_equal_open_clip(shared_data: Path) -> None:
    expected, ours = open_clip_preprocess(), Preprocess()
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
def test_preprocess_odd_sizes_equal_open_clip(size: tuple[int, int]) -> None:
    image = noise_image(*size)
    assert torch.equal(Preprocess()(image), open_clip_preprocess()(image))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 336},
        {"size": 97, "interpolation": "bilinear"},
        {"resize_mode": "squash"},
        {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0)},
    ],
)
def test_preprocess_other_settings_equal_open_clip(settings: dict) -> None:
    image = noise_image(310, 205)
    assert torch.equal(Preprocess(PreprocessConfig(**settings))(image), open_clip_preprocess(**settings)(image))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_preprocess_other_modes_are_converted_before_the_resize(mode: str) -> None:
    image = noise_image(300, 250, mode)
    assert torch.equal(Preprocess()(image), open_clip_preprocess()(image.convert("RGB")))


def test_preprocess_transparent_image_is_put_over_white() -> None:
    image = noise_image(300, 250, "RGBA")
    over_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert torch.equal(Preprocess()(image), open_clip_preprocess()(over_white))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "I;16"])
def test_preprocess_open_clip_conversion_equals_open_clip(mode: str) -> None:
    image = noise_image(300, 250)
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 40000, 300 * 250).reshape(250, 300).astype(np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    ours = Preprocess(PreprocessConfig(conversion="open_clip"))
    assert torch.equal(ours(image), open_clip_preprocess()(image))


def test_preprocess_palette_image_is_resized_in_colours() -> None:
    smooth = Image.linear_gradient("L").resize((600, 600)).convert("RGB")
    palette = smooth.quantize(64)
    difference = (Preprocess()(palette) - Preprocess()(smooth)).abs().max()
    assert difference < 0.2
    # open_clip resizes the colour indices by nearest neighbour, see the docstring of Preprocess.
    assert not torch.equal(Preprocess()(palette), open_clip_preprocess()(palette))


def test_preprocess_16_bit_image_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 40000, 300 * 300).reshape(300, 300).astype(np.uint16)
    pixels = Preprocess().to_uint8(Image.fromarray(values))
    assert pixels.float().mean() == pytest.approx(255 * 20000 / 65535, abs=2)
    assert Preprocess().to_uint8(Image.new("I;16", (30, 30), 700)).unique().tolist() == [round(255 * 700 / 1023)]


def test_preprocess_image_too_large_for_memory_is_refused() -> None:
    with pytest.raises(UserError, match="100000 x 1 pixels"):
        Preprocess()(Image.new("RGB", (100_000, 1)))


def test_to_uint8_and_normalize_equal_the_call() -> None:
    images = [noise_image(300, 260), noise_image(224, 301)]
    ours = Preprocess()
    batch = torch.stack([ours.to_uint8(image) for image in images])
    assert batch.dtype == torch.uint8
    assert batch.shape == (2, 224, 224, 3)
    assert torch.equal(normalize(batch), torch.stack([ours(image) for image in images]))
    half = normalize(batch, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.is_contiguous()
    assert torch.equal(half, normalize(batch).bfloat16())


def test_shortest_edge_size_equals_torchvision() -> None:
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
def test_preprocess_config_invalid_settings_are_refused(settings: dict) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        PreprocessConfig(**settings)


def test_crop_box_depends_only_on_its_arguments() -> None:
    keys = [(seed, epoch, sample) for seed in (0, 1) for epoch in (0, 1) for sample in range(50)]
    boxes = {key: random_resized_crop_box(300, 400, *key, scale=(0.3, 1.0)) for key in keys}
    for key in reversed(keys):
        assert random_resized_crop_box(300, 400, *key, scale=(0.3, 1.0)) == boxes[key]
    assert len(set(boxes.values())) > 190


@pytest.mark.parametrize("size", [(300, 400), (1, 1), (1, 1000), (1000, 1), (7, 5), (224, 224)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
def test_crop_box_stays_inside_the_image_and_its_bounds(size: tuple[int, int], scale: tuple[float, float]) -> None:
    for sample in range(200):
        top, left, height, width = random_resized_crop_box(*size, 0, 0, sample, scale)
        assert min(top, left) >= 0
        assert min(height, width) >= 1
        assert top + height <= size[0]
        assert left + width <= size[1]
        if min(size) > 100:
            assert scale[0] * 0.98 <= height * width / (size[0] * size[1]) <= 1.0
            assert 0.74 <= width / height <= 1.35


def test_crop_box_distribution_equals_torchvision() -> None:
    transforms = import_torchvision().transforms
    count, image = 4000, torch.zeros(1, 300, 420)
    expected = torch.tensor(
        [transforms.RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    ).double()
    ours = torch.tensor([random_resized_crop_box(300, 420, 5, 3, i, (0.3, 1.0)) for i in range(count)]).double()
    # Allow five standard errors of the difference between means of 4000 draws.
    allowed = 5 * expected.std(0) * math.sqrt(2 / count)
    assert ((ours.mean(0) - expected.mean(0)).abs() < allowed).all()
    assert torch.allclose(ours.std(0), expected.std(0), rtol=0.1)


def test_crop_box_of_narrow_image_has_an_allowed_ratio() -> None:
    assert random_resized_crop_box(100, 1000, 0, 0, 0, (0.9, 1.0)) == (0, 433, 100, 133)
    assert random_resized_crop_box(1000, 100, 0, 0, 0, (0.9, 1.0)) == (433, 0, 133, 100)


def test_crop_box_invalid_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="0 x 5"):
        random_resized_crop_box(0, 5, 0, 0, 0)
    with pytest.raises(UserError, match="increasing"):
        random_resized_crop_box(5, 5, 0, 0, 0, scale=(1.0, 0.5))
