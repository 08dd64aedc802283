"""Checkpoints in our sizes: saved and loaded in every layout and spelling, also by open_clip."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, convert_to_bin, edit_json, edit_weights
from peers import import_open_clip
from PIL import Image
from towers import GPT, SMALL, padded_ids, shaken

from bclip_fast import load, save
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionConfig


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, text=replace(GPT, end_id=3), init_logit_bias=-10.0),
        replace(SMALL, text=replace(SMALL.text, projection="linear", mlp_ratio=85 / 32), init_logit_scale=1.0),
        replace(SMALL, vision=replace(SMALL.vision, mlp_ratio=1000 / 48, patch_dropout=0.5)),
    ],
    ids=["bert", "gpt", "linear", "ratio"],
)
def test_save_other_sizes_open_in_open_clip(config, tokenizer, tmp_path, monkeypatch) -> None:
    model = shaken(BiomedClip(config)).eval()
    preprocess = Preprocess(PreprocessConfig(size=32, mean=(0.5, 0.5, 0.5), interpolation="bilinear"))
    save(tmp_path, model, preprocess, tokenizer)
    again, preprocess_again, tokenizer_again = load(tmp_path)
    assert again.config == config
    assert preprocess_again.config == preprocess.config
    texts, image = ["axial brain MRI", "stained nuclei " * 10], torch.randn(2, 3, 32, 32)
    ids = tokenizer(texts)
    assert torch.equal(tokenizer_again(texts), ids)
    assert torch.equal(again.encode_text(ids), model.encode_text(ids))
    assert torch.equal(again.encode_image(image), model.encode_image(image))
    open_clip = import_open_clip()
    monkeypatch.chdir(tmp_path)
    theirs, _, transform = open_clip.create_model_and_transforms("local-dir:.", output_dict=True)
    expected = theirs.eval()(image, ids)
    ours = model(image, ids)
    assert expected.keys() == ours.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5)
    noise = Image.effect_noise((50, 40), 80).convert("RGB")
    assert torch.equal(transform(noise), preprocess(noise))
    assert torch.equal(open_clip.get_tokenizer("local-dir:.")(texts), ids)


@torch.no_grad()
def test_load_gpt_tower_in_open_clips_top_level_layout_is_equal(checkpoint: Path, tokenizer: Tokenizer) -> None:
    config = replace(SMALL, text=GPT)
    model = shaken(BiomedClip(config)).eval()
    save(checkpoint, model, Preprocess(PreprocessConfig(size=32)), tokenizer)
    edit_json(checkpoint / CONFIG, lambda content: content["model_cfg"].pop("custom_text"))

    def top_level(state: dict) -> None:
        for name in [name for name in state if name.startswith("text.")]:
            state[name.removeprefix("text.")] = state.pop(name)

    edit_weights(checkpoint, top_level)
    ids = padded_ids([5, 19])
    assert torch.equal(load(checkpoint)[0].encode_text(ids), model.encode_text(ids))


def test_load_both_spellings_of_the_configuration(checkpoint: Path) -> None:
    def old(content: dict) -> None:
        text = content["model_cfg"]["text_cfg"]
        text["proj"], text["pooler_type"] = text.pop("hf_proj_type"), text.pop("hf_pooler_type")

    edit_json(checkpoint / CONFIG, old)
    assert load(checkpoint)[0].config == SMALL
    edit_json(checkpoint / CONFIG, lambda content: content["model_cfg"]["text_cfg"].update(hf_proj_type="linear"))
    with pytest.raises(UserError, match="hf_proj_type='linear' contradicts proj='mlp'"):
        load(checkpoint)


@torch.no_grad()
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {k: v.reshape(1) if v.dim() == 0 else v for k, v in state.items()},
    ],
    ids=["plain", "training", "vector-scale"],
)
def test_load_bin_equals_safetensors(checkpoint: Path, wrap: Callable[[dict], object]) -> None:
    ids = padded_ids([4, 9])
    expected = load(checkpoint)[0](text=ids)
    convert_to_bin(checkpoint, wrap)
    model = load(checkpoint)[0]
    actual = model(text=ids)
    assert torch.equal(actual["text_features"], expected["text_features"])
    assert torch.equal(actual["logit_scale"], expected["logit_scale"])
    assert model.logit_scale.shape == ()
    assert model.text.layers[0].qkv.weight.requires_grad


def test_load_unused_tensors_are_dropped_and_logged(checkpoint: Path, caplog) -> None:
    def add(state: dict) -> None:
        state["text.transformer.embeddings.position_ids"] = torch.arange(24)[None]
        state["text.transformer.pooler.dense.weight"] = torch.zeros(32, 32)
        state["text.transformer.pooler.dense.bias"] = torch.zeros(32)

    edit_weights(checkpoint, add)
    with caplog.at_level("INFO", logger="bclip_fast"):
        load(checkpoint)
    assert "position_ids" in caplog.text
    assert "pooler.dense.bias" in caplog.text


def test_load_run_folder_works_and_wrong_names_raise(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.rename(run / "model")
    assert load(run)[0].config == SMALL
    assert load(str(run / "model"))[0].config == SMALL
    with pytest.raises(UserError, match="hf-hub:ORG/NAME"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no open_clip_config.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="precision 'int4'"):
        load(run, precision="int4")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_load_precision_keeps_float32_logit_scale(checkpoint: Path, precision: str, dtype: torch.dtype) -> None:
    model = load(checkpoint, precision=precision)[0]
    assert model.visual.head.weight.dtype == dtype
    assert model.logit_scale.dtype == torch.float32


def test_load_other_image_size_resizes_positions(checkpoint: Path) -> None:
    model, preprocess, tokenizer = load(checkpoint, image_size=48)
    assert model.config.vision.image_size == preprocess.config.size == 48
    assert model.encode_image(torch.randn(1, 3, 48, 48)).shape == (1, 24)
    save(checkpoint, model, preprocess, tokenizer)
    assert load(checkpoint)[0].config == model.config
    with pytest.raises(UserError, match="multiple"):
        load(checkpoint, image_size=50)


def test_save_mismatched_parts_raise(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = BiomedClip(SMALL)
    with pytest.raises(UserError, match="224"):
        save(tmp_path / "a", model, Preprocess(), tokenizer)
    large = Tokenizer.train(["abcdefghijklmnopqrstuvwxyz " + " ".join(f"{i}" for i in range(400))] * 3, 400)
    with pytest.raises(UserError, match="embeds only 100"):
        save(tmp_path / "a", model, Preprocess(PreprocessConfig(size=32)), large)
    with pytest.raises(UserError, match="logit_scale"):
        save(tmp_path / "a", model, Preprocess(PreprocessConfig(size=32)), tokenizer, state_dict={})
    assert not (tmp_path / "a").exists()


def test_save_gathered_state_is_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model, other = BiomedClip(SMALL), shaken(BiomedClip(SMALL))
    save(tmp_path, model, Preprocess(PreprocessConfig(size=32)), tokenizer, state_dict=other.state_dict())
    assert torch.equal(load(tmp_path)[0].visual.pos_embed, other.visual.pos_embed)


def test_save_published_names_only_for_published_sizes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = BiomedClipConfig(vision=VisionConfig(width=8, heads=1, layers=1), embed_dim=4, text=SMALL.text)
    save(tmp_path, BiomedClip(config), Preprocess(), tokenizer)
    content = json.loads((tmp_path / CONFIG).read_text())["model_cfg"]
    assert content["vision_cfg"]["timm_model_name"] == "local-dir:./vision"
    assert content["text_cfg"]["hf_tokenizer_name"] == "."
