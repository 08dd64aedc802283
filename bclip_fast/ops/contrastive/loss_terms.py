"""Small terms of the losses, O(B * D) and O(B), that the backends and the losses over ranks share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import processor
from ..dtypes import accumulation_dtype

# Products image @ text.T that the C++ kernels keep for the backward: 64 MiB in float32. Multiplying them again takes a
# quarter of the time.
_MAX_KEPT = 4096 * 4096


def siglip_gradient_dtype(features: Tensor) -> torch.dtype:
    """What gradients that are known with the loss are kept in until the upstream gradient comes.

    float16 has no room for them: 1 / B at B = 32768 is subnormal in it, and a GradScaler's factor comes upstream.
    """
    return torch.float32 if features.dtype == torch.float16 else features.dtype


def log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """logits.logsumexp(dim) in float64, of exponentials in the logits' precision; -inf over nothing but -inf."""
    # The bound keeps -inf - -inf away.
    highest = logits.amax(dim, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
    return (logits - highest).exp_().sum(dim, dtype=torch.float64).log_() + highest.squeeze(dim)


def positive_logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """scale * the dot product of each row of image (b, D) with its row of text (b, D), in float64.

    At a scale of 100 a sum in float32 would show in the fifth digit of the gradient; of half-precision features it is
    the same sum that every tile has.
    """
    dtype = torch.float64 if text.element_size() > 2 else torch.float32
    # Few rows at a time, whose copies are small beside a gradient.
    pairs = zip(image.split(64), text.split(64), strict=True)
    return scale.double() * torch.cat([(row.to(dtype) * other.to(dtype)).sum(1).double() for row, other in pairs])


def pair_losses(rows_lse: Tensor, columns_lse: Tensor, positive: Tensor) -> Tensor:
    """(n,): what row and column of each positive lose to their negatives."""
    # Past its threshold softplus(x) is x: at 20, the default, that shows in float64.
    return F.softplus(rows_lse - positive, threshold=50) + F.softplus(columns_lse - positive, threshold=50)


def positive_gradient(rows_lse: Tensor, columns_lse: Tensor, positive: Tensor) -> Tensor:
    """dL/dS at the positives, before the weight: minus the probabilities that go astray in row and column."""
    return -((rows_lse - positive).sigmoid() + (columns_lse - positive).sigmoid())


def keeps_products(image: Tensor, text: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether the C++ softmax loss of these features, multiplied in `dtype`, keeps their products for the backward."""
    # The matrix unit's tiles of S never leave the caches.
    if processor.HAS_AMX and dtype == torch.bfloat16:
        return False
    wanted = image.requires_grad or text.requires_grad or scale.requires_grad
    return wanted and torch.is_grad_enabled() and len(image) * len(text) <= _MAX_KEPT


@dataclass(frozen=True)
class Groups:
    """Which pairs of b rows (images) and B columns (texts) are positives, and what they weigh in the softmax loss.

    The loss is the mean over rows that have a positive, and that over columns, halved: row i weighs w_i, which is
    1 / (2 * number of such rows) or 0, and each of its n positives w_i / n; columns likewise. The kernels know one
    weight w, the larger, and log-sum-exps that are raised where a row or column weighs less.
    """

    rows: Tensor
    """(b,) int32: the rows' ids, numbered anew."""
    columns: Tensor
    """(B,) int32."""
    row_weights: Tensor
    """(b,) float64: w_i."""
    column_weights: Tensor
    row_shares: Tensor
    """(b,) float64: w_i / (n * w), what a positive takes from G / w in its row."""
    column_shares: Tensor
    positive_weights: Tensor
    """(b,) float64: what each of the row's positive logits weighs in the loss, for its row and its column."""
    sizes: Tensor
    """The number of texts of each new id."""
    weight: float

    @classmethod
    def of(cls, own_ids: Tensor, image_ids: Tensor, text_ids: Tensor) -> Groups:
        """Of ids (b,) of these images, those of all ranks' images, and (B,) of all texts.

        Raises:
            ValueError: no image shares its id with a text.
        """
        numbers = torch.unique(torch.cat([own_ids, image_ids, text_ids]), return_inverse=True)[1]
        own, images, texts = numbers.split([len(own_ids), len(image_ids), len(text_ids)])
        num_images, num_texts = (torch.bincount(part, minlength=len(numbers)) for part in (images, texts))
        num_rows, num_columns = torch.stack([(num_texts[images] > 0).sum(), (num_images[texts] > 0).sum()]).tolist()
        if num_rows == 0:
            raise ValueError("groups: no image shares its id with a text, so there is nothing to learn from")
        weight = 1 / (2 * min(num_rows, num_columns))
        row_weights = (num_texts[own] > 0).double() / (2 * num_rows)
        column_weights = (num_images[texts] > 0).double() / (2 * num_columns)
        row_shares = row_weights / num_texts[own].clamp_min(1)
        return cls(
            rows=own.int(),
            columns=texts.int(),
            row_weights=row_weights,
            column_weights=column_weights,
            row_shares=row_shares / weight,
            column_shares=column_weights / num_images[texts].clamp_min(1) / weight,
            positive_weights=row_shares + (num_texts[own] > 0).double() / (2 * num_columns * num_images[own]),
            sizes=num_texts,
            weight=weight,
        )

    def among(self, columns: slice) -> Groups:
        """The tile of these columns."""
        return replace(self, columns=self.columns[columns], column_shares=self.column_shares[columns])

    def positives(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """The weighted sum of the rows' positive logits, from sums over each id's texts: O(B * D), in fixed order."""
        wide = accumulation_dtype(text)
        ordered = text.index_select(0, self.columns.argsort(stable=True)).to(wide)
        sums = torch.segment_reduce(ordered, "sum", lengths=self.sizes, axis=0, unsafe=True)
        return (self.positive_weights * positive_logits(image, sums.index_select(0, self.rows), scale)).sum()

    def raised(self, rows_lse: Tensor, columns_lse: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exps of rows and columns as the kernels take them: those of weight 0 are infinite."""
        rows, columns = ((self.weight / part).log() for part in (self.row_weights, self.column_weights))
        return rows_lse + rows, columns_lse + columns
