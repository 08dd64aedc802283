"""`bclip export --to onnx` of a classifier: onnxruntime gives the probabilities of the run, without our package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from finetunes import TEXTS, write_start
from towers import SMALL

from bclip_fast import pretrained
from bclip_fast.cli import main
from bclip_fast.export import parity
from bclip_fast.model.image_classifier import ClassHead
from bclip_fast.pretrained import class_head

_ALONE = """
import json, sys
import numpy as np, onnxruntime
folder = sys.argv[1]
session = onnxruntime.InferenceSession(f"{folder}/classifier.onnx")
rows = session.run(None, {"pixel_values": np.load(f"{folder}/pixels.npy")})[0]
assert "torch" not in sys.modules and "bclip_fast" not in sys.modules
print(json.dumps(rows.tolist()))
"""


def write_run(folder: Path, multi_label: bool) -> ClassHead:
    write_start(folder / "model", texts=TEXTS)
    head = ClassHead(["no finding", "nodule", "effusion"], multi_label, SMALL.embed_dim, "finding")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
        head.scale.fill_(5.0)
    class_head.save(folder, head)
    return head.eval()


@pytest.mark.parametrize("multi_label", [False, True])
def test_classifier_graph_gives_the_probabilities_of_the_run(multi_label: bool, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "onnx"
    head = write_run(run, multi_label)
    assert main(["export", str(run), "--to", "onnx", "-o", str(out)]) == 0
    model = pretrained.load(str(run))[0].eval()
    pixels = parity.made_up_samples(model.config.vision.image_size).images
    np.save(out / "pixels.npy", pixels.numpy())
    with torch.no_grad():
        expected = head.probabilities(head(model.encode_image(pixels))).numpy()
    done = subprocess.run([sys.executable, "-c", _ALONE, str(out)], capture_output=True, text=True, check=True, cwd=out)
    np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-5)
    assert np.ptp(expected) > 0.1
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "no finding", "1": "nodule", "2": "effusion"}
    assert config["problem_type"] == ("multi_label_classification" if multi_label else "single_label_classification")
    assert "classifier.onnx" in (out / "README.md").read_text() and not (out / "text.onnx").exists()


def test_wrong_classifier_graph_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", False)
    run = parity.run
    monkeypatch.setattr(parity, "run", lambda *arguments: run(*arguments) + 1e-3)
    assert main(["export", str(tmp_path / "run"), "--to", "onnx", "-o", str(tmp_path / "onnx")]) != 0
    assert "classifier.onnx differs from the model by 1.0e-03" in capsys.readouterr().err
    assert not (tmp_path / "onnx" / "classifier.onnx").exists()


def test_damaged_class_head_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", False)
    (tmp_path / "run" / "classifier" / "classes.json").write_text('{"classes": ["a"], "multi_label": false}')
    assert main(["export", str(tmp_path / "run"), "--to", "onnx", "-o", str(tmp_path / "onnx")]) != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "classifier is damaged" in error and "Traceback" not in error
