"""Checkpoints: parity with open_clip both ways, both layouts and spellings, and every kind of broken input."""

from __future__ import annotations

import gc
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peers import import_open_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from towers import GPT, SMALL, padded_ids, shaken

from bclip_fast import load, save
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.presets import preset
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionConfig

PUBMEDBERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
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
BERT_BASE = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 0,
}
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["axial brain MRI", "chest radiograph", "cell nuclei, stained"] * 3, 100, context_length=20)


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A small checkpoint of ours on disk."""
    save(tmp_path / "small", shaken(BiomedClip(SMALL)), Preprocess(PreprocessConfig(size=32)), tokenizer)
    return tmp_path / "small"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def as_bin(folder: Path, wrap: Callable[[dict], object] = lambda state: state) -> Path:
    path = folder / "open_clip_pytorch_model.bin"
    torch.save(wrap(load_file(folder / WEIGHTS)), path)
    (folder / WEIGHTS).unlink()
    return path


# Parity at full size. One fixture builds open_clip's model once, keeps its answers, and lets it go: memory.


@pytest.fixture(scope="module")
def real(shared_data: Path) -> tuple[torch.Tensor, list[str]]:
    images = []
    for path in sorted((shared_data / "pmc_articles" / "native").rglob("*.jpg"))[:40:20]:
        with Image.open(path) as image:
            images.append(Preprocess()(image))
    with open(shared_data / "pmc_articles" / "pairs.jsonl", encoding="utf-8") as lines:
        texts = sorted((json.loads(line)["caption"] for line in lines), key=len)
    assert len(images) == 2
    return torch.stack(images), [texts[20], texts[280], texts[-1]]


@pytest.fixture(scope="module")
def published(tmp_path_factory, real, shared_data: Path) -> tuple[Path, Path, dict]:
    """(folder with the model names of the hub, checkpoint folder as published, open_clip's answers)."""
    open_clip = import_open_clip()
    hub = tmp_path_factory.mktemp("hub")
    # transformers takes a name for a folder where there is one: the hub's model names resolve offline from here.
    (hub / PUBMEDBERT).mkdir(parents=True)
    (hub / PUBMEDBERT / "config.json").write_text(json.dumps(BERT_BASE))
    folder = tmp_path_factory.mktemp("published")
    (folder / CONFIG).write_text(json.dumps(PUBLISHED))
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shared_data / "vocab" / "pubmedbert" / name).read_bytes())
    before = os.getcwd()
    os.chdir(hub)
    torch.manual_seed(0)  # the fixture of the module is set up before the one that seeds each test
    try:
        theirs = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False).eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(real[1])
    finally:
        os.chdir(before)
    assert type(theirs).__name__ == "CustomTextCLIP"
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        theirs.logit_scale.fill_(4.4454)
        answers = {
            "tokens": tokens,
            "image": theirs.encode_image(real[0], normalize=True),
            "text": theirs.encode_text(tokens, normalize=True),
            "image_raw": theirs.encode_image(real[0]),
            "text_raw": theirs.encode_text(tokens),
        }
    state = theirs.state_dict()
    state["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    return hub, folder, answers


@pytest.mark.slow
@torch.no_grad()
def test_published_configuration_equals_open_clip_and_back(published, real, tmp_path, monkeypatch) -> None:
    """Takes up to 20 seconds: five models of the published size are made, loaded or saved, and two embed."""
    hub, folder, answers = published
    model, preprocess, tokenizer = load(folder)
    assert model.config == preset("biomedclip_b16") and not model.training
    assert torch.equal(tokenizer(real[1]), answers["tokens"])
    assert (answers["tokens"] != 0).sum(1).tolist()[-1] == 256
    ours = {"image": model.encode_image(real[0]), "text": model.encode_text(answers["tokens"])}
    for tower, features in ours.items():
        assert (features - answers[tower]).abs().max() <= 1e-5
        # The answers differ from input to input, or equality would say little.
        assert (answers[tower][0] - answers[tower][1]).abs().max() > 1e-2
    raw = model.encode_image(real[0], normalize=False)
    torch.testing.assert_close(raw, answers["image_raw"], rtol=1e-3, atol=1e-3)
    assert model().get("logit_scale").item() == pytest.approx(85.23, abs=0.01)

    save(tmp_path, model, preprocess, tokenizer)
    del model
    gc.collect()
    assert json.loads((tmp_path / CONFIG).read_text()) == PUBLISHED
    open_clip = import_open_clip()
    monkeypatch.chdir(hub)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs.eval()
    assert torch.equal(theirs.encode_image(real[0], normalize=True), answers["image"])
    assert torch.equal(theirs.encode_text(answers["tokens"], normalize=True), answers["text"])
    picture = Image.effect_noise((300, 260), 80).convert("RGB")
    assert torch.equal(transform(picture), preprocess(picture))
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(real[1]), answers["tokens"])


