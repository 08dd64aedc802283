"""A small sentencepiece model and SigLIP's settings around it, for tests of tokenizers and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CAPTIONS = [
    "axial brain MRI",
    "chest radiograph of a patient",
    "cell nuclei, stained with H&E",
    "brain scan of a child",
]


def write_sentencepiece(folder: Path, vocab_size: int = 96, **options: object) -> Path:
    """Train a unigram model with T5's normalisation and special pieces, as SigLIP has, and write its settings."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spiece.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([caption.lower() for caption in CAPTIONS] * 10),
            model_writer=file,
            minloglevel=2,
            **{
                "vocab_size": vocab_size,
                "hard_vocab_limit": False,
                "num_threads": 1,
                "normalization_rule_name": "nmt_nfkc",
            },
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, **options},
        )
    token = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
    config = {
        "tokenizer_class": "SiglipTokenizer",
        "do_lower_case": True,
        "model_max_length": 64,
        "sp_model_kwargs": {},
        "additional_special_tokens": [],
        **{"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"},
    }
    special = {name: {"content": config[name], **token} for name in ("eos_token", "pad_token", "unk_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return path
