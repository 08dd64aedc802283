"""`bclip train`: contrastive pretraining of BiomedCLIP from shards.

One process, or one a device under a launcher:

    bclip train CONFIG.toml
    torchrun --nproc-per-node 2 -m bclip_fast.cli train CONFIG.toml
    deepspeed --no_local_rank --module bclip_fast.cli train CONFIG.toml

The run folder holds config.toml (resolved; feeds back into `bclip train`), tokenizer/, metrics.jsonl, tb/,
checkpoints/step-XXXXXXXX/, model/ (open_clip's layout, written with each checkpoint), bad_samples.jsonl where
samples turned out damaged and were replaced, and dumps/step-XXXXXXXX/ where too many steps were skipped (dump.py).

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
from typing import Any, TypeVar

import torch

from bclip_fast import config as config_files
from bclip_fast import distributed, pretrained
from bclip_fast.data.native import Batch, NativeLoader
from bclip_fast.data.shards import ShardDataset
from bclip_fast.data.stream import SampleStream
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.loss import ClipLoss
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.packed import Packed
from bclip_fast.model.tokenizer import Tokenizer

from . import checkpoint as checkpoints
from . import dump as dumps
from . import engine as engines
from .bad_samples import BadSamples
from .config import DataConfig, TrainConfig
from .metrics import MetricsLog, Progress
from .schedule import learning_rate
from .signals import EXIT_STOPPED, Signals
from .spikes import Spikes

log = logging.getLogger(__name__)

T = TypeVar("T")


Validate = Callable[[BiomedClip, Preprocess, Tokenizer], dict[str, float]]
OnStep = Callable[[dict[str, Any]], None]


def train(config: TrainConfig, *, validate: Validate | None = None, on_step: OnStep | None = None) -> Path:
    """Trains to the end and returns the run folder.

    Args:
        validate: figures of the model, computed on rank 0 every `validation.every_steps`; retrieval unless given.
        on_step: called on rank 0 with each line of metrics.jsonl: step, epoch, samples, loss, lr, logit_scale,
            grad_norm (before clipping), samples_per_second (over all ranks), data_wait_seconds, bad_samples (different
            ones so far, over all ranks).

    Raises:
        UserError: a configuration, dataset or checkpoint that doesn't fit, or the last checkpoint can't be written; on
            every rank, too many skipped steps or damaged samples, or a rank whose shards can't be read in time; on
            those that are left, a rank that is lost.
        SystemExit: with EXIT_STOPPED, where a signal stopped the run.
    """
    config = config.resolved()
    distributed.init(timeout_seconds=config.timeout_s)
    # Not at the end of this function: DeepSpeed keeps references to the group while the process lives.
    atexit.register(distributed.shutdown)
    dataset = _open(config.data, config.data.split)
    stream = SampleStream(
        dataset.shard_sizes,
        dataset.fingerprint,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        shuffle_block=config.data.shuffle_block,
        # The text tower's work follows the tokens, of which English has one in 4 to 5 bytes.
        cost=lambda i: min(dataset.caption_bytes(i), 5 * config.model.text.context_length),
    )
    if config.validation.every_steps and validate is None:
        _open(config.data, config.validation.split)
    run = Path(config.run)
    _on_main(lambda: _prepare(run, config, dataset))
    tokenizer = Tokenizer.from_file(run / "tokenizer" / "tokenizer.json", config.model.text.context_length)
    _check_tokenizer(tokenizer, config.model)
    # A launcher that has lost a rank sends SIGTERM to the others, which are still to say so.
    with Signals() as signals, distributed.explain_lost_ranks():
        with _Run(config, run, dataset, stream, tokenizer, validate or _retrieval(config), on_step, signals) as state:
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
        stream: SampleStream,
        tokenizer: Tokenizer,
        validate: Validate,
        on_step: OnStep | None,
        signals: Signals,
    ) -> None:
        self.config = config
        self.run = run
        self.stream = stream
        self.tokenizer = tokenizer
        self.validate = validate
        self.on_step = on_step
        self.num_steps = config.max_steps or config.epochs * stream.num_batches
        self.step = 0
        self.preprocess = Preprocess(PreprocessConfig(size=config.model.vision.image_size))
        torch.manual_seed(config.seed)
        self.model = model = BiomedClip(config.model)
        model.visual.patch_embed.mean, model.visual.patch_embed.std = (
            self.preprocess.config.mean,
            self.preprocess.config.std,
        )
        self.spikes = Spikes(config.spikes)
        self.best: dict[str, Any] = {}
        saved = self._load(model) if config.resume else None
        self.engine = engines.make(model.train(), config.engine, config.optim, config.batch_size)
        if saved is not None:
            self.engine.load_optimizer_state(saved.optimizer)
        self.loss = ClipLoss(rank=distributed.rank(), world_size=distributed.world_size())
        self.loader = self._make_loader(dataset)
        self.bad = BadSamples(run, self.step, config.data.max_bad_samples)
        main = distributed.is_main()
        self.metrics = MetricsLog(run, self.step) if main else None
        self.progress = Progress(self.step, self.num_steps) if main else None
        self.saved_step = self.step if _on_main(lambda: (run / "model").is_dir()) else -1
        self.position = self.loader.state_dict()
        self.writer = checkpoints.Writer(config.checkpoint.background) if main else None
        self.signals = signals
        self.stopped = False
        self.given_up = ""

    def _make_loader(self, dataset: ShardDataset) -> NativeLoader:
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
            return NativeLoader(*arguments, **options)
        from bclip_fast.data.dali import DaliLoader

        return DaliLoader(*arguments, device_id=device.index if device.type == "cuda" else None, **options)

    def _load(self, model: BiomedClip) -> checkpoints.Checkpoint | None:
        folder = self.run / "checkpoints"
        # Rank 0 hashes and decides, so that all ranks read the same one.
        step = _on_main(lambda: checkpoints.load_latest(folder).step if checkpoints.steps(folder) else None)
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
            "training on %d samples, %d steps of %d pairs, %d rank(s), %s",
            self.stream.num_samples,
            self.num_steps,
            config.batch_size,
            distributed.world_size(),
            f"{config.engine.name} ZeRO {config.engine.zero_stage}"
            if config.engine.name == "deepspeed"
            else config.engine.name,
        )
        while self.step < self.num_steps:
            record = self._train_step()
            if record is None:
                break
            if self.metrics is not None and self.progress is not None:
                self.metrics.write(record)
                self.progress.update(record)
                if self.on_step is not None:
                    self.on_step(record)
            if self.given_up:
                raise UserError(self.given_up)
            improved = _is_due(self.step, config.validation.every_steps) and self._validate()
            if improved or _is_due(self.step, config.checkpoint.every_steps):
                self._save()
        if self.step and self.saved_step != self.step:
            self._save()
        _on_main(lambda: self.writer.finish() if self.writer else None)

    def _train_step(self) -> dict[str, Any] | None:
        """A step and its line of metrics; None where a signal stops the run before it."""
        start = time.perf_counter()
        batch = self._batch()
        if batch is None:
            self.stopped = True
            return None
        data_wait = time.perf_counter() - start
        # Dropout's random numbers are a function of (seed, step, rank): a resumed run draws what it would have drawn.
        seed = _step_seed(self.config.seed, self.step, distributed.rank())
        torch.manual_seed(seed)
        self.model.visual.patch_dropout = patch_dropout(self.step, self.num_steps, self.config)
        loss = self._forward(batch)
        value = float(loss.detach())
        self.engine.backward(loss)
        lr = learning_rate(self.step, self.num_steps, self.config.optim)
        scale = self.logit_scale
        size = len(batch.keys) * distributed.world_size()
        result = self.engine.step(lr, self.spikes.limit(value, size))
        self.step += 1
        self.position = self.loader.state_dict()
        reason = self.spikes.observe(self.step, value, result)
        if result.skipped and distributed.is_main():
            log.warning("step %d is skipped: %s", self.step, reason or "the fp16 gradient overflowed")
        if self.spikes.too_many:
            self._give_up([(batch, seed)], value, result.grad_norm, reason)
        return {
            "step": self.step,
            "epoch": batch.epoch,
            "samples": self.stream.num_consumed,
            "loss": value,
            "lr": lr,
            "logit_scale": scale,
            "grad_norm": result.grad_norm,
            "samples_per_second": self.config.batch_size / (time.perf_counter() - start),
            "data_wait_seconds": data_wait,
            "bad_samples": self.bad.num_bad,
            "skipped": self.spikes.num_skipped,
        }

    def _batch(self) -> Batch | None:
        """The next batch, None where a rank was told to stop. A rank that has none tells the others, which would wait
        for it in the loss."""
        batch, problem = None, None
        try:
            batch = next(self.loader)
        except UserError as error:
            problem = str(error)
        stop = self.bad.agree(self.step + 1, batch.bad if batch else [], problem, bool(self.signals.received))
        return None if stop else batch

    def _forward(self, batch: Batch) -> torch.Tensor:
        device = self.engine.device
        images, text = batch.images.to(device, non_blocking=True), Packed.of(batch.ids, batch.lengths)
        output = self.engine(images, text.to(device, non_blocking=True))
        self.logit_scale = float(output["logit_scale"].detach())
        return self.loss(
            output["image_features"], output["text_features"], output["logit_scale"], output.get("logit_bias")
        )

    def _give_up(self, batches: list[tuple[Batch, int]], loss: float, grad_norm: float, reason: str | None) -> None:
        """Leaves a dump of the step just made; the weights are those before it, since it made no update."""
        dropped, state = self.model.visual.patch_dropout, self.engine.model_state()
        dump = dumps.Dump(self.config, self.step, loss, grad_norm, dropped, batches, state)
        self.given_up = (
            f"{self.spikes} at step {self.step}: {reason}; lower optim.lr, set optim.grad_clip_norm, take "
            f"engine.precision=fp32 or raise the limits of the section spikes, then resume from "
            f"{self.run / 'checkpoints'}. `bclip train replay {dumps.write(self.run, dump)}` computes the step again"
        )

    def _save(self) -> None:
        """Begins to write a checkpoint. The copies on rank 0 are made once those of the one before are written."""
        if self.writer is not None:
            self.writer.wait()
        state, optimizer = self.engine.model_state(), self.engine.optimizer_state()
        self.saved_step = self.step
        if self.writer is not None:
            rest = {"spikes": self.spikes.state_dict(), "best": self.best}
            identity = _as_json(self.config.model)
            saved = checkpoints.Checkpoint(self.step, state, optimizer, self.position, identity, rest)
            # Here, not in the thread: random numbers are a state of the process.
            with torch.device("meta"):
                model = BiomedClip(self.config.model)
            self.writer.submit(lambda: self._write(saved, model))

    def _write(self, saved: checkpoints.Checkpoint, model: BiomedClip) -> None:
        config = self.config.checkpoint
        options = {"keep": config.keep, "keep_every_steps": config.keep_every_steps}
        path = checkpoints.save(self.run / "checkpoints", saved, best=saved.rest["best"].get("step"), **options)
        with checkpoints.written(self.run / "model"):
            pretrained.save(self.run / "model", model, self.preprocess, self.tokenizer, state_dict=saved.model)
        log.info("saved %s", path)

    def _validate(self) -> bool:
        """Whether the figures are the best so far by `checkpoint.best`."""
        state = self.engine.model_state()
        figures = _on_main(lambda: self._write_validation(state))
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

    def _write_validation(self, state: dict[str, torch.Tensor]) -> dict[str, float]:
        with torch.device("meta"):
            model = BiomedClip(self.config.model)
        model.load_state_dict(state, assign=True)
        figures = self.validate(model.to(self.engine.device).eval(), self.preprocess, self.tokenizer)
        record = {"step": self.step, **{f"validation/{name}": value for name, value in figures.items()}}
        assert self.metrics is not None
        self.metrics.write(record)
        log.info("step %d  %s", self.step, "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        return figures

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.writer is not None and kind is not KeyboardInterrupt:
            self.writer.wait()
        self.loader.close()
        if self.metrics is not None and self.progress is not None:
            self.metrics.close()
            self.progress.close()
        self.engine.close()


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
    (run / "config.toml").write_text(config_files.to_toml(config), encoding="utf-8")
    if begun:
        return
    source, text = config.data.tokenizer, config.model.text
    if source == "train":
        tokenizer = Tokenizer.train(dataset.captions(), text.vocab_size, text.context_length)
    else:
        tokenizer = Tokenizer.from_file(source, text.context_length)
    tokenizer.save(run / "tokenizer")


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


def _retrieval(config: TrainConfig) -> Validate:
    def validate(model: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> dict[str, float]:
        from bclip_fast.eval import evaluate

        results = evaluate(
            (model, preprocess, tokenizer),
            ["retrieval"],
            data=config.data.shards,
            split=config.validation.split,
            batch_size=config.validation.batch_size,
            device=str(next(model.parameters()).device),
            num_workers=config.data.num_threads,
            progress=False,
            cache="none",
        )
        return {figure["name"]: figure["value"] for figure in results["tasks"]["retrieval"]["figures"]}

    return validate


def _on_main(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank; its UserError is raised on every rank too."""
    result: tuple[Any, str | None] = (None, None)
    if distributed.is_main():
        try:
            result = function(), None
        except UserError as error:
            result = None, str(error)
    value, problem = distributed.broadcast_object(result)
    if problem is not None:
        raise UserError(problem)
    return value


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def patch_dropout(step: int, num_steps: int, config: TrainConfig) -> float:
    """The share of patches dropped in step 0 <= step < num_steps."""
    return config.model.vision.patch_dropout if step < config.patch_dropout_until * num_steps else 0.0


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _as_json(config: Any) -> dict[str, Any]:
    """A dataclass as what json reads back, so that it can be compared with what a file holds."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
