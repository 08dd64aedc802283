"""A small checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from towers import SMALL, shaken

from bclip_fast import save
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["axial brain MRI", "chest radiograph", "cell nuclei, stained"] * 3, 100, context_length=20)


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """The folder of a small checkpoint in our sizes."""
    save(tmp_path / "small", shaken(BiomedClip(SMALL)), Preprocess(PreprocessConfig(size=32)), tokenizer)
    return tmp_path / "small"
