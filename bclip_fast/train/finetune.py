"""`bclip finetune MODEL --data DATA`: train on image-text pairs, METER's head on questions, or a classifier of images.

    bclip finetune hf-hub:ORG/NAME --data pairs.csv --lora_rank 8            # a CSV, shards or a folder with captions
    bclip finetune RUN --data vqa_rad/ --task vqa_rad --epochs 20
    bclip finetune hf-hub:ORG/NAME --data labels.csv --task classification --group patient_id

It reads data as `bclip eval` does. The run folder holds config.toml, metrics.jsonl, checkpoints/, and model/ in
open_clip's layout with LoRA merged in. A run on questions also writes vqa/, and one on classes classifier/, splits.csv
and report.html. `bclip eval RUN` accepts all of them.

Order, crops and dropout depend only on (seed, epoch, sample) and (seed, step, rank). So a resumed run equals an
uninterrupted one.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bclip_fast import distributed, pretrained
from bclip_fast.data.sources import shown
from bclip_fast.data.transform import Preprocess
from bclip_fast.distributed import run_on_rank0
from bclip_fast.errors import UserError
from bclip_fast.hardware import peak_memory
from bclip_fast.io.hashing import sha256
from bclip_fast.io.runs import VALIDATION
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer

from . import backends, base_model, class_report
from . import checkpoint as checkpoints
from .bad_samples import BadSamples
from .config import CheckpointConfig
from .engine import StepResult, build_engine
from .finetune_classes import Classes
from .finetune_config import FinetuneConfig
from .finetune_data import BatchReader, Samples
from .finetune_objectives import Pairs, Questions
from .lora import add_lora
from .loss_spikes import SpikeConfig
from .metrics import MetricsLog
from .precision import resolve_precision
from .run_folder import RunFolder
from .run_loop import RunLoop
from .schedule import learning_rate
from .signals import Signals
from .step_results import PendingStep
from .step_timer import StepTimer
from .transfers import AsyncRead, packed_to_device, to_device

log = logging.getLogger(__name__)

# Number of texts whose tokens tell whether a resumed run has the same tokenizer.
_NUM_TEXTS = 64
_CHECKPOINTS = CheckpointConfig(keep=2)
Objective = Pairs | Questions | Classes


def finetune(config: FinetuneConfig) -> Path:
    """Train to the end and return the run folder.

    Raises:
        UserError: the data have no captions or answers, or too few samples. Or the ranks cannot share a batch, the
            checkpoint belongs to another run, or an image cannot be read or replaced. Too many steps were skipped.
        SystemExit: with EXIT_STOPPED, if a signal stopped the run.
    """
    distributed.init()
    atexit.register(distributed.shutdown)
    if config.batch_size % distributed.world_size():
        raise UserError(f"batch_size={config.batch_size} is not a multiple of {distributed.world_size()} ranks")
    if Path(config.run).resolve() == Path(config.model).resolve():
        raise UserError(f"run={config.run} is the folder of the model; choose another run folder")
    with distributed.explain_lost_ranks():
        folder = RunFolder(Path(config.run), "finetune", config.resume)
        precision = resolve_precision(config.engine.precision, folder.recorded_precision)
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))
        folder.compare(config)
        objective = _objective(config)
        num_samples = len(objective.texts)
        if num_samples < config.batch_size:
            raise UserError(
                f"data={shown(config.data)} has {num_samples} samples, fewer than batch_size={config.batch_size}; "
                "lower it"
            )
        clip, preprocess, tokenizer = pretrained.load(config.model)
        choice = backends.of_run(folder.path, resumed=folder.records is not None)
    with (
        Signals() as signals,
        distributed.explain_lost_ranks(),
        choice.in_force(),
        _Loop(config, folder, choice, objective, clip, preprocess, tokenizer, signals) as state,
    ):
        state.loop()
    if isinstance(objective, Classes):
        run_on_rank0(lambda: class_report.write(folder.path, config, objective.content))
    return folder.path


def _objective(config: FinetuneConfig) -> Objective:
    if config.task == "classification":
        return Classes(config)
    return Questions(config) if config.task else Pairs(config)


def run(config: FinetuneConfig) -> None:
    """Run `bclip finetune`."""
    finetune(config)


def _spikes(config: FinetuneConfig) -> SpikeConfig:
    """The limits of updates. A classifier has none: rare hard images have high losses, and it must learn them."""
    return dataclasses.replace(config.spikes, loss=0, grad_norm=0) if config.task == "classification" else config.spikes


class _Loop(RunLoop):
    """A run of fine-tuning."""

    def __init__(
        self,
        config: FinetuneConfig,
        folder: RunFolder,
        choice: backends.Choice,
        objective: Objective,
        clip: BiomedClip,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        signals: Signals,
    ) -> None:
        super().__init__(folder, _spikes(config), signals, background=True)
        self.config, self.choice, self.objective = config, choice, objective
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.steps_per_epoch = len(objective.texts) // config.batch_size
        self.num_steps = config.epochs * self.steps_per_epoch
        saved = folder.read_checkpoint()
        self.identity = run_on_rank0(lambda: self._identity(clip, saved))
        torch.manual_seed(config.seed)
        clip.requires_grad_(True)
        if clip.decoder is not None:
            # Neither objective predicts captions.
            clip.decoder.requires_grad_(False)
        self.adapter = add_lora(clip, config.lora_rank, config.lora_alpha) if config.lora_rank else None
        self.clip = clip
        self.model: nn.Module = objective.model(clip, preprocess, tokenizer)
        if saved is not None:
            self.load_weights(self.model, saved)
        self.engine = build_engine(self.model.train(), config.engine, config.optim, config.batch_size)
        if saved is not None:
            self.engine.load_optimizer_state(saved.optimizer)
        recorded = saved.rest if saved else None
        objective.build_loss(self.engine.device, preprocess.config, recorded, folder.path)
        if isinstance(objective, Classes) and objective.is_finished:
            self.num_steps = self.step
        self.timer = StepTimer(self.engine.device)
        self._observe_with(False, self._give_up)
        self.reader = BatchReader(
            objective.data,
            shown(config.data),
            preprocess,
            num_steps=self.num_steps,
            first_step=self.step,
            batch_size=config.batch_size,
            seed=config.seed,
            crop_scale=config.crop_scale,
            num_workers=config.num_workers,
            stop_at_damage=config.on_bad_image == "stop",
        )

    def _identity(self, clip: BiomedClip, saved: checkpoints.Checkpoint | None) -> dict[str, Any]:
        """Everything that a checkpoint presumes: the content of the data and of the base model. Only on rank 0.

        Raises:
            UserError: those of the checkpoint differ.
        """
        texts = self.objective.texts
        identity = {
            "data": self.objective.data.fingerprint,
            "texts": sha256("\0".join(texts)),
            "base model": base_model.describe(clip, self.preprocess, self.tokenizer, texts[:_NUM_TEXTS]),
            **(self.objective.facts if isinstance(self.objective, Classes) else {}),
        }
        recorded = identity if saved is None else saved.data
        for name, value in identity.items():
            # Earlier versions recorded no base model.
            before = {name: recorded.get(name, value)}
            if difference := checkpoints.first_difference(before, {name: value}, ""):
                raise UserError(f"cannot resume from {self.folder.path / 'checkpoints'}: its {difference.lstrip('.')}")
        return identity

    def _begin(self) -> tuple[MetricsLog | None, BadSamples]:
        logs = self.folder.begin(self.config, self.choice.content, max_bad_samples=sys.maxsize)
        num_weights = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        log.info("%d samples, %d steps, %d weights to train", len(self.objective.texts), self.num_steps, num_weights)
        return logs

    def _prepare(self) -> bool:
        is_ready = self.objective.prepare(lambda: bool(self.signals.received))
        if isinstance(self.objective, Classes):
            self.reader.features = self.objective.features
        return is_ready

    def _samples_before(self, step: int) -> int:
        return step * self.config.batch_size

    def _is_checkpoint_due(self) -> bool:
        every = self.config.checkpoint_every
        is_best = self._validate() if self.step % self.steps_per_epoch == 0 else False
        return is_best or (every > 0 and self.step % every == 0 and self.step < self.num_steps)

    def _validate(self) -> bool:
        """Validate a classifier after an epoch. Return whether it is the best so far. End the run if it is time."""
        if not isinstance(self.objective, Classes):
            return False
        self.results.finish()
        start = time.perf_counter()
        is_best, values = self.objective.validate(self.step, self.model)
        if self.metrics is not None:
            record = {"step": self.step, "validation_seconds": time.perf_counter() - start}
            self.metrics.write(record | {f"{VALIDATION}{name}": value for name, value in values.items()})
        epoch, shown = (
            self.step // self.steps_per_epoch,
            "  ".join(f"{name} {value:.4g}" for name, value in values.items()),
        )
        log.info("epoch %d  %s%s", epoch, shown, "  (best)" if is_best else "")
        if self.objective.is_finished and self.step < self.num_steps:
            log.info("stopping early: no better %s for %d epochs", self.config.metric, self.config.patience)
            self.num_steps = self.step
        return is_best

    def _next_batch(self) -> Samples | None:
        """The next batch. None if a signal or the data of any rank stop the run."""
        batch, problem = None, None
        try:
            batch = next(self.reader)
        except UserError as error:
            problem = str(error)
        return batch if self._agree(batch.bad if batch else [], problem) else None

    def _train_step(self) -> None:
        start = time.perf_counter()
        config, device, timer = self.config, self.engine.device, self.timer
        batch = self._next_batch()
        if batch is None:
            return
        data_wait = time.perf_counter() - start
        timer.start()
        torch.manual_seed(config.seed * 1_000_003 + 8191 * self.step + distributed.rank())
        text: Any = None
        if self.objective.has_text:
            text = self.tokenizer.packed([self.objective.texts[row] for row in batch.rows])
        output = self.engine(to_device(batch.images, device), packed_to_device(text, device) if text else text)
        timer.lap("forward")
        loss, scalars = self.objective.loss(output, batch.rows, batch.images)
        timer.lap("loss")
        self.engine.backward(loss)
        timer.lap("backward")
        lr = learning_rate(self.step, self.num_steps, config.optim)
        value = self.objective.global_value(loss)
        largest_loss, largest_norm = self.spikes.limits(config.batch_size)
        # The device decides about the update, so the host reads everything once, after the step.
        outcome = self.engine.start_step(lr, largest_norm, value.isfinite() & (value.double() <= largest_loss))
        timer.lap("optimizer")
        self.step += 1
        self.results.add(
            PendingStep(
                step=self.step,
                epoch=(self.step - 1) // self.steps_per_epoch,
                samples=self._samples_before(self.step),
                batch_size=config.batch_size,
                num_tokens=len(text.ids) * distributed.world_size() if text else 0,
                lr=lr,
                start=start,
                data_wait=data_wait,
                parts=timer.finish(),
                communication=self.engine.communication(),
                peak_memory=peak_memory(device),
                num_bad=self.bad.num_bad,
                least_seconds=None,
                tensors=AsyncRead([value, *outcome.scalars, *scalars.values()]),
                names=tuple(scalars),
            )
        )

    def _give_up(self, step: int, loss: float, result: StepResult, reason: str, inputs: None) -> str:
        return (
            f"{reason}; lower optim.lr, set optim.grad_clip_norm, set engine.precision=fp32 or raise the limits of the "
            "section spikes. Then start again, or resume a checkpoint with --allow_changes"
        )

    def _checkpoint(self) -> Callable[[], None]:
        state, optimizer = self.engine.model_state(), self.engine.optimizer_state()
        rest = {"spikes": self.spikes.state_dict(), **self.objective.state}
        saved = checkpoints.Checkpoint(self.step, state, optimizer, self.identity, {}, rest)
        return partial(self._write, saved)

    def _write(self, saved: checkpoints.Checkpoint) -> None:
        log.info("saved %s", self.folder.save_checkpoint(saved, _CHECKPOINTS))

    def _end(self) -> None:
        if self.bad.num_bad:
            log.warning(
                "%d of %d images cannot be decoded; other samples took their place",
                self.bad.num_bad,
                len(self.objective.texts),
            )
        state = self.engine.model_state()
        run_on_rank0(lambda: self._export(self._best(state)))

    def _best(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a classifier's best epoch, and the last ones of other models."""
        best = self.objective.best.state.get("step") if isinstance(self.objective, Classes) else None
        if best in (None, self.step):
            return state
        path = self.folder.path / "checkpoints" / f"step-{best:08d}"
        if problem := checkpoints.verify(path):
            raise UserError(f"the checkpoint of the best epoch is damaged: {path}: {problem}")
        return checkpoints.read(path).model

    def _export(self, state: dict[str, Tensor]) -> None:
        """Write model/ with LoRA merged in, and the files of the objective."""
        self.model.load_state_dict(state)
        clip: Any = self.clip if self.adapter is None else self.adapter.merge_and_unload()
        with self.folder.writing() as run:
            pretrained.save(run / "model", clip.float().cpu(), self.preprocess, self.tokenizer)
            self.objective.save(run, self.model, state)
        log.info("wrote %s", self.folder.path / "model")

    def _close(self) -> None:
        self.reader.close()
