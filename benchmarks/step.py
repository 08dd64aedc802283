"""`bclip bench step`: a whole training step of ours and of open_clip's, and the gain from each improvement."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast import ops
from bclip_fast.data.transform import normalize
from bclip_fast.model import text as text_towers
from bclip_fast.model import transformer, vision
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.packed import Packed
from bclip_fast.model.presets import preset
from bclip_fast.train.engine.malloc import set_malloc_trim
from bclip_fast.train.engine.optimizer import AdamW
from bclip_fast.train.schedule import OptimConfig, parameter_groups

from .cases.model import (
    PRECISIONS,
    Features,
    Inputs,
    OpenClip,
    StepConfig,
    difference,
    make_inputs,
    mixtures,
    open_clip_twin,
    variants,
)
from .measure import DEVICE, matmul_note, matmul_rate, peak_extra_bytes
from .peers import import_open_clip
from .table import print_table

log = logging.getLogger(__name__)


class Step:
    """One contender. A call trains one step and returns the seconds of (forward and loss, backward, optimiser).

    optimizer: the optimiser to use. Contenders with the same model can share it. None makes a new one.
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
            # open_clip's loader normalises in other processes, so the time of this does not count.
            self.image = normalize(inputs.images)
        elif not features.packing:
            # Padding costs the time of tokens that it ignores. Let every caption have as many tokens as the context.
            padded = Packed.of(inputs.ids.flatten(), [inputs.ids.shape[1]] * len(inputs.ids))
            self.text = padded.to(inputs.ids.device)
        kind = torch.optim.AdamW if isinstance(features, OpenClip) else AdamW
        self.optimizer = optimizer or kind(parameter_groups(model.named_parameters(), OptimConfig()), lr=1e-5)

    @property
    def is_fused(self) -> bool:
        """Whether the optimiser's own `step` runs. Ours needs torch's fused kernel."""
        return isinstance(self.features, OpenClip) or self.features.fused_adamw

    def __call__(self) -> list[float]:
        """Train one step."""
        dtype = PRECISIONS[self.config.precision]
        features, image = self.features, self.image
        set_malloc_trim(isinstance(features, Features) and features.keeps_memory)
        with contextlib.ExitStack() as stack:
            _set_checkpointing(self.model, features.checkpointing)
            if isinstance(features, Features):
                stack.enter_context(_plain_where_off(features, self.model))
                for group in self.optimizer.param_groups:
                    group["fused"] = self.is_fused
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
            if self.is_fused:
                self.optimizer.step()
            else:
                # Our optimiser hands its decision to torch's fused kernel, and the others refuse it.
                torch.optim.AdamW.step(self.optimizer)  # type: ignore[arg-type]
            self.optimizer.zero_grad(set_to_none=True)
            times.append(_now())
        if not loss.isfinite():
            raise AssertionError(f"the loss is {float(loss)}")
        return [stop - start for start, stop in itertools.pairwise(times)]


def _set_checkpointing(model: nn.Module, on: bool) -> None:
    model.set_grad_checkpointing(on)  # type: ignore[operator]
    # open_clip 3.3 turns checkpointing on in a text tower of transformers even if it is asked to turn it off.
    disable = getattr(getattr(model.text, "transformer", None), "gradient_checkpointing_disable", None)
    if disable is not None and not on:
        disable()


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)
    return time.perf_counter()


@contextlib.contextmanager
def _plain_where_off(features: Features, model: nn.Module) -> Iterator[None]:
    """Replace each operator that is off by plain PyTorch."""
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

                def all_tokens(*arguments: Any, forward: Any = forward) -> tuple[Tensor, Tensor]:
                    *others, first_rows = arguments
                    stream, branch = forward(*others, None)
                    return stream[first_rows], branch[first_rows]

                stack.enter_context(mock.patch.object(last, "forward", all_tokens))
        yield


def _sdpa(sequences: transformer.Sequences, qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Pad the captions to the longest one and run torch's attention."""
    if sequences.cu_seqlens is None:
        query, key, value = qkv.unflatten(0, (-1, sequences.max_seqlen)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=sequences.causal)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)
    is_token = torch.arange(sequences.max_seqlen, device=qkv.device) < sequences.cu_seqlens.diff()[:, None]
    padded = qkv.new_zeros(*is_token.shape, *qkv.shape[1:]).masked_scatter(is_token[..., None, None, None], qkv)
    query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if is_token.all() else is_token[:, None, None]
    if sequences.causal:
        past = torch.ones(2 * [is_token.shape[1]], dtype=torch.bool, device=qkv.device).tril()
        mask = past if mask is None else mask & past
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)
    return out.transpose(1, 2)[is_token].flatten(1)


