"""SigLIP's tokenizer, from a sentencepiece model or a tokenizer.json: ids equal those of transformers and open_clip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peers import import_open_clip
from sentencepieces import write_sentencepiece

from bclip_fast.errors import UserError
from bclip_fast.model.tokenizer import Tokenizer

TEXTS = [
    "axial brain MRI",
    "Chest  radiograph, of a PATIENT!",
    "it's_a cell: 3.5 \u00b5m (H&E) \u2460 \ufb01ne",
    "x\u00a0ray\u3000film\tof\nbones",
    "Pa\u0301tient \u4e2d\u6587 \u2581brain",
    "...",
    "",
    "a patient " * 30,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("siglip")).parent


def test_ids_equal_transformers(folder: Path) -> None:
    from transformers import SiglipTokenizer

    theirs = SiglipTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_file(folder / "spiece.model")
    assert (ours.context_length, ours.pad_id, ours.cleaning, ours.has_start) == (64, 1, "siglip", False)
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=64, return_tensors="pt").input_ids
    ids = ours(TEXTS)
    for text, row, expected_row in zip(TEXTS, ids.tolist(), expected.tolist(), strict=True):
        assert row == expected_row, text
    assert len({tuple(row) for row in ids.tolist()}) == len(TEXTS) - 1  # "..." is empty without punctuation
    assert ids.max() < ours.vocab_size


def test_saved_tokenizer_gives_same_ids(folder: Path, tmp_path: Path) -> None:
    ours = Tokenizer.from_file(folder / "spiece.model")
    ours.save(tmp_path)
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.cleaning == "siglip"
    assert again.encode(TEXTS) == ours.encode(TEXTS)
    assert again.packed(TEXTS).ids.tolist() == [token for row in ours.encode(TEXTS) for token in row]


def test_canonicalized_ids_equal_open_clip(folder: Path, tmp_path: Path) -> None:
    """open_clip also repairs the encoding, and makes spaces of underscores."""
    open_clip = import_open_clip()
    ours = Tokenizer.from_file(folder / "spiece.model", 64).with_cleaning("canonicalize")
    ours.save(tmp_path)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=64, clean="canonicalize")
    texts = [*TEXTS, "a \u00e2\u20ac\u0153brain\u00e2\u20ac\u009d &lt;scan&gt;"]
    assert ours(texts).tolist() == theirs(texts).tolist()
    assert ours.encode(["cell_nuclei"]) == ours.encode(["cell nuclei"])
    assert ours.encode(["cell_nuclei"]) != ours.with_cleaning("siglip").encode(["cell_nuclei"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "bpe"}, "isn't a unigram model"),
        ({"add_dummy_prefix": False}, "isn't a unigram model"),
        ({"eos_id": -1}, "has no piece '</s>'"),
    ],
)
def test_other_sentencepiece_models_raise(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = write_sentencepiece(tmp_path, **options)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_file(path)


def test_damaged_sentencepiece_model_raises(folder: Path, tmp_path: Path) -> None:
    content = (folder / "spiece.model").read_bytes()
    for damaged in (content[: len(content) // 2], b"not a protocol buffer"):
        (tmp_path / "spiece.model").write_bytes(damaged)
        with pytest.raises(UserError, match="spiece.model isn't a sentencepiece model"):
            Tokenizer.from_file(tmp_path / "spiece.model")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("do_lower_case", False, "do_lower_case=false isn't supported"), ("clean", "lower", "clean='lower' must be")],
)
def test_unsupported_settings_raise(folder: Path, tmp_path: Path, key: str, value: object, message: str) -> None:
    (tmp_path / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=message):
        Tokenizer.from_file(tmp_path / "spiece.model")
