"""SigLIP's text tower (arXiv 2303.15343): bidirectional, with padding that is part of the caption."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention_pool import init_as_big_vision
from .packed import Packed
from .text import TextConfig, check_text, filled
from .transformer import Linear, Norm, PreNormLayer, PreProjection, Sequences, Tower

NORM_EPS = 1e-6


class SiglipTextTower(Tower):
    """Pre-norm layers without mask, final norm, and the projection with bias of the last position's output.

    SigLIP was trained on captions that are padded to context_length. Every token attends to the padding, and the last
    position, which is padding unless the caption is that long, gives the embedding.
    """

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, width))
        self.layers = nn.ModuleList(
            PreNormLayer(width, config.heads, config.mlp_ratio, NORM_EPS, config.activation)
            for _ in range(config.layers)
        )
        self.norm = Norm(width, NORM_EPS)
        self.head = Linear(width, embed_dim)
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialise as big_vision does: embeddings of unit variance a row, Xavier's layers, LeCun's projection."""
        width = self.config.width
        nn.init.normal_(self.token_embedding.weight, std=width**-0.5)
        nn.init.normal_(self.pos_embed, std=width**-0.5)
        for layer in self.layers:
            init_as_big_vision(layer)
        nn.init.trunc_normal_(self.head.weight, std=width**-0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, text: Packed | Tensor | PreProjection) -> Tensor:
        """Embed n captions, packed or (n, L) int64 with L <= context_length -> (n, embed_dim), not normalised.

        The captions are padded with pad_id to context_length first.
        """
        if isinstance(text, PreProjection):
            return self.head(text.states)
        check_text(text, self.config.context_length)
        ids = filled(text, self.config)
        num_tokens = ids.shape[1]
        stream = (self.token_embedding(ids) + self.pos_embed).flatten(0, 1)
        branch: Tensor | None = None
        last_rows = torch.arange(1, ids.shape[0] + 1, device=ids.device) * num_tokens - 1
        for layer in self.layers:
            rows = last_rows if layer is self.layers[-1] else None
            stream, branch = self.run_layer(layer, stream, branch, Sequences(num_tokens), rows)
        return self.head(self.store_pre_projection(self.norm(stream, branch)[0]))