# Our own sizes, at small size.


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
def test_other_sizes_open_in_open_clip_from_their_folder(config, tokenizer, tmp_path, monkeypatch) -> None:
    model = shaken(BiomedClip(config)).eval()
    preprocess = Preprocess(PreprocessConfig(size=32, mean=(0.5, 0.5, 0.5), interpolation="bilinear"))
    save(tmp_path, model, preprocess, tokenizer)
    again, preprocess_again, tokenizer_again = load(tmp_path)
    assert again.config == config and preprocess_again.config == preprocess.config
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
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    assert torch.equal(transform(picture), preprocess(picture))
    assert torch.equal(open_clip.get_tokenizer("local-dir:.")(texts), ids)


@torch.no_grad()
def test_open_clips_clip_layout_of_a_gpt_tower(checkpoint: Path, tokenizer: Tokenizer) -> None:
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


def test_both_spellings_of_the_configuration(checkpoint: Path) -> None:
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
def test_bin_equals_safetensors(checkpoint: Path, wrap: Callable[[dict], object]) -> None:
    ids = padded_ids([4, 9])
    expected = load(checkpoint)[0](text=ids)
    as_bin(checkpoint, wrap)
    model = load(checkpoint)[0]
    actual = model(text=ids)
    assert torch.equal(actual["text_features"], expected["text_features"])
    assert torch.equal(actual["logit_scale"], expected["logit_scale"]) and model.logit_scale.shape == ()
    assert model.text.layers[0].qkv.weight.requires_grad


def test_counters_and_unused_pooler_are_dropped_with_a_line(checkpoint: Path, caplog) -> None:
    def add(state: dict) -> None:
        state["text.transformer.embeddings.position_ids"] = torch.arange(24)[None]
        state["text.transformer.pooler.dense.weight"] = torch.zeros(32, 32)
        state["text.transformer.pooler.dense.bias"] = torch.zeros(32)

    edit_weights(checkpoint, add)
    with caplog.at_level("INFO", logger="bclip_fast"):
        load(checkpoint)
    assert "position_ids" in caplog.text and "pooler.dense.bias" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(foreign=torch.zeros(2)), "has foreign, which this model doesn't"),
        (lambda s: s.pop("visual.trunk.blocks.1.attn.qkv.bias"), "lacks visual.trunk.blocks.1.attn.qkv.bias"),
        (lambda s: s.pop("text.transformer.encoder.layer.2.attention.self.key.weight"), "layer.2.attention.self.key"),
        (lambda s: s.update({"visual.head.proj.weight": torch.zeros(24, 47)}), r"head.proj.weight .*\(24, 47\)"),
        (lambda s: s.update({"text.proj.2.weight": torch.zeros(24, 28).int()}), "text.proj.2.weight is torch.int32"),
        (lambda s: s.update({"text.transformer.embeddings.position_ids2": torch.zeros(1)}), "position_ids2"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("text.")], "and [0-9]+ more keys"),
        (lambda s: s.clear() or s.update(a=torch.zeros(1)), "and it has a"),
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_named(checkpoint: Path, change, message: str) -> None:
    edit_weights(checkpoint, change)
    with pytest.raises(UserError, match=message) as error:
        load(checkpoint)
    assert "\n" not in str(error.value) and WEIGHTS in str(error.value)


class Payload:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BCLIP_TEST_PAYLOAD"],))


def test_a_pickle_with_code_is_refused_and_not_run(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    trace = tmp_path / "executed"
    monkeypatch.setenv("BCLIP_TEST_PAYLOAD", str(trace))
    path = as_bin(checkpoint, lambda state: {**state, "extra": Payload()})
    with pytest.raises(UserError, match="more than plain weights"):
        load(checkpoint)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match="broken"):
        load(checkpoint)
    assert not trace.exists()


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_truncated_file_is_refused(checkpoint: Path, keep: float, kind: str) -> None:
    path = as_bin(checkpoint) if kind == "bin" else checkpoint / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=f"{path.name} (is broken|isn't a complete)") as error:
        load(checkpoint)
    assert "\n" not in str(error.value)


