"""The tokenizer against those of transformers and open_clip, its training and its files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from peers import import_open_clip

from bclip_fast.errors import UserError
from bclip_fast.model.tokenizer import Tokenizer, clean


@pytest.fixture(scope="module")
def captions(shared_data: Path) -> list[str]:
    with open(shared_data / "pmc_articles" / "pairs.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["caption"] for line in lines]
    with gzip.open(shared_data / "pairs" / "jats_captions_ccby_text.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts += [json.loads(line)["caption"] for _, line in zip(range(200), lines, strict=False)]
    return [*texts, "", " \n ", "[SEP] [MASK] 5µm ﬁne CO₂ 中文 é " + "x" * 120]


@pytest.mark.parametrize("vocabulary", ["pubmedbert", "bert-base-uncased"])
@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_ids_equal_transformers_bert_tokenizer(
    vocabulary: str, file: str, captions: list[str], shared_data: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "vocab" / vocabulary
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_file(folder / file)
    for length, texts in ((256, captions), (77, captions[-150:])):
        keywords = {"max_length": length, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        expected = theirs([clean(text) for text in texts], **keywords).input_ids
        assert torch.equal(ours(texts, length), expected)
    assert ours.pad_id == theirs.pad_token_id
    assert ours.vocab_size == len(theirs)


def test_ids_of_raw_captions_equal_open_clips_tokenizer(captions: list[str], shared_data: Path) -> None:
    open_clip = import_open_clip()
    folder = shared_data / "vocab" / "pubmedbert"
    theirs = open_clip.tokenizer.HFTokenizer(str(folder), context_length=256)
    ours = Tokenizer.from_file(folder / "vocab.txt", context_length=256)
    assert torch.equal(ours(captions), theirs(captions))
    assert sum(clean(caption) != " ".join(caption.split()) for caption in captions) > 20


def test_packed_ids_equal_padded_ids_without_padding(captions: list[str], shared_data: Path) -> None:
    ours = Tokenizer.from_file(shared_data / "vocab" / "pubmedbert" / "vocab.txt")
    texts = [*captions[:50], "", "a", "word " * 2000]
    ids, text = ours(texts), ours.packed(texts)
    assert torch.equal(text.ids, ids[ids != 0])
    assert text.lengths.tolist() == (ids != 0).sum(1).tolist()
    assert text.lengths[-3:].tolist() == [2, 3, 256]
    assert text.max_seqlen == 256
    assert ours.packed([]).cu_seqlens.tolist() == [0]
    assert torch.equal(text.positions, torch.cat([torch.arange(int(n)) for n in text.lengths]))


def test_single_text_and_empty_list_give_one_and_no_row() -> None:
    tokenizer = Tokenizer.train(["axial brain MRI"] * 3, 60, context_length=8)
    assert tokenizer("axial").shape == (1, 8)
    assert tokenizer([]).shape == (0, 8)
    assert tokenizer("axial " * 50)[0, -1] == tokenizer.fast.token_to_id("[SEP]")


def test_training_is_deterministic_and_survives_saving(captions: list[str], tmp_path: Path) -> None:
    texts = captions[:300]
    tokenizer = Tokenizer.train(texts, 1500, context_length=64)
    repeated = Tokenizer.train(iter(texts), 1500, context_length=64)
    assert tokenizer.fast.get_vocab() == repeated.fast.get_vocab()
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
    keywords = {"max_length": 64, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
    assert torch.equal(theirs([clean(text) for text in texts], **keywords).input_ids, ids)


def test_trained_vocabulary_never_exceeds_vocab_size() -> None:
    letters = [chr(code) for code in range(0x0430, 0x0550)]
    texts = ["".join(letters[i : i + 7]) for i in range(len(letters))] * 3 + ["axial brain MRI"] * 50
    tokenizer = Tokenizer.train(texts, 120)
    assert tokenizer.vocab_size <= 120
    assert tokenizer.fast.get_vocab() == Tokenizer.train(texts, 120).fast.get_vocab()
    assert tokenizer.fast.encode("axial brain").tokens == ["[CLS]", "axial", "brain", "[SEP]"]
    with pytest.raises(UserError, match="vocab_size=5"):
        Tokenizer.train(texts, 5)


def test_broken_tokenizer_files_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such"):
        Tokenizer.from_file(tmp_path / "no-such.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 5')
    with pytest.raises(UserError, match=r"not a tokenizer.json"):
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
