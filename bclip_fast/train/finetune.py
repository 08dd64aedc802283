"""`bclip finetune MODEL --data DATA`: the towers on image-text pairs, or METER's head on questions.

    bclip finetune hf-hub:ORG/NAME --data pairs.csv --lora_rank 8            # any CSV, shards or folder with captions
    bclip finetune RUN --data vqa_rad/ --task vqa_rad --epochs 20

Data are read as `bclip eval` reads them. The run folder holds config.toml, metrics.jsonl, checkpoints/ and model/ in
open_clip's layout, into which LoRA is merged; questions leave vqa/ beside it. `bclip eval RUN` takes either.

Order, crops and dropout are functions of (seed, epoch, sample) and (seed, step, rank), so a resumed run is equal to one
that was never stopped.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from bclip_fast import config as config_files
from bclip_fast import distributed, pretrained
from bclip_fast.data.images import open_image
from bclip_fast.data.transform import Preprocess, random_resized_crop_box, to_rgb
from bclip_fast.errors import UserError
from bclip_fast.eval import tasks
from bclip_fast.eval.datasets import EvalDataset, open_dataset
from bclip_fast.eval.datasets.vqa import open_dataset as open_questions
from bclip_fast.io.hashing import sha256
from bclip_fast.loss import ClipLoss
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.meter import MeterConfig, VqaModel, vqa_loss
from bclip_fast.model.packed import Packed
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.transformer import Linear
from bclip_fast.pretrained import vqa_head

from . import backends
from . import checkpoint as checkpoints
from .engine import deepspeed as engines
from .engine.deepspeed import EngineConfig
from .metrics import MetricsLog
from .precision import resolve
from .schedule import OptimConfig, learning_rate

log = logging.getLogger(__name__)

# The linear layers of both towers' blocks; patch and output projections keep their weights.
_LORA_TARGETS = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a trained model is fitted to data of one's own."""

    model: tyro.conf.Positional[str]
    """A run folder, a folder in open_clip's layout, or hf-hub:ID."""
    data: str
    """Pairs: shards, a .csv with columns path,caption, or a folder of images beside .txt. Questions: as --task."""
    split: str = "train"
    task: str = ""
    """A task of protocol vqa (vqa_rad, slake, a TOML file, or `vqa` for a CSV); none: contrastive on pairs."""
    run: str = "runs/finetune"
    """Folder of the run."""
    resume: bool = False
    """Continue from the newest whole checkpoint of the run folder, and begin where there is none."""
    epochs: int = 10
    batch_size: int = 32
    seed: int = 0
    lora_rank: int = 0
    """Rank of LoRA (arXiv 2106.09685) through peft in the linear layers of the towers; 0 trains every weight."""
    lora_alpha: int = 16
    freeze_towers: bool = False
    """Questions only: train the head alone."""
    head_layers: int = 6
    """Co-attention layers a stream of METER's head."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of a picture's area in a training crop; 1 1 takes the centre crop."""
    num_workers: int = 2
    checkpoint_every: int = 0
    """Steps between checkpoints, besides the one at the end."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-5, warmup_steps=100, weight_decay=0.01, eps=1e-8, decay="linear")
    )
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(name="ddp"))

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.lora_rank < 0 or self.num_workers < 1:
            raise UserError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, lora_rank={self.lora_rank}, "
                f"num_workers={self.num_workers}: need at least 1, 2, 0 and 1"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"crop_scale={self.crop_scale}: need 0 < smallest <= largest <= 1")


def finetune(config: FinetuneConfig) -> Path:
    """Trains to the end and returns the run folder.

    Raises:
        UserError: data without captions or answers, fewer samples than a batch, a batch that the ranks cannot share, a
            checkpoint of another run, a loss that isn't finite.
    """
    distributed.init()
    atexit.register(distributed.shutdown)
    if config.batch_size % distributed.world_size():
        raise UserError(f"batch_size={config.batch_size} is not a multiple of {distributed.world_size()} ranks")
    run = Path(config.run)
    continued = run if config.resume and checkpoints.steps(run / "checkpoints") else None
    precision = resolve(config.engine.precision, continued)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))
    objective: _Pairs | _Questions = _Questions(config) if config.task else _Pairs(config)
    clip, preprocess, tokenizer = pretrained.load(config.model)
    if run.resolve() == Path(config.model).resolve():
        raise UserError(f"--run is the model's own folder, {run}: give another")
    begun = bool(checkpoints.steps(run / "checkpoints"))
    if begun and not config.resume:
        raise UserError(f"{run} holds a run already: --resume continues it, --run names another")
    torch.manual_seed(config.seed)
    clip.requires_grad_(True)
    adapter: Any = None
    if config.lora_rank:
        adapter = _add_lora(clip, config)
    model = objective.model(clip)
    if distributed.is_main():
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.toml").write_text(config_files.to_toml(config), encoding="utf-8")
    with backends.of_run(run, resumed=begun):
        _Loop(config, run, objective, model, preprocess, tokenizer, adapter).train()
    return run


def run(config: FinetuneConfig) -> None:
    """The command."""
    finetune(config)


class _Pairs:
    """The contrastive objective over the global batch."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.data: EvalDataset = open_dataset(config.data, config.split)
        captions = self.data.captions()
        if captions is None:
            raise UserError(f"{config.data} has no captions: give shards, a .csv with a column caption, or .txt files")
        self.texts, self.config = captions, config
        self.loss_fn = ClipLoss(rank=distributed.rank(), world_size=distributed.world_size())

    def model(self, clip: BiomedClip) -> nn.Module:
        return clip

    def loss(self, output: dict[str, Tensor], rows: Sequence[int]) -> Tensor:
        return self.loss_fn(
            output["image_features"], output["text_features"], output["logit_scale"], output.get("logit_bias")
        )

    def save(self, run: Path, model: Any, state: dict[str, Tensor]) -> None: ...


