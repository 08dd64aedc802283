"""Fine-tuning on pairs with each loss, a teacher and known positives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetunes import settings, write_pairs, write_start
from runs import column

from bclip_fast import pretrained
from bclip_fast.data.transform import PreprocessConfig, denormalize, normalize
from bclip_fast.errors import UserError
from bclip_fast.train.checkpoint import load_latest
from bclip_fast.train.finetune import finetune
from bclip_fast.train.losses import LossConfig

PAIRS: dict[str, Any] = {"task": "", "epochs": 1, "batch_size": 8, "checkpoint_every": 0, "crop_scale": (1.0, 1.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start, a teacher with other pixels, and 16 pairs of which four each have one caption."""
    folder = tmp_path_factory.mktemp("finetune")
    write_start(folder / "start")
    write_start(folder / "teacher", seed=2, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
    write_pairs(folder)
    return folder


def run(folder: Path, name: str, **changes: Any) -> Path:
    return finetune(settings(folder / "start", folder / "write_pairs.csv", folder / name, **PAIRS, **changes))


def test_sigmoid_loss_starts_with_its_scale_and_bias_and_saves_them(folder: Path) -> None:
    path = run(folder, "siglip", loss=LossConfig(kind="siglip"))
    assert column(path, "logit_scale")[0] == pytest.approx(10)
    clip = pretrained.load(path)[0]
    assert clip.logit_bias is not None
    assert float(clip.logit_bias.detach()) == pytest.approx(-10, abs=0.1)
    again = run(folder, "again", loss=LossConfig(kind="siglip", init_scale=20.0, init_bias=-5.0))
    assert column(again, "logit_scale")[0] == pytest.approx(20)
    assert float(load_latest(again / "checkpoints").model["logit_bias"]) == pytest.approx(-5, abs=0.1)
    assert column(run(folder, "clip"), "logit_scale")[0] == pytest.approx(1 / 0.07)


def test_teacher_embeds_batches_or_all_samples_at_first(folder: Path) -> None:
    terms = {}
    for mode in ("off", "fp32"):
        loss = LossConfig(kind="distill", teacher=str(folder / "teacher"), teacher_cache=mode)
        path = run(folder, mode, loss=loss)
        terms[mode] = column(path, "distill_loss")
        assert column(path, "loss") == pytest.approx(
            [sum(pair) for pair in zip(terms[mode], column(path, "contrastive_loss"), strict=True)]
        )
    assert terms["fp32"] == pytest.approx(terms["off"], rel=1e-5)
    assert len(list((folder / "fp32" / "teacher").rglob("*.npy"))) == 1
    assert load_latest(folder / "fp32" / "checkpoints").rest["teacher"]


def test_equal_captions_are_positives(folder: Path) -> None:
    """16 pairs share four captions, and a batch of 8 has pairs of one caption."""
    path = run(folder, "captions", positives="captions")
    assert all(0 < count <= 8 for count in column(path, "shared_positives"))
    assert "shared_positives" not in (run(folder, "pair") / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positives": "figure"}, "positives=figure needs the manifest of shards"),
        (
            {"positives": "captions", "loss": LossConfig(label_smoothing=0.1)},
            "cannot be combined with loss.label",
        ),
        ({"loss": LossConfig(kind="distill", teacher="nowhere")}, "loss.teacher=nowhere cannot be loaded"),
        ({"loss": LossConfig(kind="no_such_module:Loss")}, "loss.kind=no_such_module:Loss cannot be imported"),
    ],
)
def test_losses_that_do_not_fit_write_nothing(folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, "refused", **changes)
    assert not (folder / "refused").exists()


def test_questions_take_no_loss() -> None:
    with pytest.raises(UserError, match="task=vqa_rad has its own loss"):
        settings(Path("a"), Path("b"), Path("c"), task="vqa_rad", loss=LossConfig(kind="siglip"))


def test_denormalize_returns_the_pixels() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    config = PreprocessConfig(size=16, mean=(0.48, 0.4, 0.1), std=(0.26, 0.01, 3.0))
    assert torch.equal(denormalize(normalize(pixels, config.mean, config.std), config), pixels)
