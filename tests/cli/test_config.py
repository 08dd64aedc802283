"""Tests of configurations from TOML files and flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from bclip_fast.config import from_toml, parse, to_toml
from bclip_fast.errors import UserError


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    path: Path = Path("x")
    inner: Inner = field(default_factory=Inner)
    steps: int | None = None
    offset: int = -3
    resume: bool = False
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.offset > 0:
            raise UserError(f"offset = {self.offset} must not be positive")


def write(folder, text, name="c.toml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_parse_later_files_and_flags_override(tmp_path):
    first = write(tmp_path, 'steps = 5\nkind = "b"\n[inner]\nlr = 0.5\nbetas = [0.1, 0.2]')
    second = write(tmp_path, "steps = 7\noffset = -9\nresume = true", "d.toml")
    config = parse(Config, [first, second, "--inner.lr", "1e-4"], prog="t")
    assert config == Config(inner=Inner(lr=1e-4, betas=(0.1, 0.2)), steps=7, offset=-9, resume=True, kind="b")


def test_parse_bare_flag_sets_boolean(tmp_path):
    assert parse(Config, ["--resume"], prog="t").resume
    assert not parse(Config, [write(tmp_path, "resume = true"), "--no-resume"], prog="t").resume


def test_to_toml_round_trip_is_equal(tmp_path):
    config = Config(path=Path("/a b"), inner=Inner(lr=3e-7, names=("x", "y z")), steps=3, resume=True)
    assert from_toml(Config, write(tmp_path, to_toml(config))) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inner.lrr = 1", "inner.lrr"),
        ('inner.lr = "fast"', "fast"),
        ("unknown = 1", "unknown"),
        ('kind = "z"', "'z'"),
        ("offset = 4", "offset = 4"),
        ("steps = ", "not valid TOML"),
    ],
)
def test_parse_bad_file_error_names_file_and_key(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        parse(Config, [path], prog="t")
    assert words in str(error.value) and path in str(error.value) and "\n" not in str(error.value)


def test_parse_missing_file_is_named():
    with pytest.raises(UserError, match="nowhere.toml does not exist"):
        parse(Config, ["nowhere.toml"], prog="t")


def test_parse_unknown_flag_is_named():
    with pytest.raises(UserError, match="--stepss"):
        parse(Config, ["--stepss", "1"], prog="t")


def test_biomedclip_b16_equals_paper():
    """Table S9 of arXiv 2303.00915."""
    from bclip_fast.train.config import TrainConfig

    config = parse(TrainConfig, ["biomedclip_b16.toml", "--data.shards", "x"], prog="bclip train").resolved()
    optim = config.optim
    assert (optim.lr, optim.weight_decay, optim.beta1, optim.beta2, optim.eps) == (5e-4, 0.2, 0.9, 0.98, 1e-6)
    assert (optim.warmup_steps, config.epochs, config.batch_size, config.seed) == (2000, 32, 4096, 0)
    assert (config.model.vision.image_size, config.model.text.context_length) == (224, 256)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("bclip_fast/configs/*.toml")), ids=lambda p: p.name
)
def test_package_configurations_are_valid(path):
    from bclip_fast.train.config import TrainConfig

    parse(TrainConfig, [path.name], prog="bclip train").resolved()
