"""The positives of the losses with groups, and their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bclip_fast.ops.dtypes import accumulation_dtype

from .loss_terms import positive_logits


@dataclass(frozen=True)
class Groups:
    """The positives among pairs of b rows (images) and B columns (texts), and their weights in the softmax loss.

    The loss is half the mean over rows with a positive plus half the mean over columns with a positive. Row i has the
    weight w_i, which is 1 / (2 * number of such rows), or 0 without a positive. Each of the row's n positives has the
    weight w_i / n. Columns have the same weights. The kernels take one weight w, the larger one, and log-sum-exps that
    are raised for rows or columns of a smaller weight.
    """

    rows: Tensor
    """(b,) int32: the rows' ids, renumbered from 0."""
    columns: Tensor
    """(B,) int32: the columns' ids, renumbered from 0."""
    row_weights: Tensor
    """(b,) float64: w_i."""
    column_weights: Tensor
    """(B,) float64: the weights of the columns."""
    row_shares: Tensor
    """(b,) float64: w_i / (n * w), which G / w of a positive loses to its row."""
    column_shares: Tensor
    """(B,) float64: the same for columns."""
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
        numbers = torch.unique(torch.cat([local_ids, image_ids, text_ids]), return_inverse=True)[1]
        local, images, texts = numbers.split([len(local_ids), len(image_ids), len(text_ids)])
        num_images, num_texts = (torch.bincount(part, minlength=len(numbers)) for part in (images, texts))
        num_rows, num_columns = torch.stack([(num_texts[images] > 0).sum(), (num_images[texts] > 0).sum()]).tolist()
        if num_rows == 0:
            raise ValueError("groups: no image shares its id with a text, so the loss has no positives")
        weight = 1 / (2 * min(num_rows, num_columns))
        row_weights = (num_texts[local] > 0).double() / (2 * num_rows)
        column_weights = (num_images[texts] > 0).double() / (2 * num_columns)
        row_shares = row_weights / num_texts[local].clamp_min(1)
        return cls(
            rows=local.int(),
            columns=texts.int(),
            row_weights=row_weights,
            column_weights=column_weights,
            row_shares=row_shares / weight,
            column_shares=column_weights / num_images[texts].clamp_min(1) / weight,
            positive_weights=row_shares + (num_texts[local] > 0).double() / (2 * num_columns * num_images[local]),
            sizes=num_texts,
            weight=weight,
        )

    def among(self, columns: slice) -> Groups:
        """The groups of the tile of these columns."""
        return replace(self, columns=self.columns[columns], column_shares=self.column_shares[columns])

    def positives(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """The weighted sum of the rows' positive logits, by sums over each id's texts: O(B * D), in a fixed order."""
        wide = accumulation_dtype(text)
        ordered = text.index_select(0, self.columns.argsort(stable=True)).to(wide)
        sums = torch.segment_reduce(ordered, "sum", lengths=self.sizes, axis=0, unsafe=True)
        return (self.positive_weights * positive_logits(image, sums.index_select(0, self.rows), scale)).sum()

    def raised(self, rows_lse: Tensor, columns_lse: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exps of rows and columns as the kernels take them; infinite for a weight of 0."""
        rows, columns = ((self.weight / part).log() for part in (self.row_weights, self.column_weights))
        return rows_lse + rows, columns_lse + columns
