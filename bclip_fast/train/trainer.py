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
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bclip_fast import distributed, pretrained
from bclip_fast.data.batch import Batch
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.mixed import Dataset
from bclip_fast.data.transform import Preprocess
from bclip_fast.distributed import run_on_rank0
from bclip_fast.errors import UserError
from bclip_fast.hardware import device_peak, peak_memory
from bclip_fast.model import flops
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer

from . import backends, inputs, run_folder, validation
from . import checkpoint as checkpoints
from .bad_samples import BadSamples
from .config import TrainConfig
from .ema import Ema
from .engine import StepResult, build_engine
from .grad_cache import GradCache
from .init_weights import init_model, new_model, training_pixels
from .losses import build_loss
from .metrics import MetricsLog
from .precision import resolve_precision
from .replay import Dump, write_dump
from .run_folder import RunFolder
from .run_loop import OnStep, RunLoop
from .run_teacher import RunTeacher, shard_samples
from .schedule import learning_rate, patch_dropout, step_seed
from .signals import Signals
from .spill import SpillBuffer
from .step_results import PendingStep
from .step_timer import StepTimer
from .transfers import AsyncRead

log = logging.getLogger(__name__)


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
    with distributed.explain_lost_ranks():
        folder = RunFolder(Path(config.run), "train", config.resume)
        config = config.with_precision(resolve_precision(config.engine.precision, folder.recorded_precision))
        folder.compare(config)
        dataset = inputs.open_dataset(config.data)
        sampler = inputs.build_sampler(config, dataset)
        if validate is None and (config.validation.every_steps or config.validation.every_epochs):
            validate = validation.build_on_rank0(config)
        tokenizer = inputs.tokenizer_of_run(folder, config, dataset)
        inputs.count_tokens(config, dataset, tokenizer, sampler)
        choice = backends.of_run(folder.path, resumed=folder.records is not None)
    # A launcher that lost a rank sends SIGTERM to the others. They must still report which rank was lost.
    with (
        Signals() as signals,
        distributed.explain_lost_ranks(),
        choice.in_force(),
        _Run(config, folder, choice, dataset, sampler, tokenizer, validate, on_step, signals) as state,
    ):
        state.loop()
    return folder.path


