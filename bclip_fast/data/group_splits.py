"""Make train, val and test splits of data without any: stratified by class, with each group in one split.

A group is what must not be in two splits, such as all images of a patient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
"""Share of the samples in each split."""


def assign(targets: np.ndarray, groups: Sequence[str], seed: int, shares: Mapping[str, float] = SHARES) -> list[str]:
    """Return the split of each sample. Equal arguments give equal splits.

    Each class is to have the same share in each split, as far as groups allow. This is the greedy rule of iterative
    stratification (Sechidis et al., 2011) on groups. Those with the largest part of a class come first. A group goes
    where the classes of its samples lack most. So a class of few groups is in all splits, if that is possible.

    Args:
        targets: (N, C) bool, the classes of each sample.
        groups: name of each sample's group.
        shares: share of each split. The order breaks ties.
    """
    names = sorted(set(groups))
    number_of = {name: i for i, name in enumerate(names)}
    group_of = np.array([number_of[group] for group in groups], dtype=np.int64)
    # The first column lets samples without a class count, too.
    columns = np.concatenate([np.ones((len(targets), 1)), targets.astype(np.float64)], axis=1)
    counts = np.zeros((len(names), columns.shape[1]))
    np.add.at(counts, group_of, columns)
    totals = counts.sum(0)
    parts = counts / np.maximum(totals, 1)  # (G, 1 + C), the part of each class in each group
    order = np.random.default_rng(abs(seed)).permutation(len(names))
    order = order[np.argsort(-parts[order].max(1), kind="stable")]
    splits, wanted = list(shares), np.array(list(shares.values()))
    filled = np.zeros((len(splits), columns.shape[1]))
    chosen = np.zeros(len(names), dtype=np.int64)
    for group in order:
        lack = 1 - filled / wanted[:, None]  # (S, 1 + C), 1 for an empty split and 0 for a full one
        split = int(np.argmax(np.round(lack @ parts[group], 12)))
        chosen[group] = split
        filled[split] += parts[group]
    return [splits[chosen[group]] for group in group_of]


def shared(groups_of_split: Mapping[str, Sequence[str | None]]) -> dict[str, dict[str, int]]:
    """Return the groups that are in two splits or more: the first row of the group in each of its splits."""
    first: dict[str, dict[str, int]] = {}
    for split, groups in groups_of_split.items():
        for row, group in enumerate(groups):
            if group is not None:
                first.setdefault(group, {}).setdefault(split, row)
    return {group: rows for group, rows in first.items() if len(rows) > 1}
