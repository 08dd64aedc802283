"""Checkpoints in the layouts of open_clip, transformers and PMC-CLIP: random weights of the published configurations.

At full size, all names and shapes are compared on the meta device. Small towers of the same kinds are compared in their
outputs. The largest difference may be 1e-5 of the largest feature.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIG, edit_json, in_section
from features import check_close, photographs
from peers import import_open_clip
from sentencepieces import write_sentencepiece
from towers import GPT, SIGLIP, shaken

from bclip_fast import load, save
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.model import open_clip_config, transformers_clip, weights
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.presets import preset
from bclip_fast.model.safe_load import read_checkpoint
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionConfig
from bclip_fast.pretrained import save_transformers

TEXTS = ["axial brain MRI", "Chest radiograph, of a PATIENT!", "nuclei " * 30]
# google/medsiglip-448, as transformers writes it. Keys without influence are left out.
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
MEDSIGLIP = {
    "architectures": ["SiglipModel"],
    "model_type": "siglip",
    "initializer_factor": 1.0,
    "text_config": {
        **_SO400M,
        "model_type": "siglip_text_model",
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }
    | {"vocab_size": 32000, "projection_size": 1152, "max_position_embeddings": 64, "attention_dropout": 0.0},
    "vision_config": {**_SO400M, "model_type": "siglip_vision_model", "image_size": 448, "patch_size": 14}
    | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3, "attention_dropout": 0.0},
}
# openai/clip-vit-large-patch14. Its file has every setting of a tower twice.
_OPENAI_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
_OPENAI_TEXT |= {"projection_dim": 768, "hidden_act": "quick_gelu", "eos_token_id": 2}
_OPENAI_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
_OPENAI_VISION |= {"projection_dim": 768, "patch_size": 14, "hidden_act": "quick_gelu"}
OPENAI_L14 = {
    "model_type": "clip",
    "projection_dim": 768,
    **{"text_config": {"hidden_act": "quick_gelu", "eos_token_id": 2}, "text_config_dict": _OPENAI_TEXT},
    **{"vision_config": _OPENAI_VISION, "vision_config_dict": _OPENAI_VISION},
}


@pytest.fixture(autouse=True, scope="module")
def _torchvision() -> None:
    """transformers and timm import torchvision if it is installed. This stub has no operators."""
    import_open_clip()


@pytest.fixture
def siglip_tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_file(write_sentencepiece(tmp_path / "pieces"), 16)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("ViT-B-16-SigLIP", "siglip_b16"),
        ("ViT-SO400M-14-SigLIP-384", "siglip_so400m14_384"),
        ("ViT-L-14-quickgelu", "clip_l14"),
        ("ViT-L-14", None),
        ("ViT-L-16-SigLIP2-512", None),
        ("ViT-gopt-16-SigLIP2-256", None),
    ],
)
def test_open_clip_names_and_shapes_at_full_size(name: str, ours: str | None) -> None:
    """ViT-L-14 is the architecture of BMC-CLIP and MedPMC-CLIP."""
    open_clip = import_open_clip()
    published = open_clip.get_model_config(name)
    config = open_clip_config.read({"model_cfg": published}, _no_file, _no_file)
    if config.text.kind == "siglip":  # open_clip's default scale is CLIP's, and the tokenizer gives the padding
        text = dataclasses.replace(config.text, pad_id=1)
        config = dataclasses.replace(config, text=text, init_logit_scale=math.log(10))
    if ours:
        assert config == preset(ours)
    custom = published.pop("custom_text", False)
    with torch.device("meta"):
        theirs = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**published)
        model = BiomedClip(config)
    state = weights.from_open_clip(theirs.state_dict(), model, source=name)
    assert state.keys() == model.state_dict().keys()
    written = open_clip_config.write(config, published_tokenizer=False)[CONFIG]
    assert open_clip_config.read(written, _no_file, _no_file) == config
    if custom:
        assert written["model_cfg"]["vision_cfg"] == published["vision_cfg"]


@torch.no_grad()
def test_training_checkpoint_with_the_configuration_of_the_docs(tmp_path: Path) -> None:
    """BMC-CLIP: docs/models.md gives the configuration. Here it has smaller towers."""
    open_clip = import_open_clip()
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    published = json.loads(page.partition("```json")[2].partition("```")[0])["model_cfg"]
    assert published == open_clip.get_model_config("ViT-L-14")
    published["vision_cfg"] |= {"width": 64, "layers": 2, "head_width": 32, "image_size": 28}
    published["text_cfg"] |= {"width": 32, "heads": 2, "layers": 1}
    theirs = shaken(open_clip.CLIP(**published)).eval()
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "c.bin")
    model = BiomedClip(open_clip_config.read({"model_cfg": published}, _no_file, _no_file)).eval()
    model.load_state_dict(weights.from_open_clip(read_checkpoint(tmp_path / "c.bin"), model, source="c.bin"))
    pixels = torch.randn(2, 3, 28, 28)
    check_close(model.encode_image(pixels, normalize=False), theirs.encode_image(pixels))


def _no_file(path: str) -> Any:
    raise AssertionError(f"{path} is read")


@pytest.mark.parametrize(("content", "ours"), [(MEDSIGLIP, "siglip_so400m14_448"), (OPENAI_L14, "clip_l14")])
def test_transformers_names_and_shapes_at_full_size(content: dict[str, Any], ours: str) -> None:
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    siglip = content["model_type"] == "siglip"
    config = transformers_clip.read(content, "config.json")
    if siglip:
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, pad_id=1))
    assert config == preset(ours)
    sections = {key: content.get(f"{key}_dict") or content[key] for key in ("vision_config", "text_config")}
    with torch.device("meta"):
        model = BiomedClip(config)
        if siglip:
            theirs: Any = SiglipModel(SiglipConfig(**sections))
        else:
            theirs = CLIPModel(CLIPConfig(**sections, projection_dim=content["projection_dim"]))
    state = weights.from_transformers(theirs.state_dict(), model, source="model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert transformers_clip.read(transformers_clip.write(config), "written") == dataclasses.replace(
        config, text=dataclasses.replace(config.text, pad_id=0)
    )


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_siglip_opens_in_open_clip(
    activation: str, siglip_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saved model gives the same pixels, ids and features in open_clip, and loads again."""
    open_clip = import_open_clip()
    vision, text = (dataclasses.replace(tower, activation=activation) for tower in (SIGLIP.vision, SIGLIP.text))
    # The product of this ratio and the width is below a whole number in floating point.
    text = dataclasses.replace(text, mlp_ratio=29 / 32)
    config = dataclasses.replace(SIGLIP, vision=dataclasses.replace(vision, mlp_ratio=85 / 48), text=text)
    model = shaken(BiomedClip(config)).eval()
    preprocess = Preprocess(PreprocessConfig(35, (0.5,) * 3, (0.5,) * 3, resize_mode="squash"))
    tokenizer = siglip_tokenizer.with_cleaning("canonicalize")
    save(tmp_path / "saved", model, preprocess, tokenizer)
    again, preprocess_again, tokenizer_again = load(tmp_path / "saved")
    assert (again.config, preprocess_again.config) == (config, preprocess.config)
    ids, image = tokenizer(TEXTS), torch.stack([preprocess(each) for each in photographs()])
    assert torch.equal(tokenizer_again(TEXTS), ids)
    check_close(again.encode_image(image), model.encode_image(image))
    monkeypatch.chdir(tmp_path / "saved")
    theirs, _, transform = open_clip.create_model_and_transforms("local-dir:.")
    theirs.eval()
    assert torch.equal(open_clip.get_tokenizer("local-dir:.")(TEXTS), ids)
    assert torch.equal(torch.stack([transform(each) for each in photographs()]), image)
    check_close(model.encode_image(image, normalize=False), theirs.encode_image(image))
    check_close(model.encode_text(tokenizer.packed(TEXTS), normalize=False), theirs.encode_text(ids))
    assert float(theirs.logit_bias) == -10.0


