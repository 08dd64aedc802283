"""`bclip bench step`: a whole training step, ours against open_clip's, and what each improvement is worth."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast import ops
from bclip_fast.data.transform import normalize
from bclip_fast.errors import UserError
from bclip_fast.model import open_clip_config, transformer, vision, weights
from bclip_fast.model import text as text_towers
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.flops import step_flops
from bclip_fast.model.packed import Packed
from bclip_fast.model.presets import preset
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.tower_config import PUBMEDBERT
from bclip_fast.train.engine.malloc import set_malloc_trim
from bclip_fast.train.engine.optimizer import AdamW
from bclip_fast.train.schedule import OptimConfig, parameter_groups

from .cases import peer, shared_data
from .measure import DEVICE, matmul_note, matmul_rate, peak_extra_bytes
from .peers import import_open_clip

log = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class StepConfig:
    """The step of `bclip bench step`: forward, loss, backward, AdamW."""

    preset: str = "biomedclip_b16"
    batch_size: int = 16
    precision: str = "bf16"
    """bf16 (autocast) or fp32."""
    dropout: float = 0.0
    """Of the text tower, hidden and attention; published training has 0.1."""
    lengths: str = ""
    """File with lines "tokens count", a histogram of caption lengths; empty: the captions of BCLIP_SHARED_DATA."""
    rounds: int = 3
    """Rounds of a step of each contender; a ratio is the median of those within a round, a time the fastest."""
    ablation: bool = True
    """Time ours with each improvement turned on in turn as well."""
    compile: bool = False
    """Time ours with its layers under torch.compile as well."""
    mixtures: bool = False
    """Instead of all that, time ours on captions that are all of the mean length, on those of the histogram, and on
    half of one token and half of as many as there may be."""
    open_clip: bool = True

    def __post_init__(self) -> None:
        if self.precision not in _DTYPES or self.batch_size < 1 or self.rounds < 1:
            raise UserError(
                f"step.precision={self.precision}, batch_size={self.batch_size}, rounds={self.rounds}: need one of "
                f"{', '.join(_DTYPES)}, at least 1 and 1"
            )


@dataclass(frozen=True)
class Features:
    """What a variant of ours does; the last fields keep the arithmetic and change its speed or memory."""

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
    """open_clip's own towers, loss and AdamW, and with `checkpointing` its own of that."""

    checkpointing: bool = False


def variants(config: StepConfig) -> dict[str, Features | OpenClip]:
    """Name -> what is on."""
    found: dict[str, Features | OpenClip] = {"open_clip": OpenClip()} if config.open_clip else {}
    if config.ablation:
        on = Features(**dict.fromkeys(asdict(Features()), False))
        found["ours, padded, plain PyTorch"] = on
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
            on = replace(on, **{name: True})
            found[title] = on
    else:
        found["ours"] = Features()
    compiled = {"ours, compiled": Features(compile=True)} if config.compile else {}
    theirs = {"open_clip, checkpointed": OpenClip(checkpointing=True)} if config.open_clip else {}
    return {**found, **compiled, **theirs, "ours, checkpointed": Features(checkpointing=True)}


@dataclass
class Inputs:
    """images: (n, S, S, 3) uint8. ids: (n, L) int64 padded. text: the same packed. flops: of the step on just these
    tokens, the last layers for one token alone."""

    images: Tensor
    ids: Tensor
    text: Packed
    flops: float


def make_inputs(config: StepConfig, model: BiomedClipConfig, lengths: Sequence[int] = ()) -> Inputs:
    """On captions of these lengths, one each; those of the histogram unless given."""
    text = model.text
    generator = torch.Generator().manual_seed(0)
    side, size = model.vision.image_size, config.batch_size
    images = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=generator)
    lengths = lengths or _spread(caption_lengths(config, text.context_length), size)
    ids = torch.full((size, text.context_length), text.pad_id)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(5, text.vocab_size - 1, (length,), generator=generator)
        row[length - 1] = text.vocab_size - 1 if text.end_id is None else text.end_id
    packed = Packed.of(torch.cat([row[:length] for row, length in zip(ids, lengths, strict=True)]), lengths)
    return Inputs(images, ids, packed, step_flops(model, lengths))


