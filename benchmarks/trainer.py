"""`bclip bench trainer`: where the time of a step of pretraining goes, ours and open_clip's own trainer."""

from __future__ import annotations

import contextlib
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
from .loader import LoaderConfig, figures_to_shards
from .peers import import_open_clip
from .step import open_clip_twin

PARTS = ("data_wait", "forward", "loss", "backward", "optimizer", "communication")
_OPTIM = OptimConfig(lr=1e-5, warmup_steps=0)


@dataclass(frozen=True)
class TrainerConfig:
    """Steps of both trainers from the same shards, on the same ranks, with the same model: DDP, bf16, AdamW."""

    preset: str = "biomedclip_b16"
    shards: str = ""
    """A folder that `bclip ingest build` wrote, with a shard a rank at least; empty: articles of the shared data."""
    batch_size: int = 16
    """Over all ranks."""
    ranks: int = 2
    """Processes of this machine, one thread each."""
    steps: int = 4
    """Of each trainer in a round; one more before them isn't counted."""
    rounds: int = 2
    """Each trainer has its turn in each; a time is the median over all steps."""

    def __post_init__(self) -> None:
        if min(self.ranks, self.steps, self.rounds) < 1 or self.batch_size % self.ranks or self.batch_size < 1:
            raise UserError(
                f"trainer.batch_size={self.batch_size}, ranks={self.ranks}, steps={self.steps}, rounds={self.rounds}: "
                "need at least 1 each, and a batch that the ranks divide"
            )


def measure_trainer(config: TrainerConfig) -> list[dict[str, Any]]:
    """A row for each trainer. Raises Unavailable without open_clip and its trainer."""
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
        whole = statistics.median(record["step_seconds"] for record in records)
        rows.append(
            {
                "operator": "trainer",
                "case": f"{config.preset}-{config.ranks}x{config.batch_size // config.ranks}",
                "contender": name,
                "batch": config.batch_size,
                "num_steps": len(records),
                "step_seconds": whole,
                "samples_per_second": config.batch_size / whole,
                **{f"{part}_seconds": value for part, value in seconds.items()},
            }
        )
    return rows


def _many_shards(root: Path) -> Path:
    """Of articles: open_clip deals shards to ranks, so each needs some."""
    with ShardWriter(root / "shards", max_shard_bytes=2 << 20) as writer:
        for sample in ShardDataset(figures_to_shards(LoaderConfig(), root / "figures")):
            writer.write(sample, "train")
    return writer.out


def _on_rank(rank: int, config: TrainerConfig, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    # As under torchrun; what mp.spawn sets in its children is not for open_clip's loader, which can't be pickled.
    multiprocessing.set_start_method("fork", force=True)
    root = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=config.ranks)
    steps: dict[str, list[dict[str, float]]] = {"open_clip": [], "ours": []}
    for number in range(config.rounds):
        # What each trainer does first, page faults and lazy imports, is no step of a run.
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
    """Steps of open_clip_train's `train_one_epoch`, with clocks around what it calls."""
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
    # Its own grouping of a tar's files, of 2022, fails on what today's webdataset reads.
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
    """The steps that were asked for are made: open_clip's workers would go through the whole epoch."""


class _Meter:
    """Stands around what open_clip's loop calls and says how long each part of a step took."""

    def __init__(self, model: nn.Module, num_steps: int) -> None:
        self._module, self._num_steps = model, num_steps
        self._clock = StepTimer(torch.device("cpu"))
        self.records: list[dict[str, float]] = []
        self.model = _Stand(model, self.timed(model, "forward"))
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model._set_ddp_runtime_logging_sample_rate(1)

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self._clock.lap(part)
            return result

        return call

    def optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        return _Stand(optimizer, step=self.timed(optimizer.step, "optimizer"))

    def batches(self, loader: Any) -> Any:
        return _Stand(loader, iterate=lambda: self._batches(loader))

    def _batches(self, loader: Any) -> Iterator[Any]:
        asked, source = time.perf_counter(), iter(loader)
        for batch in source:
            now = time.perf_counter()
            waited, start = now - asked, asked
            self._clock.start()
            yield batch
            asked = time.perf_counter()
            seconds = {"step_seconds": asked - start, "data_wait_seconds": waited, **self._clock.seconds()}
            self.records.append(seconds | self._communication())
            if len(self.records) == self._num_steps:
                raise _Enough

    def _communication(self) -> dict[str, float]:
        """As `PlainEngine.communication` has it: of a step before, as soon as DDP tells."""
        module = self._module
        found = module._get_ddp_logging_data() if isinstance(module, nn.parallel.DistributedDataParallel) else {}
        if "backward_comm_time" not in found:
            return {}
        waited = found["backward_comm_time"] - found["backward_compute_comm_overlap_time"]
        return {"communication_seconds": max(0, waited) / 1e9}


class _Stand:
    """In an object's place: called, iterated or asked for one of `changed`, it does as told; else as the object."""

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
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rows[0]['case']}, {rows[0]['device']}, seconds of a step", title_justify="left")
    for heading in ("trainer", "samples/s", "step", *(part.replace("_", " ") for part in PARTS)):
        table.add_column(heading, justify="left" if heading == "trainer" else "right")
    for row in rows:
        times = (f"{row[f'{part}_seconds']:.3f}" for part in ("step", *PARTS))
        table.add_row(row["contender"], f"{row['samples_per_second']:.2f}", *times)
    with contextlib.suppress(StopIteration):
        theirs = next(row for row in rows if row["contender"] == "open_clip")
        ours = next(row for row in rows if row["contender"] == "ours")
        ratios = (_ratio(theirs[f"{part}_seconds"], ours[f"{part}_seconds"]) for part in ("step", *PARTS))
        table.add_row("open_clip / ours", "", *ratios)
    Console(width=120).print(table)
    print("Communication is what the backward pass waited for gradients of other ranks, and part of it.")


def _ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f}" if ours else ""
