"""`bclip export --to sentence_transformers`: its own loader gives our embeddings of captions and PIL images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from peers import import_torchvision
from PIL import Image
from sentencepieces import write_sentencepiece
from towers import GPT, SIGLIP, SMALL, shaken

from bclip_fast import pretrained
from bclip_fast.cli import main
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer

CAPTIONS = ["a red square at the left", "cells", "a blue square at the top of the picture, and more words than fit"]
END = dataclasses.replace(GPT, end_id=3)
LINEAR = dataclasses.replace(SMALL.text, projection="linear")
MODELS = {
    "vit and bert with an mlp projection": SMALL,
    "vit and bert with a linear projection": dataclasses.replace(SMALL, text=LINEAR),
    "vit and gpt": dataclasses.replace(SMALL, text=END),
    "clip": dataclasses.replace(
        SMALL, vision=dataclasses.replace(SMALL.vision, kind="clip"), text=END, quick_gelu=True
    ),
    "siglip": SIGLIP,
}


@pytest.mark.parametrize("name", MODELS)
def test_sentence_transformers_gives_our_embeddings(tmp_path: Path, name: str) -> None:
    import_torchvision()
    from sentence_transformers import SentenceTransformer

    config = MODELS[name]
    torch.manual_seed(0)
    model = shaken(BiomedClip(config)).eval()
    if name == "siglip":
        tokenizer = Tokenizer.from_file(write_sentencepiece(tmp_path / "pieces"), config.text.context_length)
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, pad_id=tokenizer.pad_id))
    else:
        tokenizer = Tokenizer.train(CAPTIONS * 3, config.text.vocab_size, config.text.context_length)
    resize_mode = "squash" if name == "siglip" else "shortest"
    preprocess = Preprocess(PreprocessConfig(size=config.vision.image_size, resize_mode=resize_mode))
    pretrained.save(tmp_path / "model", model, preprocess, tokenizer)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "model"), "--to", "sentence_transformers", "-o", str(out)]) == 0
    theirs = SentenceTransformer(str(out), device="cpu")
    picture = Image.fromarray(torch.randint(0, 256, (48, 40, 3), dtype=torch.uint8).numpy())
    with torch.no_grad():
        texts, image = model.encode_text(tokenizer(CAPTIONS)), model.encode_image(preprocess(picture)[None])
    torch.testing.assert_close(torch.from_numpy(theirs.encode(CAPTIONS)), texts, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(theirs.encode(CAPTIONS[1:2])), texts[1:2], rtol=0, atol=1e-5)
    # Its image processor rounds the resized image to bytes.
    torch.testing.assert_close(torch.from_numpy(theirs.encode([picture])), image, rtol=0, atol=2e-2)
    assert "sentence-transformers" in (out / "README.md").read_text()


def test_resnet_has_no_place_in_sentence_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from towers import RESNET

    model = BiomedClip(RESNET).eval()
    tokenizer = Tokenizer.train(CAPTIONS * 3, RESNET.text.vocab_size, RESNET.text.context_length)
    pretrained.save(tmp_path / "model", model, Preprocess(PreprocessConfig(size=64)), tokenizer)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "model"), "--to", "sentence_transformers", "-o", str(out)]) == 2
    assert "transformers' ViTModel has no convolutions" in capsys.readouterr().err
    assert not (out / "modules.json").exists()