class _Run(RunLoop):
    """A run of pretraining."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        choice: backends.Choice,
        dataset: Dataset,
        sampler: ShardSampler,
        tokenizer: Tokenizer,
        validate: validation.Validate | None,
        on_step: OnStep | None,
        signals: Signals,
    ) -> None:
        super().__init__(folder, config.spikes, signals, config.checkpoint.background, on_step)
        self.config, self.choice = config, choice
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.num_steps = config.max_steps or sampler.num_batches_of(config.epochs)
        self.preprocess = Preprocess(training_pixels(config.model))
        torch.manual_seed(config.seed)
        self.model = model = new_model(config)
        self.best = validation.BestMetric(config.checkpoint.best)
        saved = folder.read_checkpoint()
        if saved is not None:
            self._load(saved)
        else:
            # Rank 0 goes first: only one rank downloads from the hub, and its error stops every rank.
            run_on_rank0(lambda: init_model(model, config.init, config.loss))
            if not distributed.is_main():
                init_model(model, config.init, config.loss)
        self.engine = build_engine(model.train(), config.engine, config.optim, config.first_batch_size)
        if saved is not None:
            self.engine.load_optimizer_state(saved.optimizer)
        if config.ema_decay:
            # Unlocked layers have no EMA so far.
            grows = any(change.name.startswith("lock_") for change in folder.new_changes)
            self.ema = Ema(self.engine, config.ema_decay, saved.ema if saved else {}, grows)
        device = self.engine.device
        places = folder.path, dataset.fingerprint, len(dataset)
        read, recorded = shard_samples(dataset, config.data.num_threads), saved.rest if saved else None
        self.teacher = RunTeacher(config.loss, device, config.engine.precision, recorded, *places, read)
        self.loss_fn = build_loss(config.loss, self.teacher.scale, config.model.text.pad_id)
        arguments = dataset, sampler, tokenizer, self.preprocess, device
        self.loader = inputs.build_loader(config.data, *arguments, **self.teacher.loader_options)
        self.spill = SpillBuffer(config.data.spool_above_mib << 20, config.data.spool_dir)
        self.validator = validation.Validator(config.model, validate, self.preprocess, tokenizer, self.best)
        self.timer = StepTimer(device)
        # On a CPU, the device doesn't work while the host reads.
        self._observe_with(device.type != "cpu", self._give_up)
        self.peak_flops = device_peak(device, config.engine.precision)
        if not run_on_rank0(lambda: saved is not None and folder.has_model(saved)):
            self.saved_step = -1
        self.position = self.loader.state_dict()

    def _load(self, saved: checkpoints.Checkpoint) -> None:
        """Load weights and state of a checkpoint, and move the sampler to its position.

        Raises:
            UserError: the checkpoint belongs to another model or to other data, or it lacks its EMA.
        """
        path, records = self.folder.path / "checkpoints", self.folder.records
        if difference := checkpoints.first_difference(saved.model_config, run_folder.as_json(self.config.model)):
            raise UserError(f"cannot resume from {path}: its {difference}")
        try:
            self.sampler.load_state_dict(saved.data)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if self.config.ema_decay and records and records.config.get("ema_decay") and not saved.ema:
            raise UserError(
                f"cannot resume from {path}: step {saved.step} has no ema.safetensors, but the run keeps an EMA; "
                "delete that checkpoint to resume from an earlier one"
            )
        self.load_weights(self.model, saved)
        self.best.load_state(saved.rest.get("best", {}))

    def _begin(self) -> tuple[MetricsLog | None, BadSamples]:
        config, engine = self.config, self.config.engine
        logs = self.folder.begin(
            config,
            self.choice.content,
            tokenizer=self.tokenizer if self.folder.records is None else None,
            log_config=config.log,
            max_bad_samples=config.data.max_bad_samples,
        )
        self.schedule = validation.ValidationSchedule(config.validation, self.folder.path, self.num_steps)
        log.info(
            "training on %d samples, %d steps of %d pairs, %d rank(s), %s, %s",
            self.sampler.num_samples,
            self.num_steps,
            config.first_batch_size,
            distributed.world_size(),
            engine.precision,
            f"{engine.name} ZeRO {engine.zero_stage}" if engine.name == "deepspeed" else engine.name,
        )
        return logs

    def _prepare(self) -> bool:
        return self.teacher.prepare(lambda: bool(self.signals.received))

    def _samples_before(self, step: int) -> int:
        return self.sampler.samples_before(step)

    def _is_checkpoint_due(self) -> bool:
        epoch, epoch_before = self.sampler.locate(self.step)[0], self.sampler.locate(self.step - 1)[0]
        every = self.config.checkpoint.every_steps
        is_due = every > 0 and self.step % every == 0
        if self.schedule.is_due(self.step, epoch, epoch_before):
            self.results.finish()
            is_due |= self.validator.run(self.step, self.engine, self.ema, self.metrics)
            self.schedule.last_step = self.step
        return is_due

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
        sizes = self.sampler.micro_batch_sizes(step)
        num_parts = len(sizes)
        cache = GradCache(self.engine, self.loss_fn, sizes, self.spill)
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
            self.teacher.attach(batch)
            cache.add(batch, step_seed(config.seed, step, distributed.rank() * num_parts + part))
            lengths += batch.lengths
            timer.lap("forward")
        cache.loss()
        timer.lap("loss")
        loss = cache.backward()
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
                tensors=AsyncRead([loss, *outcome.scalars, *cache.scalars.values()]),
                names=tuple(cache.scalars),
                member_samples=self.sampler.member_samples(self.step),
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
        """The next micro-batch. None if a signal or the data of any rank stop the run."""
        batch, problem = None, None
        try:
            batch = next(self.loader)
        except UserError as error:
            problem = str(error)
        return batch if self._agree(batch.bad if batch else [], problem) else None

    def _give_up(self, step: int, loss: float, result: StepResult, reason: str, cache: GradCache) -> str:
        """Write a dump of the step, which made no update. So the weights are those before the step. Collective."""
        dropped, state = self.model.visual.patch_dropout, self.engine.model_state()
        batches = list(cache.micro_batches())
        changes, scale = self.folder.changes, self.teacher.scale
        dump = Dump(self.config, step, loss, result.grad_norm, dropped, batches, state, changes, scale)
        path = write_dump(self.folder.path, dump)
        return (
            f"{reason}; lower optim.lr, set optim.grad_clip_norm, set engine.precision=fp32 or raise the limits of the "
            f"section spikes, then resume from {self.folder.path / 'checkpoints'} with --allow_changes. "
            f"`bclip train replay {path}` computes the step again"
        )

    def _checkpoint(self) -> Callable[[], None]:
        state, optimizer = self.engine.model_state(), self.engine.optimizer_state()
        ema = self.ema.state() if self.ema is not None else {}
        rest = {"spikes": self.spikes.state_dict(), "best": self.best.state, **self.teacher.state}
        model_config = run_folder.as_json(self.config.model)
        saved = checkpoints.Checkpoint(self.step, state, optimizer, self.position, model_config, rest, ema)
        # Build the model outside the thread, because the random state belongs to the whole process.
        with torch.device("meta"):
            model = BiomedClip(self.config.model)
        return partial(self._write, saved, model)

    def _write(self, saved: checkpoints.Checkpoint, model: BiomedClip) -> None:
        """Write a checkpoint, model/, and model_ema/ if the checkpoint has an EMA."""
        path = self.folder.save_checkpoint(saved, self.config.checkpoint)
        with self.folder.writing() as run:
            for name, ema in {"model": {}, "model_ema": saved.ema}.items():
                if ema or name == "model":
                    state = {**saved.model, **ema}
                    pretrained.save(run / name, model, self.preprocess, self.tokenizer, state_dict=state)
        log.info("saved %s", path)

    def _end(self) -> None:
        pass

    def _close(self) -> None:
        self.loader.close()
