"""Ten steps of open_clip's own training code, with its losses or ours: `python open_clip_steps.py` in a child process.

PYTHONPATH decides about the version of open_clip: the installed package (3.3.0, `train_one_epoch` of its trainer), or a
clone of its main branch (4.x, whose tasks own model and loss). The output is a JSON line: the loss of each step by
kind, strategy of compilation and owner of the loss.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import bclip_fast
from bclip_fast.benchmarks import peers
from bclip_fast.integrations import open_clip as into_open_clip

NUM_STEPS, ROWS = 10, 6
KINDS = {"clip": "ClipLoss", "siglip": "SigLipLoss", "distill": "DistillClipLoss"}
STRATEGIES = ("eager", "model", "task", "step")


def tiny_model(open_clip: Any, kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    logits = {"init_logit_scale": 2.3, "init_logit_bias": -5.0} if kind == "siglip" else {}
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    text = {"layers": 1, "width": 32, "heads": 2, "context_length": 8, "vocab_size": 50}
    model: nn.Module = open_clip.CLIP(16, vision, text, output_dict=True, **logits)
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(ROWS, 3, 32, 32, generator=generator),
            torch.randint(1, 50, (ROWS, 8), generator=generator),
        )
        for _ in range(NUM_STEPS)
    ]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)


def steps_of_tasks(open_clip: Any, kind: str, strategy: str, loss: nn.Module | None) -> list[float]:
    """The losses of open_clip 4's training step. A graph break within the compiled part is an error."""
    # Each optimizer is a new guard of the compiled step, and beyond eight torch would run it without compilation.
    torch.compiler.reset()
    tasks, train = importlib.import_module("open_clip.task"), importlib.import_module("open_clip_train.train")
    model = tiny_model(open_clip, kind, 1)
    if kind == "distill":
        task = tasks.DistillCLIPTask(model, tiny_model(open_clip, kind, 2), loss=loss)
    else:
        task = {"clip": tasks.CLIPTask, "siglip": tasks.SigLIPTask}[kind](model, loss=loss)
    optimizer, args = optimizer_of(model), argparse.Namespace(grad_clip_norm=None, accum_freq=1)
    args.torchcompile_backend, args.torchcompile_mode = "aot_eager", None
    if strategy in ("model", "task"):
        task.compile(target=strategy, backend="aot_eager", fullgraph=strategy == "task")
    task.train()
    losses = []
    state = train.TrainState(task=task, optimizer=optimizer)
    for image, text in batches():
        batch = {"image": image, "text": text}
        if strategy == "step":
            optimizer.zero_grad()
            result, _ = train._get_compiled_train_step(state, contextlib.nullcontext, args)(batch)
            task.clamp_logit_scale()
        else:
            result, *_ = train._train_step_eager(task, batch, None, optimizer, None, contextlib.nullcontext, args)
        losses.append(float(result["loss"].detach()))
    return losses


def steps_of_trainer(open_clip: Any, kind: str) -> list[float]:
    """The losses of open_clip 3's `train_one_epoch`, with the class that its factory makes."""
    train = importlib.import_module("open_clip_train.train")
    args = argparse.Namespace(
        model="tiny", distill=kind == "distill", siglip=kind == "siglip", local_loss=False, gather_with_grad=False,
        rank=0, world_size=1, horovod=False, loss_dist_impl=None, device="cpu", precision="fp32", accum_freq=1,
        skip_scheduler=True, grad_clip_norm=None, log_every_n_steps=1, batch_size=ROWS, wandb=False, distributed=False,
        local_rank=0, coca_caption_loss_weight=2.0, coca_contrastive_loss_weight=1.0,
    )  # fmt: skip
    loss = open_clip.create_loss(args)
    losses: list[float] = []
    # The trainer logs only averages of its losses, so read them where it gets them.
    loss.register_forward_hook(lambda _, __, result: losses.append(float(sum(result.values()).detach())))
    loader = type("Loader", (list,), {"num_batches": NUM_STEPS, "num_samples": ROWS * NUM_STEPS})(batches())
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    model, teacher = tiny_model(open_clip, kind, 1), tiny_model(open_clip, kind, 2)
    train.train_one_epoch(model, data, loss, 0, optimizer_of(model), None, None, teacher, args)
    return losses


def main() -> int:
    open_clip = peers.import_open_clip()
    results: dict[str, dict[str, list[float]]] = {}
    has_tasks = (importlib.util.find_spec("open_clip.task")) is not None
    for kind, name in KINDS.items():
        for strategy in STRATEGIES if has_tasks else ("trainer",):
            losses = results[f"{kind} {strategy}"] = {}
            if has_tasks:
                losses["theirs"] = steps_of_tasks(open_clip, kind, strategy, None)
                losses["ours"] = steps_of_tasks(open_clip, kind, strategy, getattr(bclip_fast, name)())
                into_open_clip.install()
                losses["installed"] = steps_of_tasks(open_clip, kind, strategy, None)
            else:
                losses["theirs"] = steps_of_trainer(open_clip, kind)
                into_open_clip.install()
                losses["installed"] = steps_of_trainer(open_clip, kind)
            into_open_clip.uninstall()
    json.dump({"version": open_clip.__version__, "losses": results}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
