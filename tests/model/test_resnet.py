"""OpenAI's ResNet against open_clip's: results, gradients, weights on disk, and the sizes that it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import import_open_clip
from safetensors.torch import load_file, save_file
from torch import nn
from towers import RESNET, RESNET_VISION, SMALL, resnet_tower, shaken, statistics

from bclip_fast import pretrained
from bclip_fast.data.transform import normalize
from bclip_fast.errors import UserError
from bclip_fast.model import open_clip_config, weight_names, weights
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.meter import MeterConfig, VqaModel
from bclip_fast.model.presets import preset
from bclip_fast.model.resnet import ResNetTower
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionConfig, resize_positions
from bclip_fast.train.config import InitConfig
from bclip_fast.train.engine.base import persistent_buffers
from bclip_fast.train.init_weights import init_model
from bclip_fast.train.lora import add_lora

WEIGHTS = "open_clip_model.safetensors"


def peer(ours: BiomedClip) -> Any:
    """open_clip's CLIP with the same sizes and weights, and with its text tower under `text.`."""
    open_clip = import_open_clip()
    vision, text = ours.config.vision, ours.config.text
    theirs = open_clip.model.CustomTextCLIP(
        ours.config.embed_dim,
        {"image_size": vision.image_size, "layers": list(vision.blocks), "width": vision.width, "patch_size": None,
             "head_width": 32 * vision.width // vision.heads},
        {"context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width, "heads": text.heads,
             "layers": text.layers},
        quick_gelu=True,
    )  # fmt: skip
    # A strict load works: torch itself fills in the batch counts that we don't keep.
    theirs.load_state_dict(weights.to_open_clip(ours.state_dict(), ours.config))
    return theirs


def check_equal(ours: BiomedClip, batch: int, training: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Compare outputs, all gradients and all statistics, relative to each tensor's largest element."""
    theirs = peer(ours)
    side, text = ours.config.vision.image_size, ours.config.text
    image = torch.randn(batch, 3, side, side, dtype=dtype)
    ids = torch.randint(1, text.vocab_size - 1, (batch, text.context_length))
    ids[:, -1] = text.vocab_size - 1
    weight = torch.randn(batch, ours.config.embed_dim)
    outputs, grads = [], []
    for model in (ours.to(dtype), theirs.to(dtype)):
        model.train(training)
        outputs.append([model.encode_image(image, normalize=False), model.encode_text(ids, normalize=False)])
        model.zero_grad()
        sum((out * weight).sum() for out in outputs[-1]).backward()  # type: ignore[union-attr]
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for ours_out, their_out in zip(*outputs, strict=True):
        assert worst(ours_out, their_out) <= tolerance
    keys = weight_names.key_map(ours.config)
    assert grads[0].keys() == {n for n, _ in ours.named_parameters()} - {"logit_scale"}
    for name, grad in grads[0].items():
        parts = [grads[1][other] for other in keys[name]]
        # The keys' bias shifts all scores alike, so its gradient is 0: measure its error relative to the queries'.
        parts = [torch.cat(parts)] if name.endswith("pool.qkv.bias") else parts
        for our_part, their_part in zip(grad.chunk(len(parts)), parts, strict=True):
            error = worst(our_part, their_part)
            assert error <= tolerance, f"{name}: {error:.2g}"
    state = theirs.state_dict()
    for name, buffer in persistent_buffers(ours).items():
        assert worst(buffer, state[keys[name][0]]) <= tolerance, name


def worst(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one.reshape(other.shape) - other).abs().max() / other.abs().max()).detach())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "vision",
    [RESNET_VISION, dataclasses.replace(RESNET_VISION, image_size=96, width=4, heads=8, blocks=(2, 1, 1, 1), layers=5)],
    ids=["two positions a side", "three"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
def test_outputs_gradients_and_statistics_equal_open_clip(
    vision: VisionConfig, training: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, a smooth function replaces ReLU in both models.

    Rounding can carry a number across 0 and switch part of ReLU's gradient. Correct gradients would differ by 1 %.
    """
    if dtype == torch.float32:
        monkeypatch.setattr(nn.functional, "relu", lambda x, inplace=False: nn.functional.silu(x))
    torch.manual_seed(0)
    ours = BiomedClip(dataclasses.replace(RESNET, vision=vision))
    ours.visual = resnet_tower(ours.config)
    before = [buffer.to(dtype) for buffer in statistics(ours)]
    check_equal(ours, 4, training, dtype, tolerance)
    assert training != all(map(torch.equal, before, statistics(ours)))


def test_rn50_names_and_shapes_equal_open_clip() -> None:
    open_clip = import_open_clip()
    with torch.device("meta"):
        theirs = open_clip.model.CustomTextCLIP(**open_clip.get_model_config("RN50-quickgelu"))
        ours = BiomedClip(preset("clip_rn50"))
    assert sum(p.numel() for p in ours.parameters()) == 102_007_137
    assert sum(p.numel() for p in ours.visual.parameters()) == sum(p.numel() for p in theirs.visual.parameters())
    state = {name: torch.empty(tensor.shape) for name, tensor in ours.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in weights.to_open_clip(state, ours.config).items()}
    counts = {name for name in theirs.state_dict() if name.endswith("num_batches_tracked")}
    assert shapes == {name: t.shape for name, t in theirs.state_dict().items() if name not in counts}
    assert len(counts) == 55


def test_initial_weights_are_distributed_as_open_clips() -> None:
    """Compare each weight's standard deviation. Its mean is 0. Zeros and ones must be equal."""
    torch.manual_seed(0)
    ours = BiomedClip(dataclasses.replace(RESNET, vision=dataclasses.replace(RESNET_VISION, width=16)))
    theirs = peer(ours).visual
    theirs.__init__([1, 2, 1, 2], 24, 4, 64, 16)
    start = theirs.state_dict()
    for name, parts in weight_names.key_map(ours.config).items():
        if not name.startswith("visual."):
            continue
        our_values = ours.state_dict()[name].flatten()
        their_values = torch.cat([start[part.removeprefix("visual.")].flatten() for part in parts])
        spread = float(their_values.std(correction=0))
        tolerance = 0.3 if len(our_values) > 100 else 1.5
        assert float(our_values.std(correction=0)) == pytest.approx(spread, rel=tolerance, abs=0), name
        assert spread or torch.equal(our_values, their_values), name


@pytest.mark.parametrize("layout", ["CLIP", "CustomTextCLIP", "OpenAI's archive"])
def test_checkpoint_round_trip_through_open_clips_layouts(layout: str, tmp_path: Path) -> None:
    ours = shaken(BiomedClip(RESNET))
    ours.visual = resnet_tower()
    theirs = peer(ours).eval()
    state = theirs.state_dict()
    if layout != "CustomTextCLIP":
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    if layout == "OpenAI's archive":
        state |= {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    vision = {"image_size": 64, "layers": [1, 2, 1, 2], "width": 8, "patch_size": None}
    text = {"context_length": 20, "vocab_size": 100, "width": 32, "heads": 2, "layers": 3}
    # Without head_width, open_clip's heads are 64 wide. Ours are, too.
    model_cfg = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / WEIGHTS)
    Tokenizer.train(["axial brain MRI", "chest radiograph"] * 3, 100, context_length=20).save(tmp_path)
    loaded, preprocess, tokenizer = pretrained.load(tmp_path)
    assert loaded.config == RESNET
    assert loaded.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    # open_clip's own reader checks every name.
    open_clip = import_open_clip()
    pretrained.save(tmp_path / "ours", loaded, preprocess, tokenizer)
    written = json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())["model_cfg"]
    assert written["vision_cfg"] == vision | {"head_width": 64}
    fresh = open_clip.model.CustomTextCLIP(**{key: value for key, value in written.items() if key != "custom_text"})
    open_clip.load_checkpoint(fresh, str(tmp_path / "ours" / WEIGHTS))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval().encode_image(pixels), theirs.encode_image(pixels))
        torch.testing.assert_close(
            loaded.encode_image(pixels), theirs.encode_image(pixels, normalize=True), rtol=1e-4, atol=1e-5
        )
    counts = {name for name in state if name.endswith("num_batches_tracked")}
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == theirs.state_dict().keys() - counts
    with pytest.raises(UserError, match=r"ViTModel has no convolutions, as vision.kind resnet has"):
        pretrained.save_transformers(tmp_path / "hf", loaded, preprocess, tokenizer)
    # For another image size, the pool's positions are resized like those of a ViT.
    larger = pretrained.load(tmp_path, image_size=128)[0]
    assert isinstance(larger.visual, ResNetTower)
    assert isinstance(loaded.visual, ResNetTower)
    assert torch.equal(larger.visual.pool.pos_embed, resize_positions(loaded.visual.pool.pos_embed, 16))
    assert larger.encode_image(torch.randn(1, 3, 128, 128)).shape == (1, 24)


