"""Checkpoints of the published size: parity with open_clip in both directions."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import BERT_BASE, CONFIG, PUBMEDBERT
from peers import import_open_clip
from PIL import Image

from bclip_fast import load, save
from bclip_fast.data.transform import Preprocess
from bclip_fast.model.presets import preset

PUBLISHED = {
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": PUBMEDBERT,
            "hf_tokenizer_name": PUBMEDBERT,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}


@pytest.fixture(scope="module")
def inputs(shared_data: Path) -> tuple[torch.Tensor, list[str]]:
    images = []
    for path in sorted((shared_data / "pmc_articles" / "native").rglob("*.jpg"))[:40:20]:
        with Image.open(path) as image:
            images.append(Preprocess()(image))
    with open(shared_data / "pmc_articles" / "pairs.jsonl", encoding="utf-8") as lines:
        texts = sorted((json.loads(line)["caption"] for line in lines), key=len)
    assert len(images) == 2
    return torch.stack(images), [texts[20], texts[280], texts[-1]]


@pytest.fixture(scope="module")
def published(tmp_path_factory, inputs, shared_data: Path) -> tuple[Path, Path, dict]:
    """(folder with the model names of the hub, checkpoint folder as published, open_clip's outputs).

    The fixture frees open_clip's model, to save memory.
    """
    open_clip = import_open_clip()
    hub = tmp_path_factory.mktemp("hub")
    # transformers prefers a folder of the model's name to the hub, so the names resolve offline in this folder.
    (hub / PUBMEDBERT).mkdir(parents=True)
    (hub / PUBMEDBERT / "config.json").write_text(json.dumps(BERT_BASE))
    folder = tmp_path_factory.mktemp("published")
    (folder / CONFIG).write_text(json.dumps(PUBLISHED))
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shared_data / "vocab" / "pubmedbert" / name).read_bytes())
    previous_folder = os.getcwd()
    os.chdir(hub)
    torch.manual_seed(0)  # this fixture runs before the one that seeds each test
    try:
        theirs = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False).eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(inputs[1])
    finally:
        os.chdir(previous_folder)
    assert type(theirs).__name__ == "CustomTextCLIP"
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        theirs.logit_scale.fill_(4.4454)
        outputs = {
            "tokens": tokens,
            "image": theirs.encode_image(inputs[0], normalize=True),
            "text": theirs.encode_text(tokens, normalize=True),
            "image_raw": theirs.encode_image(inputs[0]),
            "text_raw": theirs.encode_text(tokens),
        }
    state = theirs.state_dict()
    state["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    return hub, folder, outputs


@pytest.mark.slow
@torch.no_grad()
def test_load_and_save_published_checkpoint_equal_open_clip(published, inputs, tmp_path, monkeypatch) -> None:
    """This takes up to 20 seconds: the test builds, loads or saves five models of the published size."""
    hub, folder, outputs = published
    model, preprocess, tokenizer = load(folder)
    assert model.config == preset("biomedclip_b16")
    assert not model.training
    assert torch.equal(tokenizer(inputs[1]), outputs["tokens"])
    assert (outputs["tokens"] != 0).sum(1).tolist()[-1] == 256
    ours = {"image": model.encode_image(inputs[0]), "text": model.encode_text(outputs["tokens"])}
    for tower, features in ours.items():
        assert (features - outputs[tower]).abs().max() <= 1e-5
        # Different inputs give different outputs, so that equality is meaningful.
        assert (outputs[tower][0] - outputs[tower][1]).abs().max() > 1e-2
    raw = model.encode_image(inputs[0], normalize=False)
    torch.testing.assert_close(raw, outputs["image_raw"], rtol=1e-3, atol=1e-3)
    assert model().get("logit_scale").item() == pytest.approx(85.23, abs=0.01)

    save(tmp_path, model, preprocess, tokenizer)
    del model
    gc.collect()
    assert json.loads((tmp_path / CONFIG).read_text()) == PUBLISHED
    open_clip = import_open_clip()
    monkeypatch.chdir(hub)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs.eval()
    assert torch.equal(theirs.encode_image(inputs[0], normalize=True), outputs["image"])
    assert torch.equal(theirs.encode_text(outputs["tokens"], normalize=True), outputs["text"])
    image = Image.effect_noise((300, 260), 80).convert("RGB")
    assert torch.equal(transform(image), preprocess(image))
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(inputs[1]), outputs["tokens"])
