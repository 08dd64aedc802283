"""The operators by torch's own kernels, for devices without ours.

Unlike the other backends this is ordinary torch code. Autograd gives all derivatives, and torch.compile can fuse it.
`add_norm` runs four kernels where ours runs one, and moves twice the bytes (docs/operators.md).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bclip_fast.ops.custom_op import without_autocast

from . import reference


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
    """Same contract as `reference.add_norm`. A sum of two dtypes needs no copy of the branch in the wider one.

    A seed selects the same elements as in every backend, by Philox in int64 operations. Without one, torch's fused
    dropout runs, which is many times faster.
    """
    if branch is not None:
        if seed is not None:
            rows, columns = branch.shape
            kept = reference.dropout_mask(rows, columns, dropout_p, seed, branch.device)
            branch = branch * (kept / (1 - dropout_p)).to(branch.dtype)
        elif dropout_p:
            branch = F.dropout(branch, dropout_p)
        stream = (stream + branch).to(stream.dtype)
    weight, bias = weight.to(stream.dtype), bias.to(stream.dtype)
    return F.layer_norm(stream, stream.shape[1:], weight, bias, eps), stream
