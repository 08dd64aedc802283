"""The largest micro-batch that fits into the memory of a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from bclip_fast.hardware import Cluster
from bclip_fast.train.config import TrainConfig

from .estimate import fits, resolve_config, stage_of
from .samples import Samples

# Budgets are multiples of 1/64 of the largest power of two below them: 2 % are as good as exact.
_STEPS = 64


def largest_micro_batch(
    config: TrainConfig, samples: Samples, cluster: Cluster, batch_sizes: Sequence[int]
) -> tuple[str, int]:
    """The setting of the micro-batches, and its largest value that fits, or 0 if none does.

    Args:
        batch_sizes: global batch sizes of the run.

    Returns:
        ("micro_batch_tokens", tokens) if the configuration has a budget of tokens, in steps of about 2 %. Otherwise
        ("micro_batch_size", pairs), a divisor of every rank's batch.
    """
    config = resolve_config(config, cluster)
    largest = max(batch_sizes)

    def does_fit(**setting: int) -> bool:
        changed = replace(config, **setting)  # type: ignore[arg-type]
        return fits(changed, samples, cluster, stage_of(changed, samples, cluster, largest))

    if not config.micro_batch_tokens:
        shares = [batch_size // cluster.ranks for batch_size in batch_sizes]
        sizes = [size for size in range(1, min(shares) + 1) if not any(share % size for share in shares)]
        return "micro_batch_size", _last(sizes, lambda size: does_fit(micro_batch_size=size))
    least = config.image_tokens + config.model.text.context_length
    # More tokens than the longest captions of a rank's batch have don't change the micro-batch.
    budgets = [least]
    while budgets[-1] < least * (largest // cluster.ranks):
        step = max(1, (1 << budgets[-1].bit_length() - 1) // _STEPS)
        budgets.append((budgets[-1] // step + 1) * step)
    return "micro_batch_tokens", _last(budgets, lambda tokens: does_fit(micro_batch_tokens=tokens))


def _last(values: Sequence[int], is_true: Callable[[int], bool]) -> int:
    """The last of the sorted values that fulfil a condition, which no larger value fulfils. 0 if none does."""
    low, high = -1, len(values) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_true(values[middle]) else (low, middle - 1)
    return values[low] if low >= 0 else 0
