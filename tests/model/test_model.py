"""The towers at small sizes against timm and open_clip, their options, and the sizes that they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peers import import_open_clip
from torch import nn
from towers import GPT, SMALL, gradients, padded_ids, shaken

from bclip_fast import config as toml
from bclip_fast.data.transform import normalize
from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.packed import Packed
from bclip_fast.model.presets import PRESETS, preset
from bclip_fast.model.text import GptTower, TextConfig
from bclip_fast.model.transformer import PostNormLayer, PreNormLayer, Sequences
from bclip_fast.model.vision import VisionConfig, drop_patches, resize_positions
from bclip_fast.model.weight_names import key_map


def test_biomedclip_b16_has_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = BiomedClip(preset("biomedclip_b16"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 195_902_721


@pytest.mark.parametrize("name", PRESETS)
def test_preset_builds_and_survives_toml(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        BiomedClip(preset(name))
    path = tmp_path / "model.toml"
    path.write_text(toml.to_toml(PRESETS[name]))
    assert toml.from_toml(BiomedClipConfig, path) == PRESETS[name]


def test_presets_cover_paper_ablations() -> None:
    with torch.device("meta"):
        sizes = {letter: BiomedClip(preset(f"biomedclip_{letter}16")) for letter in "smb"}
    millions = {k: sum(p.numel() for p in m.visual.parameters()) / 1e6 for k, m in sizes.items()}
    # Table S2 of the paper: 22, 39 and 86 million parameters.
    assert millions == pytest.approx({"s": 22, "m": 39, "b": 86}, abs=0.7)
    assert preset("biomedclip_b16_384").vision.num_patches == 576
    assert preset("biomedclip_b16_ctx77").text.context_length == 77
    assert preset("biomedclip_l16_336_gpt77").text.kind == "gpt"
    with pytest.raises(UserError, match="biomedclip_x16"):
        preset("biomedclip_x16")


def test_forward_output_has_open_clips_form() -> None:
    model = BiomedClip(replace(SMALL, init_logit_bias=-10.0)).eval()
    image, ids = torch.randn(2, 3, 32, 32), padded_ids([5, 9])
    output = model(image, ids)
    assert list(output) == ["image_features", "text_features", "logit_scale", "logit_bias"]
    assert output["image_features"].shape == output["text_features"].shape == (2, 24)
    assert output["image_features"].detach().norm(dim=-1) == pytest.approx([1, 1], abs=1e-5)
    assert output["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert torch.equal(output["text_features"], model.encode_text(ids))
    assert not torch.allclose(model.encode_text(ids, normalize=False), model.encode_text(ids))
    assert model(image)["text_features"] is None
    assert model(text=ids)["image_features"] is None
    assert "logit_bias" not in BiomedClip(SMALL)()


def test_whole_initial_logits_of_published_files_can_train() -> None:
    """open_clip's configurations have the bias -10, which JSON reads as an integer."""
    model = BiomedClip(replace(SMALL, init_logit_scale=2, init_logit_bias=-10))
    assert (model.logit_scale.dtype, model.logit_bias.dtype) == (torch.float32, torch.float32)
    assert model.logit_bias.requires_grad


def packed(ids: torch.Tensor) -> Packed:
    return Packed.of(ids[ids != 0], (ids != 0).sum(1).tolist())


