"""The towers against transformers, timm and open_clip at small sizes, their switches, and the tokenizer."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peers import import_open_clip
from torch import nn

from bclip_fast import config as toml
from bclip_fast.data.transform import normalize
from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.packed import Packed
from bclip_fast.model.presets import PRESETS, preset
from bclip_fast.model.text import GptTower, TextConfig
from bclip_fast.model.tokenizer import Tokenizer, clean
from bclip_fast.model.transformer import PostNormLayer, PreNormLayer, Sequences
from bclip_fast.model.vision import VisionConfig, drop_patches, resize_positions

SMALL = BiomedClipConfig(
    embed_dim=24,
    vision=VisionConfig(image_size=32, patch_size=8, width=48, layers=3, heads=4),
    text=TextConfig(context_length=20, vocab_size=100, width=32, layers=3, heads=2, max_positions=24),
)
GPT = TextConfig(
    kind="gpt",
    context_length=20,
    vocab_size=100,
    width=32,
    layers=3,
    heads=2,
    max_positions=20,
    dropout=0.0,
    attention_dropout=0.0,
    projection="linear",
)


def shaken(model: nn.Module) -> nn.Module:
    """Weights of which none is zero or one, so that no term of the arithmetic can go missing unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def padded_ids(lengths: list[int], context_length: int = 20) -> torch.Tensor:
    ids = torch.zeros(len(lengths), context_length, dtype=torch.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, 99, (length,))
    return ids


