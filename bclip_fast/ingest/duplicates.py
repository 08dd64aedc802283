"""Images of a plan that are equal or nearly so."""

from __future__ import annotations

import numpy as np

from .parts import SPLITS

# Bits of 256; `sanitize.perceptual_hash` says what was measured.
NEAR_BITS = 12


def mark_duplicates(pairs: np.ndarray) -> np.ndarray:
    """Set `original` (row of the first image that is equal or nearly so, else -1) and `near`; the leaks.

    Equal: the same source bytes; near: perceptual hashes of which at most NEAR_BITS bits differ. The answer is, for
    each pair that may not stay, the row of an image of another split that it resembles: a train image like one of val
    or test, a val image like one of test. For others it is -1, and they alone count as originals.
    """
    rows = np.arange(len(pairs))
    leaks = np.full(len(pairs), -1)
    hashes = np.ascontiguousarray(pairs["phash"])
    _, first, look = np.unique(hashes.view("V32").ravel(), return_index=True, return_inverse=True)
    _, source = np.unique(pairs["source"], return_inverse=True)
    left, right = near_pairs(hashes[first])

    def first_like(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every row the first chosen one with its source, and with its source or its look; else len(pairs)."""
        by_source, by_look = np.full((2, len(pairs)), len(pairs))
        np.minimum.at(by_source, source[chosen], chosen)
        np.minimum.at(by_look, look[chosen], chosen)
        near = by_look.copy()
        np.minimum.at(near, left, by_look[right])
        np.minimum.at(near, right, by_look[left])
        return by_source[source], np.minimum(by_source[source], near[look])

    train, val, test = (pairs["split"] == number for number in range(len(SPLITS)))
    for protected, exposed in ((val, train), (test, train | val)):
        _, like = first_like(np.flatnonzero(protected))
        moved = exposed & (like < len(pairs))
        leaks[moved] = like[moved]
    same, original = first_like(np.flatnonzero(leaks < 0))
    pairs["original"] = np.where((leaks < 0) & (original < rows), original, -1)
    pairs["near"] = same >= rows
    return leaks


def near_pairs(hashes: np.ndarray, bits: int = NEAR_BITS) -> tuple[np.ndarray, np.ndarray]:
    """Index pairs of different (n, 4) uint64 hashes, each pair once, of which at most `bits` bits differ.

    Exact: the 256 positions are dealt out to bits + 1 bands; two such hashes agree in one band at least, and only those
    that agree in a band are compared.
    """
    found: list[np.ndarray] = []
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
            found.append(np.sort(np.stack([one[near], two[near]], 1), axis=1))
            step += 1
    edges = np.unique(np.concatenate(found), axis=0) if found else np.empty((0, 2), np.int64)
    return edges[:, 0], edges[:, 1]