def caption_lengths(config: StepConfig, context_length: int) -> list[int]:
    """Tokens of each caption, cut to the context length."""
    if config.lengths:
        rows = [line.split() for line in Path(config.lengths).read_text().splitlines() if line.strip()]
        return [min(int(tokens), context_length) for tokens, count in rows for _ in range(int(count))]
    folder = shared_data()
    tokenizer = Tokenizer.from_file(folder / "vocab" / "pubmedbert" / "vocab.txt", context_length)
    with open(folder / "pmc_articles" / "pairs.jsonl", encoding="utf-8") as lines:
        return tokenizer.packed([json.loads(line)["caption"] for line in lines]).lengths.tolist()


def mixtures(config: StepConfig, model: BiomedClipConfig) -> dict[str, Inputs]:
    """The same images with captions that need not be of one length."""
    size, most = config.batch_size, model.text.context_length
    real = make_inputs(config, model)
    mean = round(sum(real.text.lengths.tolist()) / size)
    halves = [1, most] * (size // 2) + [most] * (size % 2)
    return {
        f"ours, {mean} tokens each": make_inputs(config, model, [mean] * size),
        "ours, real lengths": real,
        f"ours, 1 or {most} tokens": make_inputs(config, model, halves),
    }


def _spread(lengths: Sequence[int], count: int) -> list[int]:
    """`count` lengths with the distribution of all, in no order."""
    ordered = sorted(lengths)
    chosen = [ordered[int((i + 0.5) / count * len(ordered))] for i in range(count)]
    return [chosen[i] for i in torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()]


class Step:
    """One contender: `step()` trains once and returns the seconds of forward with loss, backward and optimiser.

    Contenders of the same model can share its optimiser.
    """

    def __init__(
        self,
        config: StepConfig,
        model: nn.Module,
        inputs: Inputs,
        features: Features | OpenClip,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.config, self.model, self.features = config, model.train(), features
        self.loss: Callable[..., Tensor] = ops.clip_loss
        self.image: Tensor = inputs.images
        self.text: Packed | Tensor = inputs.text
        if isinstance(features, OpenClip):
            self.loss = import_open_clip().ClipLoss()
            self.text = inputs.ids
            # Its loader normalises, in processes of its own.
            self.image = normalize(inputs.images)
        elif not features.packing:
            # The time of padding without its numbers: every caption has as many tokens as the longest may have.
            padded = Packed.of(inputs.ids.flatten(), [inputs.ids.shape[1]] * len(inputs.ids))
            self.text = padded.to(inputs.ids.device)
        kind = torch.optim.AdamW if isinstance(features, OpenClip) else AdamW
        self.optimizer = optimizer or kind(parameter_groups(model.named_parameters(), OptimConfig()), lr=1e-5)

    def __call__(self) -> list[float]:
        dtype = _DTYPES[self.config.precision]
        features, image = self.features, self.image
        set_malloc_trim(isinstance(features, Features) and features.keeps_memory)
        with contextlib.ExitStack() as stack:
            _set_checkpointing(self.model, features.checkpointing)
            if isinstance(features, Features):
                stack.enter_context(_without(features, self.model))
                for group in self.optimizer.param_groups:
                    group["fused"] = features.fused_adamw
            times = [_now()]
            if isinstance(features, Features) and not features.raw_pixels:
                image = normalize(image)
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                output = self.model(image, self.text)
            if isinstance(output, tuple):
                output = dict(zip(("image_features", "text_features", "logit_scale"), output, strict=True))
            loss = self.loss(output["image_features"], output["text_features"], output["logit_scale"])
            times.append(_now())
            loss.backward()
            times.append(_now())
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            times.append(_now())
        if not loss.isfinite():
            raise AssertionError(f"the loss is {float(loss)}")
        return [stop - start for start, stop in zip(times, times[1:], strict=False)]


def _set_checkpointing(model: nn.Module, on: bool) -> None:
    model.set_grad_checkpointing(on)  # type: ignore[operator]
    # Of a text tower of transformers, open_clip (3.3) turns it on whatever it was asked.
    disable = getattr(getattr(model.text, "transformer", None), "gradient_checkpointing_disable", None)
    if disable is not None and not on:
        disable()


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)
    return time.perf_counter()


@contextlib.contextmanager
def _without(features: Features, model: nn.Module) -> Iterator[None]:
    """Puts plain PyTorch in the place of what is off."""
    with contextlib.ExitStack() as stack:
        if not features.pointwise:
            for name in ("add_norm", "gelu"):
                plain = functools.partial(getattr(ops, name), backend="reference")
                stack.enter_context(mock.patch.object(transformer, name, plain))
        if not features.attention:
            stack.enter_context(mock.patch.object(transformer.Sequences, "attend", _sdpa))
            stack.enter_context(mock.patch.object(transformer.Sequences, "attend_from", _sdpa_from))
        if not features.linear:
            plain = functools.partial(ops.linear, backend="reference")
            for module in (transformer, vision, text_towers):
                stack.enter_context(mock.patch.object(module, "linear", plain))
        if not features.first_only:
            for tower in (model.visual, model.text):
                last: Any = tower.layers[-1]  # type: ignore[index,union-attr]
                forward = last.forward

                def whole(*arguments: Any, forward: Any = forward) -> tuple[Tensor, Tensor]:
                    one, two = forward(*arguments[:-1], None)
                    return one[arguments[-1]], two[arguments[-1]]

                stack.enter_context(mock.patch.object(last, "forward", whole))
        yield


def _sdpa(sequences: transformer.Sequences, qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    """torch's attention on captions padded to the longest, as one writes it without an operator for packed ones."""
    if sequences.cu_seqlens is None:
        query, key, value = qkv.unflatten(0, (-1, sequences.max_seqlen)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=sequences.causal)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)
    kept = torch.arange(sequences.max_seqlen, device=qkv.device) < sequences.cu_seqlens.diff()[:, None]
    padded = qkv.new_zeros(*kept.shape, *qkv.shape[1:]).masked_scatter(kept[..., None, None, None], qkv)
    query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if kept.all() else kept[:, None, None]
    if sequences.causal:
        past = torch.ones(2 * [kept.shape[1]], dtype=torch.bool, device=qkv.device).tril()
        mask = past if mask is None else mask & past
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)
    return out.transpose(1, 2)[kept].flatten(1)


