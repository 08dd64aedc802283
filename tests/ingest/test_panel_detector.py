"""The DAB-DETR of `--panel_model`: its outputs are those of transformers, and unfit files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from articles import (
    write_files,
)
from panel_models import PREPROCESSING, tiny_model, write_model
from PIL import Image

from bclip_fast.errors import UserError
from bclip_fast.ingest.panels.detector import PanelDetector, overlap, read_preprocessing
from bclip_fast.ingest.panels.detector_files import model_files


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("random"), tiny_model())


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def test_outputs_and_pixels_equal_those_of_transformers(random_model):
    detector, model = PanelDetector(random_model), tiny_model()
    pixels, mask = torch.rand(2, 3, 96, 128), torch.ones(2, 96, 128, dtype=torch.int64)
    mask[1, :, 64:] = 0
    with torch.no_grad():
        ours, theirs = (each(pixel_values=pixels, pixel_mask=mask) for each in (detector.model, model))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.pred_boxes, theirs.pred_boxes)
    from transformers.models.conditional_detr.image_processing_pil_conditional_detr import (
        ConditionalDetrImageProcessorPil,
    )

    processor = ConditionalDetrImageProcessorPil.from_dict(PREPROCESSING)
    for size in ((300, 200), (200, 300), (640, 90), (96, 96), (97, 140)):
        image = picture(1, size)
        expected = processor(images=image, return_tensors="np")["pixel_values"][0]
        prepared = detector.prepare(image)
        mean, std = detector.preprocessing.mean, detector.preprocessing.std
        values = (prepared.pixels.astype(np.float64) * detector.preprocessing.scale - mean) / std
        np.testing.assert_allclose(values.transpose(2, 0, 1), expected, atol=1e-5)
        (found,) = detector.detect([prepared], 0.0)
        outputs = detector.model(
            **{k: torch.from_numpy(v) for k, v in processor(images=image, return_tensors="np").items()}
        )
        best = processor.post_process_object_detection(outputs, 0.0, [image.size[::-1]], top_k=8)[0]
        # transformers pads an image alone to nothing. Beside that, the best box is the same.
        assert found[0].score == pytest.approx(float(best["scores"][0]), abs=0.02)
        assert overlap(found[0].box, best["boxes"][0].tolist()) > 0.8


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_backbone_of_timm_is_read_without_timm(tmp_path, name):
    tiny_model()  # makes torchvision importable
    pytest.importorskip("timm")
    model = tiny_model(backbone={"use_timm_backbone": True, "backbone": name})
    assert any("_backbone.layer1.0.conv1.weight" in key for key in model.state_dict())
    detector = PanelDetector(write_model(tmp_path, model))
    pixels = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.allclose(detector.model(pixels).pred_boxes, model(pixels).pred_boxes, atol=1e-6)
        assert torch.allclose(detector.model(pixels).logits, model(pixels).logits, atol=1e-5)


def test_batch_changes_no_box_and_overlaps_are_dropped(random_model):
    detector = PanelDetector(random_model)
    images = [detector.prepare(picture(seed, (300 + 10 * seed, 200))) for seed in range(4)]
    assert len({image.canvas for image in images}) == 1
    together = detector.detect(images, 0.0)
    for one, image in zip(together, images, strict=True):
        (alone,) = detector.detect([image], 0.0)
        assert len(one) == len(alone)
        for left, right in zip(one, alone, strict=True):
            # Rounding errors may move a box by a pixel, and a score by its last digit.
            assert np.abs(np.subtract(left.box, right.box)).max() <= 1
            assert left.score == pytest.approx(right.score, abs=0.0011)
        boxes = [each.box for each in one]
        assert all(overlap(a, b) <= 0.5 for i, a in enumerate(boxes) for b in boxes[:i])
        assert [each.score for each in one] == sorted((each.score for each in one), reverse=True)


def test_values_that_are_not_finite_are_an_error(random_model):
    detector = PanelDetector(random_model)
    with torch.no_grad():
        next(iter(detector.model.class_embed.parameters())).fill_(float("nan"))
    with pytest.raises(UserError, match="values that are not finite"):
        detector.detect([detector.prepare(picture(0, (60, 40)))], 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle .* not read"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "holds no preprocessor_config.json"),
        (lambda folder: rewrite(folder / "config.json", model_type="detr"), "is a model of type 'detr'"),
        (lambda folder: rewrite(folder / "config.json", num_queries=9), "does not fit config.json"),
        (lambda folder: rewrite(folder / "config.json", encoder_layers=10**9), "encoder_layers=1000000000 must be"),
        (lambda folder: rewrite(folder / "config.json", backbone_config={"model_type": "swin"}), "swin is not"),
        (lambda folder: rewrite(folder / "preprocessor_config.json", size={"height": 10**6, "width": 9}), "must lie"),
        (lambda folder: rewrite(folder / "preprocessor_config.json", do_resize=False), "do_resize"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x02}q\x00."), "cannot be read"),
    ],
)  # fmt: skip
def test_unfit_models_are_refused_by_name(tmp_path, random_model, change, message):
    folder = tmp_path / "model"
    write_files(folder, {path.name: path.read_bytes() for path in random_model.iterdir()})
    change(folder)
    with pytest.raises(UserError, match=message):
        PanelDetector(next(iter(model_files(str(folder)).values())).parent)


def rewrite(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_model_of_the_hub_needs_a_network_or_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"panel_model=hf-hub:org/none@abc.*download it elsewhere .*give its folder"):
        model_files("hf-hub:org/none@abc")
    with pytest.raises(UserError, match="is not a folder; for a model of the hub"):
        model_files(str(tmp_path / "none"))


def test_preprocessing_of_older_processors(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"size": 640, "max_size": 900, "image_mean": [0.5] * 3, "resample": 3}))
    read = read_preprocessing(tmp_path / "p.json")
    assert (read.size, read.is_exact, read.mean, read.resample) == ((640, 900), False, (0.5,) * 3, 3)
    assert read.resized(2000, 1000) == (900, 450)
