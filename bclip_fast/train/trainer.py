"""`bclip train`: contrastive pretraining of BiomedCLIP from shards.

Run it in one process, or under a launcher with one process for each device:

    bclip train CONFIG.toml
    torchrun --nproc-per-node 2 -m -- bclip_fast.cli train CONFIG.toml
    deepspeed --no_local_rank --module bclip_fast.cli train CONFIG.toml
    srun bclip train CONFIG.toml        in a Slurm job; configs/slurm.sbatch requeues it

After SIGTERM, SIGUSR1 or the first SIGINT, all ranks write a checkpoint before the next step and exit with status 75.
The same command with --resume continues the run.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bclip_fast import distributed
from bclip_fast.data.loader import Batch
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.distributed import run_on_rank0
from bclip_fast.errors import UserError
from bclip_fast.hardware import device_peak, peak_memory
from bclip_fast.loss import ClipLoss
from bclip_fast.model import flops
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer

from . import backends, inputs, run_folder, validation
from . import checkpoint as checkpoints
from .background_writer import BackgroundWriter
from .bad_samples import BadSamples
from .config import TrainConfig
from .ema import Ema
from .engine import build_engine
from .grad_cache import GradCache
from .init_weights import init_model, new_model
from .loss_spikes import LossSpikes
from .metrics import MetricsLog
from .progress import Progress
from .schedule import learning_rate, patch_dropout, step_seed
from .signals import EXIT_STOPPED, Signals
from .spill import SpillBuffer
from .step_results import PendingStep, StepResults
from .step_timer import StepTimer
from .transfers import AsyncRead

log = logging.getLogger(__name__)

OnStep = Callable[[dict[str, Any]], None]


def train(config: TrainConfig, *, validate: validation.Validate | None = None, on_step: OnStep | None = None) -> Path:
    """Train to the end and return the run folder.

    Args:
        validate: function that returns the validation metrics of a model. Rank 0 calls it when validation is due. By
            default, the function of `validation.build_validation`.
        on_step: function that rank 0 calls with each step's line of metrics.jsonl. metrics.py lists its keys.

    Raises:
        UserError: configuration, dataset or checkpoint do not fit together, or the last checkpoint cannot be written.
            On every rank: too many steps were skipped, too many samples are damaged, or a rank cannot read its shards
            in time. On the other ranks: a rank was lost.
        SystemExit: with EXIT_STOPPED, if a signal stopped the run.
    """
    if config.dry_run:
        raise UserError("dry_run=true: this function trains; call bclip_fast.plan.command.run to plan a run")
    config = config.resolved()
    distributed.init(timeout_seconds=config.timeout_s)
    # DeepSpeed keeps references to the group as long as the process lives, so don't shut down before its end.
    atexit.register(distributed.shutdown)
    run = Path(config.run)
    is_resumed = config.resume and run_folder.has_checkpoints(run)
    config = dataclasses.replace(config, engine=run_folder.resolve_engine(config.engine, run, config.resume))
    dataset = inputs.open_dataset(config.data)
    sampler = inputs.build_sampler(config, dataset)
    if validate is None and (config.validation.every_steps or config.validation.every_epochs):
        validate = validation.build_on_rank0(config)
    run_on_rank0(lambda: run_folder.prepare(run, config, dataset))
    tokenizer = run_folder.read_tokenizer(run, config.model)
    # A launcher that lost a rank sends SIGTERM to the others. They must still report which rank was lost.
    with (
        Signals() as signals,
        distributed.explain_lost_ranks(),
        backends.of_run(run, resumed=is_resumed),
        _Run(config, dataset, sampler, tokenizer, validate, on_step, signals) as state,
    ):
        state.loop()
    if state.stopped:
        if distributed.is_main():
            log.warning("stopped after step %d of %d; --resume continues the run", state.step, state.num_steps)
        raise SystemExit(EXIT_STOPPED)
    return run


class _Run:
    """The state of a run from its first step to its last."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: ShardDataset,
        sampler: ShardSampler,
        tokenizer: Tokenizer,
        validate: validation.Validate | None,
        on_step: OnStep | None,
        signals: Signals,
    ) -> None:
        self.config = config
        self.run = Path(config.run)
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.on_step = on_step
        self.signals = signals
        self.num_steps = config.max_steps or sampler.num_batches_of(config.epochs)
        self.step = 0
        self.preprocess = Preprocess(PreprocessConfig(size=config.model.vision.image_size))
        torch.manual_seed(config.seed)
        self.model = model = new_model(config)
        self.spikes = LossSpikes(config.spikes)
        self.best = validation.BestMetric(config.checkpoint.best)
        saved = run_folder.load(self.run, config.model, sampler) if config.resume else None
        if saved is not None:
            model.load_state_dict(saved.model)
            self.step = saved.step
            if "spikes" in saved.rest:
                self.spikes.load_state_dict(saved.rest["spikes"])
            self.best.state = saved.rest.get("best", {})
            log.info("resuming after step %d", self.step)
        else:
            # Rank 0 goes first: only one rank downloads from the hub, and its error stops every rank.
            run_on_rank0(lambda: init_model(model, config.init))
            if not distributed.is_main():
                init_model(model, config.init)
        self.engine = build_engine(model.train(), config.engine, config.optim, config.first_batch_size)
        if saved is not None:
            self.engine.load_optimizer_state(saved.optimizer)
        self.ema = Ema(self.engine, config.ema_decay, saved.ema if saved else {}) if config.ema_decay else None
        self.loss_fn = ClipLoss(rank=distributed.rank(), world_size=distributed.world_size())
        device = self.engine.device
        self.loader = inputs.build_loader(config.data, dataset, sampler, tokenizer, self.preprocess, device)
        self.spill = SpillBuffer(config.data.spool_above_mib << 20, config.data.spool_dir)
        self.bad = BadSamples(self.run, self.step, config.data.max_bad_samples)
        self.metrics: MetricsLog | None = None
        run_on_rank0(self._open_log)
        samples = (sampler.samples_before(step) for step in (self.step, self.num_steps))
        self.progress = Progress(self.num_steps, *samples) if distributed.is_main() else None
        self.schedule = validation.ValidationSchedule(config.validation, self.run, self.num_steps)
        self.validator = validation.Validator(config.model, validate, self.preprocess, tokenizer, self.best)
        self.timer = StepTimer(device)
        self.results = StepResults(config, self.engine, model, self.spikes, self.ema)
        self.results.outputs = self.metrics, self.progress, on_step
        self.peak_flops = device_peak(device, config.engine.precision)
        is_written = run_on_rank0(lambda: saved is not None and run_folder.has_model(self.run, saved))
        self.saved_step = self.step if is_written else -1
        self.position = self.loader.state_dict()
        self.writer = BackgroundWriter(config.checkpoint.background) if distributed.is_main() else None
        self.stopped = False

    def _open_log(self) -> None:
        run_folder.write_config(self.run, self.config)
        self.metrics = MetricsLog(self.run, self.step, self.config.log, run_folder.as_json(self.config))
        self.metrics.event(self.step, "resume" if self.step else "start", ranks=distributed.world_size())

    def loop(self) -> None:
        """Train to the last step, or until a signal stops the run."""
        config, engine = self.config, self.config.engine
        log.info(
            "training on %d samples, %d steps of %d pairs, %d rank(s), %s, %s",
            self.sampler.num_samples,
            self.num_steps,
            config.first_batch_size,
            distributed.world_size(),
            engine.precision,
            f"{engine.name} ZeRO {engine.zero_stage}" if engine.name == "deepspeed" else engine.name,
        )
        while self.step < self.num_steps:
            self._train_step()
            if self.stopped:
                self.results.finish()
                if self.metrics is not None:
                    self.metrics.event(self.step, "stop")
                break
            epoch, epoch_before = self.sampler.locate(self.step)[0], self.sampler.locate(self.step - 1)[0]
            every = config.checkpoint.every_steps
            is_due = every > 0 and self.step % every == 0
            if self.schedule.is_due(self.step, epoch, epoch_before):
                self.results.finish()
                is_due |= self.validator.run(self.step, self.engine, self.ema, self.metrics)
                self.schedule.last_step = self.step
            if is_due:
                self._save()
        self.results.finish()
        if self.step and self.saved_step != self.step:
            self._save()
        run_on_rank0(lambda: self.writer.finish() if self.writer else None)

    def _train_step(self) -> None:
        """Train one step, or set `stopped` if a signal stops the run before the step.

        On a GPU, the host queues the whole step without a wait. Only then does it read the results of the step before,
        which set the limits of this update (loss_spikes.py). The device compares this step's loss and norm with them.
        """
        start = time.perf_counter()
        config, step, timer = self.config, self.step, self.timer
        data_wait, lengths = 0.0, []
        epoch, _ = self.sampler.locate(step)
        rates = config.model.vision.patch_dropout, config.patch_dropout_until
        self.model.visual.patch_dropout = patch_dropout(*self._progress(), *rates)
        num_parts = self.sampler.num_micro_batches(step)
        cache = GradCache(self.engine, self.loss_fn, num_parts, self.spill)
        timer.start()
        for part in range(num_parts):
            wait_start = time.perf_counter()
            batch = self._next_batch()
            if batch is None:
                self.stopped = True
                return
            data_wait += time.perf_counter() - wait_start
            timer.skip()
            # The seed depends on (seed, step, micro-batch) and not on the rank. So a resumed run draws the same random
            # numbers, and so do two ranks with half as many micro-batches each.
            cache.add(batch, step_seed(config.seed, step, distributed.rank() * num_parts + part))
            lengths += batch.lengths
            timer.lap("forward")
        loss = cache.loss()
        timer.lap("loss")
        cache.backward()
        timer.lap("backward")
        self.results.finish()
        batch_size = self.sampler.batch_size_of(epoch)
        lr = learning_rate(*self._progress(), config.optim, batch_size / config.first_batch_size)
        largest_loss, largest_norm = self.spikes.limits(batch_size)
        timer.skip()
        outcome = self.engine.start_step(lr, largest_norm, loss.isfinite() & (loss.double() <= largest_loss))
        timer.lap("optimizer")
        self.step += 1
        self.position = self.loader.state_dict()
        self.results.add(
            PendingStep(
                step=self.step,
                epoch=epoch,
                samples=self.sampler.num_consumed,
                batch_size=batch_size,
                num_tokens=sum(lengths) * distributed.world_size(),
                lr=lr,
                start=start,
                data_wait=data_wait,
                parts=timer.finish(),
                communication=self.engine.communication(),
                peak_memory=peak_memory(self.engine.device),
                num_bad=self.bad.num_bad,
                least_seconds=self._least_seconds(lengths),
                tensors=AsyncRead([loss, cache.logit_scale, *outcome.scalars]),
            ),
            cache,
        )

    def _least_seconds(self, lengths: list[int]) -> float | None:
        """How long this rank's device takes for the step at its peak rate. None if the rate is unknown."""
        if self.peak_flops is None:
            return None
        locked = self.model.visual.num_locked, self.model.text.num_locked
        return flops.step_flops(self.config.model, lengths, self.model.visual.patch_dropout, locked) / self.peak_flops

    def _progress(self) -> tuple[float, float]:
        """Steps so far and in total, in units of the first batch size: a step of a larger batch counts more."""
        first = self.config.first_batch_size
        return self.sampler.samples_before(self.step) / first, self.sampler.samples_before(self.num_steps) / first

    def _next_batch(self) -> Batch | None:
        """The next micro-batch. None if a signal asked any rank to stop.

        A rank without a batch reports its problem to the others, which would otherwise wait for it in a collective.
        """
        batch, problem = None, None
        try:
            batch = next(self.loader)
        except UserError as error:
            problem = str(error)
        stop = self.bad.agree(self.step + 1, batch.bad if batch else [], problem, bool(self.signals.received))
        return None if stop else batch

    def _save(self) -> None:
        """Start to write a checkpoint. Rank 0 copies the state after the previous checkpoint is written."""
        self.results.finish()
        if self.writer is not None:
            self.writer.wait()
        state, optimizer = self.engine.model_state(), self.engine.optimizer_state()
        ema = self.ema.state() if self.ema is not None else {}
        self.saved_step = self.step
        if self.writer is not None:
            rest = {"spikes": self.spikes.state_dict(), "best": self.best.state}
            model_config = run_folder.as_json(self.config.model)
            saved = checkpoints.Checkpoint(self.step, state, optimizer, self.position, model_config, rest, ema)
            # Build the model outside the thread, because the random state belongs to the whole process.
            with torch.device("meta"):
                model = BiomedClip(self.config.model)
            self.writer.submit(lambda: self._write(saved, model))

    def _write(self, saved: checkpoints.Checkpoint, model: BiomedClip) -> None:
        path = run_folder.save(self.run, self.config.checkpoint, saved, model, self.preprocess, self.tokenizer)
        log.info("saved %s", path)
        if self.metrics is not None:
            self.metrics.event(saved.step, "checkpoint")

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self.writer is not None and kind is not KeyboardInterrupt:
            self.writer.wait()
        self.loader.close()
        self.bad.close()
        if self.metrics is not None and self.progress is not None:
            if error is not None:
                self.results.finish_after_error()
                self.metrics.event(self.step, "error", reason=f"{type(error).__name__}: {error}")
            self.metrics.close()
            self.progress.close()
        self.engine.close()
