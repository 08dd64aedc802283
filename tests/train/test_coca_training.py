"""Training of a CoCa: the step over micro-batches and ranks, metrics, resume, replay and evaluation."""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coca_models import COCA, open_clip_coca
from grad_cache_steps import ENGINES, NUM_PAIRS, NUM_PARTS, OPTIM, SIZES, micro_batches, spill_buffer
from peers import import_open_clip
from ranks import on_ranks
from towers import GPT

from bclip_fast.data.transform import normalize
from bclip_fast.model import weights
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.ops.image import CLIP_MEAN, CLIP_STD
from bclip_fast.train.engine import Engine, build_engine
from bclip_fast.train.grad_cache import GradCache, embed_with_captions
from bclip_fast.train.losses import LossConfig, build_loss

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
