"""Checkpoints that are damaged, unsafe or unsupported: the error names the file and the key."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, WEIGHTS, convert_to_bin, edit_json, edit_weights, in_model, in_section

from bclip_fast import load
from bclip_fast.errors import UserError


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
def test_load_wrong_keys_or_shapes_raise(checkpoint: Path, change, message: str) -> None:
    edit_weights(checkpoint, change)
    with pytest.raises(UserError, match=message) as error:
        load(checkpoint)
    assert "\n" not in str(error.value)
    assert WEIGHTS in str(error.value)


class Payload:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["BCLIP_TEST_PAYLOAD"],))


def test_load_pickle_with_code_raises_without_running_it(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    trace = tmp_path / "executed"
    monkeypatch.setenv("BCLIP_TEST_PAYLOAD", str(trace))
    path = convert_to_bin(checkpoint, lambda state: {**state, "extra": Payload()})
    with pytest.raises(UserError, match="more than plain weights"):
        load(checkpoint)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match="broken"):
        load(checkpoint)
    assert not trace.exists()


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_load_truncated_file_raises(checkpoint: Path, keep: float, kind: str) -> None:
    path = convert_to_bin(checkpoint) if kind == "bin" else checkpoint / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=f"{path.name} (is broken|isn't a complete|is empty)") as error:
        load(checkpoint)
    assert "\n" not in str(error.value)


def test_load_unusual_bin_files_raise(checkpoint: Path) -> None:
    path = convert_to_bin(checkpoint)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="compressed"):
        load(checkpoint)
    for content, message in [
        ([1, 2], "a state dict"),
        ({}, "a state dict"),
        ({"a": 1}, "'a', which isn't a plain tensor"),
    ]:
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            load(checkpoint)
    torch.save({"a": torch.zeros(2, 2).to_sparse()}, path)
    with pytest.raises(UserError, match="isn't a plain tensor"):
        load(checkpoint)
    path.unlink()
    with pytest.raises(UserError, match=r"holds no open_clip_model.safetensors or"):
        load(checkpoint)


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
        # timm then averages the patches, as it does without the key, and our tower reads the class token.
        (in_section("vision_cfg", "timm_pool", "avg"), "timm_pool='avg' must be '' or 'token'"),
        (lambda c: c["model_cfg"]["vision_cfg"].pop("timm_pool"), "timm_pool='avg' must be"),
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
def test_load_unsupported_configuration_raises(checkpoint: Path, change, message: str) -> None:
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
        # The weights do not have these sizes. A model of 40 GB must never be allocated.
        ("vision/config.json", lambda c: c["model_args"].update(embed_dim=16384, depth=12), "doesn't fit|blocks"),
    ],
)
def test_load_unsupported_tower_configuration_raises(checkpoint: Path, file: str, change, message: str) -> None:
    edit_json(checkpoint / file, change)
    with pytest.raises(UserError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "\udcff", '{"model_cfg":' + " " * (1 << 20) + "{}}"])
def test_load_invalid_json_raises(checkpoint: Path, content: str) -> None:
    (checkpoint / CONFIG).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=CONFIG):
        load(checkpoint)
