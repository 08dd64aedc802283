"""CLIP's text tower with more tokens than it was trained with, as Long-CLIP stretches it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from coca_models import COCA
from towers import GPT, SIGLIP, SMALL, shaken

from bclip_fast import load, save
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.text import stretch_positions
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.train.config import InitConfig
from bclip_fast.train.init_weights import init_model

CLIP = dataclasses.replace(SMALL, text=dataclasses.replace(GPT, context_length=30, max_positions=30, end_id=3))
CAPTIONS = ["axial brain MRI", "chest radiograph", "cell nuclei, stained " * 12]


def test_77_positions_become_those_of_long_clip() -> None:
    """Long-CLIP's 248 rows: 20 kept, then four for each old row, the last three on the line of the last two rows."""
    old = torch.randn(77, 5, dtype=torch.float64)
    expected = [*old[:20]]
    for i in range(20, 77):
        step = old[i + 1] - old[i] if i < 76 else old[76] - old[75]
        expected += [old[i] + quarter / 4 * step for quarter in range(4)]
    torch.testing.assert_close(stretch_positions(old, 248), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_other_lengths_keep_lines_straight() -> None:
    """Interpolation and extrapolation of rows on a line stay on it, at positions that rise evenly."""
    line = torch.arange(77.0)[:, None]
    stretched = stretch_positions(line, 256)[:, 0]
    assert stretched.shape == (256,)
    assert torch.equal(stretched[:20], torch.arange(20.0))
    torch.testing.assert_close(stretched[20:], 20 + torch.arange(236) * (57 / 236))
    with pytest.raises(UserError, match="a text tower of 21 positions can't be stretched to 40: it needs 22 or more"):
        stretch_positions(line[:21], 40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer.train(CAPTIONS * 3, 100, context_length=30)
    save(tmp_path / "clip", shaken(BiomedClip(CLIP)), Preprocess(PreprocessConfig(32)), tokenizer)
    return tmp_path / "clip"


def test_load_stretches_and_cuts(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _, tokenizer = load(folder)
    with caplog.at_level(logging.INFO):
        longer, _, long_tokenizer = load(folder, context_length=48)
        shorter, _, _ = load(folder, context_length=12)
    assert "text positions stretched from 30 to 48 tokens, the first 20 kept" in caplog.text
    assert "text positions cut from 30 to 12 tokens" in caplog.text
    assert (longer.config.text.context_length, long_tokenizer.context_length) == (48, 48)
    assert torch.equal(longer.text.pos_embed, stretch_positions(model.text.pos_embed, 48))
    with torch.no_grad():
        short = tokenizer(CAPTIONS[:2])
        torch.testing.assert_close(longer.encode_text(short), model.encode_text(short))
        torch.testing.assert_close(shorter.encode_text(short[:, :12]), model.encode_text(short))
        assert longer.encode_text(long_tokenizer(CAPTIONS)).isfinite().all()
    assert len(long_tokenizer.encode(CAPTIONS)[2]) == 48


def test_init_stretches_to_the_configured_context(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = dataclasses.replace(CLIP.text, context_length=48)
    model = BiomedClip(dataclasses.replace(CLIP, text=text))
    with caplog.at_level(logging.INFO):
        init_model(model, InitConfig(model=str(folder)))
    assert "stretched from 30 to 48 tokens" in caplog.text
    assert torch.equal(model.text.pos_embed, stretch_positions(load(folder)[0].text.pos_embed, 48))


def test_context_of_other_towers(tmp_path: Path) -> None:
    """A BERT takes any length up to its positions. A tower that attends to padding keeps its length."""
    tokenizer = Tokenizer.train(CAPTIONS * 3, 100, context_length=20)
    pixels = Preprocess(PreprocessConfig(32))
    save(tmp_path / "bert", shaken(BiomedClip(SMALL)), pixels, tokenizer)
    assert load(tmp_path / "bert", context_length=24)[0].config.text.context_length == 24
    with pytest.raises(UserError, match=r"text.context_length=25 must not exceed text.max_positions=24"):
        load(tmp_path / "bert", context_length=25)
    siglip = BiomedClipConfig(
        **{**vars(SIGLIP), "text": dataclasses.replace(SIGLIP.text, context_length=20, max_positions=20, pad_id=0)}
    )
    save(tmp_path / "siglip", BiomedClip(siglip), Preprocess(PreprocessConfig(35)), tokenizer)
    with pytest.raises(UserError, match="captions padded to 20 tokens, and its text tower attends to the padding"):
        load(tmp_path / "siglip", context_length=40)
    text = dataclasses.replace(COCA.text, end_id=tokenizer.vocab_size - 1)
    save(tmp_path / "coca", BiomedClip(dataclasses.replace(COCA, text=text)), pixels, tokenizer)
    with pytest.raises(UserError, match="coca has a caption decoder, so context_length=40 isn't possible"):
        load(tmp_path / "coca", context_length=40)
