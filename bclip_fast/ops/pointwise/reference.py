"""The definitions, in plain PyTorch; their gradients come from autograd and so are an independent oracle.

Dropout keeps element (t, j) of a (T, D) branch unless word j % 4 of Philox4x32-10 at counter (j // 4, t, 0, 0) and key
(seed's low 32 bits, its high 32 bits) is below floor(dropout_p * 2^32); what is kept is divided by 1 - dropout_p.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import philox


def add_norm(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(normed, stream + dropout(branch)), both in the stream's dtype; without a seed it is torch's own dropout."""
    if branch is not None:
        if seed is None:
            branch = F.dropout(branch, dropout_p) if dropout_p else branch
        else:
            kept = dropout_mask(len(branch), branch.shape[1], dropout_p, seed).to(branch.device)
            branch = branch * (kept / (1 - dropout_p)).to(branch.dtype)
        stream = stream + branch.to(stream.dtype)
    return F.layer_norm(stream, stream.shape[1:], weight.to(stream.dtype), bias.to(stream.dtype), eps), stream


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def dropout_mask(rows: int, columns: int, dropout_p: float, seed: Tensor) -> Tensor:
    """(rows, columns) bool, True where kept."""
    key, zero = int(seed), torch.zeros((), dtype=torch.int64)
    counter = (torch.arange(-(-columns // 4))[None, :], torch.arange(rows)[:, None], zero, zero)
    words = torch.stack(philox(counter, (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF)), -1)
    return words.flatten(1)[:, :columns] >= int(dropout_p * 2**32)
