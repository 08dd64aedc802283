"""Training of a CoCa: the step over micro-batches and ranks, metrics, resume, replay and evaluation."""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coca_models import COCA, open_clip_coca
from grad_cache_steps import ENGINES, NUM_PAIRS, NUM_PARTS, OPTIM, SIZES, micro_batches, spill_buffer
from peers import import_open_clip
from ranks import on_ranks
from runs import are_equal, assert_equal_runs, column, records, stopped_after
from synthetic import tiny_model, tiny_run
from synthetic import weights as run_weights
from towers import GPT

from bclip_fast import pretrained
from bclip_fast.cli import main
from bclip_fast.data.transform import normalize
from bclip_fast.errors import UserError
from bclip_fast.eval import evaluate
from bclip_fast.export.command import ExportConfig
from bclip_fast.export.command import run as export
from bclip_fast.hardware import ClusterConfig, cluster_of
from bclip_fast.model import weights
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.ops.image import CLIP_MEAN, CLIP_STD
from bclip_fast.plan.estimate import build_plan
from bclip_fast.plan.samples import samples_of
from bclip_fast.train import report
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.engine import Engine, build_engine
from bclip_fast.train.finetune_config import FinetuneConfig
from bclip_fast.train.grad_cache import GradCache, embed_with_captions
from bclip_fast.train.loss_spikes import SpikeConfig
from bclip_fast.train.losses import LossConfig, build_loss
from bclip_fast.train.trainer import train

LOSS = LossConfig(kind="coca", caption_loss_weight=1.5, clip_loss_weight=0.5)
# Some captions of the micro-batches fill the context.
MODEL = dataclasses.replace(COCA, text=dataclasses.replace(GPT, context_length=11, max_positions=11))


def make(engine: str, dtype: torch.dtype = torch.float32, locked: str = "") -> Engine:
    torch.manual_seed(0)
    model = BiomedClip(MODEL).to(dtype).train()
    model.visual.patch_dropout = 0.25
    if locked:
        model.get_submodule(locked).lock()  # type: ignore[operator]
    model.set_grad_checkpointing(engine == "zero3")
    return build_engine(model, ENGINES[engine], OPTIM, NUM_PAIRS)


def whole_batch(locked: str = "") -> dict[str, Any]:
    """The step of one graph over all pairs in float64, with the loss by its definition."""
    engine = make("ddp", torch.float64, locked)
    parts = [embed_with_captions(engine, *part) for part in micro_batches()]
    image, text = (torch.cat([part[i] for part, _ in parts]) for i in (0, 1))
    logits = parts[0][0].logit_scale * image @ text.T
    targets = torch.arange(len(logits))
    contrastive = 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    count = sum(length - 1 for batch, _ in micro_batches() for length in batch.lengths)
    caption = 1.5 * torch.stack([losses for _, losses in parts]).sum() / count
    engine.backward(contrastive + caption)
    result = engine.step(OPTIM.lr)
    numbers = {"contrastive_loss": float(contrastive.detach()), "caption_loss": float(caption.detach())}
    return {**numbers, "grad_norm": result.grad_norm, "weights": engine.model_state()}


def cached_step(rank: int, engine: Engine, share: int) -> dict[str, Any]:
    mine = slice(rank * share, (rank + 1) * share)
    cached = GradCache(engine, build_loss(LOSS), SIZES[mine], spill_buffer())
    for part in micro_batches()[mine]:
        cached.add(*part)
    cached.loss()
    loss = float(cached.backward())
    result = engine.step(OPTIM.lr)
    numbers = {name: float(cached.scalars[name]) for name in ("contrastive_loss", "caption_loss")}
    assert loss == pytest.approx(sum(numbers.values()))
    return {**numbers, "grad_norm": result.grad_norm, "weights": engine.model_state()}