def test_odd_checkpoints_are_refused(checkpoint: Path) -> None:
    path = as_bin(checkpoint)
    members = {}
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="compressed"):
        load(checkpoint)
    for odd, message in [([1, 2], "a state dict"), ({}, "a state dict"), ({"a": 1}, "'a', which isn't a plain tensor")]:
        torch.save(odd, path)
        with pytest.raises(UserError, match=message):
            load(checkpoint)
    torch.save({"a": torch.zeros(2, 2).to_sparse()}, path)
    with pytest.raises(UserError, match="isn't a plain tensor"):
        load(checkpoint)
    path.unlink()
    with pytest.raises(UserError, match="holds no open_clip_model.safetensors or"):
        load(checkpoint)


def in_model(key: str, value: object) -> Callable[[dict], None]:
    return lambda content: content["model_cfg"].update({key: value})


def in_section(section: str, key: str, value: object) -> Callable[[dict], None]:
    return lambda content: content["model_cfg"][section].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model_cfg"), "model_cfg"),
        (in_model("multimodal_cfg", {}), "multimodal_cfg"),
        (in_model("quick_gelu", True), "quick_gelu=True requires"),
        (in_model("embed_dim", "512"), "embed_dim='512' must be"),
        (in_model("vision_cfg", 5), "vision_cfg"),
        (in_section("vision_cfg", "timm_model_name", "resnet50"), "timm_model_name='resnet50' must be one of"),
        (in_section("vision_cfg", "timm_model_name", "local-dir:../../etc"), "inside the checkpoint's folder"),
        (in_section("vision_cfg", "timm_model_name", "local-dir:/etc"), "inside the checkpoint's folder"),
        (in_section("vision_cfg", "timm_pool", "avg_max"), "timm_pool='avg_max' must be"),
        (in_section("vision_cfg", "patch_dropout", "half"), "patch_dropout"),
        (in_section("vision_cfg", "image_size", 64), "image_size=64 must be"),
        (in_section("vision_cfg", "attentional_pool", True), "attentional_pool"),
        (in_section("text_cfg", "hf_model_name", "/etc"), "inside the checkpoint's folder"),
        (in_section("text_cfg", "hf_model_name", "./nowhere"), "nowhere/config.json"),
        (in_section("text_cfg", "hf_pooler_type", "mean_pooler"), "'mean_pooler'"),
        (in_section("text_cfg", "hf_proj_type", "none"), "text.projection='none' must be"),
        (in_section("text_cfg", "context_length", 10**9), "text.context_length"),
        (in_section("text_cfg", "surprise", 1), "text_cfg has unsupported keys: surprise"),
        (lambda c: c["preprocess_cfg"].update(mean=[1]), "mean"),
        (lambda c: c["preprocess_cfg"].update(size=31), "size 31"),
        (lambda c: c["preprocess_cfg"].update(surprise=1), "surprise"),
    ],
)
def test_configurations_that_are_not_ours_are_refused(checkpoint: Path, change, message: str) -> None:
    edit_json(checkpoint / CONFIG, change)
    with pytest.raises(UserError, match=message) as error:
        load(checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("text/config.json", lambda c: c.update(hidden_act="relu"), "hidden_act='relu' must be"),
        ("text/config.json", lambda c: c.update(model_type="roberta"), "model_type='roberta' must be"),
        ("text/config.json", lambda c: c.update(hidden_size=10**12), "hidden_size"),
        ("text/config.json", lambda c: c.update(vocab_size=50), "embeds only 50"),
        ("text/config.json", lambda c: c.pop("num_hidden_layers"), "encoder.layer.10.*more keys"),
        ("vision/config.json", lambda c: c["model_args"].update(depth=10**9), "vision.layers"),
        ("vision/config.json", lambda c: c["model_args"].update(class_token=False), "class_token"),
        ("vision/config.json", lambda c: c.update(architecture="resnet50"), "'resnet50'"),
        # Sizes that the weights don't have, whose memory must never be asked for: this would be 40 GB.
        ("vision/config.json", lambda c: c["model_args"].update(embed_dim=16384, depth=12), "doesn't fit|blocks"),
    ],
)
def test_tower_descriptions_that_are_not_ours_are_refused(checkpoint: Path, file: str, change, message: str) -> None:
    edit_json(checkpoint / file, change)
    with pytest.raises(UserError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "\udcff", '{"model_cfg":' + " " * (1 << 20) + "{}}"])
def test_configurations_that_are_no_json_are_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / CONFIG).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=CONFIG):
        load(checkpoint)


