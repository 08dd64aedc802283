"""`bclip bench trainer`: the time of the parts of a pretraining step, in our trainer and in open_clip's."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.presets import preset
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.train.config import CheckpointConfig, DataConfig, TrainConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.schedule import OptimConfig
from bclip_fast.train.step_timer import StepTimer

from .cases import Unavailable
from .cases.model import open_clip_twin
from .loader import LoaderConfig, figures_to_shards
from .peers import import_open_clip
from .table import print_table

PARTS = ("data_wait", "forward", "loss", "backward", "optimizer", "communication")
_OPTIM = OptimConfig(lr=1e-5, warmup_steps=0)


@dataclass(frozen=True)
class TrainerConfig:
    """Steps of both trainers with DDP, bf16 and AdamW, from the same shards, on the same ranks, with the same model."""

    preset: str = "biomedclip_b16"
    """Name of the model."""
    shards: str = ""
    """Folder that `bclip ingest build` wrote, with at least one shard per rank. Empty: articles of the shared data."""
    batch_size: int = 16
    """Global batch size."""
    ranks: int = 2
    """Number of processes on this machine, with one thread each."""
    steps: int = 4
    """Number of steps of each trainer in a round. One more step, at the start, does not count."""
    rounds: int = 2
    """Number of rounds. Each trainer runs once per round. A time is the median over all steps."""

    def __post_init__(self) -> None:
        if min(self.ranks, self.steps, self.rounds) < 1 or self.batch_size % self.ranks or self.batch_size < 1:
            raise UserError(
                f"trainer.batch_size={self.batch_size}, ranks={self.ranks}, steps={self.steps}, rounds={self.rounds}: "
                "each must be at least 1, and the ranks must divide the batch"
            )


def measure_trainer(config: TrainerConfig) -> list[dict[str, Any]]:
    """Return a row for each trainer. Raises Unavailable if open_clip or its trainer is not installed."""
    try:
        import_open_clip()
        import open_clip_train  # noqa: F401
        import webdataset  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"the peer open_clip with its trainer needs {error.name}") from None
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shards = config.shards or str(_many_shards(root))
        sizes = preset(config.preset).text
        tokenizer = Tokenizer.train(ShardDataset(shards).captions(), sizes.vocab_size, sizes.context_length)
        tokenizer.save(root / "tokenizer")
        mp.spawn(_on_rank, (replace(config, shards=shards), folder), nprocs=config.ranks)
        steps = json.loads((root / "steps.json").read_text())
    rows = []
    for name, records in steps.items():
        seconds = {part: statistics.median(record.get(f"{part}_seconds", 0.0) for record in records) for part in PARTS}
        step_seconds = statistics.median(record["step_seconds"] for record in records)
        rows.append(
            {
                "operator": "trainer",
                "case": f"{config.preset}-{config.ranks}x{config.batch_size // config.ranks}",
                "contender": name,
                "batch": config.batch_size,
                "num_steps": len(records),
                "step_seconds": step_seconds,
                "samples_per_second": config.batch_size / step_seconds,
                **{f"{part}_seconds": value for part, value in seconds.items()},
            }
        )
    return rows


def _many_shards(root: Path) -> Path:
    """Write small shards of articles, because open_clip divides shards among the ranks."""
    with ShardWriter(root / "shards", max_shard_bytes=2 << 20) as writer:
        for sample in ShardDataset(figures_to_shards(LoaderConfig(), root / "figures")):
            writer.write(sample, "train")
    return writer.out


def _on_rank(rank: int, config: TrainerConfig, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    # mp.spawn makes "spawn" the start method of its children. open_clip's loader cannot be pickled, so use "fork".
    multiprocessing.set_start_method("fork", force=True)
    root = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=config.ranks)
    steps: dict[str, list[dict[str, float]]] = {"open_clip": [], "ours": []}
    for number in range(config.rounds):
        # Leave out the first step, which has page faults and lazy imports.
        steps["open_clip"] += _theirs(config, root, number)[1:]
        steps["ours"] += _ours(config, root, number)[1:]
    if rank == 0:
        (root / "steps.json").write_text(json.dumps(steps))
    dist.destroy_process_group()


def _ours(config: TrainerConfig, root: Path, number: int) -> list[dict[str, float]]:
    from bclip_fast.train.trainer import train

    records: list[dict[str, Any]] = []
    train(
        TrainConfig(
            run=str(root / f"run{number}"),
            seed=number,
            preset=config.preset,
            batch_size=config.batch_size,
            max_steps=config.steps + 1,
            data=DataConfig(shards=config.shards, tokenizer=str(root / "tokenizer" / "tokenizer.json"), num_threads=1),
            optim=_OPTIM,
            engine=EngineConfig(name="ddp", precision="bf16"),
            checkpoint=CheckpointConfig(every_steps=0),
        ),
        on_step=records.append,
    )
    return records


def _theirs(config: TrainerConfig, root: Path, number: int) -> list[dict[str, float]]:
    """Run open_clip_train's `train_one_epoch` with timers around its calls."""
    open_clip = import_open_clip()
    import webdataset
    from open_clip_train import data as their_data
    from open_clip_train import train as their_train
    from open_clip_train.scheduler import cosine_lr

    sizes = preset(config.preset)
    torch.manual_seed(number)
    model = open_clip_twin(BiomedClip(sizes)).train()
    model.output_dict = True  # type: ignore[assignment]
    parallel = nn.parallel.DistributedDataParallel(model) if config.ranks > 1 else model
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for _, value in named if value.ndim < 2], "weight_decay": 0.0},
            {"params": [value for _, value in named if value.ndim >= 2], "weight_decay": _OPTIM.weight_decay},
        ],
        lr=_OPTIM.lr, betas=(_OPTIM.beta1, _OPTIM.beta2), eps=_OPTIM.eps,
    )  # fmt: skip
    shards = sorted(Path(config.shards).glob("train-*.tar"))
    args = Namespace(
        train_data="::".join(map(str, shards)), train_num_samples=len(ShardDataset(config.shards)),
        train_data_upsampling_factors=None, dataset_resampled=False, seed=number, workers=1, device="cpu",
        batch_size=config.batch_size // config.ranks, world_size=config.ranks, rank=dist.get_rank(),
        local_rank=dist.get_rank(), distributed=config.ranks > 1, precision="amp_bf16", distill=False, accum_freq=1,
        skip_scheduler=False, grad_clip_norm=None, horovod=False, log_every_n_steps=1 << 30, wandb=False,
        log_local=False,
    )  # fmt: skip
    # open_clip's function to group a tar's files fails with today's webdataset.
    their_data.tarfile_to_samples_nothrow = webdataset.tarfile_to_samples(handler=their_data.log_and_continue)
    tokenizer = Tokenizer.from_file(root / "tokenizer" / "tokenizer.json", sizes.text.context_length)
    options = {"scale": (0.9, 1.0)}
    transform = open_clip.image_transform(sizes.vision.image_size, is_train=True, aug_cfg=options)
    info = their_data.get_wds_dataset(args, transform, is_train=True, epoch=0, tokenizer=lambda text: tokenizer(text))
    loss = open_clip.ClipLoss(
        local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=config.ranks
    )  # fmt: skip
    meter = _Meter(parallel, config.steps + 1)
    info.dataloader = meter.batches(info.dataloader)
    backward = their_train.backward
    their_train.backward = meter.timed(backward, "backward")
    try:
        their_train.train_one_epoch(
            meter.model, {"train": info}, meter.timed(loss, "loss"), 0, meter.optimizer(optimizer), None,
            cosine_lr(optimizer, _OPTIM.lr, 0, config.steps + 1), None, args,
        )  # fmt: skip
    except _Enough:
        pass
    finally:
        their_train.backward = backward
    return meter.records


