"""`bclip train`: contrastive pretraining of BiomedCLIP from shards.

One process, or one a device under a launcher:

    bclip train CONFIG.toml
    torchrun --nproc-per-node 2 -m -- bclip_fast.cli train CONFIG.toml
    deepspeed --no_local_rank --module bclip_fast.cli train CONFIG.toml
    srun bclip train CONFIG.toml        in a job of Slurm; configs/slurm.sbatch requeues it

The run folder holds config.toml (resolved; feeds back into `bclip train`), backends.json (which backends the operators
take, kept by --resume), tokenizer/, metrics.jsonl, events.jsonl, tb/, checkpoints/step-XXXXXXXX/, model/ (open_clip's
layout, written with each checkpoint), model_ema/ likewise with `ema_decay`, bad_samples.jsonl where samples turned out
damaged and were replaced, and dumps/step-XXXXXXXX/ where too many steps were skipped (dump.py).

SIGTERM, SIGUSR1 and the first SIGINT have all ranks write a checkpoint before the next step and exit with 75; the same
command with --resume goes on.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bclip_fast import config as config_files
from bclip_fast import distributed, pretrained
from bclip_fast.data.loader import Batch, Loader
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.distributed import run_on_rank0
from bclip_fast.errors import UserError
from bclip_fast.hardware import device_peak, peak_memory
from bclip_fast.io.runs import VALIDATION, VALIDATION_EMA
from bclip_fast.loss import ClipLoss
from bclip_fast.model import flops
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.tokenizer import Tokenizer

from . import backends, validation
from . import checkpoint as checkpoints
from . import replay as dumps
from .bad_samples import BadSamples
from .config import DataConfig, TrainConfig
from .ema import Average
from .engine import deepspeed as engines
from .grad_cache import CachedBatch, Spool
from .init_weights import initial_tokenizer, initialise, new_model
from .loss_spikes import Spikes
from .metrics import MetricsLog, Progress
from .precision import resolve
from .schedule import learning_rate
from .signals import EXIT_STOPPED, Signals
from .step_timer import StepClock

log = logging.getLogger(__name__)

OnStep = Callable[[dict[str, Any]], None]


def train(config: TrainConfig, *, validate: validation.Validate | None = None, on_step: OnStep | None = None) -> Path:
    """Trains to the end and returns the run folder.

    Args:
        validate: figures of the model, computed on rank 0 when validation is due, in place of `validation.standard`.
        on_step: called on rank 0 with each line of metrics.jsonl: step, epoch, samples, loss, lr, logit_scale,
            grad_norm (before clipping), samples_per_second and tokens_per_second (over all ranks, the tokens as many as
            rank 0's on each), mfu (rank 0's, where the device's peak is known), step_seconds and of it, on rank 0,
            data_wait_seconds and those of `StepClock`: forward, loss, backward (with the towers' second forward pass
            where there are micro-batches), optimizer; communication_seconds where the engine knows what the backward
            pass waited for gradients; peak_memory_bytes (rank 0's so far, on its GPU if it has one); bad_samples
            (different ones so far, over all ranks); skipped (steps so far that the section `spikes` forbade).

    Raises:
        UserError: a configuration, dataset or checkpoint that doesn't fit, or the last checkpoint can't be written; on
            every rank, too many skipped steps or damaged samples, or a rank whose shards can't be read in time; on
            those that are left, a rank that is lost.
        SystemExit: with EXIT_STOPPED, where a signal stopped the run.
    """
    if config.dry_run:
        raise UserError("dry_run=true: this function trains; bclip_fast.plan.command plans a run")
    config = config.resolved()
    distributed.init(timeout_seconds=config.timeout_s)
    # Not at the end of this function: DeepSpeed keeps references to the group while the process lives.
    atexit.register(distributed.shutdown)
    run = Path(config.run)
    continued = run if config.resume and checkpoints.steps(run / "checkpoints") else None
    config = config.with_precision(resolve(config.engine.precision, continued))
    dataset = _open(config.data, config.data.split)
    stream = ShardSampler(
        dataset.shard_sizes,
        dataset.fingerprint,
        batch_size=config.batch_size,
        schedule=config.batch_schedule,
        micro_batch_size=config.micro_batch_size,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        shuffle_block=config.data.shuffle_block,
        # The text tower's work follows the tokens, of which English has one in 4 to 5 bytes.
        cost=lambda i: min(dataset.caption_bytes(i), 5 * config.model.text.context_length),
    )
    found = [validate] if validate else []
    if not found and (config.validation.every_steps or config.validation.every_epochs):
        run_on_rank0(lambda: found.append(validation.standard(config)))
    run_on_rank0(lambda: _prepare(run, config, dataset))
    tokenizer = Tokenizer.from_file(run / "tokenizer" / "tokenizer.json", config.model.text.context_length)
    _check_tokenizer(tokenizer, config.model)
    # A launcher that has lost a rank sends SIGTERM to the others, which are still to say so.
    chosen = found[0] if found else None
    with Signals() as signals, distributed.explain_lost_ranks(), backends.of_run(run, resumed=continued is not None):
        with _Run(config, run, dataset, stream, tokenizer, chosen, on_step, signals) as state:
            state.loop()
    if state.stopped:
        if distributed.is_main():
            log.warning("stopped after step %d of %d; the command with --resume goes on", state.step, state.num_steps)
        raise SystemExit(EXIT_STOPPED)
    return run


class _Run:
    """What lives from the first step to the last."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        dataset: ShardDataset,
        stream: ShardSampler,
        tokenizer: Tokenizer,
        validate: validation.Validate | None,
        on_step: OnStep | None,
        signals: Signals,
    ) -> None:
        self.config = config
        self.run = run
        self.stream = stream
        self.tokenizer = tokenizer
        self.validate = validate
        self.on_step = on_step
        self.num_steps = config.max_steps or stream.num_batches_of(config.epochs)
        self.step = 0
        self.preprocess = Preprocess(PreprocessConfig(size=config.model.vision.image_size))
        torch.manual_seed(config.seed)
        self.model = model = new_model(config)
        self.spikes = Spikes(config.spikes)
        self.best: dict[str, Any] = {}
        saved = self._load(model) if config.resume else None
        if saved is None:
            # Rank 0 before the others: it alone fetches from the hub, and what it refuses is refused on every rank.
            run_on_rank0(lambda: initialise(model, config.init))
            if not distributed.is_main():
                initialise(model, config.init)
        self.engine = engines.make(model.train(), config.engine, config.optim, config.first_batch_size)
        if saved is not None:
            self.engine.load_optimizer_state(saved.optimizer)
        self.average = Average(self.engine, config.ema_decay, saved.ema if saved else {}) if config.ema_decay else None
        self.loss = ClipLoss(rank=distributed.rank(), world_size=distributed.world_size())
        self.loader = self._make_loader(dataset)
        self.spool = Spool(config.data.spool_above_mib << 20, config.data.spool_dir)
        self.bad = BadSamples(run, self.step, config.data.max_bad_samples)
        self.metrics: MetricsLog | None = None
        run_on_rank0(self._open_log)
        samples = (self.stream.samples_before(step) for step in (self.step, self.num_steps))
        self.progress = Progress(self.num_steps, *samples) if distributed.is_main() else None
        self.validation = validation.Validation(config.validation, run, self.num_steps)
        self.clock = StepClock(self.engine.device)
        self.peak = device_peak(self.engine.device, config.engine.precision)
        self.saved_step = self.step if run_on_rank0(lambda: (run / "model").is_dir()) else -1
        self.position = self.loader.state_dict()
        self.writer = checkpoints.Writer(config.checkpoint.background) if distributed.is_main() else None
        self.signals = signals
        self.stopped = False
        self.given_up = ""

    def _open_log(self) -> None:
        _write_config(self.run, self.config)
        self.metrics = MetricsLog(self.run, self.step, self.config.log, _as_json(self.config))
        self.metrics.event(self.step, "resume" if self.step else "start", ranks=distributed.world_size())

    def _make_loader(self, dataset: ShardDataset) -> Loader:
        data, device = self.config.data, self.engine.device
        arguments = (dataset, self.tokenizer.encode, self.stream, self.preprocess)
        options: dict[str, Any] = dict(
            augment=data.augment,
            crop_scale=data.crop_scale,
            num_threads=data.num_threads,
            prefetch_batches=data.prefetch_batches,
            pin_memory=device.type == "cuda",
            timeout_s=data.timeout_s,
        )
        if data.loader == "native":
            return Loader(*arguments, **options)
        from bclip_fast.data.dali_loader import DaliLoader

        return DaliLoader(*arguments, device_id=device.index if device.type == "cuda" else None, **options)

    def _load(self, model: BiomedClip) -> checkpoints.Checkpoint | None:
        folder = self.run / "checkpoints"
        # Rank 0 hashes and decides, so that all ranks read the same one.
        step = run_on_rank0(lambda: checkpoints.load_latest(folder).step if checkpoints.steps(folder) else None)
        if step is None:
            return None
        saved = checkpoints.read(folder / f"step-{step:08d}")
        if difference := checkpoints.first_difference(saved.model_config, _as_json(self.config.model)):
            raise UserError(f"cannot resume from {folder}: another model, {difference}")
        try:
            self.stream.load_state_dict(saved.data)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        model.load_state_dict(saved.model)
        self.step = saved.step
        if "spikes" in saved.rest:
            self.spikes.load_state_dict(saved.rest["spikes"])
        self.best = saved.rest.get("best", {})
        log.info("resuming after step %d", self.step)
        return saved

    def loop(self) -> None:
        config = self.config
        log.info(
            "training on %d samples, %d steps of %d pairs, %d rank(s), %s, %s",
            self.stream.num_samples,
            self.num_steps,
            config.first_batch_size,
            distributed.world_size(),
            config.engine.precision,
            f"{config.engine.name} ZeRO {config.engine.zero_stage}"
            if config.engine.name == "deepspeed"
            else config.engine.name,
        )
        while self.step < self.num_steps:
            record = self._train_step()
            if record is None:
                if self.metrics is not None:
                    self.metrics.event(self.step, "stop")
                break
            if self.metrics is not None and self.progress is not None:
                self.metrics.write(record)
                self.progress.update(record)
                if self.on_step is not None:
                    self.on_step(record)
            if self.given_up:
                raise UserError(self.given_up)
            epoch, epoch_before = self.stream.locate(self.step)[0], self.stream.locate(self.step - 1)[0]
            improved = self.validation.is_due(self.step, epoch, epoch_before) and self._validate()
            if improved or _is_due(self.step, config.checkpoint.every_steps):
                self._save()
        if self.step and self.saved_step != self.step:
            self._save()
        run_on_rank0(lambda: self.writer.finish() if self.writer else None)

    def _train_step(self) -> dict[str, Any] | None:
        """A step and its line of metrics; None where a signal stops the run before it."""
        start = time.perf_counter()
        config, number, clock = self.config, self.step, self.clock
        data_wait, lengths = 0.0, []
        epoch, _ = self.stream.locate(number)
        self.model.visual.patch_dropout = patch_dropout(*self._progress(), config)
        num_parts = self.stream.num_micro_batches(number)
        cached = CachedBatch(self.engine, self.loss, num_parts, self.spool)
        clock.start()
        for part in range(num_parts):
            asked = time.perf_counter()
            batch = self._batch()
            if batch is None:
                self.stopped = True
                return None
            data_wait += time.perf_counter() - asked
            clock.leave_out()
            # Random numbers are a function of (seed, step, micro-batch), whichever rank computes it: a resumed run
            # draws what it would have drawn, and so do two ranks of half as many micro-batches.
            seed = _step_seed(config.seed, number, distributed.rank() * num_parts + part)
            cached.add(batch, seed)
            lengths += batch.lengths
            clock.mark("forward")
        loss = cached.loss()
        clock.mark("loss")
        value = float(loss)
        cached.backward()
        clock.mark("backward")
        batch_size = self.stream.batch_size_of(epoch)
        lr = learning_rate(*self._progress(), config.optim, batch_size / config.first_batch_size)
        result = self.engine.step(lr, self.spikes.limit(value, batch_size))
        clock.mark("optimizer")
        if self.average is not None and not result.skipped:
            self.average.update()
        self.step += 1
        self.position = self.loader.state_dict()
        self._judge(cached, value, result)
        seconds = time.perf_counter() - start
        return {
            "step": self.step,
            "epoch": epoch,
            "samples": self.stream.num_consumed,
            "loss": value,
            "lr": lr,
            "logit_scale": cached.logit_scale,
            "grad_norm": result.grad_norm,
            "samples_per_second": batch_size / seconds,
            "tokens_per_second": sum(lengths) * distributed.world_size() / seconds,
            **self._mfu(lengths, seconds),
            "step_seconds": seconds,
            "data_wait_seconds": data_wait,
            **clock.seconds(),
            **self.engine.communication(),
            "peak_memory_bytes": peak_memory(self.engine.device),
            "bad_samples": self.bad.num_bad,
            "skipped": self.spikes.num_skipped,
        }

    def _progress(self) -> tuple[float, float]:
        """Where the run stands and how long it is, in steps of the first batch size: a larger step counts for more."""
        done, whole = self.stream.samples_before(self.step), self.stream.samples_before(self.num_steps)
        return done / self.config.first_batch_size, whole / self.config.first_batch_size

    def _mfu(self, lengths: list[int], seconds: float) -> dict[str, float]:
        if self.peak is None:
            return {}
        locked = self.model.visual.num_locked, self.model.text.num_locked
        count = flops.step_flops(self.config.model, lengths, self.model.visual.patch_dropout, locked)
        return {"mfu": count / seconds / self.peak}

    def _batch(self) -> Batch | None:
        """The next micro-batch, None where a rank was told to stop. A rank that has none tells the others, which would
        wait for it in a collective."""
        batch, problem = None, None
        try:
            batch = next(self.loader)
        except UserError as error:
            problem = str(error)
        stop = self.bad.agree(self.step + 1, batch.bad if batch else [], problem, bool(self.signals.received))
        return None if stop else batch

    def _judge(self, cached: CachedBatch, loss: float, result: engines.StepResult) -> None:
        """Notes whether the step just made was skipped; too often, and the run gives up and leaves a dump of it."""
        reason = self.spikes.observe(self.step, loss, result)
        if not result.skipped:
            return
        if self.metrics is not None:
            reason = reason or "the fp16 gradient overflowed"
            log.warning("step %d is skipped: %s", self.step, reason)
            self.metrics.event(self.step, "skip", reason=reason)
        if self.spikes.too_many:
            # The weights are those before the step, since it made no update.
            dropped, state = self.model.visual.patch_dropout, self.engine.model_state()
            dump = dumps.Dump(self.config, self.step, loss, result.grad_norm, dropped, list(cached.batches()), state)
            folder = dumps.write(self.run, dump)
            self.given_up = (
                f"{self.spikes} at step {self.step}: {reason}; lower optim.lr, set optim.grad_clip_norm, take "
                f"engine.precision=fp32 or raise the limits of the section spikes, then resume from "
                f"{self.run / 'checkpoints'}. `bclip train replay {folder}` computes the step again"
            )

    def _save(self) -> None:
        """Begins to write a checkpoint. The copies on rank 0 are made once those of the one before are written."""
        if self.writer is not None:
            self.writer.wait()
        state, optimizer = self.engine.model_state(), self.engine.optimizer_state()
        average = self.average.state() if self.average is not None else {}
        self.saved_step = self.step
        if self.writer is not None:
            rest = {"spikes": self.spikes.state_dict(), "best": self.best}
            identity = _as_json(self.config.model)
            saved = checkpoints.Checkpoint(self.step, state, optimizer, self.position, identity, rest, average)
            # Here, not in the thread: random numbers are a state of the process.
            with torch.device("meta"):
                model = BiomedClip(self.config.model)
            self.writer.submit(lambda: self._write(saved, model))

    def _write(self, saved: checkpoints.Checkpoint, model: BiomedClip) -> None:
        config = self.config.checkpoint
        options = {"keep": config.keep, "keep_every_steps": config.keep_every_steps}
        path = checkpoints.save(self.run / "checkpoints", saved, best=saved.rest["best"].get("step"), **options)
        for name, part in {"model": {}, "model_ema": saved.ema}.items():
            if part or name == "model":
                state = {**saved.model, **part}
                with checkpoints.written(self.run / name):
                    pretrained.save(self.run / name, model, self.preprocess, self.tokenizer, state_dict=state)
        log.info("saved %s", path)
        if self.metrics is not None:
            self.metrics.event(saved.step, "checkpoint")

    def _validate(self) -> bool:
        """Whether the figures are the best so far by `checkpoint.best`."""
        state = self.engine.model_state()
        figures = run_on_rank0(lambda: self._write_validation(state, VALIDATION))
        if self.average is not None:
            average = {**state, **self.average.state()}
            run_on_rank0(lambda: self._write_validation(average, VALIDATION_EMA))
        self.validation.last_step = self.step
        name = self.config.checkpoint.best.removeprefix("-")
        if not name:
            return False
        if name not in figures:
            raise UserError(f"checkpoint.best={name}: the validation has no such figure, but {', '.join(figures)}")
        sign = -1 if self.config.checkpoint.best.startswith("-") else 1
        if self.best and sign * figures[name] <= sign * self.best["value"]:
            return False
        self.best = {"step": self.step, "figure": name, "value": figures[name]}
        return True

    def _write_validation(self, state: dict[str, torch.Tensor], prefix: str) -> dict[str, float]:
        start = time.perf_counter()
        with torch.device("meta"):
            model = BiomedClip(self.config.model)
        model.load_state_dict(state, assign=True)
        assert self.metrics is not None and self.validate is not None
        figures = self.validate(model.to(self.engine.device).eval(), self.preprocess, self.tokenizer)
        record = {"step": self.step, "validation_seconds": time.perf_counter() - start}
        self.metrics.write(record | {f"{prefix}{name}": value for name, value in figures.items()})
        shown = [f"{name} {value:.4g}" for name, value in figures.items()][:8]
        log.info("step %d  %s%s", self.step, "  ".join(shown), "  ..." if len(figures) > len(shown) else "")
        return figures

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self.writer is not None and kind is not KeyboardInterrupt:
            self.writer.wait()
        self.loader.close()
        self.bad.close()
        if self.metrics is not None and self.progress is not None:
            if error is not None:
                self.metrics.event(self.step, "error", reason=f"{type(error).__name__}: {error}")
            self.metrics.close()
            self.progress.close()
        self.engine.close()


def replay(config: dumps.ReplayConfig) -> int:
    """`bclip train replay`: computes a dumped step again and logs its loss and gradient norm; 1 where they differ.

    They are those of the run bit for bit on a CPU like the run's with as many threads, on one rank or two: of more, the
    first step's gradients are sent in other pieces than the later ones', and sums run in another order. fp16 starts
    with its first loss scale.
    """
    distributed.init()
    atexit.register(distributed.shutdown)
    with backends.of_run(config.dump, resumed=True, keep=False):
        return _replay(config)


def _replay(config: dumps.ReplayConfig) -> int:
    dump = dumps.read(config.dump)
    model = new_model(dump.config)
    model.load_state_dict(dump.model)
    model.visual.patch_dropout = dump.patch_dropout
    engine = engines.make(model.train(), dump.config.engine, dump.config.optim, dump.config.first_batch_size)
    loss = ClipLoss(rank=distributed.rank(), world_size=distributed.world_size())
    data = dump.config.data
    spool = Spool(data.spool_above_mib << 20, data.spool_dir)
    cached = CachedBatch(engine, loss, len(dump.batches), spool)
    for batch, seed in dump.batches:
        cached.add(batch, seed)
    value = float(cached.loss())
    cached.backward()
    norm = engine.step(0.0, -1.0).grad_norm
    engine.close()
    pairs = {"loss": (dump.loss, value), "grad_norm": (dump.grad_norm, norm)}
    for name, (found, again) in pairs.items():
        log.info("step %d  %s %r in the run, %r computed again", dump.step, name, found, again)
    # As text, for NaN isn't equal to itself.
    return int(any(repr(found) != repr(again) for found, again in pairs.values()))


def _open(data: DataConfig, split: str) -> ShardDataset:
    if not data.shards:
        raise UserError("data.shards is not set; give the folder that `bclip ingest build` wrote")
    return ShardDataset(data.shards, split, data.read)


def _prepare(run: Path, config: TrainConfig, dataset: ShardDataset) -> None:
    """The run folder with config.toml and the tokenizer; an earlier run is only continued, never mixed with another."""
    # A run that was stopped before its first checkpoint holds nothing to lose, and is begun again.
    begun = bool(checkpoints.steps(run / "checkpoints"))
    if begun and not config.resume:
        raise UserError(f"{run}: holds a run already; --resume continues it, or give another run folder")
    run.mkdir(parents=True, exist_ok=True)
    if begun:
        # The settings may still be refused, and a refusal must leave the run as it is: _open_log writes them.
        return
    _write_config(run, config)
    source, text = config.data.tokenizer, config.model.text
    if not source and (given := initial_tokenizer(config)) is not None:
        tokenizer = given
    elif source in ("", "train"):
        tokenizer = Tokenizer.train(dataset.captions(), text.vocab_size, text.context_length)
    else:
        tokenizer = Tokenizer.from_file(source, text.context_length)
    tokenizer.save(run / "tokenizer")


def _write_config(run: Path, config: TrainConfig) -> None:
    (run / "config.toml").write_text(config_files.to_toml(config), encoding="utf-8")


def _check_tokenizer(tokenizer: Tokenizer, model: BiomedClipConfig) -> None:
    text = model.text
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.text.vocab_size is {text.vocab_size}: raise it"
        )
    if text.kind == "bert" and tokenizer.pad_id != text.pad_id:
        raise UserError(f"the tokenizer pads with {tokenizer.pad_id}, model.text.pad_id is {text.pad_id}: set it so")
    end = int(tokenizer("", 2)[0, -1])
    if text.kind == "gpt" and end != (tokenizer.vocab_size - 1 if text.end_id is None else text.end_id):
        raise UserError(f"the tokenizer ends captions with token {end}: set model.text.end_id={end}")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def patch_dropout(step: float, num_steps: float, config: TrainConfig) -> float:
    """The share of patches dropped in step 0 <= step < num_steps."""
    return config.model.vision.patch_dropout if step < config.patch_dropout_until * num_steps else 0.0


def _step_seed(seed: int, step: int, micro_batch: int) -> int:
    digest = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _as_json(config: Any) -> dict[str, Any]:
    """A dataclass as what json reads back, so that it can be compared with what a file holds."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
