"""Duplicates and near duplicates among the images of a plan."""

from __future__ import annotations

import numpy as np

from .parts import SPLITS

# Largest distance of near duplicates, of 256 bits. `sanitize.perceptual_hash` lists the measurements behind it.
NEAR_BITS = 12


def mark_duplicates(pairs: np.ndarray) -> np.ndarray:
    """Set `original` and `near` of each pair, and return the leaks between splits.

    Two images are duplicates if their source bytes are equal. They are near duplicates if their perceptual hashes
    differ in at most NEAR_BITS bits. `original` is the row of the first such image, or -1. `near` is set if that image
    is only a near duplicate.

    Returns:
        For each pair, the row of an image in a protected split that it resembles, or -1. Test images are protected
        from train and val, val images from train. A pair with such an image must be removed, and is never an original.
    """
    rows = np.arange(len(pairs))
    leaks = np.full(len(pairs), -1)
    hashes = np.ascontiguousarray(pairs["phash"])
    _, first, hash_ids = np.unique(hashes.view("V32").ravel(), return_index=True, return_inverse=True)
    _, source_ids = np.unique(pairs["source"], return_inverse=True)
    left, right = near_pairs(hashes[first])

    def first_like(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for every row the first chosen duplicate, and the first chosen duplicate or near duplicate.

        A row without one has len(pairs).
        """
        by_source, by_hash = np.full((2, len(pairs)), len(pairs))
        np.minimum.at(by_source, source_ids[chosen], chosen)
        np.minimum.at(by_hash, hash_ids[chosen], chosen)
        near = by_hash.copy()
        np.minimum.at(near, left, by_hash[right])
        np.minimum.at(near, right, by_hash[left])
        return by_source[source_ids], np.minimum(by_source[source_ids], near[hash_ids])

    train, val, test = (pairs["split"] == number for number in range(len(SPLITS)))
    for protected, exposed in ((val, train), (test, train | val)):
        _, similar = first_like(np.flatnonzero(protected))
        is_leak = exposed & (similar < len(pairs))
        leaks[is_leak] = similar[is_leak]
    duplicate, original = first_like(np.flatnonzero(leaks < 0))
    pairs["original"] = np.where((leaks < 0) & (original < rows), original, -1)
    pairs["near"] = duplicate >= rows
    return leaks


def near_pairs(hashes: np.ndarray, bits: int = NEAR_BITS) -> tuple[np.ndarray, np.ndarray]:
    """Return the index pairs of hashes that differ in at most `bits` bits, each pair once.

    The search is exact. The 256 bits are divided into bits + 1 bands, so two such hashes agree in at least one band.
    Only hashes that agree in a band are compared.

    Args:
        hashes: (n, 4) uint64, all different.
    """
    edges: list[np.ndarray] = []
    for band in range(bits + 1):
        chosen = np.zeros(256, np.uint8)
        chosen[band :: bits + 1] = 1
        mask = np.packbits(chosen, bitorder="little").view("<u8")
        mixed = np.zeros(len(hashes), np.uint64)
        for word in range(4):
            mixed = (mixed ^ (hashes[:, word] & mask[word])) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        order = np.argsort(mixed, kind="stable")
        mixed = mixed[order]
        step = 1
        candidates = np.arange(len(mixed) - 1)
        while len(candidates := candidates[candidates + step < len(mixed)]):
            candidates = candidates[mixed[candidates] == mixed[candidates + step]]
            one, two = order[candidates], order[candidates + step]
            near = np.bitwise_count(hashes[one] ^ hashes[two]).sum(axis=1) <= bits
            edges.append(np.sort(np.stack([one[near], two[near]], 1), axis=1))
            step += 1
    pairs = np.unique(np.concatenate(edges), axis=0) if edges else np.empty((0, 2), np.int64)
    return pairs[:, 0], pairs[:, 1]
