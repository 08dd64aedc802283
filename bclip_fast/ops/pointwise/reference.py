"""The definitions, in plain PyTorch. Their gradients come from autograd, so they are an independent oracle.

Dropout drops element (t, j) of a (T, D) branch if word j % 4 of Philox4x32-10 is below floor(dropout_p * 2^32). The
counter is (j // 4, t, 0, 0), and the key is (low 32 bits of the seed, high 32 bits). Other elements are divided by
1 - dropout_p.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.ops.custom_op import without_autocast
from bclip_fast.ops.philox import key_of, philox, threshold_of

_CPU = torch.device("cpu")


@without_autocast
def add_norm(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(normed, stream + dropout(branch)), both in the stream's dtype. Without a seed, torch's own dropout runs."""
    if branch is not None:
        if seed is None:
            branch = F.dropout(branch, dropout_p) if dropout_p else branch
        else:
            rows, columns = branch.shape
            kept = dropout_mask(rows, columns, dropout_p, seed, branch.device)
            branch = branch * (kept / (1 - dropout_p)).to(branch.dtype)
        stream = stream + branch.to(stream.dtype)
    return F.layer_norm(stream, stream.shape[1:], weight.to(stream.dtype), bias.to(stream.dtype), eps), stream


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x)"""
    return F.gelu(x)


def dropout_mask(rows: int, columns: int, dropout_p: float, seed: Tensor, device: torch.device = _CPU) -> Tensor:
    """(rows, columns) bool on `device`, True for an element that dropout keeps."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    quad, row = torch.arange(-(-columns // 4), device=device), torch.arange(rows, device=device)
    words = torch.stack(philox((quad[None, :], row[:, None], zero, zero), key_of(seed, device)), -1)
    return words.flatten(1)[:, :columns] >= threshold_of(dropout_p)