class _Questions:
    """METER's objective: every answer of the vocabulary, yes or no."""

    def __init__(self, config: FinetuneConfig) -> None:
        task = tasks.load(config.task)
        if task.protocol != "vqa":
            raise UserError(f"task {config.task!r} is {task.protocol}, not vqa; pairs need no --task")
        self.data = open_questions(task.resolve_data_dir(config.data), config.split, task)
        self.texts = [question.text for question in self.data.questions]
        self.answers = self.data.vocabulary()
        number = {answer: i for i, answer in enumerate(self.answers)}
        self.targets = torch.tensor([number[question.answer] for question in self.data.questions])
        self.config = config

    def model(self, clip: BiomedClip) -> nn.Module:
        vision = clip.config.vision
        meter = MeterConfig(len(self.answers), vision.width, self.config.head_layers, vision.heads)
        model = VqaModel(clip, meter, self.answers, freeze=self.config.freeze_towers)
        model.common_answers = self.data.common_answers()  # type: ignore[assignment]
        if self.config.lora_rank:
            for name, parameter in clip.named_parameters():
                parameter.requires_grad_("lora_" in name and not self.config.freeze_towers)
        return model

    def loss(self, output: dict[str, Tensor], rows: Sequence[int]) -> Tensor:
        logits = output["logits"]
        targets = nn.functional.one_hot(self.targets[list(rows)], logits.shape[1]).to(logits.device)
        return vqa_loss(logits, targets)

    def save(self, run: Path, model: Any, state: dict[str, Tensor]) -> None:
        vqa_head.save(run, model, state)


