"""The objective of `bclip finetune --task classification`: a classifier on the image embedding, with early stopping."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast import distributed
from bclip_fast.data.transform import Preprocess
from bclip_fast.errors import UserError
from bclip_fast.eval import prompts, statistics, zero_shot
from bclip_fast.eval.datasets.subset import SubsetDataset
from bclip_fast.eval.embed import Embedder
from bclip_fast.eval.labels import look_alike
from bclip_fast.io.atomic import write_text
from bclip_fast.io.hashing import sha256
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.image_classifier import ClassHead, ImageClassifier
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.pretrained import class_head

from . import class_data
from .finetune_config import FinetuneConfig
from .transfers import to_device
from .validation import BestMetric

log = logging.getLogger(__name__)

SPLITS = "splits.csv"


class _ImageTower(nn.Module):
    """The image tower as `Embedder` calls it."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, images: Tensor, normalize: bool) -> Tensor:
        return F.normalize(self.visual(images).float(), dim=-1) if normalize else self.visual(images)


class Classes:
    """Cross-entropy of the classes, or binary cross-entropy of each class of multi-label samples.

    Attributes:
        features: with frozen towers, the embeddings of train, float32 (N, D). `prepare` computes them.
        best: the best value of the validation metric and its step.
    """

    has_text = False

    def __init__(self, config: FinetuneConfig) -> None:
        """Read the data. Raises the errors of `class_data.read` and `class_data.class_weights`."""
        self.config = config
        self.content = class_data.read(config)
        train, val = (self.content.parts[split] for split in ("train", "val"))
        self.data, self.texts, self.targets = train.data, train.labels, train.targets
        self.weights = class_data.class_weights(config.class_weights, train.targets, self.content.classes)
        self.facts = {
            "classes": list(self.content.classes),
            "validation data": sha256("\0".join([val.data.fingerprint, *val.labels])),
        }
        self.features: Tensor | None = None
        self.best = BestMetric(f"{'-' if config.metric == 'loss' else ''}{config.metric}")
        self._num_waited = 0

    def model(self, clip: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> nn.Module:
        """Return the model to train. Its head starts at the embeddings of the prompts, or at zero without prompts.

        Raises:
            UserError: a class has no prompt.
        """
        content, config = self.content, self.config
        head = ClassHead(content.classes, config.multi_label, clip.config.embed_dim, content.label)
        with torch.no_grad():
            head.scale.copy_(clip.logit_scale.exp())
            if config.prompts:
                head.weight.copy_(zero_shot.class_embeddings(_text_encoder(clip, tokenizer), self._prompt_set()))
        clip.text.requires_grad_(False)
        clip.logit_scale.requires_grad_(False)
        self._visual, self._preprocess, self._tokenizer = clip.visual, preprocess, tokenizer
        if config.freeze_towers:
            clip.visual.requires_grad_(False)
            return ImageClassifier(None, head)
        if config.lora_rank:
            for name, parameter in clip.visual.named_parameters():
                parameter.requires_grad_("lora_" in name)
        return ImageClassifier(clip.visual, head)

    def _prompt_set(self) -> prompts.PromptSet:
        classes = self.content.classes
        if self.config.prompts == "labels":
            return prompts.from_values(classes)
        found = prompts.named(self.config.prompts)
        if missing := [name for name in classes if name not in found.classes]:
            raise UserError(
                f"prompts={self.config.prompts} has no class {missing[0]!r}{look_alike(missing[0], found.classes)}; "
                "add it to the file, or leave out --prompts"
            )
        return prompts.PromptSet({name: found.classes[name] for name in classes}, found.templates, found.source)

    def build_loss(self, device: torch.device, pixels: Any, recorded: dict[str, Any] | None, run: Path) -> None:
        """Copy the weights of the classes to the device, and restore the best value of the checkpoint."""
        self._device, self._run = device, run
        self.weights = self.weights.to(device)
        if recorded is not None:
            self.best.load_state(recorded.get("best", {}))
            self._num_waited = recorded.get("num_waited", 0)

    def prepare(self, is_stopped: Callable[[], bool]) -> bool:
        """Write the splits. With frozen towers, embed train and val once. Return False if a signal came. Collective."""
        distributed.run_on_rank0(lambda: write_text(self._run / SPLITS, self.content.as_csv()))
        if self.config.freeze_towers:
            self._visual.to(self._device)
            parts = self.content.parts
            self.features, self._val_features = (self._embed(parts[split].data) for split in ("train", "val"))
        return not distributed.total(int(is_stopped()))

    def _embed(self, data: SubsetDataset) -> Tensor:
        """Embed images, each rank its share: float32 (N, D) on the CPU. NaN for damaged ones. Collective."""
        rows = list(range(distributed.rank(), len(data), distributed.world_size()))
        precision: Any = {"fp8": "bf16"}.get(self.config.engine.precision, self.config.engine.precision)
        mine: tuple[Tensor | None, str] = None, ""
        try:
            if rows:
                embedder = Embedder(
                    _ImageTower(self._visual), self._preprocess, self._tokenizer, device=self._device,
                    precision=precision, batch_size=self.config.batch_size, num_workers=self.config.num_workers,
                    on_bad_image=self.config.on_bad_image,
                )  # fmt: skip
                mine = embedder.uncached_images(SubsetDataset(data, rows)).cpu(), ""
        except UserError as error:
            mine = None, str(error)
        shares = distributed.all_gather_object(mine)
        if problem := next((problem for _, problem in shares if problem), ""):
            raise UserError(problem)
        found = [share for share, _ in shares if share is not None]
        features = torch.empty(len(data), found[0].shape[1])
        for rank, share in enumerate(found):
            features[rank :: distributed.world_size()] = share
        return features

    def loss(self, output: dict[str, Tensor], rows: Sequence[int], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the samples `rows`, a scalar, and no further scalars."""
        targets = to_device(self.targets[list(rows)], self._device)
        return class_loss(output["logits"], targets, self.weights), {}

    @property
    def state(self) -> dict[str, Any]:
        """The state for the checkpoint."""
        return {"best": self.best.state, "num_waited": self._num_waited}

    def global_value(self, loss: Tensor) -> Tensor:
        """Return the mean loss over the ranks, which have equally many samples. Detached. Collective."""
        return mean_over_ranks(loss)

    @property
    def is_finished(self) -> bool:
        """Whether the metric has not improved for `patience` epochs."""
        return 0 < self.config.patience <= self._num_waited

    @torch.no_grad()
    def validate(self, step: int, model: Any) -> tuple[bool, dict[str, float]]:
        """Measure the model on val. Return whether it is the best so far, and the metrics. Collective."""
        val = self.content.parts["val"]
        embeddings = self._val_features if self.config.freeze_towers else self._embed(val.data)
        is_read = embeddings.isfinite().all(1)
        logits = model.head(embeddings[is_read].to(self._device)).double().cpu()
        metrics = val_metrics(logits, val.targets[is_read])
        is_best = self.best.update(step, metrics)
        self._num_waited = 0 if is_best else self._num_waited + 1
        return is_best, metrics

    def save(self, run: Path, model: Any, state: dict[str, Tensor]) -> None:
        """Write the head."""
        class_head.save(run, model.head)


def class_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the mean weighted loss of a batch, a scalar.

    The mean is over samples, not over weights, so the sum over batches is that of the whole split.

    Args:
        logits: (N, C).
        targets: class numbers int64 (N,), or bool (N, C) for multi-label samples.
        weights: (C,), of the samples of each class, or of the positives of each class of multi-label samples.
    """
    if targets.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), pos_weight=weights)
    return (F.cross_entropy(logits, targets, reduction="none") * weights[targets]).mean()


