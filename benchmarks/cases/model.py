"""The training step of `bclip bench step`: its configuration, inputs and variants, and open_clip's twin of a model."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bclip_fast.benchmarks.peers import import_open_clip
from bclip_fast.data.transform import normalize
from bclip_fast.errors import UserError
from bclip_fast.model import open_clip_config, weights
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.flops import step_flops
from bclip_fast.model.open_clip_sections import CONFIG_FILE
from bclip_fast.model.packed import Packed
from bclip_fast.model.tower_config import PUBMEDBERT

from .case import peer, shared_data

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class StepConfig:
    """The step of `bclip bench step`: forward, loss, backward, AdamW."""

    preset: str = "biomedclip_b16"
    """Name of the model."""
    batch_size: int = 16
    """Pairs in the batch."""
    precision: str = "bf16"
    """bf16 (autocast) or fp32."""
    dropout: float = 0.0
    """Dropout of the text tower's hidden states and attention. The published training used 0.1."""
    lengths: str = ""
    """File with a histogram of caption lengths, in lines "tokens count". Empty: the captions of BCLIP_SHARED_DATA."""
    rounds: int = 3
    """Number of rounds. A round steps each contender once. Ratios are medians over the rounds. Times are those of the
    fastest round."""
    ablation: bool = True
    """Also time ours while its improvements are turned on one by one."""
    compile: bool = False
    """Also time ours with its layers under torch.compile."""
    mixtures: bool = False
    """Time only ours, on three sets of captions: all have the mean length, the histogram's lengths, or one token and
    the context length in turn."""
    open_clip: bool = True
    """Also time open_clip."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS or self.batch_size < 1 or self.rounds < 1:
            raise UserError(
                f"step.precision={self.precision}, batch_size={self.batch_size}, rounds={self.rounds}: "
                f"precision must be one of {', '.join(PRECISIONS)}, and the others at least 1"
            )


@dataclass(frozen=True)
class Features:
    """The improvements that a variant of ours uses. The fields from fused_adamw on keep the arithmetic."""

    packing: bool = True
    first_only: bool = True
    raw_pixels: bool = True
    pointwise: bool = True
    attention: bool = True
    linear: bool = True
    fused_adamw: bool = True
    keeps_memory: bool = True
    checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True)
class OpenClip:
    """The variant with open_clip's towers, loss and AdamW. `checkpointing` turns on its gradient checkpointing."""

    checkpointing: bool = False


def variants(config: StepConfig) -> dict[str, Features | OpenClip]:
    """Return the variants to time, by name."""
    by_name: dict[str, Features | OpenClip] = {"open_clip": OpenClip()} if config.open_clip else {}
    if config.ablation:
        features = Features(**dict.fromkeys(asdict(Features()), False))
        by_name["ours, padded, plain PyTorch"] = features
        titles = {
            "packing": "+ packed captions",
            "first_only": "+ last layer for CLS alone",
            "raw_pixels": "+ normalisation in the patch matmul",
            "pointwise": "+ fused norms, dropout, GELU",
            "attention": "+ attention operator",
            "linear": "+ linear operator",
            "fused_adamw": "+ fused AdamW",
            "keeps_memory": "ours: + freed memory kept",
        }
        for name, title in titles.items():
            features = replace(features, **{name: True})
            by_name[title] = features
    else:
        by_name["ours"] = Features()
    if config.compile:
        by_name["ours, compiled"] = Features(compile=True)
    if config.open_clip:
        by_name["open_clip, checkpointed"] = OpenClip(checkpointing=True)
    return {**by_name, "ours, checkpointed": Features(checkpointing=True)}


@dataclass
class Inputs:
    """The batch of a step.

    images: (n, S, S, 3) uint8. ids: (n, L) int64, padded. text: the same captions, packed.
    flops: operations of a step on these tokens, if the last layers compute only one token.
    """

    images: Tensor
    ids: Tensor
    text: Packed
    flops: float


def make_inputs(config: StepConfig, model: BiomedClipConfig, lengths: Sequence[int] = ()) -> Inputs:
    """Return a random batch. lengths: tokens of each caption. Empty: the distribution of `caption_lengths`."""
    text = model.text
    generator = torch.Generator().manual_seed(0)
    side, size = model.vision.image_size, config.batch_size
    images = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=generator)
    lengths = lengths or _quantiles(caption_lengths(config, text.context_length), size)
    ids = torch.full((size, text.context_length), text.pad_id)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(5, text.vocab_size - 1, (length,), generator=generator)
        row[length - 1] = text.vocab_size - 1 if text.end_id is None else text.end_id
    packed = Packed.of(torch.cat([row[:length] for row, length in zip(ids, lengths, strict=True)]), lengths)
    return Inputs(images, ids, packed, step_flops(model, lengths))