def _sdpa_from(
    sequences: transformer.Sequences, rows: Tensor, query: Tensor, key_value: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """The same for one query of each sequence, among all the others."""
    queries = torch.zeros_like(key_value[:, 0]).index_copy(0, rows, query)
    return _sdpa(sequences, torch.cat([queries[:, None], key_value], 1), dropout_p)[rows]


def open_clip_twin(model: BiomedClip) -> nn.Module:
    """open_clip's CustomTextCLIP of the same configuration with the same weights. Raises Unavailable without it."""
    open_clip = peer(import_open_clip)
    config, before = model.config, os.getcwd()
    files = open_clip_config.write(config, published_tokenizer=False)
    name = files[open_clip_config.CONFIG_FILE]["model_cfg"]["text_cfg"].get("hf_model_name")
    with tempfile.TemporaryDirectory() as folder:
        if name == PUBMEDBERT:
            # Offline, transformers takes a hub's name for a folder where there is one.
            changed = replace(config, text=replace(config.text, max_positions=config.text.max_positions + 1))
            bert = open_clip_config.write(changed, published_tokenizer=False)["text/config.json"]
            files[f"{name}/config.json"] = {**bert, "max_position_embeddings": config.text.max_positions}
        for path, content in files.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_text(json.dumps(content))
        os.chdir(folder)
        try:
            options = dict(load_weights=False, pretrained_text=False)
            theirs = open_clip.create_model("local-dir:.", **options)
        finally:
            os.chdir(before)
    theirs.load_state_dict(weights.to_open_clip(model.state_dict(), config))
    return theirs


def measure_step(config: StepConfig) -> list[dict[str, Any]]:
    """A row for each variant. Raises AssertionError where open_clip's embeddings aren't ours."""
    sizes = preset(config.preset)
    if sizes.text.kind == "bert":
        dropped = replace(sizes.text, dropout=config.dropout, attention_dropout=config.dropout)
        sizes = replace(sizes, text=dropped)
    contenders: dict[str, Features | OpenClip]
    if config.mixtures:
        all_inputs = mixtures(config, sizes)
        config, contenders = replace(config, open_clip=False), dict.fromkeys(all_inputs, Features())
    else:
        contenders = variants(config)
        all_inputs = dict.fromkeys(contenders, make_inputs(config, sizes))
    for name, one in all_inputs.items():
        all_inputs[name] = replace(one, images=one.images.to(DEVICE), ids=one.ids.to(DEVICE), text=one.text.to(DEVICE))
    torch.manual_seed(0)
    ours = BiomedClip(sizes).to(DEVICE)
    theirs = open_clip_twin(ours).to(DEVICE) if config.open_clip else None
    error = 0.0 if theirs is None else difference(ours, theirs, next(iter(all_inputs.values())))
    models: dict[str, Any] = {}
    for name, features in contenders.items():
        models[name] = theirs if isinstance(features, OpenClip) else ours
        if isinstance(features, Features) and features.compile:
            models[name] = copy.deepcopy(ours)
            models[name].compile_layers()
    extra: dict[str, int | None] = {}
    steps: dict[str, Step] = {}
    for name, features in contenders.items():
        model = models[name]
        extra[name], _ = peak_extra_bytes(Step(config, model, all_inputs[name], features))
        model.zero_grad(set_to_none=True)
    for name, features in contenders.items():
        model = models[name]
        shared = next((step.optimizer for step in steps.values() if step.model is model), None)
        steps[name] = Step(config, model, all_inputs[name], features, shared)
    times: dict[str, list[list[float]]] = {name: [] for name in steps}
    for number in range(1 + config.rounds):
        for name, step in steps.items():
            parts = step()
            if number:  # the first gives the optimisers their moments
                times[name].append(parts)
                log.info("round %d, %s: %.2f s", number, name, sum(parts))
    first = next(iter(steps))
    rows: list[dict[str, Any]] = []
    for name in steps:
        forward, backward, optimizer = min(times[name], key=sum)
        seconds = forward + backward + optimizer
        ratios = [sum(one) / sum(own) for one, own in zip(times[first], times[name], strict=True)]
        rows.append(
            dict(
                operator="step",
                case=f"{config.preset}-{config.batch_size}-{config.precision}-dropout-{config.dropout}",
                contender=name,
                error=error if isinstance(contenders[name], OpenClip) else 0.0,
                flops=all_inputs[name].flops,
                batch=config.batch_size,
                dtype=config.precision,
                tokens=len(all_inputs[name].text.ids),
                seconds=seconds,
                forward_seconds=forward,
                backward_seconds=backward,
                optimizer_seconds=optimizer,
                samples_per_second=config.batch_size / seconds,
                tokens_per_second=len(all_inputs[name].text.ids) / seconds,
                speedup=statistics.median(ratios),
                rounds=config.rounds,
                **matmul_rate(_DTYPES[config.precision]),
                extra_bytes=extra[name],
            )
        )
    return rows


@torch.no_grad()
def difference(ours: BiomedClip, theirs: nn.Module, inputs: Inputs) -> float:
    """Largest difference of an embedding's number, of unit length, in float32 on a few samples.

    Raises AssertionError where it is no rounding: a time for other numbers is no figure.
    """
    ours.eval(), theirs.eval()
    few = slice(0, 2)
    texts = ours.encode_text(inputs.ids[few]) - theirs.encode_text(inputs.ids[few], normalize=True)  # type: ignore[operator]
    theirs_image = theirs.encode_image(normalize(inputs.images[few]), normalize=True)  # type: ignore[operator]
    error = max(float(part.abs().max()) for part in (texts, ours.encode_image(inputs.images[few]) - theirs_image))
    assert error < 1e-4, f"open_clip's embeddings differ by {error:.3g}"
    return error


def show_step(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    sizes = " to ".join(f"{flops / 1e12:.2f}" for flops in sorted({row["flops"] for row in rows}))
    table = Table(
        title=f"{first['case']}, tokens a caption, {sizes} TFLOP a step{matmul_note(rows)}", title_justify="left"
    )
    headings = ("contender", "tokens", "samples/s", "tokens/s", "s", "fwd", "bwd", "opt", "MFU", "extra GB", "x first")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    for row in rows:
        parts = (row[f"{name}_seconds"] for name in ("forward", "backward", "optimizer"))
        table.add_row(
            row["contender"],
            f"{row['tokens'] / row['batch']:.0f}",
            f"{row['samples_per_second']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds']:.2f}",
            *(f"{part:.2f}" for part in parts),
            f"{row['flops'] / row['seconds'] / row['matmul_flops_per_second']:.0%}",
            "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e9:.2f}",
            f"{row['speedup']:.2f}",
        )
    (Console() if os.isatty(1) else Console(width=120)).print(table)
