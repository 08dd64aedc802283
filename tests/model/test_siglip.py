"""SigLIP's towers: arithmetic, gradients, training options and counts, against timm and open_clip."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from peers import import_open_clip
from torch.utils.flop_counter import FlopCounterMode
from towers import SIGLIP, gradients, shaken

from bclip_fast import ops
from bclip_fast.errors import UserError
from bclip_fast.model import flops
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.packed import Packed
from bclip_fast.model.presets import preset
from bclip_fast.model.siglip_text import SiglipTextTower
from bclip_fast.model.text import TextConfig
from bclip_fast.model.transformer import PreProjection
from bclip_fast.model.vision import VisionConfig, VisionTower, drop_patches, resize_positions
from bclip_fast.model.weights import from_open_clip, to_open_clip

TANH = dataclasses.replace(
    SIGLIP,
    vision=dataclasses.replace(SIGLIP.vision, activation="gelu_tanh"),
    text=dataclasses.replace(SIGLIP.text, activation="gelu_tanh"),
)
LENGTHS = [3, 16, 1]


def open_clip_model(config: Any) -> Any:
    """open_clip's CustomTextCLIP of the same sizes, in double precision, with random weights."""
    open_clip = import_open_clip()
    import timm

    vision, text = config.vision, config.text
    approximate = {"act_kwargs": {"approximate": "tanh"}} if text.activation == "gelu_tanh" else {}
    small_vit = functools.partial(
        timm.create_model,
        **{"img_size": vision.image_size, "patch_size": vision.patch_size, "embed_dim": vision.width},
        **{"depth": vision.layers, "num_heads": vision.heads, "mlp_ratio": vision.mlp_ratio},
        act_layer=vision.activation,
    )
    with mock.patch.object(timm, "create_model", small_vit):
        theirs = open_clip.CustomTextCLIP(
            embed_dim=config.embed_dim,
            vision_cfg={"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"},
            text_cfg={
                **{name: getattr(text, name) for name in ("context_length", "vocab_size", "width", "heads", "layers")},
                **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
                **{"mlp_ratio": text.mlp_ratio, **approximate},
            },
            init_logit_bias=-10,
        )
    return shaken(theirs).double().eval()