def steps(rank: int, num_ranks: int, names: list[str]) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = str(rank)
    results = {}
    for name in names:
        dtype = torch.float64 if name == "ddp" else torch.float32
        engine = make(name, dtype)
        results[name] = cached_step(rank, engine, NUM_PARTS // num_ranks)
        engine.close()
    return results


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return whole_batch()


def compare(results: dict[str, Any], expected: dict[str, Any], name: str, *, rel: float, atol: float) -> None:
    for key in ("contrastive_loss", "caption_loss", "grad_norm"):
        assert results[key] == pytest.approx(expected[key], rel=rel), (name, key)
    assert results["weights"].keys() == expected["weights"].keys()
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(results["weights"][key].double(), weight, rtol=0, atol=atol, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    ("num_ranks", "names"), [(1, ["ddp", "zero1"]), (2, list(ENGINES)), (4, ["ddp", "zero2", "zero3"])]
)
def test_coca_step_over_micro_batches_and_ranks_is_that_of_whole_batch(
    num_ranks: int, names: list[str], expected: dict[str, Any]
) -> None:
    """DDP computes in float64. The ranks have different numbers of tokens."""
    for name, results in on_ranks(num_ranks, steps, num_ranks, names)[0].items():
        rel, atol = (1e-10, 1e-10) if name == "ddp" else (1e-5, 2e-5)
        compare(results, expected, name, rel=rel, atol=atol)


def test_ten_steps_equal_open_clips_trainer() -> None:
    """Two micro-batches a step, as with open_clip's --accum-freq 2, with its AdamW and its rule of weight decay.

    Both compute in float64: AdamW amplifies the rounding errors of float32.
    """
    open_clip = import_open_clip()
    trainer = pytest.importorskip("open_clip_train.train")
    torch.manual_seed(0)
    theirs = open_clip_coca(MODEL).double()
    model = BiomedClip(MODEL)
    model.load_state_dict(weights.from_open_clip(theirs.state_dict(), model, source="open_clip"))
    model.visual.set_normalization(CLIP_MEAN, CLIP_STD)
    optim = dataclasses.replace(OPTIM, grad_clip_norm=0.0, weight_decay=0.2, eps=1e-6)
    engine = build_engine(model.double().train(), ENGINES["ddp"], optim, NUM_PAIRS)
    parts = [micro_batches()[i % NUM_PARTS] for i in range(20)]
    ours = []
    for step in range(10):
        pair = parts[2 * step : 2 * step + 2]
        cached = GradCache(engine, build_loss(LOSS), [len(batch.lengths) for batch, _ in pair], spill_buffer())
        for part in pair:
            cached.add(*part)
        cached.loss()
        total = float(cached.backward())
        engine.step(optim.lr)
        ours.append([total, *(float(cached.scalars[name]) for name in ("contrastive_loss", "caption_loss"))])

    args = Namespace(
        device="cpu", precision="fp32", accum_freq=2, distill=False, skip_scheduler=True, grad_clip_norm=None,
        horovod=False, log_every_n_steps=1, batch_size=4, world_size=1, rank=0, local_rank=0, wandb=False,
        distributed=False,
    )  # fmt: skip
    batches = []
    for batch, _ in parts:
        ids = torch.zeros(len(batch.lengths), 11, dtype=torch.int64)
        ids[torch.arange(11) < torch.tensor(batch.lengths)[:, None]] = batch.ids
        batches.append((normalize(batch.images).double(), ids))
    loader = type("Loader", (list,), {"num_batches": 20, "num_samples": 80})(batches)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    parameters = list(theirs.named_parameters())
    undecayed = [p for name, p in parameters if p.ndim < 2 or any(word in name for word in ("bn", "ln", "bias"))]
    decayed = [p for _, p in parameters if all(p is not other for other in undecayed)]
    optimizer = torch.optim.AdamW(
        [{"params": undecayed, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}],
        lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
    )  # fmt: skip
    logged: dict[str, list[float]] = {}
    board = SimpleNamespace(add_scalar=lambda name, value, _: logged.setdefault(name, []).append(value))
    loss = open_clip.loss.CoCaLoss(caption_loss_weight=1.5, clip_loss_weight=0.5)
    trainer.train_one_epoch(theirs, data, loss, 0, optimizer, None, None, None, args, board)
    expected = list(
        zip(*(logged[f"train/{name}"] for name in ("loss", "contrastive_loss", "caption_loss")), strict=True)
    )
    assert len(expected) == 10
    assert torch.tensor(ours) == pytest.approx(torch.tensor(expected), abs=1e-5)
    assert ours[0][0] - ours[8][0] > 0.1


RUN_MODEL = dataclasses.replace(COCA, text=dataclasses.replace(GPT, vocab_size=96, context_length=12, max_positions=12))


def coca_run(folder: Path, shards: Path, **changes: Any) -> TrainConfig:
    return tiny_run(folder, shards, **{"model": RUN_MODEL, "loss": LOSS, "micro_batch_size": 8, **changes})


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with an EMA, and with checkpoints at steps 3 and 6."""
    return train(coca_run(tmp_path_factory.mktemp("runs") / "finished", shards, ema_decay=0.5))


def test_metrics_and_report_show_both_terms(finished: Path) -> None:
    for line in records(finished):
        assert line["loss"] == pytest.approx(line["contrastive_loss"] + line["caption_loss"], rel=1e-6)
    captions = column(finished, "caption_loss")
    assert captions[-1] < captions[0]
    assert "Caption term of the loss" in report.render([report.Run.read(finished, "run")])


def test_killed_run_resumes_bit_for_bit(finished: Path, shards: Path, tmp_path: Path) -> None:
    again = stopped_after(finished, tmp_path / "again", 3)
    train(coca_run(again, shards, ema_decay=0.5, resume=True))
    assert_equal_runs(again, finished)


def test_exported_model_is_that_of_open_clip_and_can_be_evaluated(
    finished: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(ExportConfig(model=str(finished), out=tmp_path / "exported"))
    model, preprocess, tokenizer = pretrained.load(tmp_path / "exported")
    assert model.config.decoder == RUN_MODEL.decoder
    assert are_equal(model.state_dict(), run_weights(finished))
    open_clip = import_open_clip()
    monkeypatch.chdir(tmp_path / "exported")
    theirs = open_clip.create_model("local-dir:.").eval()
    assert type(theirs).__name__ == "CoCa"
    image, ids = torch.randn(2, 3, 32, 32), tokenizer(["a red square at the left", "a blue square"])
    with torch.no_grad():
        expected, ours = theirs(image, ids), model(image, ids, captions=True)
    for name in ("image_features", "text_features"):
        assert (ours[name] - expected[name]).abs().max() <= 1e-5
    logits = expected["logits"].permute(0, 2, 1)
    mean = F.cross_entropy(logits, expected["labels"], ignore_index=0, reduction="sum")
    assert float(ours["caption_losses"]) == pytest.approx(float(mean), rel=1e-5)
    results = evaluate((model, preprocess, tokenizer), ("retrieval",), data=str(shards), progress=False)
    assert results["tasks"]["retrieval"]["num_samples"] == 32


def test_run_that_gave_up_replays(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spikes = SpikeConfig(window=2, grad_norm=1e-9, max_skipped=1)
    with pytest.raises(UserError, match="2 of the last 2 steps were skipped"):
        train(coca_run(tmp_path / "run", shards, spikes=spikes, max_steps=60))
    (dump,) = (tmp_path / "run" / "dumps").iterdir()
    last = records(tmp_path / "run")[-1]
    capsys.readouterr()
    assert main(["train", "replay", str(dump)]) == 0
    assert f"loss {last['loss']!r} in the run, {last['loss']!r} computed again" in capsys.readouterr().err


def test_plan_counts_decoder(shards: Path) -> None:
    """The first pass of gradient caching runs without the decoder."""
    # A plan needs a head dimension that a kernel supports, here 16.
    model = dataclasses.replace(RUN_MODEL, decoder=dataclasses.replace(RUN_MODEL.decoder, heads=2))
    config = coca_run(Path("unused"), shards, model=model)
    plan = build_plan(config, samples_of(config), cluster_of(ClusterConfig(1, 1, "cpu")))
    assert plan.parameters["caption decoder"] == sum(
        weight.numel() for name, weight in BiomedClip(RUN_MODEL).named_parameters() if name.startswith("decoder.")
    )
    assert plan.stages[0].flops["replay"] > 1.2 * plan.stages[0].flops["forward"]
    assert plan.memory["backward"]["caption decoder's activations"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": tiny_model()}, "loss.kind=coca needs a model with a caption decoder; set preset=coca_b32"),
        ({"loss": LossConfig()}, "loss.kind=clip doesn't train the model's caption decoder; set loss.kind=coca"),
        ({"loss": LossConfig(kind="siglip")}, "loss.kind=siglip doesn't train the model's caption decoder"),
    ],
)
def test_loss_and_model_that_dont_fit_are_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(coca_run(tmp_path / "run", shards, **changes))
    assert not (tmp_path / "run").exists()


def test_finetuning_refuses_coca() -> None:
    with pytest.raises(UserError, match="loss.kind=coca needs bclip train"):
        FinetuneConfig(model="run", data="pairs.csv", run="out", loss=LOSS)


@pytest.mark.parametrize(("name", "value"), [("caption_loss_weight", 0.0), ("clip_loss_weight", -1.0)])
def test_invalid_weights_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"loss.{name}={value} must"):
        LossConfig(kind="coca", **{name: value})
