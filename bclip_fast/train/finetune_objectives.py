"""Two objectives of `bclip finetune`: image-text pairs, and questions with answers. `Classes` is the third."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bclip_fast import distributed
from bclip_fast.data.shards.positives import equal_texts, group_ids
from bclip_fast.data.sources import shown
from bclip_fast.data.transform import Preprocess, PreprocessConfig, denormalize
from bclip_fast.errors import UserError
from bclip_fast.eval import tasks
from bclip_fast.eval.datasets import EvalDataset, open_dataset
from bclip_fast.eval.datasets.shards import ShardEvalDataset
from bclip_fast.eval.datasets.vqa import open_dataset as open_questions
from bclip_fast.io.hashing import sha256
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.meter import MeterConfig, VqaModel, vqa_loss
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.pretrained import vqa_head

from .finetune_classes import mean_over_ranks
from .finetune_config import FinetuneConfig
from .init_weights import set_initial_logits
from .losses import build_loss, total
from .run_teacher import RunTeacher, eval_samples
from .transfers import to_device


class Pairs:
    """The contrastive loss over the global batch."""

    has_text = True

    def __init__(self, config: FinetuneConfig) -> None:
        """Open the data. Raises UserError if they have no captions."""
        self.data: EvalDataset = open_dataset(config.data, config.split, filter=config.filter)
        captions = self.data.captions()
        if captions is None:
            raise UserError(
                f"data={shown(config.data)} has no captions; use shards, a .csv with a column caption, or .txt files"
            )
        self.texts, self.config = captions, config
        self.groups = groups_of(self.data, captions, config.positives)

    def model(self, clip: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> nn.Module:
        """Return the model to train, with the initial scale and bias of its logits."""
        set_initial_logits(clip, self.config.loss)
        return clip

    def build_loss(
        self, device: torch.device, pixels: PreprocessConfig, recorded: dict[str, Any] | None, run: Path
    ) -> None:
        """Build the loss and its teacher. Call it before `loss`. Writes nothing. Collective.

        Args:
            pixels: preprocessing of the images that `loss` gets.
            recorded: state of the checkpoint from which the run continues, or None.

        Raises:
            UserError: on every rank, if the teacher or a class of the user's cannot be loaded.
        """
        identity, precision = sha256("\0".join([self.data.fingerprint, *self.texts])), self.config.engine.precision
        places = run, identity, len(self.texts), eval_samples(self.data, self.texts)
        self.teacher = RunTeacher(self.config.loss, device, precision, recorded, *places)
        self.loss_fn, self._pixels = build_loss(self.config.loss, self.teacher.scale), pixels

    def prepare(self, is_stopped: Callable[[], bool]) -> bool:
        """Write what the first step needs. Return False if a signal stopped a rank. Collective."""
        return self.teacher.prepare(is_stopped)

    def loss(self, output: dict[str, Tensor], rows: Sequence[int], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the samples `rows`, a scalar, and further scalars by their keys in metrics.jsonl.

        Args:
            images: (b, 3, S, S), the preprocessed images.
        """
        device, constants = output["image_features"].device, dict[str, Any]()
        scalars = {"logit_scale": output["logit_scale"].detach()}
        if self.groups is not None:
            groups = to_device(self.groups[list(rows)], device)
            constants["groups"] = groups, groups
            scalars["shared_positives"] = distributed.num_equal(groups)
        captions = [self.texts[row] for row in rows]
        features = self.teacher.features(rows, lambda: denormalize(images, self._pixels), captions)
        if features is not None:
            constants["teacher"] = to_device(features, device)
        names = "image_features", "text_features", "logit_scale", "logit_bias"
        value, terms = total(self.loss_fn(*map(output.get, names), **constants))
        return value, scalars | terms

    @property
    def state(self) -> dict[str, Any]:
        """The state for the checkpoint."""
        return self.teacher.state

    def global_value(self, loss: Tensor) -> Tensor:
        """Return the loss of the global batch, detached: every rank has it."""
        return loss.detach()

    def save(self, run: Path, model: Any, state: dict[str, Tensor]) -> None:
        """Write nothing: the model is complete without further files."""


class Questions:
    """METER's loss: a binary classification for every answer of the vocabulary."""

    has_text = True

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

    def model(self, clip: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> nn.Module:
        """Return the model to train."""
        vision = clip.config.vision
        meter = MeterConfig(len(self.answers), vision.width, self.config.head_layers, vision.heads)
        model = VqaModel(clip, meter, self.answers, freeze=self.config.freeze_towers)
        model.common_answers = self.data.common_answers()  # type: ignore[assignment]
        if self.config.lora_rank:
            for name, parameter in clip.named_parameters():
                parameter.requires_grad_("lora_" in name and not self.config.freeze_towers)
        return model

    def build_loss(self, *_: Any) -> None:
        """Do nothing: the loss needs nothing."""

    def prepare(self, is_stopped: Callable[[], bool]) -> bool:
        """Do nothing: the first step needs nothing."""
        return True

    def loss(self, output: dict[str, Tensor], rows: Sequence[int], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the samples `rows`, a scalar, and no further scalars."""
        logits = output["logits"]
        targets = to_device(nn.functional.one_hot(self.targets[list(rows)], logits.shape[1]), logits.device)
        return vqa_loss(logits, targets), {}

    @property
    def state(self) -> dict[str, Any]:
        """The state for the checkpoint."""
        return {}

    def global_value(self, loss: Tensor) -> Tensor:
        """Return the mean loss over the ranks, which have equally many samples. Detached. Collective."""
        return mean_over_ranks(loss)

    def save(self, run: Path, model: Any, state: dict[str, Tensor]) -> None:
        """Write the head and the answers."""
        vqa_head.save(run, model, state)


def groups_of(data: EvalDataset, captions: Sequence[str], positives: str) -> Tensor | None:
    """The group of each sample (N,) int64, by `FinetuneConfig.positives`. None for pair.

    Raises:
        UserError: the data have no manifest, which these positives need.
    """
    if positives == "pair":
        return None
    if isinstance(data, ShardEvalDataset):
        groups = group_ids(data.shards, positives)
    elif positives == "captions":
        groups = equal_texts(captions)
    else:
        raise UserError(
            f"positives={positives} needs the manifest of shards that bclip ingest build wrote, which data={data.path} "
            "lacks; use captions or pair"
        )
    return None if groups is None else torch.from_numpy(groups)