def packed(lengths: list[int]) -> tuple[Packed, torch.Tensor]:
    """Captions of these lengths, packed, and padded to 16 with token 1."""
    rows = [torch.randint(2, 99, (length,)) for length in lengths]
    padded = torch.ones(len(lengths), 16, dtype=torch.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return Packed.of(torch.cat(rows), lengths), padded


@pytest.fixture(scope="module", params=[SIGLIP, TANH], ids=["gelu", "tanh"])
def pair(request: pytest.FixtureRequest) -> tuple[BiomedClip, Any]:
    """Our model and open_clip's with the same weights, in double precision."""
    torch.manual_seed(2)
    theirs, ours = open_clip_model(request.param), BiomedClip(request.param)
    ours.load_state_dict(from_open_clip(theirs.state_dict(), ours, source="open_clip"))
    ours = ours.double().eval()
    with torch.no_grad():  # float32 on the way rounded them
        for name, tensor in to_open_clip(ours.state_dict(), request.param).items():
            theirs.state_dict()[name].copy_(tensor)
    return ours, theirs


def test_outputs_and_gradients_equal_open_clip_in_float64(pair: tuple[BiomedClip, Any]) -> None:
    """The last pixels of 35 lie outside the patches of 8."""
    ours, theirs = pair
    image, (text, padded) = torch.randn(3, 3, 35, 35, dtype=torch.float64), packed(LENGTHS)
    compare("visual.", pair, lambda: ours.encode_image(image, normalize=False), lambda: theirs.encode_image(image))
    compare("text.", pair, lambda: ours.encode_text(text, normalize=False), lambda: theirs.encode_text(padded))


def compare(
    tower: str, pair: tuple[BiomedClip, Any], run: Callable[[], torch.Tensor], run_peer: Callable[[], torch.Tensor]
) -> None:
    """Compare the outputs and the gradients of a tower."""
    ours, theirs = pair
    expected = run_peer()
    weights = torch.randn_like(expected)
    torch.testing.assert_close(run(), expected, rtol=1e-10, atol=1e-12)
    assert (expected[0] - expected[2]).abs().max() > 1e-2
    grads = gradients(ours, lambda: (run() * weights).sum())
    peer_grads = gradients(theirs, lambda: (run_peer() * weights).sum())
    zeros = {name: torch.zeros_like(parameter) for name, parameter in ours.named_parameters()}
    in_their_layout = to_open_clip({**zeros, **grads}, ours.config)
    assert {name for name in in_their_layout if name.startswith(tower)} == peer_grads.keys()
    for name, grad in peer_grads.items():
        torch.testing.assert_close(in_their_layout[name], grad, rtol=1e-8, atol=1e-10, msg=name)


def test_raw_pixels_and_padded_ids_equal_normalised_and_packed() -> None:
    torch.manual_seed(0)
    model = shaken(BiomedClip(SIGLIP)).eval()
    model.visual.set_normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image, (text, padded) = torch.randint(0, 256, (3, 35, 35, 3), dtype=torch.uint8), packed(LENGTHS)
    with torch.no_grad():
        channels_first = image.permute(0, 3, 1, 2)
        expected = model.encode_image(channels_first / 127.5 - 1)
        torch.testing.assert_close(model.encode_image(image), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode_image(channels_first), expected, rtol=1e-4, atol=1e-5)
        expected = model.encode_text(padded)
        assert torch.equal(model.encode_text(text), expected)
        # Rows that are shorter than the context length are padded further.
        assert torch.equal(model.encode_text(padded[:1, :3]), model.encode_text(padded[:1]))
        # The padding is part of the caption.
        other = padded.clone()
        other[0, 9] = 50
        assert (model.encode_text(other)[0] - expected[0]).abs().max() > 1e-3
    with pytest.raises(UserError, match="up to 17 tokens; this model takes 16"):
        model.encode_text(Packed.of(torch.ones(17, dtype=torch.int64), [17]))


def test_bfloat16_is_as_close_as_open_clips(pair: tuple[BiomedClip, Any]) -> None:
    """Both run under autocast. The yardstick is the result in double precision."""
    ours, theirs = pair
    image, (text, padded) = torch.randn(16, 3, 35, 35), packed([5] * 16)
    with torch.no_grad():
        truth = theirs.encode_image(image.double()), theirs.encode_text(padded)
        with torch.autocast("cpu", torch.bfloat16):
            mine, peer = ours.float(), theirs.float()
            results = [
                (mine.encode_image(image, normalize=False), peer.encode_image(image)),
                (mine.encode_text(text, normalize=False), peer.encode_text(padded)),
            ]
    ours.double(), theirs.double()
    for expected, (actual, other) in zip(truth, results, strict=True):
        assert (actual - expected).norm() <= 1.5 * (other - expected).norm()


def test_patch_dropout_keeps_a_share_of_the_patches() -> None:
    x = torch.arange(2 * 16, dtype=torch.float32).view(2, 16, 1).expand(-1, -1, 2)
    kept = drop_patches(x, 0.75, has_cls=False)
    assert kept.shape == (2, 4, 2)
    for row, offset in zip(kept, (0, 16), strict=True):
        assert len({int(value) - offset for value in row[:, 0]} & set(range(16))) == 4
    config = dataclasses.replace(SIGLIP, vision=dataclasses.replace(SIGLIP.vision, patch_dropout=0.5))
    tower = shaken(BiomedClip(config)).visual.train()
    image = torch.randn(2, 3, 35, 35)
    assert (tower(image) - tower(image)).abs().max() > 1e-3
    assert torch.equal(tower.eval()(image), tower(image))


@pytest.mark.parametrize("unlocked", [0, 1, 2])
def test_locked_groups_equal_open_clips(unlocked: int) -> None:
    """open_clip can only lock a timm tower completely. It counts the text's projection as a group, and we never do."""
    theirs, ours = open_clip_model(SIGLIP), BiomedClip(SIGLIP)
    theirs.text.lock(unlocked + 1)
    ours.text.lock(unlocked)
    ours.visual.lock(unlocked)
    if not unlocked:
        theirs.visual.lock()
    flags = {name: torch.full_like(p, float(p.requires_grad)) for name, p in ours.named_parameters()}
    for name, flag in to_open_clip(flags, SIGLIP).items():
        if name.startswith("text.") or (name.startswith("visual.") and not unlocked):
            assert bool(flag.any()) == theirs.get_parameter(name).requires_grad, name
    pool = [p.requires_grad for p in ours.visual.pool.parameters()]
    assert pool == [unlocked > 0] * len(pool)
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in ours.visual.layers]
    assert trained == [number >= 2 - unlocked for number in range(2)]


def test_locked_towers_keep_their_features_before_the_projection() -> None:
    model = shaken(BiomedClip(SIGLIP)).train()
    model.visual.lock()
    model.text.lock()
    image, (text, _) = torch.randn(3, 3, 35, 35), packed(LENGTHS)
    for tower, inputs in ((model.visual, image), (model.text, text)):
        expected = tower(inputs)
        assert torch.equal(tower(PreProjection(tower.pre_projection)), expected)
        assert expected.requires_grad == (tower is model.text)