def val_metrics(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Return loss, accuracy, auroc (mean over classes that have both), and balanced_accuracy unless multi-label.

    Args:
        logits: float64 (N, C), finite.
        targets: as for `class_loss`.

    Raises:
        UserError: the logits are not finite, or no class has positive and negative samples.
    """
    if not bool(logits.isfinite().all()):
        raise UserError("the classifier's logits hold NaN or infinity; lower optim.lr")
    num_classes = logits.shape[1]
    metrics = {"loss": float(class_loss(logits, targets, torch.ones(num_classes, dtype=logits.dtype)))}
    if targets.ndim == 2:
        is_of, scores = targets, logits
        metrics["accuracy"] = float(((logits > 0) == targets).double().mean())
    else:
        is_of, scores = F.one_hot(targets, num_classes).bool(), logits.softmax(1)
        is_right = (logits.argmax(1) == targets).double()
        recalls = [float(is_right[targets == number].mean()) for number in targets.unique()]
        metrics |= {"accuracy": float(is_right.mean()), "balanced_accuracy": sum(recalls) / len(recalls)}
    # With two classes, both have the same area.
    areas = [statistics.auroc(np.asarray(is_of[:, i]), np.asarray(scores[:, i])) for i in range(num_classes)]
    defined = [area for area in areas if area is not None]
    if not defined:
        raise UserError("no class of the validation split has positive and negative samples; add some")
    return metrics | {"auroc": sum(defined) / len(defined)}


def mean_over_ranks(loss: Tensor) -> Tensor:
    """Return the mean of a scalar over the ranks, detached. Collective."""
    if distributed.world_size() == 1:
        return loss.detach()
    value = loss.detach().clone()
    torch.distributed.all_reduce(value)
    return value / distributed.world_size()


def _text_encoder(clip: BiomedClip, tokenizer: Tokenizer) -> Callable[[list[str]], Tensor]:
    def encode(texts: list[str]) -> Tensor:
        clip.eval()
        return torch.cat([clip.encode_text(tokenizer(texts[i : i + 64])) for i in range(0, len(texts), 64)])

    return encode