def test_a_run_folder_and_wrong_names(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.rename(run / "model")
    assert load(run)[0].config == SMALL
    assert load(str(run / "model"))[0].config == SMALL
    with pytest.raises(UserError, match="hf-hub:ORG/NAME"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no open_clip_config.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="precision 'int4'"):
        load(run, precision="int4")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision(checkpoint: Path, precision: str, dtype: torch.dtype) -> None:
    model = load(checkpoint, precision=precision)[0]
    assert model.visual.head.weight.dtype == dtype and model.logit_scale.dtype == torch.float32


def test_another_image_size(checkpoint: Path) -> None:
    model, preprocess, tokenizer = load(checkpoint, image_size=48)
    assert model.config.vision.image_size == preprocess.config.size == 48
    assert model.encode_image(torch.randn(1, 3, 48, 48)).shape == (1, 24)
    save(checkpoint, model, preprocess, tokenizer)
    assert load(checkpoint)[0].config == model.config
    with pytest.raises(UserError, match="multiple"):
        load(checkpoint, image_size=50)


def test_save_refuses_what_does_not_fit_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = BiomedClip(SMALL)
    with pytest.raises(UserError, match="224"):
        save(tmp_path / "a", model, Preprocess(), tokenizer)
    large = Tokenizer.train(["abcdefghijklmnopqrstuvwxyz " + " ".join(f"{i}" for i in range(400))] * 3, 400)
    with pytest.raises(UserError, match="embeds only 100"):
        save(tmp_path / "a", model, Preprocess(PreprocessConfig(size=32)), large)
    with pytest.raises(UserError, match="logit_scale"):
        save(tmp_path / "a", model, Preprocess(PreprocessConfig(size=32)), tokenizer, state_dict={})
    assert not (tmp_path / "a").exists()


def test_save_takes_a_gathered_state(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model, other = BiomedClip(SMALL), shaken(BiomedClip(SMALL))
    save(tmp_path, model, Preprocess(PreprocessConfig(size=32)), tokenizer, state_dict=other.state_dict())
    assert torch.equal(load(tmp_path)[0].visual.pos_embed, other.visual.pos_embed)


def test_published_names_stand_only_for_what_they_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = BiomedClipConfig(vision=VisionConfig(width=8, heads=1, layers=1), embed_dim=4, text=SMALL.text)
    save(tmp_path, BiomedClip(config), Preprocess(), tokenizer)
    content = json.loads((tmp_path / CONFIG).read_text())["model_cfg"]
    assert content["vision_cfg"]["timm_model_name"] == "local-dir:./vision"
    assert content["text_cfg"]["hf_tokenizer_name"] == "."


# The hub, which tests never reach.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    """A folder that stands for the hub: ORG/NAME/FILE."""

    def download(repo_id: str, filename: str, *, revision: str | None = None) -> str:
        path = tmp_path / "hub" / repo_id / (revision or "main") / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(f"no {filename} in the cache and no connection\nmore")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path / "hub"


def test_load_from_the_hub(hub: Path, checkpoint: Path) -> None:
    (hub / "org" / "name").mkdir(parents=True)
    checkpoint.rename(hub / "org" / "name" / "v2")
    assert load("hf-hub:org/name@v2")[0].config == SMALL
    with pytest.raises(UserError, match="hf-hub:org/name gave no open_clip_config.json: .*no connection$"):
        load("hf-hub:org/name")


def test_a_missing_tokenizer_comes_from_the_hub_or_is_named(hub: Path, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="save the tokenizer beside the weights"):
        load(checkpoint)
    edit_json(checkpoint / CONFIG, in_section("text_cfg", "hf_tokenizer_name", "org/words"))
    with pytest.raises(UserError, match="hf-hub:org/words gave no tokenizer.json or vocab.txt"):
        load(checkpoint)
    (hub / "org" / "words" / "main").mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "brain"]
    (hub / "org" / "words" / "main" / "vocab.txt").write_text("\n".join(words) + "\n")
    assert load(checkpoint)[2](["brain"], 4).tolist() == [[2, 4, 3, 0]]


def test_a_text_tower_named_on_the_hub(hub: Path, checkpoint: Path) -> None:
    edit_json(checkpoint / CONFIG, in_section("text_cfg", "hf_model_name", "org/bert"))
    with pytest.raises(UserError, match="hf-hub:org/bert gave no config.json"):
        load(checkpoint)
    (hub / "org" / "bert").mkdir(parents=True)
    (checkpoint / "text").rename(hub / "org" / "bert" / "main")
    assert load(checkpoint)[0].config == SMALL


def test_the_hub_offline_gives_one_clear_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, message in [("org/absent", "org/absent gave no"), ("a b/c/d", "no repository id")]:
        with pytest.raises(UserError, match=message) as error:
            load(f"hf-hub:{name}")
        assert "\n" not in str(error.value)