class _Enough(Exception):
    """Ends open_clip's loop after the last step to measure. Otherwise it would run through the whole epoch."""


class _Meter:
    """Times the parts of a step by wrapping the objects that open_clip's loop calls."""

    def __init__(self, model: nn.Module, num_steps: int) -> None:
        self._module, self._num_steps = model, num_steps
        self._clock = StepTimer(torch.device("cpu"))
        self.records: list[dict[str, float]] = []
        self.model = _Proxy(model, self.timed(model, "forward"))
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model._set_ddp_runtime_logging_sample_rate(1)

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return `function`, wrapped so that its end also ends a part of the step."""

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self._clock.lap(part)
            return result

        return call

    def optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the optimiser with a timed step."""
        return _Proxy(optimizer, step=self.timed(optimizer.step, "optimizer"))

    def batches(self, loader: Any) -> Any:
        """Return the loader, which records a step whenever the loop asks for the next batch."""
        return _Proxy(loader, iterate=lambda: self._batches(loader))

    def _batches(self, loader: Any) -> Iterator[Any]:
        start, source = time.perf_counter(), iter(loader)
        for batch in source:
            data_wait = time.perf_counter() - start
            self._clock.start()
            yield batch
            end = time.perf_counter()
            seconds = {"step_seconds": end - start, "data_wait_seconds": data_wait, **self._clock.finish()()}
            start = end
            self.records.append(seconds | self._communication())
            if len(self.records) == self._num_steps:
                raise _Enough

    def _communication(self) -> dict[str, float]:
        """Return the waiting time of an earlier step, once DDP reports it, as our engine does."""
        module = self._module
        data = module._get_ddp_logging_data() if isinstance(module, nn.parallel.DistributedDataParallel) else {}
        if "backward_comm_time" not in data:
            return {}
        waited = data["backward_comm_time"] - data["backward_compute_comm_overlap_time"]
        return {"communication_seconds": max(0, waited) / 1e9}


class _Proxy:
    """An object that behaves like another one, except when it is called, iterated or asked for a changed attribute."""

    def __init__(
        self,
        object: Any,
        call: Callable[..., Any] | None = None,
        iterate: Callable[[], Iterator[Any]] | None = None,
        **changed: Any,
    ) -> None:
        self._object, self._call, self._iterate = object, call, iterate
        self.__dict__.update(changed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._call is not None
        return self._call(*args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        assert self._iterate is not None
        return self._iterate()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._object, name)


def show_trainer(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table, with the ratios of the two trainers below them."""
    cells = []
    for row in rows:
        seconds = (f"{row[f'{part}_seconds']:.3f}" for part in ("step", *PARTS))
        cells.append([row["contender"], f"{row['samples_per_second']:.2f}", *seconds])
    by_name = {row["contender"]: row for row in rows}
    if {"open_clip", "ours"} <= by_name.keys():
        theirs, ours = by_name["open_clip"], by_name["ours"]
        ratios = (_ratio(theirs[f"{part}_seconds"], ours[f"{part}_seconds"]) for part in ("step", *PARTS))
        cells.append(["open_clip / ours", "", *ratios])
    headings = ["trainer", "samples/s", "step", *(part.replace("_", " ") for part in PARTS)]
    print_table(f"{rows[0]['case']}, {rows[0]['device']}, seconds of a step", headings, cells)
    print("communication: seconds of the backward pass that it waits for gradients of other ranks.")


def _ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f}" if ours else ""
