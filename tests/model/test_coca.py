"""CoCa's towers and decoder against open_clip's, packed against padded captions, and the configurations of both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coca_models import COCA, open_clip_coca, open_clip_config_of
from peers import import_open_clip
from torch import Tensor, nn
from towers import SMALL, gradients, padded_ids, shaken

from bclip_fast.errors import UserError
from bclip_fast.model import open_clip_config, weights
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.coca import DecoderConfig, rows_before_another
from bclip_fast.model.packed import Packed
from bclip_fast.model.presets import preset
from bclip_fast.model.weight_names import key_map

# The last caption fills the context.
LENGTHS = [3, 1, 7, 20, 19]


def ours_of(theirs: nn.Module, config: BiomedClipConfig) -> BiomedClip:
    model = BiomedClip(config)
    model.load_state_dict(weights.from_open_clip(theirs.state_dict(), model, source="open_clip"))
    return model.eval()


@pytest.mark.parametrize("embed_dim", [32, 48], ids=["other width of the image's tokens", "one width"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_coca_equals_open_clip(embed_dim: int, quick_gelu: bool) -> None:
    import_open_clip()
    text = dataclasses.replace(COCA.text, width=embed_dim)
    config = dataclasses.replace(COCA, embed_dim=embed_dim, text=text, quick_gelu=quick_gelu)
    theirs = shaken(open_clip_coca(config)).eval()
    model = ours_of(theirs, config)
    image, ids = torch.randn(len(LENGTHS), 3, 32, 32), padded_ids(LENGTHS)
    with torch.no_grad():
        expected = theirs(image, ids)
        features = model(image, ids)
        logits = model.caption_logits(image, ids)
        losses = model(image, ids, captions=True)
    for name in ("image_features", "text_features"):
        assert (features[name] - expected[name]).abs().max() <= 1e-5
        assert (losses[name] - expected[name]).abs().max() <= 1e-5
    assert (expected["text_features"][0] - expected["text_features"][2]).abs().max() > 1e-2
    # open_clip's rows are padded, and ours are packed. Its logits of padding mean nothing.
    rows = torch.arange(ids.shape[1] - 1) < torch.tensor(LENGTHS)[:, None] - 1
    packed = logits[rows_before_another(Packed.of(ids[ids != 0], LENGTHS))]
    assert packed.shape == (sum(LENGTHS) - len(LENGTHS), config.text.vocab_size)
    assert (packed - expected["logits"][rows]).abs().max() <= 1e-5 * expected["logits"][rows].abs().max()
    mean = nn.functional.cross_entropy(expected["logits"].permute(0, 2, 1), expected["labels"], ignore_index=0)
    assert losses["caption_losses"].item() / rows.sum().item() == pytest.approx(mean.item(), rel=1e-5)


def test_gradients_equal_open_clips() -> None:
    import_open_clip()
    theirs = shaken(open_clip_coca(COCA)).double()
    model = ours_of(theirs, COCA).double().train()
    image, ids = torch.randn(len(LENGTHS), 3, 32, 32, dtype=torch.float64), padded_ids(LENGTHS)

    def our_loss() -> Tensor:
        output = model(image, ids, captions=True)
        return (output["image_features"] * output["text_features"]).sum() + output["caption_losses"]

    def their_loss() -> Tensor:
        output = theirs(image, ids)
        labels = output["labels"]
        captions = nn.functional.cross_entropy(
            output["logits"].permute(0, 2, 1), labels, ignore_index=0, reduction="sum"
        )
        return (output["image_features"] * output["text_features"]).sum() + captions

    ours = gradients(model, our_loss)
    expected = weights.from_open_clip(
        gradients(theirs, their_loss) | {"logit_scale": torch.tensor(0.0)}, model, source=""
    )
    assert ours.keys() == expected.keys() - {"logit_scale"}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient.float(), expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_padding_and_neighbours_dont_change_captions() -> None:
    model = shaken(BiomedClip(COCA)).eval()
    image, ids = torch.randn(len(LENGTHS), 3, 32, 32), padded_ids(LENGTHS)
    packed = Packed.of(ids[ids != 0], LENGTHS)
    logits = model.caption_logits(image, packed)
    torch.testing.assert_close(model.caption_logits(image, ids), logits)
    torch.testing.assert_close(model.encode_text(packed), model.encode_text(ids))
    torch.testing.assert_close(model.encode_text(ids[:1, :3]), model.encode_text(ids)[:1], rtol=1e-4, atol=1e-5)
    alone = model.caption_logits(image[2:3], ids[2:3])
    torch.testing.assert_close(alone, logits[4:11], rtol=1e-4, atol=1e-4)
    # A token's logits depend on the image and on the tokens before it, and not on those behind it.
    changed = ids.clone()
    changed[2, 6] = 1 + changed[2, 6] % 90
    after = model.caption_logits(image, changed)
    torch.testing.assert_close(after[4:10], logits[4:10])
    assert (after[10] - logits[10]).abs().max() > 1e-2
    assert (model.caption_logits(image.roll(1, 0), ids) - logits)[4:11].abs().max() > 1e-2


def test_checkpointing_and_chunks_dont_change_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(BiomedClip(COCA)).train()
    image, ids = torch.randn(len(LENGTHS), 3, 32, 32), padded_ids(LENGTHS)

    def loss() -> Tensor:
        output = model(image, ids, captions=True)
        return (output["image_features"] * output["text_features"]).sum() + output["caption_losses"]

    plain = gradients(model, loss)
    assert plain.keys() == dict(model.named_parameters()).keys() - {"logit_scale"}
    model.set_grad_checkpointing()
    monkeypatch.setattr("bclip_fast.model.coca._MAX_LOGITS", 7 * COCA.text.vocab_size)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-5, msg=name)


def test_generation_continues_with_most_likely_tokens_until_end() -> None:
    model = shaken(BiomedClip(COCA)).eval()
    images = torch.randn(3, 3, 32, 32)
    captions = model.generate(images, 1, -1, max_tokens=9)
    assert captions.shape == (3, 9)
    following = model.caption_logits(images, Packed.of(captions.flatten(), [9] * 3)).argmax(-1).view(3, 9)
    assert torch.equal(captions[:, 1:], following[:, :-1])
    assert captions.unique(dim=0).shape[0] > 1
    # The fourth token of the first caption ends captions now.
    ended = model.generate(images[:1], 1, int(captions[0, 3]), max_tokens=9)
    length = captions[0].tolist().index(int(captions[0, 3])) + 1
    assert ended.tolist() == captions[:1, :length].tolist()
    with pytest.raises(UserError, match="max_tokens=21 must be a whole number from 2 to 20"):
        model.generate(images, 1, 2, max_tokens=21)
    with pytest.raises(UserError, match="this model has no caption decoder; load a CoCa"):
        BiomedClip(SMALL).generate(images, 1, 2)


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14"])
def test_published_configurations_are_read_and_written(name: str) -> None:
    """The keys and shapes of the published sizes are open_clip's."""
    open_clip = import_open_clip()
    content = json.loads((Path(open_clip.__file__).parent / "model_configs" / f"{name}.json").read_text())
    config = open_clip_config.read({"model_cfg": content}, lambda _: {}, lambda _: {})
    assert config == preset("coca_b32") or name != "coca_ViT-B-32"
    written = open_clip_config.write(config, published_tokenizer=False)["open_clip_config.json"]
    assert open_clip_config.read(written, lambda _: {}, lambda _: {}) == config
    with torch.device("meta"):
        theirs, ours = open_clip.coca_model.CoCa(**open_clip_config_of(config)), BiomedClip(config)
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    names = {key for keys in key_map(config).values() for key in keys}
    assert names == shapes.keys()
    assert sum(shape.numel() for shape in shapes.values()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        ("vision_cfg", {"attentional_pool": "parallel"}, "vision_cfg.attentional_pool must be True"),
        ("text_cfg", {"embed_cls": False}, "text_cfg.embed_cls must be True"),
        ("multimodal_cfg", {"width": 48}, "multimodal_cfg.width=48 must be that of text_cfg, 32"),
        ("multimodal_cfg", {"layers": "12"}, "multimodal_cfg.layers='12' must be a whole number"),
        ("multimodal_cfg", {"ls_init_value": 0.1}, "multimodal_cfg.ls_init_value=0.1 must be None"),
        ("multimodal_cfg", {"gates": 1}, "multimodal_cfg has unsupported keys: gates"),
    ],
)
def test_unsupported_decoders_are_refused(table: str, changes: dict[str, Any], message: str) -> None:
    content = open_clip_config.write(COCA, published_tokenizer=False)["open_clip_config.json"]
    content["model_cfg"][table] |= changes
    with pytest.raises(UserError, match=message):
        open_clip_config.read(content, lambda _: {}, lambda _: {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text": SMALL.text},
            "needs vision.kind=clip and text.kind=gpt, not clip and bert: a bidirectional",
        ),
        ({"vision": SMALL.vision}, "needs vision.kind=clip and text.kind=gpt, not vit and gpt"),
        ({"embed_dim": 24}, "embed_dim=24 must equal text.width=32"),
        ({"decoder": DecoderConfig(layers=2, heads=5)}, "decoder.heads=5"),
        ({"decoder": DecoderConfig(layers=2, pool_queries=1)}, "decoder.pool_queries=1 must be"),
        ({"decoder": DecoderConfig(layers=2, pool_heads=5)}, "embed_dim=32 must be a multiple of decoder.pool_heads=5"),
    ],
)
def test_decoder_that_doesnt_fit_towers_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(COCA, **changes)