def _sdpa_from(
    sequences: transformer.Sequences, rows: Tensor, query: Tensor, key_value: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """Do the same for one query per sequence, and compute the results of all the other tokens too."""
    queries = torch.zeros_like(key_value[:, 0]).index_copy(0, rows, query)
    return _sdpa(sequences, torch.cat([queries[:, None], key_value], 1), dropout_p)[rows]


def measure_step(config: StepConfig) -> list[dict[str, Any]]:
    """Return a row for each variant. Raises AssertionError if open_clip's embeddings differ from ours."""
    model_config = preset(config.preset)
    if model_config.text.kind == "bert":
        text = replace(model_config.text, dropout=config.dropout, attention_dropout=config.dropout)
        model_config = replace(model_config, text=text)
    contenders: dict[str, Features | OpenClip]
    if config.mixtures:
        batches = mixtures(config, model_config)
        config, contenders = replace(config, open_clip=False), dict.fromkeys(batches, Features())
    else:
        contenders = variants(config)
        batches = dict.fromkeys(contenders, make_inputs(config, model_config))
    for name, batch in batches.items():
        batches[name] = replace(
            batch, images=batch.images.to(DEVICE), ids=batch.ids.to(DEVICE), text=batch.text.to(DEVICE)
        )
    torch.manual_seed(0)
    ours = BiomedClip(model_config).to(DEVICE)
    theirs = open_clip_twin(ours).to(DEVICE) if config.open_clip else None
    error = 0.0 if theirs is None else difference(ours, theirs, next(iter(batches.values())))
    models: dict[str, Any] = {}
    for name, features in contenders.items():
        models[name] = theirs if isinstance(features, OpenClip) else ours
        if isinstance(features, Features) and features.compile:
            models[name] = copy.deepcopy(ours)
            models[name].compile_layers()
    extra_bytes: dict[str, int | None] = {}
    steps: dict[str, Step] = {}
    for name, features in contenders.items():
        extra_bytes[name], _ = peak_extra_bytes(Step(config, models[name], batches[name], features))
        models[name].zero_grad(set_to_none=True)
    for name, features in contenders.items():
        model = models[name]
        shared = next((step.optimizer for step in steps.values() if step.model is model), None)
        steps[name] = Step(config, model, batches[name], features, shared)
    times = _time_rounds(steps, config.rounds)
    first = next(iter(steps))
    rows: list[dict[str, Any]] = []
    for name in steps:
        forward, backward, optimizer = min(times[name], key=sum)
        seconds = forward + backward + optimizer
        ratios = [sum(one) / sum(other) for one, other in zip(times[first], times[name], strict=True)]
        num_tokens = len(batches[name].text.ids)
        rows.append(
            dict(
                operator="step",
                case=f"{config.preset}-{config.batch_size}-{config.precision}-dropout-{config.dropout}",
                contender=name,
                error=error if isinstance(contenders[name], OpenClip) else 0.0,
                flops=batches[name].flops,
                batch=config.batch_size,
                dtype=config.precision,
                tokens=num_tokens,
                seconds=seconds,
                forward_seconds=forward,
                backward_seconds=backward,
                optimizer_seconds=optimizer,
                samples_per_second=config.batch_size / seconds,
                tokens_per_second=num_tokens / seconds,
                speedup=statistics.median(ratios),
                rounds=config.rounds,
                **matmul_rate(PRECISIONS[config.precision]),
                extra_bytes=extra_bytes[name],
            )
        )
    return rows


def _time_rounds(steps: dict[str, Step], rounds: int) -> dict[str, list[list[float]]]:
    """Return the seconds of the parts of each step, by contender. A round runs every contender once."""
    times: dict[str, list[list[float]]] = {name: [] for name in steps}
    for number in range(1 + rounds):
        for name, step in steps.items():
            seconds = step()
            if number:  # round 0 makes the optimisers allocate their moments
                times[name].append(seconds)
                log.info("round %d, %s: %.2f s", number, name, sum(seconds))
    return times


def show_step(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    sizes = " to ".join(f"{flops / 1e12:.2f}" for flops in sorted({row["flops"] for row in rows}))
    title = f"{rows[0]['case']}, tokens a caption, {sizes} TFLOP a step{matmul_note(rows)}"
    headings = ["contender", "tokens", "samples/s", "tokens/s", "s", "fwd", "bwd", "opt", "MFU", "extra GB", "x first"]
    cells = []
    for row in rows:
        parts = (row[f"{name}_seconds"] for name in ("forward", "backward", "optimizer"))
        cells.append(
            [
                row["contender"],
                f"{row['tokens'] / row['batch']:.0f}",
                f"{row['samples_per_second']:.2f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['seconds']:.2f}",
                *(f"{part:.2f}" for part in parts),
                f"{row['flops'] / row['seconds'] / row['matmul_flops_per_second']:.0%}",
                "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e9:.2f}",
                f"{row['speedup']:.2f}",
            ]
        )
    print_table(title, headings, cells)
