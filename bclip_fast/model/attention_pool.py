"""Multi-head attention pooling (MAP) of SigLIP's image tower (arXiv 2106.04560, appendix D.2, and 2303.15343)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .activation import ACTIVATIONS
from .transformer import Linear, Norm, Sequences, mlp_width


class MapPool(nn.Module):
    """x = proj(attention of one learned query over all tokens), then x + fc2(activation(fc1(norm(x)))).

    The query is the same for every image. The attention has no residual.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float, activation: str) -> None:
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.norm = Norm(width, norm_eps)
        self.fc1 = Linear(width, mlp_width(width, mlp_ratio))
        self.fc2 = Linear(mlp_width(width, mlp_ratio), width)
        nn.init.xavier_uniform_(self.probe)

    def forward(self, states: Tensor, sequences: Sequences) -> Tensor:
        """Pool n sequences of equal length, (T, width) -> (n, width)."""
        rows = torch.arange(0, states.shape[0], sequences.max_seqlen, device=states.device)
        query = self.query(self.probe[0]).unflatten(-1, (self.heads, -1)).expand(rows.shape[0], -1, -1)
        key_value = self.key_value(states).unflatten(-1, (2, self.heads, -1))
        normed, stream = self.norm(self.proj(sequences.attend_from(rows, query, key_value)))
        return stream + self.fc2(self.activation(self.fc1(normed)))


def init_as_big_vision(layer: nn.Module) -> None:
    """Initialise a SigLIP layer or pool as big_vision does: Xavier's uniform weights, MLP biases of 1e-6, others zero.

    Queries, keys and values are separate square matrices there, so each third of their packed weight is drawn as such.
    """
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            for square in module.weight.split(module.in_features) if "fc" not in name else (module.weight,):
                nn.init.xavier_uniform_(square)
            if "fc" in name:
                nn.init.normal_(module.bias, std=1e-6)
            else:
                nn.init.zeros_(module.bias)