def test_grad_checkpointing_keeps_gradients() -> None:
    torch.manual_seed(1)
    model = shaken(BiomedClip(TANH)).train()
    image, (text, _) = torch.randn(3, 3, 35, 35), packed(LENGTHS)

    def loss() -> torch.Tensor:
        output = model(image, text)
        return (output["image_features"] @ output["text_features"].T).square().sum()

    expected = gradients(model, loss)
    model.set_grad_checkpointing()
    for name, grad in gradients(model, loss).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_initial_weights_are_those_of_big_vision() -> None:
    """Xavier's for each square of a packed projection, LeCun's for patches and projection, else 1 / sqrt(width)."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        SIGLIP,
        embed_dim=192,
        vision=dataclasses.replace(SIGLIP.vision, width=192, heads=4, mlp_ratio=4.0),
        text=dataclasses.replace(SIGLIP.text, width=192, heads=4),
    )
    model = BiomedClip(config)
    deviations = {
        "visual.layers.0.qkv.weight": math.sqrt(2 / 384),
        "visual.layers.0.fc1.weight": math.sqrt(2 / (5 * 192)),
        "visual.layers.0.fc1.bias": 1e-6,
        "visual.pool.key_value.weight": math.sqrt(2 / 384),
        "visual.pool.probe": 192**-0.5,
        "visual.patch_embed.weight": 192**-0.5,
        "visual.pos_embed": 192**-0.5,
        "text.token_embedding.weight": 192**-0.5,
        "text.layers.1.qkv.weight": math.sqrt(2 / 384),
        "text.head.weight": 192**-0.5,
    }
    for name, deviation in deviations.items():
        assert float(model.get_parameter(name).detach().std()) == pytest.approx(deviation, rel=0.2), name
    for name in ("visual.layers.0.qkv.bias", "visual.pool.query.bias", "visual.patch_embed.bias", "text.head.bias"):
        assert not model.get_parameter(name).any(), name
    assert model().get("logit_scale").item() == pytest.approx(10)
    assert model().get("logit_bias").item() == -10


@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_flops_equal_torchs_count(patch_dropout: float) -> None:
    config = dataclasses.replace(SIGLIP, vision=dataclasses.replace(SIGLIP.vision, patch_dropout=patch_dropout))
    model = BiomedClip(config).train()
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        model(torch.zeros(3, 3, 35, 35), packed(LENGTHS)[0])
    counted = sum(counter.get_flop_counts()["Global"].values())
    image, text = flops.forward_flops(config, LENGTHS, patch_dropout)
    # Our count leaves out the text's projection and the probe's, which every batch computes once.
    width, patches = SIGLIP.vision.width, 16 if patch_dropout == 0 else 8
    left_out = 2 * 3 * model.text.head.weight.numel() + 2 * width**2
    # Q K^T and P V: two layers of all pairs and the pool in the image tower, one of all pairs in the text tower.
    attention = 3 * 4 * width * (2 * patches**2 + patches) + 3 * 4 * SIGLIP.text.width * (16 * 16 + 16)
    assert counted + attention == image + text + left_out
    assert flops.step_flops(config, LENGTHS, patch_dropout) == 3 * (image + text)


def test_flops_of_a_locked_tower_count_the_pool_with_the_last_layer() -> None:
    full, locked = (flops.step_flops(SIGLIP, LENGTHS, locked=(number, 0)) for number in (0, 3))
    image, _ = flops.forward_flops(SIGLIP, LENGTHS)
    assert full - locked == 2 * image
    layer = flops.tower_flops([16] * 3, 48, 2, 2.0) - flops.tower_flops([16] * 3, 48, 1, 2.0)
    pool = flops.tower_flops([16] * 3, 48, 1, 2.0, pool=True) - layer
    assert flops.step_flops(SIGLIP, LENGTHS, locked=(2, 0)) - locked == 2 * (layer + pool)


def test_resize_positions_without_cls_equals_timm() -> None:
    import_open_clip()
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 49, 8)
    expected = resample_abs_pos_embed(positions, (12, 12), num_prefix_tokens=0)
    torch.testing.assert_close(resize_positions(positions, 144, has_cls=False), expected)


@pytest.mark.parametrize("name", ["siglip_b16", "siglip_so400m14_384", "siglip_so400m14_448"])
def test_presets_have_the_published_sizes(name: str) -> None:
    """Parameters in millions, as in open_clip's table of models: 203.2 (B/16) and 877 to 878 (SO400M/14)."""
    with torch.device("meta"):
        model = BiomedClip(preset(name))
    assert isinstance(model.visual, VisionTower) and isinstance(model.text, SiglipTextTower)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx({"siglip_b16": 203.16, "siglip_so400m14_384": 877.96}.get(name, 878.3), abs=0.01)
    assert model.config.vision.num_tokens == {"siglip_b16": 196, "siglip_so400m14_384": 729}.get(name, 1024)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionConfig(activation="gelu_tanh"), "requires vision.kind siglip; vision.kind is vit"),
        (lambda: VisionConfig(kind="siglip", activation="relu"), "vision.activation='relu' must be gelu or gelu_tanh"),
        (lambda: TextConfig(kind="siglip", attend_padding=True), "applies only to kind bert; text.kind is siglip"),
        (lambda: TextConfig(attend_padding=1), "text.attend_padding=1 must be True or False"),
        (lambda: dataclasses.replace(SIGLIP, embed_dim=24), "embed_dim=24 must be vision.width=48"),
    ],
)
def test_invalid_siglip_sizes_raise(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