@torch.no_grad()
def test_load_siglip_of_transformers(tmp_path: Path) -> None:
    """As google/medsiglip-448: spiece.model, SiglipImageProcessor, heads of 72, patches that don't cover the image."""
    from transformers import AutoImageProcessor, AutoTokenizer, SiglipConfig, SiglipModel

    sizes = {"hidden_size": 144, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = shaken(
        SiglipModel(
            SiglipConfig(
                text_config={**sizes, "vocab_size": 96, "max_position_embeddings": 64},
                vision_config={**sizes, "image_size": 33, "patch_size": 8},
            )
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    write_sentencepiece(tmp_path)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
    }
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255}
    processor |= {"do_convert_rgb": None, "size": {"height": 33, "width": 33}, "processor_class": "SiglipProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model, preprocess, tokenizer = load(tmp_path)
    assert model.config.text.pad_id == 1
    pixels = torch.stack([preprocess(each) for each in photographs()])
    expected = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(list(photographs()), return_tensors="pt")
    assert (pixels - expected.pixel_values).abs().max() <= 2.1 / 255  # a rounding of the resized pixels
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(tokenizer(TEXTS), ids.input_ids)
    check_close(model.encode_image(pixels, normalize=False), theirs.get_image_features(pixels).pooler_output)
    expected = theirs.get_text_features(ids.input_ids).pooler_output
    check_close(model.encode_text(tokenizer.packed(TEXTS), normalize=False), expected)
    output = theirs(input_ids=ids.input_ids, pixel_values=pixels)
    ours = model(pixels, tokenizer(TEXTS))
    logits = ours["logit_scale"] * ours["image_features"] @ ours["text_features"].T + ours["logit_bias"]
    torch.testing.assert_close(logits, output.logits_per_image, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_load_clip_of_transformers(quick_gelu: bool, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    act = {"hidden_act": "quick_gelu" if quick_gelu else "gelu"}
    sizes = {"intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 24, **act}
    text = {**sizes, "hidden_size": 32, "vocab_size": 96, "max_position_embeddings": 20, "eos_token_id": 3}
    vision = {**sizes, "hidden_size": 48, "image_size": 32, "patch_size": 8}
    theirs = shaken(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))).eval()
    theirs.save_pretrained(tmp_path)
    Tokenizer.train(TEXTS * 3, 96, context_length=20).save(tmp_path)
    model, preprocess, tokenizer = load(tmp_path)
    assert (model.config.quick_gelu, model.config.text.end_id) == (quick_gelu, 3)
    assert preprocess.config == PreprocessConfig(size=32)
    pixels, ids = torch.stack([preprocess(each) for each in photographs()]), tokenizer(TEXTS)
    check_close(model.encode_image(pixels, normalize=False), theirs.get_image_features(pixels).pooler_output)
    expected = theirs.get_text_features(ids).pooler_output
    check_close(model.encode_text(tokenizer.packed(TEXTS), normalize=False), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_saved_model_opens_in_transformers(kind: str, siglip_tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    vision = VisionConfig(32, 8, 48, 2, 4, kind="clip")
    config, tokenizer = SIGLIP, siglip_tokenizer.with_cleaning("canonicalize")
    preprocess = Preprocess(PreprocessConfig(35, (0.5,) * 3, (0.5,) * 3, resize_mode="squash"))
    if kind == "clip":
        config = BiomedClipConfig(24, vision, dataclasses.replace(GPT, end_id=3), quick_gelu=True)
        tokenizer = Tokenizer.train(TEXTS * 3, 100, context_length=20)
        preprocess = Preprocess(PreprocessConfig(32))
    model = shaken(BiomedClip(config)).eval()
    save_transformers(tmp_path / "saved", model, preprocess, tokenizer)
    theirs, info = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs.eval()
    pixels, ids = torch.stack([preprocess(each) for each in photographs()]), tokenizer(TEXTS)
    check_close(theirs.get_image_features(pixels).pooler_output, model.encode_image(pixels, normalize=False))
    check_close(theirs.get_text_features(ids).pooler_output, model.encode_text(ids, normalize=False))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    difference = processor(list(photographs()), return_tensors="pt").pixel_values - pixels
    assert difference.abs().max() <= (4 if kind == "clip" else 2.1) / 255
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    plain = "brain of a patient"
    their_ids = AutoTokenizer.from_pretrained(tmp_path / "saved")(plain, **options).input_ids
    assert torch.equal(their_ids, tokenizer(plain))
    again = load(tmp_path / "saved")
    assert (again[0].config, again[1].config) == (config, preprocess.config)
    assert torch.equal(again[2](TEXTS), ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="siglip2"), "model_type='siglip2' must be 'clip' or 'siglip'"),
        (lambda c: c["text_config"].update(hidden_act="relu"), "text_config: hidden_act='relu' must be 'gelu'"),
        (lambda c: c["vision_config"].update(layer_norm_eps=1e-5), "vision_config: layer_norm_eps=1e-05 must be 1e-06"),
        (lambda c: c["vision_config"].update(vision_use_head=False), "vision_use_head=False must be True"),
        (lambda c: c["text_config"].update(projection_size=24), "embed_dim=24 must be vision.width=48"),
        (lambda c: c["vision_config"].update(num_hidden_layers=3), "lacks vision_model.encoder.layers.2."),
        (lambda c: c.update(auto_map={"AutoModel": "x.y"}), "auto_map=.* names code of the checkpoint"),
        (lambda c: c["vision_config"].update(hidden_size=0), "vision_config.hidden_size=0 must be a whole number"),
    ],
)
def test_other_transformers_models_raise(
    change: Any, message: str, siglip_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    preprocess = Preprocess(PreprocessConfig(35, (0.5,) * 3, (0.5,) * 3, resize_mode="squash"))
    save_transformers(tmp_path / "saved", BiomedClip(SIGLIP), preprocess, siglip_tokenizer)
    edit_json(tmp_path / "saved" / "config.json", change)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("do_rescale", False, "do_rescale=False isn't supported"),
        ("rescale_factor", 1 / 127.5, "must be 1/255"),
        ("resample", 0, "resample=0 must be 2"),
        ("size", {"height": 64, "width": 64}, "size=.* must be the model's image size, 35"),
        ("size", {"shortest_edge": 35}, "needs do_center_crop=true and crop_size=35"),
    ],
)
def test_other_image_processors_raise(
    key: str, value: Any, message: str, siglip_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    preprocess = Preprocess(PreprocessConfig(35, (0.5,) * 3, (0.5,) * 3, resize_mode="squash"))
    save_transformers(tmp_path / "saved", BiomedClip(SIGLIP), preprocess, siglip_tokenizer)
    edit_json(tmp_path / "saved" / "preprocessor_config.json", lambda content: content.update({key: value}))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("vision_cfg", "timm_pool", "avg", "timm_pool='avg' must be '' or 'token'"),
        ("vision_cfg", "timm_pool", "token", "timm_proj='none' must be 'linear'"),
        ("vision_cfg", "timm_proj", "linear", "timm_proj='linear' must be 'none'"),
        ("vision_cfg", "timm_model_name", "vit_base_patch16_224", "doesn't fit timm_pool='map'"),
        ("text_cfg", "pool_type", "argmax", "pool_type='argmax' must be 'last' with no_causal_mask"),
        ("text_cfg", "norm_kwargs", None, "norm_kwargs=None must be {'eps': 1e-06}"),
        ("text_cfg", "proj_bias", False, "proj_bias=False must be True"),
        ("text_cfg", "act_kwargs", {"approximate": "none"}, "act_kwargs=.* must be None or"),
        ("text_cfg", "tokenizer_kwargs", {"clean": "lower"}, "tokenizer_kwargs.clean='lower' must be"),
        ("text_cfg", "tokenizer_kwargs", {"strip_sep_token": True}, "unsupported keys: strip_sep_token"),
    ],
)
def test_other_siglip_settings_of_open_clip_raise(
    section: str, key: str, value: Any, message: str, siglip_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    preprocess = Preprocess(PreprocessConfig(35, (0.5,) * 3, (0.5,) * 3, resize_mode="squash"))
    save(tmp_path / "saved", BiomedClip(SIGLIP), preprocess, siglip_tokenizer.with_cleaning("canonicalize"))
    edit_json(tmp_path / "saved" / CONFIG, in_section(section, key, value))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "saved")


def test_tokenizer_without_start_token_needs_a_siglip(siglip_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = dataclasses.replace(SIGLIP, text=dataclasses.replace(GPT, end_id=1))
    with pytest.raises(UserError, match="adds no start token, which a text tower of kind gpt needs"):
        save(tmp_path, BiomedClip(config), Preprocess(PreprocessConfig(35)), siglip_tokenizer)
