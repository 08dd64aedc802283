"""`bclip export --to transformers`: transformers gives our embeddings with its own image processor and tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peers import import_torchvision
from PIL import Image
from safetensors.torch import load_file
from synthetic import tiny_model

from bclip_fast import pretrained
from bclip_fast.cli import main
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.text import TextConfig
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.train import checkpoint
from bclip_fast.train.engine.optimizer import OptimizerState

CAPTIONS = ["a red square at the left", "cells", "a blue square at the top of the picture, and much more"]


@pytest.fixture(autouse=True)
def _torchvision() -> None:
    """transformers imports torchvision if it is installed. This stub has no operators."""
    import_torchvision()


def saved(folder: Path, config: BiomedClipConfig) -> BiomedClip:
    torch.manual_seed(1)
    model = BiomedClip(config).eval()
    with torch.no_grad():
        # Initial biases are zero and norms are one. With these values, the test would not notice swapped names.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tokenizer = Tokenizer.train(CAPTIONS * 3, config.text.vocab_size, config.text.context_length)
    pretrained.save(folder, model, Preprocess(PreprocessConfig(size=config.vision.image_size)), tokenizer)
    return model


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(torch.randint(0, 256, (48, 40, 3), dtype=torch.uint8).numpy())


def image_embedding(folder: Path, picture: Image.Image) -> torch.Tensor:
    from transformers import AutoImageProcessor, AutoModel

    pixels = AutoImageProcessor.from_pretrained(folder / "vision", backend="pil")(picture, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(folder / "vision").eval()(**pixels).pooler_output


@pytest.mark.parametrize("projection", ["mlp", "linear"])
def test_exported_model_gives_same_embeddings_in_transformers(tmp_path: Path, picture: Image.Image, projection: str):
    from transformers import AutoModel, AutoTokenizer

    tiny = tiny_model()
    config = dataclasses.replace(tiny, text=dataclasses.replace(tiny.text, projection=projection))
    model = saved(tmp_path / "model", config)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "model"), "-o", str(out), "--to", "transformers"]) == 0
    _, preprocess, tokenizer = pretrained.load(tmp_path / "model")
    with torch.no_grad():
        image = model.encode_image(preprocess(picture)[None], normalize=False)
        text = model.encode_text(tokenizer(CAPTIONS), normalize=False)
        # The processor rounds the resized image to bytes.
        torch.testing.assert_close(image_embedding(out, picture), image, rtol=0, atol=2e-2)
        exact = AutoModel.from_pretrained(out / "vision").eval()(preprocess(picture)[None]).pooler_output
        torch.testing.assert_close(exact, image, rtol=0, atol=1e-5)
        tokens = AutoTokenizer.from_pretrained(out / "text")(
            CAPTIONS, padding=True, truncation=True, return_tensors="pt"
        )
        bert, info = AutoModel.from_pretrained(out / "text", add_pooling_layer=False, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        hidden = bert.eval()(**tokens).last_hidden_state[:, 0]
    rest = load_file(out / "projections.safetensors")
    if projection == "mlp":
        projected = F.gelu(hidden @ rest["text_projection.0.weight"].T) @ rest["text_projection.2.weight"].T
    else:
        projected = hidden @ rest["text_projection.weight"].T
    torch.testing.assert_close(projected, text, rtol=0, atol=1e-5)
    assert float(rest["logit_scale"]) == float(model.logit_scale.detach())


# Mojibake, curly quotes, entities (also twice), ligatures, no-break and zero-width spaces, control characters.
ODD = [
    "a red square \u201cat\u201d the left",
    "a&nbsp;blue&amp;nbsp;square",
    "a \u00e2\u20ac\u0153red\u00e2\u20ac\u009d square",
    "\ufb01ve  cells\t\n",
    "caf\u00c3\u00a9 &lt;red&gt;",
    "a\u00a0blue\u200b square\u2019s top",
    "\x1b[31mred\x00 square",
    "&amp;lt;b&amp;gt; cells",
    "",
]


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_card_of_exported_model_repairs_captions_as_we_do(tmp_path: Path, picture: Image.Image, kind: str):
    from transformers import AutoTokenizer

    config = tiny_model()
    if kind == "gpt":
        text = TextConfig(
            kind="gpt", context_length=12, max_positions=12, vocab_size=96, width=32, layers=2, heads=2,
            dropout=0.0, attention_dropout=0.0, projection="linear", end_id=3,
        )  # fmt: skip
        config = dataclasses.replace(config, text=text)
    model = saved(tmp_path / "model", config)
    _, preprocess, tokenizer = pretrained.load(tmp_path / "model")
    out = tmp_path / "out"
    pretrained.save_transformers(out, model, preprocess, tokenizer)
    card = (out / "README.md").read_text()
    theirs = AutoTokenizer.from_pretrained(out / "text")
    raw = theirs(ODD, padding="max_length", truncation=True, max_length=12).input_ids
    assert sum(row != ours for row, ours in zip(raw, tokenizer(ODD).tolist(), strict=True)) >= 4
    assert "The tokenizer in `text/` doesn't do this" in card
    names: dict = {}
    for block in card.split("```python\n")[1:]:
        exec(block.partition("```")[0], names)
    repaired = theirs([names["clean"](text) for text in ODD], padding="max_length", truncation=True, max_length=12)
    assert repaired.input_ids == tokenizer(ODD).tolist()
    with torch.no_grad():
        torch.testing.assert_close(
            names["embed_captions"](out, ODD), model.encode_text(tokenizer(ODD)), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            names["embed_images"](out, [picture]), model.encode_image(preprocess(picture)[None]), rtol=0, atol=2e-2
        )
    # A card of the user's is kept. Ours is written again.
    pretrained.save_transformers(out, model, preprocess, tokenizer)
    (out / "README.md").write_text("my own card")
    pretrained.save_transformers(out, model, preprocess, tokenizer)
    assert (out / "README.md").read_text() == "my own card"


@pytest.mark.parametrize("end_id", [None, 7])
def test_exported_gpt_tower_gives_same_embeddings_as_clip(tmp_path: Path, end_id: int | None):
    from transformers import CLIPTextModelWithProjection

    text = TextConfig(
        kind="gpt", context_length=9, max_positions=9, vocab_size=96, width=32, layers=2, heads=2,
        dropout=0.0, attention_dropout=0.0, projection="linear", end_id=end_id,
    )  # fmt: skip
    config = dataclasses.replace(tiny_model(), text=text)
    model = saved(tmp_path / "model", config)
    _, preprocess, tokenizer = pretrained.load(tmp_path / "model")
    pretrained.save_transformers(tmp_path / "out", model, preprocess, tokenizer)
    ids = torch.randint(8, 90, (3, 9))
    for row, end in enumerate((3, 8, 5)):
        ids[row, end], ids[row, end + 1 :] = 95 if end_id is None else end_id, 0
    theirs, info = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out" / "text", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = model.encode_text(ids, normalize=False)
        torch.testing.assert_close(theirs.eval()(input_ids=ids).text_embeds, expected, rtol=0, atol=1e-5)


def test_export_earlier_checkpoint_has_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tiny_model()
    earlier = saved(tmp_path / "run" / "model", config).state_dict()
    earlier["logit_scale"] = torch.tensor(1.25)
    checkpoint.save(
        tmp_path / "run" / "checkpoints", checkpoint.Checkpoint(3, earlier, OptimizerState(3, {}, {}), {}, {})
    )
    arguments = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--step", "3"]) == 0
    assert float(pretrained.load(tmp_path / "out")[0].logit_scale.detach()) == 1.25
    assert main([*arguments, "--step", "4"]) == 2
    assert "manifest.json cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
