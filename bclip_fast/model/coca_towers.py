"""CoCa's towers in open_clip's form: a pool with many queries, and a text tower with a class token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast.ops import linear
from bclip_fast.ops.dispatch import is_exporting

from .cross_attention import CrossProjection, dense_attention
from .packed import Packed
from .text import GptTower, TextConfig, check_text, pack
from .transformer import ClassTokens, Linear, Norm, PreProjection, Sequences
from .vision import CLIP_NORM_EPS, VisionConfig, VisionTower


class CocaPool(nn.Module):
    """CoCa's pool in open_clip's form: learned queries attend to an image's tokens (arXiv 2205.01917, section 3.2).

    One pool serves both tasks. Its first query gives the embedding, and the decoder reads the others.

    Args:
        width: width of the queries and of the output.
        context_width: width of the image's tokens.
    """

    def __init__(self, num_queries: int, width: int, context_width: int, heads: int, norm_eps: float) -> None:
        super().__init__()
        self.num_queries, self.heads = num_queries, heads
        self.query = nn.Parameter(torch.randn(num_queries, width))
        self.query_norm = Norm(width, norm_eps)
        self.token_norm = Norm(context_width, norm_eps)
        self.projection = CrossProjection(width, context_width)
        self.proj = Linear(width, width)

    def forward(self, stream: Tensor, branch: Tensor | None, num_tokens: int, num_queries: int) -> Tensor:
        """Pool the tokens stream + branch of n images, (n num_tokens, context width) -> (n, num_queries, width).

        Only the first `num_queries` queries are computed.
        """
        query, key_value = self.projection(
            self.query_norm(self.query[:num_queries])[0], self.token_norm(stream, branch)[0]
        )
        query = query.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        key, value = key_value.unflatten(0, (-1, num_tokens)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = dense_attention(query.expand(key.shape[0], -1, -1, -1), key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CocaVisionTower(VisionTower):
    """OpenAI's ViT with a `CocaPool` before the final norm. The first pooled token takes the place of the CLS token.

    Args:
        num_queries, pool_heads: sizes of the pool.
    """

    def __init__(
        self, config: VisionConfig, embed_dim: int, quick_gelu: bool, num_queries: int, pool_heads: int
    ) -> None:
        super().__init__(config, embed_dim, quick_gelu)
        self.pool: CocaPool = CocaPool(num_queries, embed_dim, config.width, pool_heads, CLIP_NORM_EPS)
        self.norm = Norm(embed_dim, CLIP_NORM_EPS)
        self.head = Linear(embed_dim, embed_dim, bias=False)

    def forward(  # type: ignore[override]
        self, image: Tensor | PreProjection, *, captions: bool = False
    ) -> Any:
        """Embed images -> (B, embed_dim), not normalised to unit length.

        Args:
            image: as for `VisionTower.forward`.
            captions: return (features, tokens), with the other pooled tokens (B, queries - 1, embed_dim) after the
                norm. Not of features before the projection.
        """
        if isinstance(image, PreProjection):
            return self.head(image.states)
        stream, branch, sequences = self.run_layers(image, all_rows=True)
        num_queries = self.pool.num_queries if captions else 1
        pooled = self.pool(stream, branch, sequences.max_seqlen, num_queries)
        states = self.norm(pooled.flatten(0, 1))[0].unflatten(0, (-1, num_queries))
        if captions:
            return self.head(states[:, 0]), states[:, 1:]
        return self.head(self.store_pre_projection(states[:, 0]))


class CocaTextTower(GptTower):
    """CLIP's text transformer, whose embedding is the output of a learned class token behind the caption."""

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__(config, embed_dim, quick_gelu)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.pos_embed = nn.Parameter(torch.empty(config.context_length + 1, config.width))
        for parameter in (self.class_token, self.pos_embed):
            nn.init.normal_(parameter, std=0.01)

    def forward(self, text: Packed | Tensor | PreProjection, *, captions: bool = False) -> Any:
        """As `GptTower.forward`. Padding behind the last other token doesn't change the result.

        captions: return (features, states), with the states (T, width) of the captions' T tokens before the final norm.
            Not of features before the projection.
        """
        if not captions:
            return super().forward(text)
        assert not isinstance(text, PreProjection)
        text = self.packed(text)
        x, sequences, rows = self.embed_tokens(text)
        stream, branch = self.run_layers(x, sequences, None)
        features = linear(self.norm(stream[rows], branch[rows])[0], self.projection.T)
        token_rows = _token_rows(text)
        return features, stream[token_rows] + branch[token_rows]

    def packed(self, text: Packed | Tensor) -> Packed:
        """Pack ids (n, L) up to the last token that isn't padding."""
        if isinstance(text, Packed):
            return text
        columns = torch.arange(text.shape[1], device=text.device)
        last = (columns * (text != self.config.pad_id)).amax(dim=-1, keepdim=True)
        return pack(text, columns <= last)[0]

    def embed_tokens(self, text: Packed | Tensor) -> tuple[Tensor, Sequences, Tensor]:
        """As `GptTower.embed_tokens`. Every caption gets two further rows.

        The last row is the class token at position context_length. It attends to the caption and to the position behind
        it, because open_clip's mask is shifted by one position. This position holds padding or, behind a caption that
        fills the context, the class token itself.
        """
        check_text(text, self.config.context_length)
        if isinstance(text, Tensor) and is_exporting():
            return self._embed_padded(text)
        text = self.packed(text)
        num_captions, length = text.cu_seqlens.shape[0] - 1, self.config.context_length
        num_added = 2 * torch.arange(num_captions + 1, device=text.ids.device, dtype=torch.int32)
        bounds = text.cu_seqlens + num_added
        class_rows, token_rows = bounds[1:].long() - 1, _token_rows(text)
        num_rows = text.ids.shape[0] + 2 * num_captions
        ids = text.ids.new_full((num_rows,), self.config.pad_id).index_copy(0, token_rows, text.ids)
        positions = ids.new_full((num_rows,), length).index_copy(0, token_rows, text.positions)
        positions = positions.index_copy(0, class_rows - 1, text.lengths.long())
        x = torch.where((positions == length)[:, None], self.class_token, self.token_embedding(ids))
        tokens = ClassTokens(class_rows, class_rows - 1)
        sequences = Sequences(text.max_seqlen + 2, bounds, causal=True, class_tokens=tokens)
        return x + self.pos_embed[positions], sequences, class_rows

    def _embed_padded(self, ids: Tensor) -> tuple[Tensor, Sequences, Tensor]:
        """For graphs, which don't know the number of tokens without padding."""
        length, config = self.config.context_length, self.config
        ids = F.pad(ids, (0, length - ids.shape[1]), value=config.pad_id)
        columns = torch.arange(length + 1, device=ids.device)
        lengths = 1 + (columns[:-1] * (ids != config.pad_id)).amax(dim=-1, keepdim=True)
        x = torch.cat([self.token_embedding(ids), self.class_token.expand(ids.shape[0], 1, -1)], dim=1)
        rows = torch.arange(ids.shape[0], device=ids.device) * (length + 1) + length
        sequences = Sequences(length + 1, causal=True, key_mask=columns <= lengths)
        return (x + self.pos_embed).flatten(0, 1), sequences, rows


def _token_rows(text: Packed) -> Tensor:
    """(T,) int64: the row of each caption's tokens among the rows of `CocaTextTower.embed_tokens`."""
    return torch.arange(text.ids.shape[0], device=text.ids.device) + 2 * text.owners
