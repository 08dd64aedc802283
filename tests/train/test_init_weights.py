"""Initial weights: towers in timm's and transformers' layouts, complete models, and weights that do not fit."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peers import import_open_clip
from safetensors.torch import load_file, save_file
from synthetic import tiny_model, tiny_run, weights, write_shards
from towers import GPT, SMALL, padded_ids, shaken

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.train.config import InitConfig
from bclip_fast.train.init_weights import init_model
from bclip_fast.train.losses import LossConfig
from bclip_fast.train.schedule import OptimConfig
from bclip_fast.train.trainer import train

WEIGHTS = "open_clip_model.safetensors"
VISION, TEXT = SMALL.vision, SMALL.text
BERT: dict[str, Any] = {
    "hidden_size": TEXT.width,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 24,
}


def timm_vit(size: int = 32) -> torch.nn.Module:
    import_open_clip()
    import timm

    return timm.create_model(
        "vit_base_patch16_224", img_size=size, patch_size=8, embed_dim=VISION.width, depth=3, num_heads=4, num_classes=7
    ).eval()


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    theirs = shaken(timm_vit())
    from timm.models._hub import save_for_hf

    folder = tmp_path_factory.mktemp("timm")
    save_for_hf(theirs, folder, safe_serialization="both")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "pytorch_model.bin"}
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with its pretraining heads, and a vocab.txt."""
    from transformers import BertConfig, BertForPreTraining

    folder = tmp_path_factory.mktemp("bert")
    shaken(BertForPreTraining(BertConfig(**BERT))).save_pretrained(folder)
    words = ["a", "square", "at", "the", "red", "green", "blue", "left", "right", "top", "bottom"]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    return folder