@pytest.mark.parametrize("text", [SMALL.text, GPT, replace(GPT, end_id=7)], ids=["bert", "gpt", "gpt with end_id"])
def test_padding_doesnt_change_embeddings(text: TextConfig) -> None:
    tower = shaken(BiomedClip(replace(SMALL, text=text))).eval().text
    ids = padded_ids([3, 1, 7, 20, 12])
    ids[0, 1] = ids[4, 4] = 7 if text.end_id else 99
    full = tower(ids)
    torch.testing.assert_close(tower(packed(ids)), full, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tower(packed(ids[3:])), full[3:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tower(ids[:1, :3]), full[:1], rtol=1e-5, atol=1e-6)
    assert (full[0] - full[2]).abs().max() > 0.01


def test_padding_inside_caption_keeps_position_and_is_masked() -> None:
    tower = shaken(BiomedClip(SMALL)).eval().text
    ids, other = torch.tensor([[5, 0, 6, 0, 0]]), torch.tensor([[5, 6, 0, 0, 0]])
    assert not torch.allclose(tower(ids), tower(other), atol=1e-4)
    with torch.no_grad():
        before = tower(ids)
        tower.word_embeddings.weight[0] += 1
        torch.testing.assert_close(tower(ids), before)
    assert tower(torch.zeros(2, 4, dtype=torch.int64)).isfinite().all()


def test_encode_text_without_captions_returns_empty() -> None:
    model = BiomedClip(SMALL).eval()
    assert model.encode_text(Packed.of(torch.empty(0, dtype=torch.int64), [])).shape == (0, 24)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_layer_output_of_selected_rows_is_exact(kind: str) -> None:
    sequences = Sequences(6, torch.tensor([0, 4, 10], dtype=torch.int32))
    x, y, rows = *torch.randn(2, 10, 32, dtype=torch.float64), torch.tensor([0, 7])
    if kind == "pre":
        layer = shaken(PreNormLayer(32, 4, 2.0, 1e-6)).double()
        selected, complete = layer(x, y, sequences, rows), layer(x, y, sequences)
    else:
        layer = shaken(PostNormLayer(32, 4, 2.0, 1e-12, 0.0, 0.0)).double()
        selected, complete = layer(x, x, sequences, rows), layer(x, x, sequences)
    for part, full in zip(selected, complete, strict=True):
        torch.testing.assert_close(part, full[rows])


@pytest.mark.parametrize("text", [SMALL.text, GPT], ids=["bert", "gpt"])
def test_gradient_checkpointing_doesnt_change_gradients(text: TextConfig) -> None:
    config = replace(SMALL, text=text, vision=replace(SMALL.vision, patch_dropout=0.25))
    model = shaken(BiomedClip(config)).train()
    image, ids = torch.randn(3, 3, 32, 32), padded_ids([4, 20, 9])

    def loss() -> torch.Tensor:
        output = model(image, ids)
        return (output["image_features"] @ output["text_features"].T * output["logit_scale"]).square().mean()

    plain = gradients(model, loss)
    calls = []
    hook = model.text.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    recomputed = gradients(model, loss)
    hook.remove()
    assert len(calls) == 2, "the backward pass must run the layer again"
    assert plain.keys() == recomputed.keys() == dict(model.named_parameters()).keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_dropout_and_patch_dropout_act_only_in_training() -> None:
    config = replace(SMALL, vision=replace(SMALL.vision, patch_dropout=0.5))
    model = shaken(BiomedClip(config))
    image, ids = torch.randn(2, 3, 32, 32), padded_ids([6, 9])
    model.eval()
    assert torch.equal(model.encode_image(image), model.encode_image(image))
    assert torch.equal(model.encode_text(ids), model.encode_text(ids))
    without_dropout = shaken(BiomedClip(SMALL))
    without_dropout.load_state_dict(model.state_dict())
    assert torch.equal(without_dropout.eval().encode_image(image), model.encode_image(image))
    tokens = []
    model.visual.layers[0].register_forward_pre_hook(lambda _, inputs: tokens.append(len(inputs[0]) // 2))
    model.encode_image(image)
    model.train()
    assert not torch.equal(model.encode_image(image), model.encode_image(image))
    assert not torch.equal(model.encode_text(ids), model.encode_text(ids))
    assert tokens == [17, 9, 9]
    model.visual.patch_dropout = 0.0
    assert torch.equal(model.encode_image(image), without_dropout.encode_image(image))


def test_drop_patches_keeps_cls_and_distinct_patches() -> None:
    x = torch.arange(2 * 17, dtype=torch.float32).view(2, 17, 1)
    kept = drop_patches(x, 0.75)
    assert kept.shape == (2, 5, 1)
    assert kept[:, 0, 0].tolist() == [0, 17]
    for row, low in zip(kept[:, 1:, 0], (1, 18), strict=True):
        assert len(set(row.tolist())) == 4
        assert all(low <= value < low + 16 for value in row)
    assert drop_patches(x, 0.99).shape == (2, 2, 1)
    seen = torch.cat([drop_patches(x, 0.75)[0, 1:, 0] for _ in range(200)]).unique()
    assert len(seen) == 16


def test_resize_positions_equals_timm() -> None:
    import_open_clip()
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 1 + 14 * 14, 32)
    for side in (21, 24, 7):
        expected = resample_abs_pos_embed(positions, new_size=[side, side])
        torch.testing.assert_close(resize_positions(positions, side * side), expected)
    assert resize_positions(positions, 196) is positions


@pytest.mark.parametrize("end_id", [None, 7])
def test_gpt_tower_equals_open_clip(end_id: int | None) -> None:
    open_clip = import_open_clip()
    pool = {} if end_id is None else {"pool_type": "eos", "eos_id": end_id}
    theirs = shaken(
        open_clip.transformer.TextTransformer(
            context_length=20, vocab_size=100, width=32, heads=2, layers=3, output_dim=24, **pool
        )
    ).eval()
    tower = GptTower(replace(GPT, end_id=end_id), 24).eval()
    names = {k.removeprefix("text."): v[0] for k, v in key_map(replace(SMALL, text=GPT)).items() if k[:5] == "text."}
    state = theirs.state_dict()
    tower.load_state_dict({ours: state[name.removeprefix("text.")] for ours, name in names.items()})
    ids = padded_ids([3, 11, 20])
    ids[0, 2] = ids[1, 10] = ids[2, 19] = 99 if end_id is None else end_id
    torch.testing.assert_close(tower(ids), theirs(ids), rtol=1e-5, atol=1e-5)
    assert (tower(ids)[0] - tower(ids)[1]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_raw_pixels_give_same_result_as_normalised(dtype: torch.dtype, last: bool) -> None:
    """Compare the embedding and the patch weights' gradients. In bfloat16, allow twice the error of eager PyTorch."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    tower = shaken(BiomedClip(SMALL)).eval().visual.patch_embed
    tower.normalization.set(mean, std)
    # The images are as bright as figures on white paper, so sums over patches are far larger than their differences.
    pixels = torch.randint(150, 256, (3, 32, 32, 3), dtype=torch.uint8)
    floats = normalize(pixels, mean, std)
    exact = nn.functional.conv2d(
        normalize(pixels, mean, std).double(), tower.weight.double(), tower.bias.double(), stride=8
    )

    def run(image: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = tower(image)
        return [out.double(), *torch.autograd.grad(out.square().sum(), [tower.weight, tower.bias])]

    out = exact.flatten(2).transpose(1, 2)
    truth = [out, *torch.autograd.grad(out.square().sum(), [tower.weight, tower.bias])]
    raw = run(pixels if last else pixels.permute(0, 3, 1, 2).contiguous())
    for name, ours, eager, true in zip(("output", "weight", "bias"), raw, run(floats), truth, strict=True):
        error, usual = ((value - true).abs().max() / true.abs().max() for value in (ours, eager))
        assert error <= max(2 * usual, 1e-6), f"{name}: {error:.3g}, eager {usual:.3g}"


def test_bfloat16_weights_accept_float32_images() -> None:
    model = BiomedClip(SMALL).to(torch.bfloat16).eval()
    assert model.encode_image(torch.randn(2, 3, 32, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VisionConfig(image_size=225), "multiple of vision.patch_size"),
        (lambda: VisionConfig(width=770), "multiple of vision.heads"),
        (lambda: VisionConfig(patch_dropout=1.0), "vision.patch_dropout=1.0 must be"),
        (lambda: VisionConfig(layers=10**9), "vision.layers"),
        (lambda: VisionConfig(width=768.5), "whole number"),
        (lambda: TextConfig(context_length=600), "must not exceed text.max_positions=512"),
        (lambda: TextConfig(kind="lstm"), "text.kind='lstm' must be bert, gpt or siglip"),
        (lambda: TextConfig(dropout="much"), "text.dropout='much' must be a number"),
        (lambda: TextConfig(pad_id=30522), "text.pad_id"),
        (lambda: BiomedClipConfig(embed_dim=0), "embed_dim=0 must be"),
        (lambda: BiomedClip(SMALL).encode_image(torch.zeros(1, 3, 64, 64)), r"\(1, 3, 64, 64\)"),
        (lambda: BiomedClip(SMALL).encode_text(torch.ones(1, 25, dtype=torch.int64)), r"\(1, 25\)"),
        (lambda: BiomedClip(SMALL).encode_text(torch.ones(5, dtype=torch.int64)), r"\(5,\)"),
        (lambda: BiomedClip(SMALL).encode_text(Packed.of(torch.ones(25, dtype=torch.int64), [25])), "25 tokens"),
    ],
)
def test_invalid_sizes_raise(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()