def test_published_configuration_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = BiomedClip(preset("biomedclip_b16"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 195_902_721


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_survive_toml(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        BiomedClip(preset(name))
    path = tmp_path / "model.toml"
    path.write_text(toml.to_toml(PRESETS[name]))
    assert toml.from_toml(BiomedClipConfig, path) == PRESETS[name]


def test_presets_cover_the_ablations() -> None:
    with torch.device("meta"):
        sizes = {letter: BiomedClip(preset(f"biomedclip_{letter}16")) for letter in "smb"}
    millions = {k: sum(p.numel() for p in m.visual.parameters()) / 1e6 for k, m in sizes.items()}
    # Table S2 of the paper: 22, 39 and 86 million.
    assert millions == pytest.approx({"s": 22, "m": 39, "b": 86}, abs=0.7)
    assert preset("biomedclip_b16_384").vision.num_patches == 576
    assert preset("biomedclip_b16_ctx77").text.context_length == 77
    assert preset("biomedclip_l16_336_gpt77").text.kind == "gpt"
    with pytest.raises(UserError, match="biomedclip_x16"):
        preset("biomedclip_x16")


def test_forward_returns_what_open_clip_returns() -> None:
    model = BiomedClip(replace(SMALL, init_logit_bias=-10.0)).eval()
    image, ids = torch.randn(2, 3, 32, 32), padded_ids([5, 9])
    output = model(image, ids)
    assert list(output) == ["image_features", "text_features", "logit_scale", "logit_bias"]
    assert output["image_features"].shape == output["text_features"].shape == (2, 24)
    assert output["image_features"].detach().norm(dim=-1) == pytest.approx([1, 1], abs=1e-5)
    assert output["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert torch.equal(output["text_features"], model.encode_text(ids))
    assert not torch.allclose(model.encode_text(ids, normalize=False), model.encode_text(ids))
    assert model(image)["text_features"] is None and model(text=ids)["image_features"] is None
    assert "logit_bias" not in BiomedClip(SMALL)()


def packed(ids: torch.Tensor) -> Packed:
    return Packed.of(ids[ids != 0], (ids != 0).sum(1).tolist())


@pytest.mark.parametrize("text", [SMALL.text, GPT, replace(GPT, end_id=7)], ids=["bert", "gpt", "gpt with end_id"])
def test_padding_changes_no_embedding(text: TextConfig) -> None:
    tower = shaken(BiomedClip(replace(SMALL, text=text))).eval().text
    ids = padded_ids([3, 1, 7, 20, 12])
    ids[0, 1] = ids[4, 4] = 7 if text.end_id else 99
    full = tower(ids)
    torch.testing.assert_close(tower(packed(ids)), full, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tower(packed(ids[3:])), full[3:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tower(ids[:1, :3]), full[:1], rtol=1e-5, atol=1e-6)
    assert (full[0] - full[2]).abs().max() > 0.01


def test_padding_inside_a_caption_keeps_its_position_and_is_not_attended_to() -> None:
    tower = shaken(BiomedClip(SMALL)).eval().text
    ids, other = torch.tensor([[5, 0, 6, 0, 0]]), torch.tensor([[5, 6, 0, 0, 0]])
    assert not torch.allclose(tower(ids), tower(other), atol=1e-4)
    with torch.no_grad():
        before = tower(ids)
        tower.word_embeddings.weight[0] += 1
        torch.testing.assert_close(tower(ids), before)
    assert tower(torch.zeros(2, 4, dtype=torch.int64)).isfinite().all()


def test_a_batch_without_captions_is_empty() -> None:
    model = BiomedClip(SMALL).eval()
    assert model.encode_text(Packed.of(torch.empty(0, dtype=torch.int64), [])).shape == (0, 24)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_computing_only_some_tokens_is_exact(kind: str) -> None:
    sequences = Sequences(6, torch.tensor([0, 4, 10], dtype=torch.int32))
    x, y, rows = *torch.randn(2, 10, 32, dtype=torch.float64), torch.tensor([0, 7])
    if kind == "pre":
        layer = shaken(PreNormLayer(32, 4, 2.0, 1e-6)).double()
        some, every = layer(x, y, sequences, rows), layer(x, y, sequences)
    else:
        layer = shaken(PostNormLayer(32, 4, 2.0, 1e-12, 0.0, 0.0)).double()
        some, every = layer(x, x, sequences, rows), layer(x, x, sequences)
    for one, all_ in zip(some, every, strict=True):
        torch.testing.assert_close(one, all_[rows])


def gradients(model: nn.Module, run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    run().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("text", [SMALL.text, GPT], ids=["bert", "gpt"])
def test_gradient_checkpointing_gives_the_same_gradients(text: TextConfig) -> None:
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
    assert len(calls) == 2, "the layer must have run again in the backward pass"
    assert plain.keys() == recomputed.keys() == dict(model.named_parameters()).keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_dropout_and_patch_dropout_act_in_training_only() -> None:
    config = replace(SMALL, vision=replace(SMALL.vision, patch_dropout=0.5))
    model = shaken(BiomedClip(config))
    image, ids = torch.randn(2, 3, 32, 32), padded_ids([6, 9])
    model.eval()
    assert torch.equal(model.encode_image(image), model.encode_image(image))
    assert torch.equal(model.encode_text(ids), model.encode_text(ids))
    whole = shaken(BiomedClip(SMALL))
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole.eval().encode_image(image), model.encode_image(image))
    tokens = []
    model.visual.layers[0].register_forward_pre_hook(lambda _, inputs: tokens.append(len(inputs[0]) // 2))
    model.encode_image(image)
    model.train()
    assert not torch.equal(model.encode_image(image), model.encode_image(image))
    assert not torch.equal(model.encode_text(ids), model.encode_text(ids))
    assert tokens == [17, 9, 9]
    model.visual.patch_dropout = 0.0
    assert torch.equal(model.encode_image(image), whole.encode_image(image))


def test_drop_patches_keeps_cls_and_distinct_patches_with_their_positions() -> None:
    x = torch.arange(2 * 17, dtype=torch.float32).view(2, 17, 1)
    kept = drop_patches(x, 0.75)
    assert kept.shape == (2, 5, 1)
    assert kept[:, 0, 0].tolist() == [0, 17]
    for row, low in zip(kept[:, 1:, 0], (1, 18), strict=True):
        assert len(set(row.tolist())) == 4 and all(low <= value < low + 16 for value in row)
    assert drop_patches(x, 0.99).shape == (2, 2, 1)
    seen = torch.cat([drop_patches(x, 0.75)[0, 1:, 0] for _ in range(200)]).unique()
    assert len(seen) == 16


def test_resized_positions_equal_timms() -> None:
    import_open_clip()
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 1 + 14 * 14, 32)
    for side in (21, 24, 7):
        expected = resample_abs_pos_embed(positions, new_size=[side, side])
        torch.testing.assert_close(resize_positions(positions, side * side), expected)
    assert resize_positions(positions, 196) is positions


@pytest.mark.parametrize("end_id", [None, 7])
def test_gpt_tower_equals_open_clips(end_id: int | None) -> None:
    open_clip = import_open_clip()
    pool = {} if end_id is None else {"pool_type": "eos", "eos_id": end_id}
    theirs = shaken(
        open_clip.transformer.TextTransformer(
            context_length=20, vocab_size=100, width=32, heads=2, layers=3, output_dim=24, **pool
        )
    ).eval()
    from bclip_fast.model.weights import key_map

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
def test_raw_pixels_equal_normalised_ones(dtype: torch.dtype, last: bool) -> None:
    """Embedding and gradients of the patches' weights; bfloat16 by the rule of twice eager's error."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    tower = shaken(BiomedClip(SMALL)).eval().visual.patch_embed
    tower.mean, tower.std = mean, std
    # Bright, as figures on white paper are: the sum over a patch is far larger than what differs between patches.
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


def test_half_precision_takes_float32_images() -> None:
    model = BiomedClip(SMALL).to(torch.bfloat16).eval()
    assert model.encode_image(torch.randn(2, 3, 32, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VisionConfig(image_size=225), "multiple of vision.patch_size"),
        (lambda: VisionConfig(width=770), "multiple of vision.heads"),
        (lambda: VisionConfig(patch_dropout=1.0), "vision.patch_dropout is 1.0"),
        (lambda: VisionConfig(layers=10**9), "vision.layers"),
        (lambda: VisionConfig(width=768.5), "whole number"),
        (lambda: TextConfig(context_length=600), "exceeds text.max_positions"),
        (lambda: TextConfig(kind="lstm"), "text.kind is 'lstm'"),
        (lambda: TextConfig(dropout="much"), "text.dropout is 'much'"),
        (lambda: TextConfig(pad_id=30522), "text.pad_id"),
        (lambda: BiomedClipConfig(embed_dim=0), "embed_dim is 0"),
        (lambda: BiomedClip(SMALL).encode_image(torch.zeros(1, 3, 64, 64)), r"\(1, 3, 64, 64\)"),
        (lambda: BiomedClip(SMALL).encode_text(torch.ones(1, 25, dtype=torch.int64)), r"\(1, 25\)"),
        (lambda: BiomedClip(SMALL).encode_text(torch.ones(5, dtype=torch.int64)), r"\(5,\)"),
        (lambda: BiomedClip(SMALL).encode_text(Packed.of(torch.ones(25, dtype=torch.int64), [25])), "25 tokens"),
    ],
)
def test_bad_sizes_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


# The tokenizer.


@pytest.fixture(scope="module")
def captions(shared_data: Path) -> list[str]:
    with open(shared_data / "pmc_articles" / "pairs.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["caption"] for line in lines]
    with gzip.open(shared_data / "pairs" / "jats_captions_ccby_text.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts += [json.loads(line)["caption"] for _, line in zip(range(200), lines, strict=False)]
    return [*texts, "", " \n ", "[SEP] [MASK] 5µm ﬁne CO₂ 中文 é " + "x" * 120]


@pytest.mark.parametrize("vocabulary", ["pubmedbert", "bert-base-uncased"])
@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_equals_transformers_bert_tokenizer(vocabulary: str, file: str, captions: list[str], shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "vocab" / vocabulary
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_file(folder / file)
    for length, texts in ((256, captions), (77, captions[-150:])):
        keywords = dict(max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        expected = theirs([clean(text) for text in texts], **keywords).input_ids
        assert torch.equal(ours(texts, length), expected)
    assert ours.pad_id == theirs.pad_token_id and ours.vocab_size == len(theirs)


def test_equals_open_clips_tokenizer_on_raw_captions(captions: list[str], shared_data: Path) -> None:
    open_clip = import_open_clip()
    folder = shared_data / "vocab" / "pubmedbert"
    theirs = open_clip.tokenizer.HFTokenizer(str(folder), context_length=256)
    ours = Tokenizer.from_file(folder / "vocab.txt", context_length=256)
    assert torch.equal(ours(captions), theirs(captions))
    assert sum(clean(caption) != " ".join(caption.split()) for caption in captions) > 20


def test_packed_captions_are_the_padded_ones(captions: list[str], shared_data: Path) -> None:
    ours = Tokenizer.from_file(shared_data / "vocab" / "pubmedbert" / "vocab.txt")
    texts = [*captions[:50], "", "a", "word " * 2000]
    ids, text = ours(texts), ours.packed(texts)
    assert torch.equal(text.ids, ids[ids != 0]) and text.lengths.tolist() == (ids != 0).sum(1).tolist()
    assert text.lengths[-3:].tolist() == [2, 3, 256] and text.max_seqlen == 256
    assert ours.packed([]).cu_seqlens.tolist() == [0]
    assert torch.equal(text.positions, torch.cat([torch.arange(int(n)) for n in text.lengths]))


def test_a_single_text_and_no_text() -> None:
    tokenizer = Tokenizer.train(["axial brain MRI"] * 3, 60, context_length=8)
    assert tokenizer("axial").shape == (1, 8) and tokenizer([]).shape == (0, 8)
    assert tokenizer("axial " * 50)[0, -1] == tokenizer.fast.token_to_id("[SEP]")


def test_training_is_deterministic_and_survives_saving(captions: list[str], tmp_path: Path) -> None:
    texts = captions[:300]
    tokenizer = Tokenizer.train(texts, 1500, context_length=64)
    again = Tokenizer.train(iter(texts), 1500, context_length=64)
    assert tokenizer.fast.get_vocab() == again.fast.get_vocab()
    assert 1000 < tokenizer.vocab_size <= 1500
    assert [tokenizer.fast.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [
        *range(5)
    ]
    ids = tokenizer(texts)
    assert (ids == tokenizer.fast.token_to_id("[UNK]")).float().mean() < 0.01
    tokenizer.save(tmp_path)
    assert torch.equal(Tokenizer.from_file(tmp_path / "tokenizer.json", 64)(texts), ids)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    keywords = dict(max_length=64, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(theirs([clean(text) for text in texts], **keywords).input_ids, ids)


def test_a_vocabulary_never_exceeds_its_size() -> None:
    letters = [chr(code) for code in range(0x0430, 0x0550)]
    texts = ["".join(letters[i : i + 7]) for i in range(len(letters))] * 3 + ["axial brain MRI"] * 50
    tokenizer = Tokenizer.train(texts, 120)
    assert tokenizer.vocab_size <= 120
    assert tokenizer.fast.get_vocab() == Tokenizer.train(texts, 120).fast.get_vocab()
    assert tokenizer.fast.encode("axial brain").tokens == ["[CLS]", "axial", "brain", "[SEP]"]
    with pytest.raises(UserError, match="vocab_size is 5"):
        Tokenizer.train(texts, 5)


def test_broken_tokenizer_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such"):
        Tokenizer.from_file(tmp_path / "no-such.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 5')
    with pytest.raises(UserError, match="not a tokenizer.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"lacks \[PAD\]"):
        Tokenizer.from_file(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="no text"):
        Tokenizer.train([], 100)
    tokenizer = Tokenizer.train(["a b c"] * 3, 50)
    tokenizer.fast.save(str(tmp_path / "whole.json"))
    content = json.loads((tmp_path / "whole.json").read_text())
    content["post_processor"] = None
    (tmp_path / "bare.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="post_processor"):
        Tokenizer.from_file(tmp_path / "bare.json")
