"""`bclip finetune MODEL --data DATA`: train the towers on image-text pairs, or METER's head on questions.

    bclip finetune hf-hub:ORG/NAME --data pairs.csv --lora_rank 8            # a CSV, shards or a folder with captions
    bclip finetune RUN --data vqa_rad/ --task vqa_rad --epochs 20

It reads data as `bclip eval` does. The run folder holds config.toml, metrics.jsonl, checkpoints/, and model/ in
open_clip's layout with LoRA merged in. A run on questions also writes vqa/. `bclip eval RUN` accepts both.

Order, crops and dropout depend only on (seed, epoch, sample) and (seed, step, rank). So a resumed run equals an
uninterrupted one.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from bclip_fast import distributed, pretrained
from bclip_fast.data.image_files import read_rgb
from bclip_fast.data.transform import Preprocess, random_resized_crop_box
from bclip_fast.errors import UserError
from bclip_fast.eval.datasets import image_name
from bclip_fast.io.hashing import sha256
from bclip_fast.model.meter import VqaModel
from bclip_fast.model.tokenizer import Tokenizer

from . import backends, run_folder
from . import checkpoint as checkpoints
from .engine import EngineConfig, StepResult, build_engine
from .finetune_objectives import Pairs, Questions
from .lora import add_lora
from .metrics import MetricsLog
from .schedule import OptimConfig, learning_rate
from .transfers import AsyncRead, packed_to_device, to_device

log = logging.getLogger(__name__)

_TRIES = 32  # replacements of a damaged image


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning of a trained model."""

    model: tyro.conf.Positional[str]
    """Model to start from: a run folder, a folder in open_clip's layout, or hf-hub:ID."""
    data: str
    """For pairs: shards, a .csv with columns path,caption, or a folder of images with .txt files beside them. For
    questions: the data of --task."""
    split: str = "train"
    task: str = ""
    """Task of the protocol vqa: vqa_rad, slake, a TOML file, or `vqa` for a CSV. If empty, train on pairs with the
    contrastive loss."""
    run: str = "runs/finetune"
    """Run folder."""
    resume: bool = False
    """Continue from the newest intact checkpoint in the run folder. Without any checkpoint, start the run."""
    epochs: int = 10
    batch_size: int = 32
    seed: int = 0
    lora_rank: int = 0
    """Rank of LoRA (arXiv 2106.09685) in the linear layers of the towers, through peft. 0 trains every weight."""
    lora_alpha: int = 16
    freeze_towers: bool = False
    """For questions: train only the head."""
    head_layers: int = 6
    """Number of co-attention layers per stream in METER's head."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of an image's area in a training crop. 1 1 takes the centre crop."""
    num_workers: int = 2
    on_bad_image: Literal["skip", "stop"] = "skip"
    """Damaged images. skip: a sample drawn by the seed takes their place, and the log names them. stop: an error."""
    checkpoint_every: int = 0
    """Interval of checkpoints in steps. The last step always has a checkpoint. 0 writes only that one."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-5, warmup_steps=100, weight_decay=0.01, eps=1e-8, decay="linear")
    )
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(name="ddp"))

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.lora_rank < 0 or self.num_workers < 1:
            raise UserError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, lora_rank={self.lora_rank} and "
                f"num_workers={self.num_workers} must be at least 1, 2, 0 and 1"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"crop_scale={self.crop_scale} must satisfy 0 < smallest <= largest <= 1")


def finetune(config: FinetuneConfig) -> Path:
    """Train to the end and return the run folder.

    Raises:
        UserError: the data have no captions or answers, or too few samples. Or the ranks cannot share a batch, the
            checkpoint belongs to another run, or the loss is not finite.
    """
    distributed.init()
    atexit.register(distributed.shutdown)
    if config.batch_size % distributed.world_size():
        raise UserError(f"batch_size={config.batch_size} is not a multiple of {distributed.world_size()} ranks")
    run = Path(config.run)
    config = dataclasses.replace(config, engine=run_folder.resolve_engine(config.engine, run, config.resume))
    objective: Pairs | Questions = Questions(config) if config.task else Pairs(config)
    clip, preprocess, tokenizer = pretrained.load(config.model)
    if run.resolve() == Path(config.model).resolve():
        raise UserError(f"run={run} is the folder of the model; choose another run folder")
    is_resumed = run_folder.check_unused(run, config.resume)
    torch.manual_seed(config.seed)
    clip.requires_grad_(True)
    adapter = add_lora(clip, config.lora_rank, config.lora_alpha) if config.lora_rank else None
    model = objective.model(clip)
    if distributed.is_main():
        run.mkdir(parents=True, exist_ok=True)
        run_folder.write_config(run, config)
    with backends.of_run(run, resumed=is_resumed):
        _Loop(config, objective, model, preprocess, tokenizer, adapter).train()
    return run


def run(config: FinetuneConfig) -> None:
    """Run `bclip finetune`."""
    finetune(config)


class _Loop:
    """The training loop."""

    def __init__(
        self,
        config: FinetuneConfig,
        objective: Pairs | Questions,
        model: nn.Module,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        adapter: Any,
    ) -> None:
        self.config, self.run, self.objective, self.model = config, Path(config.run), objective, model
        self.preprocess, self.tokenizer, self.adapter = preprocess, tokenizer, adapter
        num_samples = len(objective.texts)
        if num_samples < config.batch_size:
            raise UserError(
                f"data={config.data} has {num_samples} samples, fewer than batch_size={config.batch_size}; lower it"
            )
        self._bad: set[int] = set()
        self.steps_per_epoch = num_samples // config.batch_size
        self.num_steps = config.epochs * self.steps_per_epoch
        self.step = 0
        # Everything that determines the result. A checkpoint with another identity belongs to another run.
        data = {"data": objective.data.fingerprint, "texts": sha256("\0".join(objective.texts))}
        machine = ("run", "resume", "model", "data", "engine", "num_workers", "checkpoint_every", "on_bad_image")
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in (*machine, "epochs")}
        self.identity = json.loads(json.dumps(data | settings, default=list))
        saved = None
        if config.resume and run_folder.has_checkpoints(self.run):
            saved = checkpoints.load_latest(self.run / "checkpoints")
            if difference := checkpoints.first_difference(saved.data, self.identity, "run"):
                raise UserError(f"cannot resume from {self.run / 'checkpoints'}: its {difference}")
            model.load_state_dict(saved.model)
            self.step = saved.step
        self.engine = build_engine(model.train(), config.engine, config.optim, config.batch_size)
        if saved is not None:
            self.engine.load_optimizer_state(saved.optimizer)

    def train(self) -> None:
        """Train to the last step, and write the model."""
        config = self.config
        num_weights = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        num_samples = len(self.objective.texts)
        log.info("%d samples, %d steps, %d weights to train", num_samples, self.num_steps, num_weights)
        metrics = MetricsLog(self.run, self.step) if distributed.is_main() else None
        with ThreadPoolExecutor(config.num_workers) as pool:
            next_batch = self._load_batch(pool, self.step)
            while self.step < self.num_steps:
                start = time.perf_counter()
                rows, images = zip(*(future.result() for future in next_batch), strict=True)
                if self.step + 1 < self.num_steps:
                    next_batch = self._load_batch(pool, self.step + 1)
                record = self._train_step(rows, torch.stack(images))
                record["samples_per_second"] = config.batch_size / (time.perf_counter() - start)
                if metrics is not None:
                    metrics.write(record)
                    if self.step % max(1, self.num_steps // 20) == 0:
                        log.info("step %d of %d  loss %.4f", self.step, self.num_steps, record["loss"])
                if config.checkpoint_every and self.step % config.checkpoint_every == 0 and self.step < self.num_steps:
                    self._save(is_last=False)
        if self._bad:
            log.warning(
                "%d of %d images cannot be decoded; other samples took their place", len(self._bad), num_samples
            )
        self._save(is_last=True)
        if metrics is not None:
            metrics.close()
        self.engine.close()

    def _rows(self, step: int) -> list[int]:
        """This rank's samples of a step. An epoch is a permutation of all samples, without an incomplete last batch."""
        epoch, number = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.objective.texts), generator=generator)
        batch = order[number * self.config.batch_size :][: self.config.batch_size].tolist()
        return batch[distributed.rank() :: distributed.world_size()]

    def _load_batch(self, pool: ThreadPoolExecutor, step: int) -> list[Future[tuple[int, Tensor]]]:
        """The futures of this rank's samples of a step."""
        epoch = step // self.steps_per_epoch
        return [pool.submit(self._load_sample, row, epoch) for row in self._rows(step) if step < self.num_steps]

    def _load_sample(self, row: int, epoch: int) -> tuple[int, Tensor]:
        """A row and its image. If that cannot be decoded, those of a row drawn by (seed, epoch, row)."""
        generator = np.random.default_rng((abs(self.config.seed), epoch, row))
        others = generator.integers(len(self.objective.texts), size=_TRIES)
        for candidate in (row, *others.tolist()):
            try:
                return candidate, self._load_image(candidate, epoch)
            except UserError as error:
                if self.config.on_bad_image == "stop":
                    raise
                if candidate not in self._bad:
                    log.warning("replaced a sample: %s", error)
                self._bad.add(candidate)
                problem = error
        raise UserError(f"{_TRIES + 1} images in a row cannot be decoded, so the data are at fault: {problem}")

    def _load_image(self, row: int, epoch: int) -> Tensor:
        """(3, S, S) float32: a random crop as in pretraining, then the preprocessing of the model."""
        image = read_rgb(self.objective.data.image(row), lambda: image_name(self.objective.data, row))
        if self.config.crop_scale != (1, 1):
            place = self.config.seed, epoch, row, self.config.crop_scale
            top, left, height, width = random_resized_crop_box(image.height, image.width, *place)
            size = self.preprocess.config.size
            image = image.resize((size, size), 3, (left, top, left + width, top + height))
        return self.preprocess(image)

    def _train_step(self, rows: Sequence[int], images: Tensor) -> dict[str, Any]:
        config, device = self.config, self.engine.device
        torch.manual_seed(config.seed * 1_000_003 + 8191 * self.step + distributed.rank())
        text = packed_to_device(self.tokenizer.packed([self.objective.texts[row] for row in rows]), device)
        output = self.engine(to_device(images, device), text)
        loss = self.objective.loss(output, rows)
        self.engine.backward(loss)
        lr = learning_rate(self.step, self.num_steps, config.optim)
        # The device refuses the update if the loss is not finite, so the host reads everything once, after the step.
        outcome = self.engine.start_step(lr, allowed=loss.detach().isfinite())
        value, *numbers = AsyncRead([loss, *outcome.scalars]).numbers()
        result = StepResult.of(*numbers)
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {self.step + 1}; lower optim.lr, or set engine.precision=fp32"
            )
        if result.skipped:
            log.warning("step %d is skipped: the gradient is not finite", self.step + 1)
        self.step += 1
        return {
            "step": self.step,
            "epoch": (self.step - 1) // self.steps_per_epoch,
            "loss": value,
            "lr": lr,
            "grad_norm": result.grad_norm,
        }

    def _save(self, is_last: bool) -> None:
        state, optimizer = self.engine.model_state(), self.engine.optimizer_state()
        if distributed.is_main():
            saved = checkpoints.Checkpoint(self.step, state, optimizer, self.identity, {})
            checkpoints.save(self.run / "checkpoints", saved, keep=2)
            if is_last:
                self._export(state)
        distributed.barrier()

    def _export(self, state: dict[str, Tensor]) -> None:
        """Write model/ with LoRA merged in, and the files of the objective."""
        self.model.load_state_dict(state)
        clip: Any = self.model.clip if isinstance(self.model, VqaModel) else self.model
        if self.adapter is not None:
            clip = self.adapter.merge_and_unload()
        pretrained.save(self.run / "model", clip.float().cpu(), self.preprocess, self.tokenizer)
        self.objective.save(self.run, self.model, state)
        log.info("wrote %s", self.run / "model")