def caption_lengths(config: StepConfig, context_length: int) -> list[int]:
    """Return the number of tokens of each caption, cut to the context length."""
    if config.lengths:
        rows = [line.split() for line in Path(config.lengths).read_text().splitlines() if line.strip()]
        return [min(int(tokens), context_length) for tokens, count in rows for _ in range(int(count))]
    # The tokenizer needs packages that a machine with a GPU may lack.
    from bclip_fast.model.tokenizer import Tokenizer

    folder = shared_data()
    tokenizer = Tokenizer.from_file(folder / "vocab" / "pubmedbert" / "vocab.txt", context_length)
    with open(folder / "pmc_articles" / "pairs.jsonl", encoding="utf-8") as lines:
        return tokenizer.packed([json.loads(line)["caption"] for line in lines]).lengths.tolist()


def mixtures(config: StepConfig, model: BiomedClipConfig) -> dict[str, Inputs]:
    """Return batches with the same images and the three sets of captions of `StepConfig.mixtures`, by name."""
    size, longest = config.batch_size, model.text.context_length
    real = make_inputs(config, model)
    mean = round(sum(real.text.lengths.tolist()) / size)
    halves = [1, longest] * (size // 2) + [longest] * (size % 2)
    return {
        f"ours, {mean} tokens each": make_inputs(config, model, [mean] * size),
        "ours, real lengths": real,
        f"ours, 1 or {longest} tokens": make_inputs(config, model, halves),
    }


def _quantiles(lengths: Sequence[int], count: int) -> list[int]:
    """Return `count` evenly spaced quantiles of the lengths, in random order."""
    ordered = sorted(lengths)
    chosen = [ordered[int((i + 0.5) / count * len(ordered))] for i in range(count)]
    return [chosen[i] for i in torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()]


def open_clip_twin(model: BiomedClip) -> nn.Module:
    """Return open_clip's CustomTextCLIP with the configuration and weights of `model`.

    Raises Unavailable if open_clip is not installed.
    """
    open_clip = peer(import_open_clip)
    config, working_directory = model.config, os.getcwd()
    files = open_clip_config.write(config, published_tokenizer=False)
    name = files[CONFIG_FILE]["model_cfg"]["text_cfg"].get("hf_model_name")
    with tempfile.TemporaryDirectory() as folder:
        if name == PUBMEDBERT:
            # transformers prefers a local folder to the hub's model of the same name, so this needs no network.
            # `write` gives BERT's config.json only for a text tower that differs from the published one.
            changed = replace(config, text=replace(config.text, max_positions=config.text.max_positions + 1))
            bert = open_clip_config.write(changed, published_tokenizer=False)["text/config.json"]
            files[f"{name}/config.json"] = {**bert, "max_position_embeddings": config.text.max_positions}
        for path, content in files.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_text(json.dumps(content))
        os.chdir(folder)
        try:
            options = dict(load_weights=False, pretrained_text=False)
            twin = open_clip.create_model("local-dir:.", **options)
        finally:
            os.chdir(working_directory)
    twin.load_state_dict(weights.to_open_clip(model.state_dict(), config))
    return twin


@torch.no_grad()
def difference(ours: BiomedClip, theirs: nn.Module, inputs: Inputs) -> float:
    """Return the largest difference of an embedding's element, in float32 on two samples.

    Raises AssertionError if it exceeds rounding. The time of other results would mean nothing.
    """
    ours.eval(), theirs.eval()
    few = slice(0, 2)
    texts = ours.encode_text(inputs.ids[few]) - theirs.encode_text(inputs.ids[few], normalize=True)  # type: ignore[operator]
    their_image = theirs.encode_image(normalize(inputs.images[few]), normalize=True)  # type: ignore[operator]
    error = max(float(part.abs().max()) for part in (texts, ours.encode_image(inputs.images[few]) - their_image))
    assert error < 1e-4, f"open_clip's embeddings differ by {error:.3g}"
    return error