class _Loop:
    def __init__(
        self,
        config: FinetuneConfig,
        run: Path,
        objective: _Pairs | _Questions,
        model: nn.Module,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        adapter: Any,
    ) -> None:
        self.config, self.run, self.objective, self.model = config, run, objective, model
        self.preprocess, self.tokenizer, self.adapter = preprocess, tokenizer, adapter
        num = len(objective.texts)
        if num < config.batch_size:
            raise UserError(f"{config.data} has {num} samples, fewer than batch_size {config.batch_size}")
        self.steps_per_epoch = num // config.batch_size
        self.num_steps = config.epochs * self.steps_per_epoch
        self.step = 0
        # Everything that makes another run of it: a checkpoint of anything else is refused.
        same = {
            "data": objective.data.fingerprint,
            "texts": sha256("\0".join(objective.texts)),
        }
        skipped = ("run", "resume", "model", "data", "engine", "num_workers", "checkpoint_every", "epochs")
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in skipped}
        self.identity = json.loads(json.dumps(same | settings, default=list))
        saved = None
        if config.resume and checkpoints.steps(run / "checkpoints"):
            saved = checkpoints.load_latest(run / "checkpoints")
            if difference := checkpoints.first_difference(saved.data, self.identity, "the run"):
                raise UserError(f"cannot resume from {run / 'checkpoints'}: {difference}")
            model.load_state_dict(saved.model)
            self.step = saved.step
        self.engine = engines.make(model.train(), config.engine, config.optim, config.batch_size)
        if saved is not None:
            self.engine.load_optimizer_state(saved.optimizer)

    def train(self) -> None:
        config, main = self.config, distributed.is_main()
        num = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        log.info("%d samples, %d steps, %d weights to train", len(self.objective.texts), self.num_steps, num)
        record = MetricsLog(self.run, self.step) if main else None
        with ThreadPoolExecutor(config.num_workers) as pool:
            waiting = self._start(pool, self.step)
            while self.step < self.num_steps:
                started = time.perf_counter()
                rows, futures = waiting
                images = torch.stack([future.result() for future in futures])
                if self.step + 1 < self.num_steps:
                    waiting = self._start(pool, self.step + 1)
                line = self._train_step(rows, images)
                line["samples_per_second"] = config.batch_size / (time.perf_counter() - started)
                if record is not None:
                    record.write(line)
                    if self.step % max(1, self.num_steps // 20) == 0:
                        log.info("step %d of %d  loss %.4f", self.step, self.num_steps, line["loss"])
                if config.checkpoint_every and self.step % config.checkpoint_every == 0 and self.step < self.num_steps:
                    self._save(last=False)
        self._save(last=True)
        if record is not None:
            record.close()
        self.engine.close()

    def _rows(self, step: int) -> list[int]:
        """This rank's samples of a step: an epoch is a permutation, whose tail short of a batch is left out."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.objective.texts), generator=generator)
        batch = order[place * self.config.batch_size :][: self.config.batch_size].tolist()
        return batch[distributed.rank() :: distributed.world_size()]

    def _start(self, pool: ThreadPoolExecutor, step: int) -> tuple[list[int], list[Any]]:
        if step >= self.num_steps:
            return [], []
        rows = self._rows(step)
        epoch = step // self.steps_per_epoch
        return rows, [pool.submit(self._picture, row, epoch) for row in rows]

    def _picture(self, row: int, epoch: int) -> Tensor:
        """(3, S, S) float32: a random crop, as pretraining takes it, then the model's own preprocessing."""
        image = to_rgb(open_image(self.objective.data.image(row), lambda: self.objective.data.key(row)))
        if self.config.crop_scale != (1, 1):
            top, left, height, width = random_resized_crop_box(
                image.height, image.width, self.config.seed, epoch, row, self.config.crop_scale
            )
            size = self.preprocess.config.size
            image = image.resize((size, size), 3, (left, top, left + width, top + height))
        return self.preprocess(image)

    def _train_step(self, rows: list[int], images: Tensor) -> dict[str, Any]:
        config, device = self.config, self.engine.device
        torch.manual_seed(config.seed * 1_000_003 + 8191 * self.step + distributed.rank())
        text: Packed = self.tokenizer.packed([self.objective.texts[row] for row in rows]).to(device)
        output = self.engine(images.to(device), text)
        loss = self.objective.loss(output, rows)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(f"the loss is {value} at step {self.step + 1}; lower optim.lr or use engine.precision fp32")
        self.engine.backward(loss)
        lr = learning_rate(self.step, self.num_steps, config.optim)
        result = self.engine.step(lr)
        if result.skipped:
            log.warning("step %d: the gradient isn't finite; no update", self.step + 1)
        self.step += 1
        return {
            "step": self.step,
            "epoch": (self.step - 1) // self.steps_per_epoch,
            "loss": value,
            "lr": lr,
            "grad_norm": result.grad_norm,
        }

    def _save(self, last: bool) -> None:
        state, optimizer = self.engine.model_state(), self.engine.optimizer_state()
        if distributed.is_main():
            saved = checkpoints.Checkpoint(self.step, state, optimizer, self.identity, {})
            checkpoints.save(self.run / "checkpoints", saved, keep=2)
            if last:
                self._export(state)
        distributed.barrier()

    def _export(self, state: dict[str, Tensor]) -> None:
        """model/ with LoRA merged in, and what the objective keeps beside it."""
        self.model.load_state_dict(state)
        clip: Any = self.model.clip if isinstance(self.model, VqaModel) else self.model
        if self.adapter is not None:
            clip = self.adapter.merge_and_unload()
        pretrained.save(self.run / "model", clip.float().cpu(), self.preprocess, self.tokenizer)
        self.objective.save(self.run, self.model, state)
        log.info("the model is in %s", self.run / "model")


def _add_lora(clip: BiomedClip, config: FinetuneConfig) -> Any:
    """peft's LoRA in the towers' blocks, everything else frozen; what is returned merges it."""
    if clip.config.vision.kind == "resnet":
        raise UserError(f"lora_rank={config.lora_rank}: LoRA is for transformers, vision.kind is resnet; give 0")
    import peft

    lora = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=rf".*layers\.\d+\.({'|'.join(_LORA_TARGETS)})"
    )
    adapted = peft.LoraModel(clip, lora, "default")
    for module in adapted.modules():
        # peft's own two factors, whose bfloat16 products would be the library's on every CPU.
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return adapted
