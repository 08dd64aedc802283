"""METER's head: its size, its layers against torch, packed texts, the loss and the trainable weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from towers import SMALL, shaken

from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.meter import CrossLayer, MeterConfig, VqaModel, vqa_loss
from bclip_fast.model.tokenizer import Tokenizer


def small_vqa(num_answers: int = 4) -> VqaModel:
    clip = shaken(BiomedClip(SMALL))
    config = MeterConfig(num_answers, width=32, layers=2, heads=4)
    return VqaModel(clip, config, tuple(f"answer {i}" for i in range(num_answers)))


def test_cross_layers_have_meters_size() -> None:
    with torch.device("meta"):
        layers = torch.nn.ModuleList(CrossLayer(MeterConfig(458)) for _ in range(6))
    assert sum(parameter.numel() for parameter in layers.parameters()) == pytest.approx(56.7e6, rel=0.01)


def test_cross_layer_equals_torch_attention_in_float64() -> None:
    config = MeterConfig(3, width=24, heads=4, dropout=0.0)
    layer = CrossLayer(config).double().eval()
    x, y = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 7, 24, dtype=torch.float64)
    is_valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])

    def attend(block, a, b, mask):
        reference = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)
        with torch.no_grad():
            reference.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
            reference.in_proj_bias.copy_(torch.cat([block.query.bias, block.key_value.bias]))
            reference.out_proj.weight.copy_(block.proj.weight)
            reference.out_proj.bias.copy_(block.proj.bias)
        return block.norm(a + reference(a, b, b, key_padding_mask=mask, need_weights=False)[0])

    expected = attend(layer.own, x, x, None)
    expected = attend(layer.cross, expected, y, ~is_valid)
    expected = layer.norm(expected + layer.fc2(F.gelu(layer.fc1(expected))))
    torch.testing.assert_close(layer(x, y, None, is_valid[:, None, None]), expected)


@torch.no_grad()
def test_vqa_model_padding_and_packing_keep_the_logits() -> None:
    model = small_vqa().eval()
    words = Tokenizer.train(["is there a red square", "what colour is it"] * 3, 60, context_length=20)
    texts, images = ["is there a red square", "colour"], torch.randn(2, 3, 32, 32)
    both = model(images, words.packed(texts))["logits"]
    torch.testing.assert_close(model(images, words(texts))["logits"], both)
    for i in range(2):
        single = model(images[i : i + 1], words.packed(texts[i : i + 1]))["logits"]
        torch.testing.assert_close(single[0], both[i], atol=1e-5, rtol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-3


@torch.no_grad()
def test_towers_token_states_give_the_embedding() -> None:
    clip = shaken(BiomedClip(SMALL)).eval()
    images = torch.randn(3, 3, 32, 32)
    states = clip.visual(images, tokens=True)
    assert states.shape == (3, 1 + SMALL.vision.num_patches, SMALL.vision.width)
    torch.testing.assert_close(clip.visual.head(states[:, 0]), clip.visual(images))
    words = Tokenizer.train(["is there a red square"] * 3, 60, context_length=20).packed(["red", "a red square"])
    states = clip.text(words, tokens=True)
    assert states.shape == (len(words.ids), SMALL.text.width)
    torch.testing.assert_close(clip.text.proj(states[words.cu_seqlens[:-1].long()]), clip.text(words))


def test_vqa_loss_is_the_sum_over_answers() -> None:
    logits, targets = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    log = F.logsigmoid
    expected = -(targets * log(logits) + (1 - targets) * log(-logits)).sum(1).mean()
    assert float(vqa_loss(logits, targets)) == pytest.approx(float(expected), rel=1e-6)


def test_vqa_model_exactly_the_used_weights_are_trainable() -> None:
    model = small_vqa()
    words = Tokenizer.train(["is there a red square"] * 3, 60, context_length=20).packed(["red", "a square"])
    vqa_loss(model(torch.randn(2, 3, 32, 32), words)["logits"], torch.eye(4)[:2]).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = VqaModel(model.clip, model.meter_config, model.answers, freeze=True)
    trainable = {name.split(".")[0] for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trainable == {"fusion", "classifier"}
    with pytest.raises(ValueError, match="3 answers were passed for num_answers=4"):
        VqaModel(model.clip, model.meter_config, ("a", "b", "c"))
