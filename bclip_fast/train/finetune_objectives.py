"""The objectives of `bclip finetune`: image-text pairs, or questions with answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bclip_fast import distributed
from bclip_fast.data.sources import shown
from bclip_fast.errors import UserError
from bclip_fast.eval import tasks
from bclip_fast.eval.datasets import EvalDataset, open_dataset
from bclip_fast.eval.datasets.vqa import open_dataset as open_questions
from bclip_fast.loss import ClipLoss
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.meter import MeterConfig, VqaModel, vqa_loss
from bclip_fast.pretrained import vqa_head

from .transfers import to_device

if TYPE_CHECKING:
    from .finetune import FinetuneConfig


class Pairs:
    """The contrastive loss over the global batch."""

    def __init__(self, config: FinetuneConfig) -> None:
        """Open the data. Raises UserError if they have no captions."""
        self.data: EvalDataset = open_dataset(config.data, config.split)
        captions = self.data.captions()
        if captions is None:
            raise UserError(
                f"data={shown(config.data)} has no captions; use shards, a .csv with a column caption, or .txt files"
            )
        self.texts, self.config = captions, config
        self.loss_fn = ClipLoss(rank=distributed.rank(), world_size=distributed.world_size())

    def model(self, clip: BiomedClip) -> nn.Module:
        """Return the model to train."""
        return clip

    def loss(self, output: dict[str, Tensor], rows: Sequence[int]) -> Tensor:
        """Return the loss of the samples `rows`: a scalar."""
        return self.loss_fn(
            output["image_features"], output["text_features"], output["logit_scale"], output.get("logit_bias")
        )

    def global_value(self, loss: Tensor) -> Tensor:
        """Return the loss of the global batch, detached: every rank has it."""
        return loss.detach()

    def save(self, run: Path, model: Any, state: dict[str, Tensor]) -> None:
        """Write nothing: the model is complete without further files."""


class Questions:
    """METER's loss: a binary classification for every answer of the vocabulary."""

    def __init__(self, config: FinetuneConfig) -> None:
        """Open the data. Raises UserError for a task of another protocol."""
        task = tasks.load(config.task)
        if task.protocol != "vqa":
            raise UserError(
                f"task={config.task} has the protocol {task.protocol}, not vqa; omit --task to train on pairs"
            )
        path = task.resolve_data_dir(config.data)
        if not isinstance(path, str):
            raise UserError(f"task {config.task} needs data in one folder or file; got {shown(path)}")
        self.data = open_questions(path, config.split, task)
        self.texts = [question.text for question in self.data.questions]
        self.answers = self.data.vocabulary()
        class_of = {answer: i for i, answer in enumerate(self.answers)}
        self.targets = torch.tensor([class_of[question.answer] for question in self.data.questions])
        self.config = config

    def model(self, clip: BiomedClip) -> nn.Module:
        """Return the model to train."""
        vision = clip.config.vision
        meter = MeterConfig(len(self.answers), vision.width, self.config.head_layers, vision.heads)
        model = VqaModel(clip, meter, self.answers, freeze=self.config.freeze_towers)
        model.common_answers = self.data.common_answers()  # type: ignore[assignment]
        if self.config.lora_rank:
            for name, parameter in clip.named_parameters():
                parameter.requires_grad_("lora_" in name and not self.config.freeze_towers)
        return model

    def loss(self, output: dict[str, Tensor], rows: Sequence[int]) -> Tensor:
        """Return the loss of the samples `rows`: a scalar."""
        logits = output["logits"]
        targets = to_device(nn.functional.one_hot(self.targets[list(rows)], logits.shape[1]), logits.device)
        return vqa_loss(logits, targets)

    def global_value(self, loss: Tensor) -> Tensor:
        """Return the mean loss over the ranks, which have equally many samples. Detached. Collective."""
        if distributed.world_size() == 1:
            return loss.detach()
        value = loss.detach().clone()
        torch.distributed.all_reduce(value)
        return value / distributed.world_size()

    def save(self, run: Path, model: Any, state: dict[str, Tensor]) -> None:
        """Write the head and the answers."""
        vqa_head.save(run, model, state)
