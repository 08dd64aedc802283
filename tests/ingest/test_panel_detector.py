"""The DAB-DETR of `--panel_model`: its outputs are those of transformers, and its boxes become panels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from articles import (
    article_xml,
    encode_image,
    manifest_rows,
    read_tree,
    reject_rows,
    write_composites,
    write_files,
)
from ingest_runs import ENVIRONMENT, ROOT
from panel_models import HALVES, PREPROCESSING, tiny_model, write_fixed_model, write_model
from PIL import Image
from safetensors.torch import load_file, save_file

from bclip_fast.errors import UserError
from bclip_fast.ingest import panel_boxes
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
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


def options(tmp_path: Path, model: Path, out: str = "out", **changes: object) -> IngestConfig:
    settings = {"workers": 1, "val_fraction": 0.0, "test_fraction": 0.0, "panels": True, "panel_model": str(model)}
    return IngestConfig(str(tmp_path / "in"), tmp_path / out, **{**settings, **changes})


def test_boxes_become_panels_and_a_stopped_build_goes_on(tmp_path, monkeypatch, caplog):
    write_composites(tmp_path / "in", 5)
    write_files(tmp_path / "in/6", {"x.nxml": article_xml(("f", "(a) One of. (b) Two of."), number=6), "f.jpg": b"no"})
    monkeypatch.setattr(panel_boxes, "GROUP", 2)
    monkeypatch.setattr("bclip_fast.ingest.build.GROUP", 2)
    model = write_fixed_model(tmp_path / "model", HALVES)
    build(options(tmp_path, model))
    rows = manifest_rows(tmp_path / "out")
    panels = {key: (json.loads(row["panel_box"]), row["caption"]) for key, row in rows.items() if row["panel"]}
    assert panels["PMC3_f1_pA"] == ([0, 0, 120, 120], "Views. From above.")
    assert panels["PMC3_f1_pB"] == ([120, 0, 240, 120], "Views. From below.")
    assert len(panels) == 10
    description = json.loads((tmp_path / "out/dataset.json").read_text())["ingest"]
    assert description["config"]["panel_model"] == str(model)
    recorded = description["panel_model"]
    assert (recorded["figures"], recorded["boxes"], recorded["failed"], len(recorded["sha256"])) == (6, 10, 1, 64)
    assert "could not read 1 of 6 figures" in caplog.text
    # Stop after the first group, damage its file, and resume.
    real, calls = panel_boxes.detect_boxes, []

    def stop_at_second(task: panel_boxes.BoxTask) -> str:
        calls.append(task.number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr(panel_boxes, "detect_boxes", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        build(options(tmp_path, model, "again"))
    build(options(tmp_path, model, "again"))
    assert calls == [0, 1, 1, 2]
    assert read_tree(tmp_path / "again") == read_tree(tmp_path / "out")
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        build(options(tmp_path, model, "damaged"))
    (path,) = (tmp_path / ".damaged.partial/work/boxes").rglob("*.json")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="was damaged on the disk"):
        build(options(tmp_path, model, "damaged"))
    build(options(tmp_path, model, "damaged"))
    assert read_tree(tmp_path / "damaged") == read_tree(tmp_path / "out")


def test_another_model_begins_again_and_none_needs_no_panels(tmp_path, monkeypatch, caplog):
    write_composites(tmp_path / "in", 2)
    model = write_fixed_model(tmp_path / "model", HALVES)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bclip_fast.ingest.build.make_plan", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(options(tmp_path, model))
    # The same name, but other weights.
    state = load_file(model / "model.safetensors")
    state["class_embed.bias"] -= 9
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    build(options(tmp_path, model))
    assert "the parts of an earlier run had other options" in caplog.text
    assert not any(row.get("panel") for row in manifest_rows(tmp_path / "out").values())
    with pytest.raises(UserError, match="needs --panels"):
        options(tmp_path, model, panels=False)


_SCRIPT = """
import sys
from pathlib import Path
from bclip_fast.data import image_files
from bclip_fast.ingest import build, panel_boxes
real = panel_boxes.open_image
def open_image(data, *limits):
    if "crash" in sys.argv[5:] and data[:3] == b"GIF":
        import os
        os._exit(11)
    return real(data, *limits)
panel_boxes.open_image = open_image
if __name__ == "__main__":
    build.build(build.IngestConfig(sys.argv[1], Path(sys.argv[2]), panels=True, panel_model=sys.argv[3], workers=2,
                                   engine=sys.argv[4], val_fraction=0.0, test_fraction=0.0, panel_score=0.1))
"""


def environment(tmp_path: Path) -> dict[str, str]:
    return {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}


def script_command(tmp_path: Path, out: str, model: Path, engine: str, *flags: str) -> list[str]:
    script = tmp_path / "panel_build.py"
    script.write_text(_SCRIPT)
    return [sys.executable, str(script), str(tmp_path / "in"), str(tmp_path / out), str(model), engine, *flags]


def run_script(tmp_path: Path, *arguments: Any) -> str:
    command = script_command(tmp_path, *arguments)
    process = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stderr


@pytest.mark.slow
def test_crash_loses_one_image(tmp_path):
    """The worker's processes import transformers, and a crash starts new ones: 20 seconds."""
    write_composites(tmp_path / "in", 1)
    gif = encode_image(picture(5, (240, 120)), "GIF")
    write_files(tmp_path / "in/4", {"x.nxml": article_xml(("f", "(a) One of. (b) Two of."), number=4), "f.gif": gif})
    model = write_fixed_model(tmp_path / "model", HALVES)
    assert "an image crashed its decoder" in run_script(tmp_path, "two", model, "local", "crash")
    rows = manifest_rows(tmp_path / "two")
    assert sorted(rows) == ["PMC1_f1", "PMC1_f1_pA", "PMC1_f1_pB", "PMC1_f2", "PMC4_f1"]
    assert not reject_rows(tmp_path / "two")
    described = json.loads((tmp_path / "two/dataset.json").read_text())["ingest"]["panel_model"]
    assert (described["figures"], described["failed"]) == (2, 1)


@pytest.mark.long
def test_engines_and_kills_change_no_byte(tmp_path):
    """Builds on Ray and in two processes, one of them killed at moments of its stages: a minute."""
    write_composites(tmp_path / "in", 80)
    model = write_model(tmp_path / "model", tiny_model())
    build(options(tmp_path, model, "one", panel_score=0.1))
    run_script(tmp_path, "ray", model, "ray")
    assert read_tree(tmp_path / "ray") == read_tree(tmp_path / "one")
    command = script_command(tmp_path, "killed", model, "local")
    for number in range(4):
        process = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.DEVNULL)
        boxes = tmp_path / ".killed.partial/work/boxes"
        while process.poll() is None and len(list(boxes.rglob("*.json"))) < number:
            time.sleep(0.01)
        process.kill()
        process.wait()
    run_script(tmp_path, "killed", model, "local")
    assert read_tree(tmp_path / "killed") == read_tree(tmp_path / "one")
