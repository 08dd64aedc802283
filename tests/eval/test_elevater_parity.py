"""LC25000 with BiomedCLIP's shapes: parity with open_clip and an independent implementation of ELEVATER."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import BERT_BASE, PUBMEDBERT
from peers import import_open_clip
from PIL import Image
from towers import shaken

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess
from bclip_fast.eval import evaluate, statistics, tasks, zero_shot
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.presets import preset
from bclip_fast.model.tokenizer import Tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("size", ["biomedclip_s16", pytest.param("biomedclip_b16", marks=pytest.mark.long)])
def test_lc25000_equals_open_clip_and_independent_elevater(
    size: str, shared_data: Path, tmp_path: Path, monkeypatch
) -> None:
    """Compare features, class embeddings and predictions of random weights on real images.

    The text tower has the published size, and that of the image tower with size "biomedclip_b16" too.
    """
    open_clip = import_open_clip()
    # It keeps the functions that it finds when it is imported, and later puts them back.
    pytest.importorskip("transformers.modeling_utils")
    for name in ("kaiming_uniform_", "normal_", "uniform_", "trunc_normal_"):
        # The first model's weights are shaken, and every other model loads them. Random ones would take seconds.
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor.data.zero_())
    folder = tmp_path / "model"
    words = Tokenizer.from_file(shared_data / "vocab" / "pubmedbert" / "tokenizer.json")
    pretrained.save(folder, shaken(BiomedClip(preset(size))), Preprocess(), words)
    # transformers prefers a folder of the model's name to the hub, so the names resolve offline in this folder.
    (tmp_path / PUBMEDBERT).mkdir(parents=True)
    (tmp_path / PUBMEDBERT / "config.json").write_text(json.dumps(BERT_BASE))
    monkeypatch.chdir(tmp_path)
    lung = tmp_path / "lung"
    for name in ("lung_aca", "lung_n", "lung_scc"):
        (lung / name).mkdir(parents=True)
        for path in sorted((shared_data / "classification" / "lc25000_lung" / name).iterdir())[:2]:
            (lung / name / path.name).symlink_to(path)
    result = evaluate(str(folder), ["lc25000_lung"], data=str(lung), progress=False)["tasks"]["lc25000_lung"]

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    names = {
        "lung_aca": "lung adenocarcinomas",
        "lung_n": "normal lung tissue",
        "lung_scc": "lung squamous cell carcinomas",
    }
    files = sorted(lung.rglob("*.jpeg"))
    with torch.no_grad():
        features = F.normalize(model.encode_image(torch.stack([transform(Image.open(path)) for path in files])), dim=-1)
        weights = []
        for noun in names.values():
            texts = tokens([f"a photo of {noun}", f"{noun} presented in image"])
            mean = F.normalize(model.encode_text(texts), dim=-1).mean(0)
            weights.append(mean / mean.norm())
        logits = 100 * features @ torch.stack(weights).T
    ours, our_transform, our_tokens = pretrained.load(folder)
    with torch.no_grad():
        pixels = torch.stack([our_transform(Image.open(path)) for path in files[::2]])
        torch.testing.assert_close(ours.encode_image(pixels), features[::2], atol=2e-6, rtol=0)
        classes = zero_shot.class_embeddings(
            lambda texts: ours.encode_text(our_tokens(texts)), tasks.load("lc25000_lung").prompts
        )
    torch.testing.assert_close(classes, torch.stack(weights), atol=2e-6, rtol=0)
    predictions = [list(names)[i] for i in logits.argmax(1).tolist()]
    assert result["samples"]["key"] == [path.relative_to(lung).as_posix() for path in files]
    assert result["samples"]["prediction"] == predictions
    is_correct = [path.parent.name == prediction for path, prediction in zip(files, predictions, strict=True)]
    assert result["figures"][0]["value"] == pytest.approx(np.mean(is_correct))
    auroc = statistics.auroc(np.array([path.parent.name == "lung_n" for path in files]),
                         (float(model.logit_scale.exp()) / 100 * logits).softmax(1)[:, 1].double().numpy())  # fmt: skip
    assert result["per_class"][1]["auroc"] == pytest.approx(auroc, abs=1 / 32)
