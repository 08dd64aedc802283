"""The positives of the losses with groups, and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bclip_fast.ops.dtypes import accumulation_dtype

from .loss_terms import positive_logits


@dataclass(frozen=True)
class GroupTile:
    """The groups of a tile of b rows (images) and B columns (texts), as the backends take them."""

    rows: Tensor
    """(b,) int32: the rows' ids, renumbered from 0."""
    columns: Tensor
    """(B,) int32: the columns' ids, renumbered from 0."""
    row_shares: Tensor
    """(b,) float64 or float32: see `Groups.shares`."""
    column_shares: Tensor
    """(B,) as `row_shares`."""

    def among(self, *columns: slice) -> GroupTile:
        """The groups of the tile with these columns."""
        ids, shares = ([part[each] for each in columns] for part in (self.columns, self.column_shares))
        if len(columns) == 1:
            return GroupTile(self.rows, ids[0], self.row_shares, shares[0])
        return GroupTile(self.rows, torch.cat(ids), self.row_shares, torch.cat(shares))


@dataclass(frozen=True)
class Groups:
    """The positives among pairs of b rows (images) and B columns (texts), and their weights in the softmax loss.

    The loss is half the mean over rows with a positive plus half the mean over columns with a positive. Row i has the
    weight w_i, which is 1 / (2 * number of such rows), or 0 without a positive. Each of the row's n positives has the
    weight w_i / n. Columns have the same weights. The kernels take one weight w, the larger one, and log-sum-exps that
    are raised for rows or columns of a smaller weight. Tensors of b + B numbers hold those of the rows first.
    """

    num_rows: int
    """b"""
    ids: Tensor
    """(b + B,) int32: the ids, renumbered from 0."""
    weights: Tensor
    """(b + B,) float64: w_i."""
    shares: Tensor
    """(b + B,) float64: w_i / (n * w), the term of a row or column in G / w of its positives, with a minus sign."""
    positive_weights: Tensor
    """(b,) float64: the weight of each of the row's positive logits in the loss, for its row plus its column."""
    sizes: Tensor
    """The number of texts of each renumbered id."""
    weight: float
    """w"""

    @classmethod
    def of(cls, local_ids: Tensor, image_ids: Tensor, text_ids: Tensor) -> Groups:
        """Groups from `local_ids` (b,) of these images, the ids of all ranks' images, and the ids (B,) of all texts.

        Raises:
            ValueError: no image has the id of a text.
        """
        # Images of other ranks come last.
        others = () if local_ids is image_ids else (image_ids,)
        ids = torch.unique(torch.cat([local_ids, text_ids, *others]), return_inverse=True)[1]
        num_rows, num_pairs = len(local_ids), len(local_ids) + len(text_ids)
        local, texts = ids[:num_rows], ids[num_rows:num_pairs]
        images = ids[num_pairs:] if others else local
        num_images, num_texts = (torch.bincount(part, minlength=len(ids)) for part in (images, texts))
        # The number of positives of each image and of each text.
        of_images, of_texts = num_texts[images], num_images[texts]
        counts = torch.stack([of_images.count_nonzero(), of_texts.count_nonzero()])
        counted_rows, counted_columns = counts.tolist()
        if counted_rows == 0:
            raise ValueError("groups: no image shares its id with a text, so the loss has no positives")
        weight = 1 / (2 * min(counted_rows, counted_columns))
        num_positives = torch.cat([num_texts[local] if others else of_images, of_texts])
        weights = (num_positives > 0).double()
        # A text's column has the weight 1 / (2 * counted_columns), divided among the images of its id.
        of_columns = weights[:num_rows] / num_images[local]
        weights[:num_rows].div_(2 * counted_rows)
        weights[num_rows:].div_(2 * counted_columns)
        shares = weights / num_positives.clamp_min_(1)
        positive_weights = shares[:num_rows].add(of_columns, alpha=1 / (2 * counted_columns))
        ids = ids[:num_pairs].int()
        return cls(num_rows, ids, weights, shares.div_(weight), positive_weights, num_texts, weight)

    @property
    def tile(self) -> GroupTile:
        """The groups of all rows and columns."""
        return group_tile(self.ids, self.shares, self.num_rows)

    def positives(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """The weighted sum of the rows' positive logits. Sums over each id's texts need only O(B * D)."""
        wide, rows, columns = accumulation_dtype(text), self.ids[: self.num_rows], self.ids[self.num_rows :]
        ordered = text.index_select(0, columns.argsort(stable=True)).to(wide)
        sums = torch.segment_reduce(ordered, "sum", lengths=self.sizes, axis=0, unsafe=True)
        return (self.positive_weights * positive_logits(image, sums.index_select(0, rows), scale)).sum()

    def raised(self, lse: Tensor) -> Tensor:
        """Log-sum-exps (b + B,) as the kernels take them. They are infinite for a weight of 0."""
        return (self.weight / self.weights).log_().add_(lse)


def group_tile(ids: Tensor, shares: Tensor, num_rows: int) -> GroupTile:
    """The tile with `Groups.ids` and `Groups.shares`."""
    return GroupTile(ids[:num_rows], ids[num_rows:], shares[:num_rows], shares[num_rows:])
