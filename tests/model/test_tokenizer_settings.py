"""The settings beside a tokenizer's files: they give the ids of transformers' tokenizer, or an error names them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from bclip_fast import pretrained
from bclip_fast.errors import UserError
from bclip_fast.model.tokenizer import Tokenizer, clean

WORDS = [
    "MRI",
    "mri",
    "of",
    "the",
    "Brain",
    "brain",
    "é",
    "e",
    "##tude",
    "étude",
    "T",
    "##1",
    "-",
    "中",
    "文",
    "中文",
    "x",
]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
OTHER = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS]
OTHER_TOKENS = {
    "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>",
}  # fmt: skip
TEXTS = [
    "MRI of the Brain", "mri OF the BRAIN", "Étude étude", "T1 - x", "中文 brain中", "[MASK] <mask> x [SEP]", "", " \n",
    "of<ROI>the <ROI>", "e\u0301tude", "unknown words", "x" * 120, "[mask] [CLS]the", "ROI roi",
]  # fmt: skip
BERT_CLASS: dict[str, Any] = {"tokenizer_class": "BertTokenizer"}
ROI = {
    "content": "<ROI>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False, "special": False,
}  # fmt: skip


def folder_of(folder: Path, words: list[str], **files: dict[str, Any] | None) -> Path:
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def ids_of_transformers(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    return theirs([clean(text) for text in TEXTS], truncation=True, max_length=24).input_ids


def ids_of_ours(path: Path) -> list[list[int]]:
    return Tokenizer.from_file(path).encode(TEXTS, 24)


@pytest.mark.parametrize(
    ("words", "config", "special_map"),
    [
        (BERT, BERT_CLASS | {"do_lower_case": False}, None),
        (BERT, BERT_CLASS | {"do_lower_case": True}, None),
        (BERT, BERT_CLASS | {"do_lower_case": False, "strip_accents": True}, None),
        (BERT, BERT_CLASS | {"do_lower_case": True, "strip_accents": False}, None),
        (BERT, BERT_CLASS | {"do_lower_case": False, "tokenize_chinese_chars": False}, None),
        ([word for word in BERT if word == word.lower() or word[0] == "["], BERT_CLASS, None),
        (OTHER, BERT_CLASS | {"do_lower_case": False} | OTHER_TOKENS, None),
        (OTHER, BERT_CLASS | {"do_lower_case": False}, OTHER_TOKENS),
        (BERT, BERT_CLASS | {"do_lower_case": False, "additional_special_tokens": ["<ROI>"]}, None),
        (BERT, BERT_CLASS | {"do_lower_case": False, "added_tokens_decoder": {str(len(BERT)): ROI}}, None),
        (BERT, {"tokenizer_class": "DistilBertTokenizer", "do_lower_case": False}, None),
        (BERT, {"tokenizer_class": "ElectraTokenizerFast", "do_lower_case": False}, None),
    ],
)
def test_ids_of_vocabulary_and_settings_equal_transformers(
    tmp_path: Path, words: list[str], config: dict[str, Any], special_map: dict[str, Any] | None
) -> None:
    folder = folder_of(tmp_path, words, tokenizer_config=config, special_tokens_map=special_map)
    expected = ids_of_transformers(folder)
    assert ids_of_ours(folder / "vocab.txt") == expected
    # Our own file keeps the settings: here and in transformers.
    ours = Tokenizer.from_file(folder / "vocab.txt")
    ours.save(tmp_path / "saved")
    again = Tokenizer.from_file(tmp_path / "saved" / "tokenizer.json")
    assert again.encode(TEXTS, 24) == expected == ids_of_transformers(tmp_path / "saved")
    assert again.pad_id == ours.pad_id == words.index("<pad>" if words is OTHER else "[PAD]")
    # And so does the tokenizer.json that transformers writes.
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    theirs = Tokenizer.from_file(tmp_path / "theirs" / "tokenizer.json")
    assert theirs.encode(TEXTS, 24) == expected
    assert theirs.pad_id == ours.pad_id


def test_config_json_names_the_kind_of_a_vocabulary(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, BERT, config={"model_type": "bert", "do_lower_case": False})
    assert Tokenizer.from_file(folder / "vocab.txt").encode(["MRI of the Brain"]) == [[2, 5, 7, 8, 9, 3]]
    (folder / "config.json").write_text(json.dumps({"tokenizer_class": "BertJapaneseTokenizer"}))
    with pytest.raises(UserError, match="belongs to a BertJapaneseTokenizer"):
        Tokenizer.from_file(folder / "vocab.txt")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "'MRI', but no file says if texts become lower case"),
        ({"tokenizer_config": {"do_lower_case": "no"}}, "do_lower_case='no' must be true or false"),
        ({"tokenizer_config": {"do_basic_tokenize": False}}, "do_basic_tokenize=False isn't supported"),
        ({"tokenizer_config": {"never_split": ["MRI"]}}, "never_split"),
        ({"tokenizer_config": {"padding_side": "left"}}, "padding_side='left'"),
        ({"tokenizer_config": {"truncation_side": "left"}}, "truncation_side='left'"),
        ({"tokenizer_config": {"auto_map": {"AutoTokenizer": ["code.Own", None]}}}, "auto_map"),
        ({"tokenizer_config": {"tokenizer_class": "MPNetTokenizer"}}, "belongs to a MPNetTokenizer"),
        ({"tokenizer_config": {"do_lower_case": False, "pad_token": "<pad>"}}, "lacks <pad>"),
        (
            {
                "tokenizer_config": {"do_lower_case": False, "pad_token": "[PAD]"},
                "special_tokens_map": {"pad_token": "x"},
            },
            "pad_token is .*but 'x'",
        ),
        (
            {"tokenizer_config": {"do_lower_case": False}, "added_tokens": {"<ROI>": 99}},
            "'<ROI>' the id 99, but with vocab.txt it has 22",
        ),
        ({"tokenizer_config": {"do_lower_case": False, "model_max_length": 64}}, "is made for 64 tokens"),
    ],
)
def test_vocabulary_with_unknown_or_contradicting_settings_raises(tmp_path: Path, files: dict, message: str) -> None:
    path = folder_of(tmp_path, BERT, **files) / "vocab.txt"
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.from_file(path, 77)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def cased_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer.json of a cased BERT and no other file."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("cased")
    folder_of(folder, BERT, tokenizer_config=BERT_CLASS | {"do_lower_case": False})
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "json")
    (folder / "json" / "tokenizer_config.json").unlink()
    return folder / "json"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_lower_case": True}, "turns 'A' into 'A', but tokenizer_config.json says do_lower_case=True"),
        (BERT_CLASS, "leaves do_lower_case at its default, True"),
        (BERT_CLASS | {"do_lower_case": False, "strip_accents": True}, "says strip_accents=True"),
        (BERT_CLASS | {"do_lower_case": False, "tokenize_chinese_chars": False}, "tokenize_chinese_chars=False"),
        ({"pad_token": "<pad>"}, "pad_token '<pad>' isn't in the vocabulary"),
        ({"cls_token": "x"}, r"puts '\[CLS\]' where the settings beside it have cls_token 'x'"),
        ({"unk_token": "x"}, r"unknown token '\[UNK\]'"),
        ({"added_tokens_decoder": {"0": ROI}}, "token 0 is"),
    ],
)
def test_tokenizer_json_that_contradicts_its_settings_raises(
    cased_json: Path, tmp_path: Path, config: dict, message: str
) -> None:
    folder = shutil.copytree(cased_json, tmp_path / "copy")
    assert Tokenizer.from_file(folder / "tokenizer.json").encode(["MRI"]) == [[2, 5, 3]]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        Tokenizer.from_file(folder / "tokenizer.json")


def byte_pairs() -> FastTokenizer:
    """RoBERTa's kind of tokenizer: <pad> has id 1."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = {
        token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Br", "RI"])
    }
    fast = FastTokenizer(models.BPE(letters, [("B", "r"), ("R", "I")], unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return fast


def unigram() -> FastTokenizer:
    """T5's and ALBERT's kind of tokenizer, lower-casing."""
    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("▁", -2.0), ("▁br", -3.0), ("ain", -3.0)]
    fast = FastTokenizer(models.Unigram([*pieces, *((letter, -5.0) for letter in "abimnrt")], 1))
    fast.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast.add_special_tokens(["<pad>", "<unk>", "[CLS]", "[SEP]"])
    return fast


@pytest.mark.parametrize(
    ("fast", "config", "pad_id"),
    [
        (byte_pairs(), {"tokenizer_class": "PreTrainedTokenizerFast"} | OTHER_TOKENS, 1),
        (unigram(), {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True, "pad_token": "<pad>"}, 0),
    ],
    ids=["byte pairs", "unigram"],
)
def test_ids_of_other_kinds_equal_transformers(tmp_path: Path, fast: FastTokenizer, config: dict, pad_id: int) -> None:
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert ours.encode(TEXTS, 24) == ids_of_transformers(tmp_path)
    assert ours.pad_id == pad_id
    ours.save(tmp_path / "saved")
    assert Tokenizer.from_file(tmp_path / "saved" / "tokenizer.json").pad_id == pad_id
    # Without settings, the padding of tokenizer.json counts, also after saving.
    fast.enable_padding(pad_id=pad_id, pad_token="<pad>")
    fast.save(str(tmp_path / "saved" / "tokenizer.json"))
    (tmp_path / "saved" / "tokenizer_config.json").unlink()
    bare = Tokenizer.from_file(tmp_path / "saved" / "tokenizer.json")
    bare.save(tmp_path / "again")
    assert Tokenizer.from_file(tmp_path / "again" / "tokenizer.json").pad_id == bare.pad_id == pad_id
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"do_lower_case": pad_id == 1}))
    with pytest.raises(UserError, match="do_lower_case"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_saved_checkpoint_names_the_published_tokenizer_only_with_its_settings(
    shared_data: Path, tmp_path: Path
) -> None:
    """open_clip would otherwise download the published one, which makes every text lower case."""
    vocabulary = shutil.copy(shared_data / "vocab" / "pubmedbert" / "vocab.txt", tmp_path / "vocab.txt")
    for lower in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
        assert pretrained._is_pubmedberts(Tokenizer.from_file(vocabulary)) == lower
    assert pretrained._is_pubmedberts(Tokenizer.from_file(shared_data / "vocab" / "pubmedbert" / "tokenizer.json"))
