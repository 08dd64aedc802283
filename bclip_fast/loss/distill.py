"""DistillClipLoss: a student that learns from a teacher, computed on chunks of rows in plain PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bclip_fast.ops.contrastive import LIMITS
from bclip_fast.ops.contrastive.checks import as_scalar, check_features, default_chunk_size
from bclip_fast.ops.contrastive.definition import softmax_terms
from bclip_fast.ops.contrastive.loss_terms import pair_losses, positive_gradient
from bclip_fast.ops.custom_op import without_autocast
from bclip_fast.ops.derivatives import Definition, first_by_kernel, transformed
from bclip_fast.ops.dispatch import Limits, choose
from bclip_fast.ops.dtypes import widened

from .clip import ClipLoss
from .collectives import ColumnRanges, Ranks, promote_under_autocast
from .sums import gather_rows, merge_lse, sum_over_ranks

_LIMITS: Limits = {"reference": LIMITS["reference"]}


class DistillClipLoss(ClipLoss):
    """open_clip's DistillClipLoss: the contrastive loss, and the student's cross-entropy under the teacher, both ways.

    Across ranks the teacher's texts travel like the student's, and its softmax runs over all of them. So the
    distillation term, too, is that of the global batch. The teacher is a constant: its features must not require
    gradients.

    Only the reference backend implements it (chunks of rows in plain PyTorch, in single precision). The arguments are
    those of `ClipLoss`, except that hardness and groups are refused and operand_dtype has no effect.
    """

    @staticmethod
    def _global_loss(*arguments: Any) -> Any:
        return _GlobalDistillLoss.apply(*arguments)

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """open_clip's definition of one direction on dense logits (b, B). `forward` never builds them."""
        return -(teacher_logits.softmax(dim=1) * student_logits.log_softmax(dim=1)).sum(dim=1).mean(dim=0)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Return the (contrastive, distillation) losses of the student's (b, D) and the teacher's (b, E) features.

        With `output_dict` they come as `{"contrastive_loss": ..., "distill_loss": ...}`.

        Raises:
            ValueError: shapes, dtypes or a world_size that don't fit, or a teacher that requires gradients.
            CollectiveError: another rank is lost or didn't answer in time.
        """
        if self.hardness:
            raise ValueError("DistillClipLoss doesn't support hardness: its targets are the teacher's")
        ranks = self._checked_ranks(image_features)
        image, text = promote_under_autocast(image_features, text_features)
        teacher_image, teacher_text = promote_under_autocast(dist_image_features, dist_text_features)
        check_features(image, text)
        check_features(teacher_image, teacher_text)
        for other in (text, teacher_image, teacher_text):
            if len(image) != len(other):
                raise ValueError(f"image and text must have as many rows, got {len(image)} and {len(other)}")
        scale, teacher_scale = as_scalar(logit_scale, image), as_scalar(dist_logit_scale, image)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (teacher_image, teacher_text, teacher_scale)):
            raise ValueError("the teacher's features or logit_scale require gradients: compute them under no_grad")
        choose("distill_clip_loss", _LIMITS, self.backend, image, text, None, self.deterministic)
        with torch.autocast(image.device.type, enabled=False):
            inputs = image, text, scale, teacher_image, teacher_text, teacher_scale, ranks, self.chunk_size
            by_definition = ranks.size == 1 and transformed(inputs)
            contrastive, distill = (_definition if by_definition else self._global_loss)(*inputs)
            contrastive = self._smoothed(contrastive, image, text, logit_scale, ranks, alike=False)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill


@without_autocast
def _definition(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor,
    ranks: Ranks,
    _: int | None,
) -> tuple[Tensor, Tensor]:
    """The losses of _GlobalDistillLoss in plain torch, on whole matrices (b, B)."""
    sizes = ranks.batch_sizes(image, text)[1]
    local, weight = ColumnRanges(ranks.rank, sizes).local, 1 / (2 * sum(sizes))
    images, texts = widened(image), gather_rows(widened(text), ranks, sizes, "text features")
    with torch.no_grad():
        teacher_texts = ranks.gather(teacher_text, sizes, "the teacher's text features")
        teacher = teacher_scale * widened(teacher_image) @ widened(teacher_texts).T
        targets = teacher.softmax(1) + (teacher - ranks.merge_lse(teacher.logsumexp(0), "the teacher's columns")).exp()
    merge = partial(merge_lse, ranks)
    student = scale * images @ texts.T
    sums = student.logsumexp(1).sum() + merge(student.logsumexp(0))[local].sum()
    distill = weight * (sums - (targets * student).sum())
    contrastive = softmax_terms(images, texts, scale, local, weight, merge_columns=merge)
    contrastive, distill = sum_over_ranks(ranks, contrastive, distill)
    return contrastive, distill


class _GlobalDistillLoss(torch.autograd.Function):
    """Contrastive loss and distillation under a constant teacher, for b local images and the B texts of all ranks.

    S are the student's logits, Z the teacher's. R and U are the log-sum-exps of their rows, Q and V those of their
    columns. Then:

        distill = (sum_i (R_i - sum_j exp(Z_ij - U_i) * S_ij) + sum_j (Q_j - sum_i exp(Z_ij - V_j) * S_ij)) / (2 * B)
        d distill / d S_ij = (exp(S_ij - R_i) - exp(Z_ij - U_i) + exp(S_ij - Q_j) - exp(Z_ij - V_j)) / (2 * B)

    Each pair's difference is formed before any sum, because student and teacher nearly agree where both are sure.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        teacher_scale: Tensor,
        ranks: Ranks,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        sizes = ranks.batch_sizes(image, text)[1]
        positive_offset = sum(sizes[: ranks.rank])
        texts = ranks.gather(text, sizes, "text features")
        teacher_texts = ranks.gather(teacher_text, sizes, "the teacher's text features")
        # Four matrices of a chunk's size exist at a time.
        chunk_size = chunk_size or max(1, default_chunk_size(len(image), len(texts), image.device) // 4)
        ctx.chunk_size, ctx.sizes, ctx.positive_offset, ctx.ranks = chunk_size, sizes, positive_offset, ranks
        rows, positive, teacher_rows, row_means = (scale.new_empty(len(image)) for _ in range(4))
        columns, teacher_columns = (scale.new_full((len(texts),), float("-inf")) for _ in range(2))
        column_means = scale.new_zeros(len(texts))
        student_logits = _LogitRows(image, texts, scale)
        teacher_logits = _LogitRows(teacher_image, teacher_texts, teacher_scale)
        for start in range(0, len(image), chunk_size):
            chunk = slice(start, start + chunk_size)
            student, teacher = student_logits[chunk], teacher_logits[chunk]
            teacher_rows[chunk] = teacher.logsumexp(1)
            row_means[chunk] = ((teacher - teacher_rows[chunk, None]).exp_() * student).sum(1)
            teacher_chunk = teacher.logsumexp(0)
            chunk_means = (teacher.sub_(teacher_chunk).exp_() * student).sum(0)
            merged = torch.logaddexp(teacher_columns, teacher_chunk)
            column_means *= (teacher_columns - merged).exp()
            column_means += chunk_means * (teacher_chunk - merged).exp()
            teacher_columns = merged
            diagonal = student.diagonal(positive_offset + start)
            positive[chunk] = diagonal
            diagonal.fill_(float("-inf"))
            rows[chunk] = student.logsumexp(1)
            columns = torch.logaddexp(columns, student.logsumexp(0))
        columns = ranks.merge_lse(columns, "column sums")
        merged = ranks.merge_lse(teacher_columns, "the teacher's column sums")
        column_means = ranks.sum(column_means * (teacher_columns - merged).exp(), "the teacher's column means")
        local = slice(positive_offset, positive_offset + len(text))
        local_columns = columns[local]
        rows_lse = torch.logaddexp(rows, positive)
        contrastive = pair_losses(rows, local_columns, positive).sum()
        distill = (rows_lse - row_means).sum()
        distill = distill + (torch.logaddexp(local_columns, positive) - column_means[local]).sum()
        totals = ranks.sum(torch.stack([contrastive, distill]), "the losses") / (2 * len(texts))
        positives = ranks.gather(positive[:, None], sizes, "positive logits")[:, 0]
        columns_lse = torch.logaddexp(columns, positives)
        ctx.save_for_backward(
            image, texts, scale, teacher_image, teacher_texts, teacher_scale, rows_lse, columns_lse, teacher_rows,
            merged, positive_gradient(rows, local_columns, positive), text, teacher_text,
        )  # fmt: skip
        return totals[0].clone(), totals[1].clone()

    @staticmethod
    def definition_of(ctx: Any) -> Definition:
        """The definition of the call in plain torch."""
        image, _, scale, teacher_image, _, teacher_scale, *_, text, teacher_text = ctx.saved_tensors
        inputs = image, text, scale, teacher_image, teacher_text, teacher_scale
        return Definition(ctx.ranks.loss, _definition, (*inputs, ctx.ranks, ctx.chunk_size))

    @staticmethod
    @partial(first_by_kernel, definition_of)
    @without_autocast
    def backward(ctx: Any, grad: Tensor, distill_grad: Tensor) -> tuple[Tensor | None, ...]:
        (image, texts, scale, teacher_image, teacher_texts, teacher_scale, rows_lse, columns_lse, teacher_rows,
         teacher_columns, positive_grad, _, _) = ctx.saved_tensors  # fmt: skip
        # Data-parallel engines average over ranks, as in _GlobalClipLoss.
        weight = ctx.ranks.size / (2 * len(texts))
        student_logits = _LogitRows(image, texts, scale)
        teacher_logits = _LogitRows(teacher_image, teacher_texts, teacher_scale)
        image_grad = torch.empty_like(image)
        texts_grad = torch.zeros_like(student_logits.texts)
        scale_grad = torch.zeros_like(scale)
        for start in range(0, len(image), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            student, teacher = student_logits[chunk], teacher_logits[chunk]
            # Row and column probabilities, summed. `student` and `teacher` are overwritten.
            student_sums = (student - rows_lse[chunk, None]).exp_().add_(student.sub_(columns_lse).exp_())
            teacher_sums = (teacher - teacher_rows[chunk, None]).exp_().add_(teacher.sub_(teacher_columns).exp_())
            logit_grad = teacher_sums.neg_().add_(student_sums).mul_(distill_grad)
            student_sums.diagonal(ctx.positive_offset + start).copy_(positive_grad[chunk])
            logit_grad.add_(student_sums.mul_(grad)).mul_(weight)
            images = image[chunk].to(scale.dtype)
            unscaled = logit_grad @ student_logits.texts
            scale_grad += (unscaled * images).sum()
            image_grad[chunk] = scale * unscaled
            texts_grad.addmm_(logit_grad.T, images)
        text_grad = None
        if ctx.needs_input_grad[1]:
            text_grad = ctx.ranks.reduce((scale * texts_grad).to(image.dtype), ctx.sizes, "text gradients")
        return image_grad, text_grad, scale_grad, None, None, None, None, None


class _LogitRows:
    """Rows of the logits: `rows[chunk]` is scale * image[chunk] @ texts.T, accumulated in the scale's dtype."""

    def __init__(self, image: Tensor, texts: Tensor, scale: Tensor) -> None:
        self.image, self.texts, self.scale = image, texts.to(scale.dtype), scale

    def __getitem__(self, chunk: slice) -> Tensor:
        return (self.scale * self.image[chunk].to(self.scale.dtype)) @ self.texts.T