def test_open_clips_rn50_json_equals_preset(tmp_path: Path) -> None:
    import_open_clip()
    import open_clip

    content = json.loads((Path(open_clip.__file__).parent / "model_configs" / "RN50-quickgelu.json").read_text())
    assert open_clip_config.read({"model_cfg": content}, dict, dict) == preset("clip_rn50")


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_raw_pixels_give_same_result_as_normalised(last: bool) -> None:
    model = resnet_tower().eval()
    model.set_normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    expected = model(normalize(pixels, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    torch.testing.assert_close(model(pixels if last else pixels.permute(0, 3, 1, 2).contiguous()), expected)
    with pytest.raises(UserError, match=r"images have shape \(2, 3, 32, 32\); this model takes \(batch, 3, 64, 64\)"):
        model(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_half_precision_error_at_most_twice_open_clips(dtype: torch.dtype, training: bool) -> None:
    """Compare both models under autocast with float64."""
    torch.manual_seed(0)
    ours = shaken(BiomedClip(RESNET))
    ours.visual = resnet_tower()
    theirs = peer(ours).train(training)
    image, weight = torch.randn(8, 3, 64, 64), torch.randn(8, 24, dtype=torch.float64)
    names = ("visual.stem.conv1.conv.weight", "visual.layers.3.conv2.conv.weight", "visual.pool.pos_embed")
    keys = weight_names.key_map(ours.config)

    def run(model: Any, of: Callable[[str], str], image: torch.Tensor) -> list[torch.Tensor]:
        out = model.encode_image(image, normalize=False)
        parameters = [dict(model.named_parameters())[of(name)] for name in names]
        return [out.double(), *torch.autograd.grad((out.double() * weight).sum(), parameters)]

    results = []
    for model, of in ((ours.train(training), str), (theirs, lambda name: keys[name][0])):
        with torch.autocast("cpu", dtype):
            results.append(run(model, of, image))
    exact = run(peer(ours).double().train(training), lambda name: keys[name][0], image.double())
    for name, ours_value, their_value, true in zip(("output", *names), *results, exact, strict=True):
        error, usual = ((value.reshape(true.shape) - true).norm() / true.norm() for value in (ours_value, their_value))
        assert error <= 2 * usual, f"{name}: {error:.3g}, open_clip's {usual:.3g}"


def test_bfloat16_weights_accept_raw_and_float_images() -> None:
    model = resnet_tower().eval()
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    exact = model(pixels)
    model.to(torch.bfloat16)
    for image in (pixels, normalize(pixels)):
        embedding = model(image)
        assert embedding.dtype == torch.bfloat16
        assert float(((embedding - exact).norm() / exact.norm()).detach()) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_dropout": 0.5}, "vision.patch_dropout=0.5 must be 0 for vision.kind resnet"),
        ({"patch_size": 16}, "vision.patch_size=16 must be 32"),
        ({"mlp_ratio": 2.0}, "vision.mlp_ratio=2.0 must be 4"),
        ({"layers": 12}, r"vision.layers=12 must be 6 for vision.kind resnet with blocks \(1, 2, 1, 2\)"),
        ({"blocks": None}, "vision.blocks=None must hold 4 numbers for vision.kind resnet"),
        ({"blocks": (1, 2, 0, 3)}, "vision.blocks=0 must be a whole number from 1"),
        ({"blocks": (1, 2, 3)}, "must hold 4 numbers"),
        ({"image_size": 72}, "vision.image_size=72 must be a multiple of vision.patch_size=32"),
        ({"width": 7}, "vision.width=7 must be even"),
        ({"heads": 5}, "32 [*] width must be divisible by vision.heads=5"),
        ({"width": 10**9}, "vision.width=1000000000 must be a whole number from 2 to 512"),
        ({"kind": "vit"}, r"vision.blocks=\(1, 2, 1, 2\) applies only to kind resnet; vision.kind is vit"),
        ({"kind": "rn"}, "vision.kind='rn' must be vit, clip, resnet or siglip"),
    ],
)
def test_invalid_resnet_sizes_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(RESNET_VISION, **changes)


def test_heads_and_adapters_of_a_vit_refuse_resnet() -> None:
    config = dataclasses.replace(SMALL, vision=RESNET_VISION)
    with pytest.raises(ValueError, match="reads the tokens of a ViT"):
        VqaModel(BiomedClip(config), MeterConfig(1), ("yes",))
    with pytest.raises(UserError, match=r"lora_rank=4 needs transformers, but vision.kind is resnet"):
        add_lora(BiomedClip(RESNET), 4, 16)
    with pytest.raises(UserError, match=r"must be a plain ViT, but model.vision.kind is resnet"):
        init_model(BiomedClip(config), InitConfig(vision="anything"))
