"""`bclip train`: contrastive pretraining of BiomedCLIP from shards.

One process, or one a device under a launcher:

    bclip train CONFIG.toml
    torchrun --nproc-per-node 2 -m bclip_fast.cli train CONFIG.toml
    deepspeed --no_local_rank --module bclip_fast.cli train CONFIG.toml

The run folder holds config.toml (resolved; feeds back into `bclip train`), tokenizer/, metrics.jsonl, tb/,
checkpoints/step-XXXXXXXX/, model/ (open_clip's layout, written with each checkpoint), and bad_samples.jsonl where
samples turned out damaged and were replaced.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import logging
import math
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
from . import engine as engines
from . import plan
from .bad_samples import BadSamples
from .config import DataConfig, TrainConfig
from .metrics import MetricsLog, Progress
from .schedule import learning_rate

log = logging.getLogger(__name__)

T = TypeVar("T")


Validate = Callable[[BiomedClip, Preprocess, Tokenizer], dict[str, float]]
OnStep = Callable[[dict[str, Any]], None]


def train(config: TrainConfig, *, validate: Validate | None = None, on_step: OnStep | None = None) -> Path:
    """Trains to the end and returns the run folder; with dry_run, prints the plan alone.

    Args:
        validate: figures of the model, computed on rank 0 every `validation.every_steps`; retrieval unless given.
        on_step: called on rank 0 with each line of metrics.jsonl: step, epoch, samples, loss, lr, logit_scale,
            grad_norm (before clipping), samples_per_second (over all ranks), data_wait_seconds, bad_samples (different
            ones so far, over all ranks).

    Raises:
        UserError: a configuration, dataset or checkpoint that doesn't fit, a loss that isn't finite; on every rank, too
            many damaged samples, or a rank whose shards can't be read in time.
    """
    config = config.resolved()
    if config.dry_run:
        plan.run(config)
        return Path(config.run)
    distributed.init()
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
    with _Run(config, run, dataset, stream, tokenizer, validate or _retrieval(config), on_step) as state:
        state.loop()
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
        self.saved_step = self.step if saved is not None else -1

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

    def _load(self, model: BiomedClip) -> checkpoints.Checkpoint:
        folder = self.run / "checkpoints"
        # Rank 0 hashes and decides, so that all ranks read the same one.
        step = _on_main(lambda: checkpoints.load_latest(folder).step)
        saved = checkpoints.read(folder / f"step-{step:08d}")
        if difference := checkpoints.first_difference(saved.model_config, _as_json(self.config.model)):
            raise UserError(f"cannot resume from {folder}: another model, {difference}")
        try:
            self.stream.load_state_dict(saved.data)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        model.load_state_dict(saved.model)
        self.step = saved.step
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
            if self.metrics is not None and self.progress is not None:
                self.metrics.write(record)
                self.progress.update(record)
                if self.on_step is not None:
                    self.on_step(record)
            if _is_due(self.step, config.validation.every_steps):
                self._validate()
            if _is_due(self.step, config.checkpoint.every_steps):
                self._save()
        if self.saved_step != self.step or not (self.run / "model").is_dir():
            self._save()

    def _train_step(self) -> dict[str, Any]:
        start = time.perf_counter()
        batch = self._batch()
        data_wait = time.perf_counter() - start
        # Dropout's random numbers are a function of (seed, step, rank): a resumed run draws what it would have drawn.
        torch.manual_seed(_step_seed(self.config.seed, self.step, distributed.rank()))
        self.model.visual.patch_dropout = patch_dropout(self.step, self.num_steps, self.config)
        loss = self._forward(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {self.step + 1}; lower optim.lr, set optim.grad_clip_norm or "
                f"engine.precision=fp32, then resume from {self.run / 'checkpoints'}"
            )
        self.engine.backward(loss)
        lr = learning_rate(self.step, self.num_steps, self.config.optim)
        scale = self.logit_scale
        result = self.engine.step(lr)
        if result.skipped:
            log.warning("step %d: the fp16 gradient overflowed; no update", self.step + 1)
        self.step += 1
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
        }

    def _batch(self) -> Batch:
        """The next batch. A rank that has none tells the others, which would wait for it in the loss."""
        batch, problem = None, None
        try:
            batch = next(self.loader)
        except UserError as error:
            problem = str(error)
        self.bad.agree(self.step + 1, batch.bad if batch else [], problem)
        assert batch is not None
        return batch

    def _forward(self, batch: Batch) -> torch.Tensor:
        device = self.engine.device
        images, text = batch.images.to(device, non_blocking=True), Packed.of(batch.ids, batch.lengths)
        output = self.engine(images, text.to(device, non_blocking=True))
        self.logit_scale = float(output["logit_scale"].detach())
        return self.loss(
            output["image_features"], output["text_features"], output["logit_scale"], output.get("logit_bias")
        )

    def _save(self) -> None:
        model, optimizer = self.engine.model_state(), self.engine.optimizer_state()
        _on_main(lambda: self._write(model, optimizer))
        self.saved_step = self.step

    def _write(self, state: dict[str, torch.Tensor], optimizer: engines.OptimizerState) -> None:
        config = self.config
        saved = checkpoints.Checkpoint(self.step, state, optimizer, self.loader.state_dict(), _as_json(config.model))
        path = checkpoints.save(self.run / "checkpoints", saved, keep=config.checkpoint.keep)
        with torch.device("meta"):
            model = BiomedClip(config.model)
        pretrained.save(self.run / "model", model, self.preprocess, self.tokenizer, state_dict=state)
        log.info("saved %s", path)

    def _validate(self) -> None:
        state = self.engine.model_state()
        _on_main(lambda: self._write_validation(state))

    def _write_validation(self, state: dict[str, torch.Tensor]) -> None:
        with torch.device("meta"):
            model = BiomedClip(self.config.model)
        model.load_state_dict(state, assign=True)
        figures = self.validate(model.to(self.engine.device).eval(), self.preprocess, self.tokenizer)
        record = {"step": self.step, **{f"validation/{name}": value for name, value in figures.items()}}
        assert self.metrics is not None
        self.metrics.write(record)
        log.info("step %d  %s", self.step, "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
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
    if not config.resume and any((run / "checkpoints").glob("step-*")):
        raise UserError(f"{run}: holds a run already; set resume=True to continue it, or another run folder")
    if config.resume and not (run / "tokenizer").is_dir():
        raise UserError(f"{run}: no run to resume; start without resume")
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(config_files.to_toml(config), encoding="utf-8")
    if config.resume:
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