def check_vision(ours: BiomedClip, theirs: Callable[[torch.Tensor], torch.Tensor]) -> None:
    size = ours.config.vision.image_size
    image = torch.randn(3, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval().visual(image, tokens=True), theirs(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", ["", "model.safetensors", "pytorch_model.bin"])
def test_init_vision_loads_timm(timm_folder: Path, caplog: pytest.LogCaptureFixture, file: str) -> None:
    ours, theirs = BiomedClip(SMALL), timm_vit()
    theirs.load_state_dict(load_file(timm_folder / "model.safetensors"))
    head = ours.visual.head.weight.detach().clone()
    with caplog.at_level(logging.INFO):
        init_model(ours, InitConfig(vision=str(timm_folder / file)))
    check_vision(ours, theirs.forward_features)
    assert torch.equal(ours.visual.head.weight, head)
    assert "dropped head.bias, head.weight" in caplog.text
    assert "random: head.weight" in caplog.text


def test_init_vision_resizes_position_embeddings_like_timm(timm_folder: Path) -> None:
    """The position embeddings are resized as in timm, without the class token's."""
    theirs = timm_vit(48)
    from timm.layers import resample_abs_pos_embed

    state = load_file(timm_folder / "model.safetensors")
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    theirs.load_state_dict(state)
    ours = BiomedClip(dataclasses.replace(SMALL, vision=dataclasses.replace(VISION, image_size=48)))
    init_model(ours, InitConfig(vision=str(timm_folder)))
    assert torch.equal(ours.visual.pos_embed[:, :1], state["pos_embed"][:, :1])
    check_vision(ours, theirs.forward_features)


@pytest.mark.parametrize("head", ["ViTForImageClassification", "ViTModel"])
def test_init_vision_loads_transformers(tmp_path: Path, head: str) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=VISION.width, num_hidden_layers=3, num_attention_heads=4, intermediate_size=4 * VISION.width,
        image_size=32, patch_size=8, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs: Any = shaken(getattr(transformers, head)(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = BiomedClip(SMALL)
    init_model(ours, InitConfig(vision=str(tmp_path)))
    trunk = theirs.vit if head == "ViTForImageClassification" else theirs
    check_vision(ours, lambda image: trunk(pixel_values=image).last_hidden_state)


@pytest.mark.parametrize("form", ["safetensors", "old names, old file"])
def test_init_text_loads_transformers(
    bert_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    from transformers import BertModel

    theirs: Any = BertModel.from_pretrained(bert_folder).eval()
    folder = bert_folder
    if form != "safetensors":
        # Use the names of norms that TensorFlow's conversion wrote, and the file format before PyTorch 1.6.
        state = load_file(bert_folder / "model.safetensors")
        for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            state = {name.replace(new, old): tensor for name, tensor in state.items()}
        state["bert.embeddings.position_ids"] = torch.arange(24)[None]
        folder = tmp_path
        shutil.copy(bert_folder / "config.json", folder)
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        assert any("gamma" in name for name in state)
    ours = BiomedClip(SMALL).eval()
    with caplog.at_level(logging.INFO):
        init_model(ours, InitConfig(text=str(folder)))
    for word in ("cls.predictions.bias", "pooler.dense.weight", "random: proj.0.weight, proj.2.weight"):
        assert word in caplog.text
    ids = padded_ids([20, 3, 11])
    with torch.no_grad():
        states = theirs(ids, attention_mask=(ids != 0).long()).last_hidden_state
        torch.testing.assert_close(ours.text(ids, tokens=True), states[ids != 0], rtol=1e-5, atol=1e-5)


def test_unfit_init_weights_are_errors(timm_folder: Path, bert_folder: Path, tmp_path: Path) -> None:
    def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **settings: Any) -> str:
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder, target)
        state = load_file(target / "model.safetensors")
        change(state)
        save_file(state, target / "model.safetensors")
        content = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(content | settings))
        return str(target)

    def same(state: dict[str, torch.Tensor]) -> None: ...

    gpt = dataclasses.replace(SMALL, text=GPT)
    deeper = dataclasses.replace(SMALL, vision=dataclasses.replace(VISION, layers=4))
    twelve = dataclasses.replace(SMALL, vision=dataclasses.replace(VISION, heads=12))
    fewer = dataclasses.replace(SMALL, text=dataclasses.replace(TEXT, vocab_size=96))
    vit = {"model_type": "vit", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    scaled = {"blocks.0.ls1.gamma": torch.ones(VISION.width)}
    for config, init, words in [
        (SMALL, InitConfig(vision=changed(timm_folder, lambda s: s.pop("norm.bias"))), "it lacks norm.bias"),
        (SMALL, InitConfig(vision=changed(timm_folder, lambda s: s.update(scaled))), "has blocks.0.ls1.gamma, which"),
        (deeper, InitConfig(vision=str(timm_folder)), "it lacks blocks.3.attn.proj.bias"),
        (twelve, InitConfig(vision=str(timm_folder)), "has 4 heads, but model.vision.heads=12"),
        (SMALL, InitConfig(vision=changed(timm_folder, same, architecture="resnet50")), "describes 'resnet50'"),
        (SMALL, InitConfig(vision=str(bert_folder)), "describes 'bert'; it must describe a plain ViT"),
        (SMALL, InitConfig(vision=str(bert_folder / "model.safetensors")), "it lacks blocks.0"),
        (gpt, InitConfig(text=str(bert_folder)), "must be a BERT, but model.text.kind is gpt"),
        (fewer, InitConfig(text=str(bert_folder)), r"word_embeddings.weight is .*\(100, 32\), but .*\(96, 32\)"),
        (SMALL, InitConfig(text=changed(bert_folder, same, hidden_act="relu")), "hidden_act='relu' must be 'gelu'"),
        (
            SMALL,
            InitConfig(text=changed(bert_folder, same, num_attention_heads=4)),
            "has 4 heads, but model.text.heads=2",
        ),
        (
            SMALL,
            InitConfig(text=changed(bert_folder, same, pad_token_id=1)),
            "padding token 1, but model.text.pad_id=0",
        ),
        (SMALL, InitConfig(text=changed(bert_folder, same, auto_map={"AutoModel": "own.Bert"})), "auto_map=.*own.Bert"),
        (
            SMALL,
            InitConfig(vision=changed(timm_folder, same, global_pool="avg", model_args={})),
            "global_pool='avg' must",
        ),
        (SMALL, InitConfig(vision=changed(timm_folder, same, model_args={"act_layer": "relu"})), "keys: act_layer"),
        (
            SMALL,
            InitConfig(vision=changed(timm_folder, same, model_args={"drop_path_rate": 0.1})),
            "drop_path_rate=0.1",
        ),
        *(
            (SMALL, InitConfig(vision=changed(bert_folder, same, **(vit | {name: value}))), f"{name}={value!r} must be")
            for name, value in (
                ("layer_norm_eps", 1e-5),
                ("attention_probs_dropout_prob", 0.1),
                ("hidden_dropout_prob", 0.1),
                ("hidden_act", "relu"),
            )
        ),
        (SMALL, InitConfig(text=str(tmp_path / "none")), "neither a file nor a folder"),
        (SMALL, InitConfig(vision=str(tmp_path)), "holds no config.json"),
    ]:
        with pytest.raises(UserError, match=words):
            init_model(BiomedClip(config), init)
    with pytest.raises(UserError, match=r"init.model sets both towers"):
        InitConfig(model="a", text="b")


def test_init_model_loads_both_towers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.train(["axial brain MRI", "chest radiograph"] * 3, 100, context_length=20)
    start = shaken(BiomedClip(SMALL))
    pretrained.save(tmp_path / "start", start, Preprocess(PreprocessConfig(size=32)), tokenizer)
    other = dataclasses.replace(
        SMALL,
        vision=dataclasses.replace(VISION, image_size=48, patch_dropout=0.5),
        text=dataclasses.replace(TEXT, dropout=0.0, context_length=12),
        init_logit_bias=-10.0,
    )
    model = BiomedClip(other)
    with caplog.at_level(logging.INFO):
        init_model(model, InitConfig(model=str(tmp_path / "start")))
    assert "dropped: nothing; initialised by config: logit_bias" in caplog.text
    actual, expected = model.state_dict(), start.state_dict()
    assert float(actual.pop("logit_bias").detach()) == -10.0
    assert actual.pop("visual.pos_embed").shape == (1, 37, 48)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    init_model(model, InitConfig(model=str(tmp_path / "start")), LossConfig(kind="siglip"))
    assert float(model.logit_scale.detach().exp()) == pytest.approx(10)
    wider = dataclasses.replace(SMALL, embed_dim=32)
    with pytest.raises(
        UserError, match=r"its model.embed_dim is 24, but this run has 32; change preset or the model section"
    ):
        init_model(BiomedClip(wider), InitConfig(model=str(tmp_path / "start")))
    config = json.loads((tmp_path / "start" / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "start" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"expects pixels of mean \(0.5, 0.5, 0.5\)"):
        init_model(BiomedClip(SMALL), InitConfig(model=str(tmp_path / "start")))


def test_init_model_loads_openai_clip(tmp_path: Path) -> None:
    """open_clip's CLIP with OpenAI's ViT and QuickGELU is read, computed, used as initial weights, and written back."""
    open_clip = import_open_clip()
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 12}
    text = {"context_length": 20, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
    model_cfg = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    theirs = shaken(open_clip.model.CLIP(**model_cfg)).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, tmp_path / WEIGHTS)
    Tokenizer.train(["axial brain MRI", "chest radiograph"] * 3, 100, context_length=20).save(tmp_path)
    ours, preprocess, tokenizer = pretrained.load(tmp_path)
    image, ids = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8), padded_ids([20, 7])
    ids[0, -1] = ids[1, 6] = 99
    mean, std = torch.tensor(preprocess.config.mean), torch.tensor(preprocess.config.std)
    pixels = ((image / 255 - mean) / std).permute(0, 3, 1, 2)

    def check(ours: BiomedClip, theirs: Any) -> None:
        with torch.no_grad():
            for input_image in (pixels, image):
                torch.testing.assert_close(
                    ours.encode_image(input_image), theirs.encode_image(pixels, normalize=True), rtol=1e-5, atol=1e-5
                )
            torch.testing.assert_close(
                ours.encode_text(ids), theirs.encode_text(ids, normalize=True), rtol=1e-5, atol=1e-5
            )

    check(ours, theirs)
    exact = dataclasses.replace(ours.config, quick_gelu=False)
    with pytest.raises(UserError, match=r"its model.quick_gelu is True, but this run has False"):
        init_model(BiomedClip(exact), InitConfig(model=str(tmp_path)))
    # Load it at another image size, and write it for open_clip.
    larger = dataclasses.replace(ours.config, vision=dataclasses.replace(ours.config.vision, image_size=48))
    model = BiomedClip(larger)
    init_model(model, InitConfig(model=str(tmp_path)))
    assert model.visual.pos_embed.shape == (1, 37, 48)
    pretrained.save(tmp_path / "again", ours, preprocess, tokenizer)
    written = json.loads((tmp_path / "again" / "open_clip_config.json").read_text())["model_cfg"]
    custom = open_clip.model.CustomTextCLIP(**{key: value for key, value in written.items() if key != "custom_text"})
    custom.load_state_dict(load_file(tmp_path / "again" / WEIGHTS))
    check(ours, custom.eval())
    assert pretrained.load(tmp_path / "again")[0].config == ours.config
    with_bert = BiomedClip(dataclasses.replace(ours.config, text=SMALL.text))
    with pytest.raises(UserError, match="ViTModel has no norm before its layers"):
        pretrained.save_transformers(tmp_path / "hf", with_bert, preprocess, tokenizer)
    with pytest.raises(UserError, match="quick_gelu=True requires"):
        dataclasses.replace(SMALL, quick_gelu=True)
    with pytest.raises(UserError, match=r"must be a plain ViT, but model.vision.kind is"):
        init_model(BiomedClip(ours.config), InitConfig(vision="anything"))


def test_init_text_downloads_from_hub(bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        requests.append((repository, name, revision))
        return str(bert_folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = BiomedClip(SMALL)
    init_model(model, InitConfig(text="hf-hub:org/bert@abc"))
    expected = load_file(bert_folder / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(model.text.word_embeddings.weight, expected)  # type: ignore[union-attr, arg-type]
    assert requests == [("org/bert", "config.json", "abc"), ("org/bert", "model.safetensors", "abc")]


def test_run_reads_init_weights_but_resumed_run_does_not(bert_folder: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    model = dataclasses.replace(tiny_model(), text=dataclasses.replace(TEXT, context_length=12, dropout=0.0))
    slow = OptimConfig(lr=1e-9, warmup_steps=0)
    start = tmp_path / "bert"
    shutil.copytree(bert_folder, start)
    config = tiny_run(tmp_path / "run", shards, model=model, init=InitConfig(text=str(start)), optim=slow, max_steps=1)
    run = train(config)
    expected = load_file(bert_folder / "model.safetensors")["bert.encoder.layer.2.output.dense.weight"]
    torch.testing.assert_close(weights(run)["text.layers.2.fc2.weight"], expected, rtol=0, atol=1e-6)
    assert Tokenizer.from_file(run / "tokenizer" / "tokenizer.json").vocab_size == 16
    shutil.rmtree(start)
    train(dataclasses.replace(config, resume=True, max_steps=2))
    # A run that starts from another run takes its weights, and its tokenizer unless another is configured.
    second = tiny_run(tmp_path / "next", shards, model=model, init=InitConfig(model=str(run)), optim=slow, max_steps=1)
    after = weights(train(second))
    torch.testing.assert_close(after, weights(run), rtol=0, atol=1e-6)
    assert Tokenizer.from_file(tmp_path / "next" / "tokenizer" / "tokenizer.json").vocab_size == 16
    data = dataclasses.replace(second.data, tokenizer="train")
    train(dataclasses.replace(second, run=str(tmp_path / "third"), data=data))
    assert Tokenizer.from_file(tmp_path / "third" / "tokenizer" / "tokenizer.json").vocab_size > 16
