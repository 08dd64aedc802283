"""The text towers: BERT with BiomedCLIP's projection, and the GPT-style tower of its ablation.

Both compute on packed tokens. Padded ids are packed first, which doesn't change any result. SigLIP's tower is in
siglip_text.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bclip_fast.errors import UserError
from bclip_fast.ops import linear
from bclip_fast.ops.dispatch import is_exporting

from .packed import Packed
from .transformer import (
    MAX_TOKENS,
    Linear,
    Norm,
    PostNormLayer,
    PreNormLayer,
    PreProjection,
    Sequences,
    Tower,
    check_activation,
    check_range,
    check_sizes,
    linear_std,
)

BERT_NORM_EPS = 1e-12
GPT_NORM_EPS = 1e-5


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower. The defaults are those of PubMedBERT with 256 tokens."""

    kind: Literal["bert", "gpt", "siglip"] = "bert"
    """bert: post-norm layers, bidirectional, reads the first token. gpt: pre-norm layers, causal, reads the end
    token. siglip: pre-norm layers, bidirectional, attends to the padding, reads the last position."""
    context_length: int = 256
    """Number of tokens to which captions are truncated and padded."""
    vocab_size: int = 30522
    """Number of rows of the embedding table. PubMedBERT's has more rows than its vocabulary has tokens."""
    width: int = 768
    """Dimension of the hidden states, a multiple of heads."""
    layers: int = 12
    """Number of transformer layers."""
    heads: int = 12
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer, as a multiple of width."""
    max_positions: int = 512
    """Number of rows of BERT's position table. The other towers have context_length rows."""
    dropout: float = 0.1
    """Dropout after bert's embeddings and sublayers, in training."""
    attention_dropout: float = 0.1
    """Dropout of bert's attention weights, in training."""
    pad_id: int = 0
    """Id of the padding token."""
    end_id: int | None = None
    """The token whose output gpt reads, at its first position. None: the highest id, as in CLIP."""
    projection: Literal["mlp", "linear"] = "mlp"
    """bert's projection, without biases. mlp: width -> (width + embed_dim) // 2 -> embed_dim with GELU. linear: one
    layer."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation of the layers: the exact GELU or, for kind siglip only, its approximation by tanh."""
    attend_padding: bool = False
    """Pad captions of bert to context_length, and attend to the padding, as PMC-CLIP does. siglip always does."""

    def __post_init__(self) -> None:
        check_sizes("text", self.width, self.layers, self.heads, self.mlp_ratio)
        if self.kind not in ("bert", "gpt", "siglip"):
            raise UserError(f"text.kind={self.kind!r} must be bert, gpt or siglip")
        check_activation("text", self.activation, self.kind)
        if not isinstance(self.attend_padding, bool):
            raise UserError(f"text.attend_padding={self.attend_padding!r} must be True or False")
        if self.attend_padding and self.kind != "bert":
            raise UserError(f"text.attend_padding=True applies only to kind bert; text.kind is {self.kind}")
        if self.projection not in ("mlp", "linear"):
            raise UserError(f"text.projection={self.projection!r} must be mlp or linear")
        check_range("text.context_length", self.context_length, 2, MAX_TOKENS)
        check_range("text.vocab_size", self.vocab_size, 2, 10_000_000)
        check_range("text.max_positions", self.max_positions, 2, MAX_TOKENS)
        check_range("text.pad_id", self.pad_id, 0, self.vocab_size - 1)
        if self.end_id is not None:
            check_range("text.end_id", self.end_id, 0, self.vocab_size - 1)
        if self.kind == "bert" and self.context_length > self.max_positions:
            raise UserError(
                f"text.context_length={self.context_length} must not exceed text.max_positions={self.max_positions}"
            )
        for name in ("dropout", "attention_dropout"):
            check_range(f"text.{name}", getattr(self, name), 0.0, 0.99)

    @property
    def computes_padding(self) -> bool:
        """Whether the tower computes context_length tokens for every caption."""
        return self.kind == "siglip" or self.attend_padding


def pack(ids: Tensor, kept: Tensor) -> tuple[Packed, Tensor]:
    """Pack the tokens of padded ids (B, L) at which `kept` (B, L) is true. Also return their columns, (T,) int64.

    Counting the tokens waits for an accelerator, so pack in the loader.
    """
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    bounds = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Packed(ids[kept], bounds, ids.shape[1]), columns[kept]


def stretch_positions(pos_embed: Tensor, length: int, kept: int = 20) -> Tensor:
    """Stretch CLIP's position embeddings to more tokens, as Long-CLIP does: (old, D) -> (length, D).

    The first `kept` rows, which are well trained, stay. The others are interpolated: row j >= kept of the result lies
    at the old position p = kept + (j - kept) * (old - kept) / (length - kept), on the line through the embeddings of
    floor(p) and floor(p) + 1. Beyond the last old row, the line through the last two goes on. 77 rows become 248 with
    the factor 4 (Long-CLIP, arXiv 2403.15378, section 3.1, and its code for the last rows).

    Raises:
        UserError: there are fewer than kept + 2 rows, so that nothing can be interpolated.
    """
    old = len(pos_embed)
    if old < kept + 2:
        raise UserError(f"a text tower of {old} positions can't be stretched to {length}: it needs {kept + 2} or more")
    positions = kept + torch.arange(length - kept, dtype=torch.float64) * (old - kept) / (length - kept)
    lower = positions.floor().clamp(max=old - 2).long()
    weight = (positions - lower).to(pos_embed.dtype)[:, None]
    stretched = pos_embed[lower] + weight * (pos_embed[lower + 1] - pos_embed[lower])
    return torch.cat([pos_embed[:kept], stretched])


def filled(text: Packed | Tensor, config: TextConfig) -> Tensor:
    """The captions padded with pad_id to context_length: (n, context_length) int64."""
    if isinstance(text, Packed):
        ids = text.ids.new_full((len(text.cu_seqlens) - 1, config.context_length), config.pad_id)
        return ids.index_put((text.owners, text.positions), text.ids)
    return nn.functional.pad(text, (0, config.context_length - text.shape[1]), value=config.pad_id)


class BertTower(Tower):
    """Hugging Face's BertModel without its pooler, and the projection of the first token's last hidden state."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.embedding_norm = Norm(width, BERT_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            PostNormLayer(
                width,
                config.heads,
                config.mlp_ratio,
                BERT_NORM_EPS,
                config.dropout,
                config.attention_dropout,
            )
            for _ in range(config.layers)
        )
        self.proj: nn.Module
        if config.projection == "mlp":
            hidden = (width + embed_dim) // 2
            self.proj = nn.Sequential(
                Linear(width, hidden, bias=False), nn.GELU(), Linear(hidden, embed_dim, bias=False)
            )
        else:
            self.proj = Linear(width, embed_dim, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """BERT's: normal weights and zero biases. Embeddings use 0.02; linear layers, too, at width 768.

        The projection keeps PyTorch's initialisation.
        """
        for module in [*self.children(), *self.layers.modules()]:
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=linear_std(self.config.width))
                nn.init.zeros_(module.bias)

    def forward(self, text: Packed | Tensor | PreProjection, *, tokens: bool = False) -> Tensor:
        """Embed n captions -> (n, embed_dim), not normalised to unit length.

        Padding inside a row keeps its position, and no token attends to it. A row that holds only padding keeps its
        first token.

        Args:
            text: packed captions, or (n, L) int64 padded with pad_id.
            tokens: return the states of all T tokens, in packed order, instead: (T, width).
        """
        if isinstance(text, PreProjection):
            return self.proj(text.states)
        attend_padding = self.config.attend_padding
        check_text(text, self.config.context_length if attend_padding else self.config.max_positions)
        if attend_padding:
            text = filled(text, self.config)
        if isinstance(text, Packed):
            ids, positions, sequences = text.ids, text.positions, Sequences(text.max_seqlen, text.cu_seqlens)
            first_rows = text.cu_seqlens[:-1].long()
        elif attend_padding or (is_exporting() and not tokens):
            # A graph for export keeps the padding: the number of other tokens isn't a size that it knows.
            columns = torch.arange(text.shape[1], device=text.device).expand_as(text)
            kept = None if attend_padding else (text != self.config.pad_id) | (columns == 0)
            ids, positions, sequences = text.flatten(), columns.flatten(), Sequences(text.shape[1], key_mask=kept)
            first_rows = torch.arange(text.shape[0], device=text.device) * text.shape[1]
        else:
            kept = text != self.config.pad_id
            kept[:, :1] = True
            packed, positions = pack(text, kept)
            ids, sequences = packed.ids, Sequences(packed.max_seqlen, packed.cu_seqlens)
            first_rows = packed.cu_seqlens[:-1].long()
        # Token types are always 0, but their module looks row 0 up: ZeRO-3 gathers a parameter only where its own
        # module runs.
        x = self.word_embeddings(ids) + self.position_embeddings(positions)
        x = x + self.token_type_embeddings(positions.new_zeros(1))
        normed, stream = self.embedding_norm(x, post=True)
        stream = self.dropout(stream)
        normed = stream.to(normed.dtype)
        for layer in self.layers:
            rows = first_rows if layer is self.layers[-1] and not tokens else None
            normed, stream = self.run_layer(layer, normed, stream, sequences, rows)
        return normed if tokens else self.proj(self.store_pre_projection(normed))


class GptTower(Tower):
    """CLIP's text transformer: causal layers, final norm, and the end token's output times a projection matrix."""

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, width))
        self.layers = nn.ModuleList(
            PreNormLayer(width, config.heads, config.mlp_ratio, GPT_NORM_EPS, "quick_gelu" if quick_gelu else "gelu")
            for _ in range(config.layers)
        )
        self.norm = Norm(width, GPT_NORM_EPS)
        self.projection = nn.Parameter(torch.empty(width, embed_dim))
        self._init_weights()

    def _init_weights(self) -> None:
        """CLIP's: standard deviations that decrease with width and depth."""
        width, depth = self.config.width, self.config.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        nn.init.normal_(self.projection, std=width**-0.5)
        for layer in self.layers:
            assert isinstance(layer, PreNormLayer)
            nn.init.normal_(layer.qkv.weight, std=width**-0.5)
            nn.init.normal_(layer.proj.weight, std=(width * 2 * depth) ** -0.5)
            nn.init.normal_(layer.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(layer.fc2.weight, std=(width * 2 * depth) ** -0.5)
            for projection in (layer.qkv, layer.proj):
                nn.init.zeros_(projection.bias)

    def forward(self, text: Packed | Tensor | PreProjection) -> Tensor:
        """Embed n captions, packed or (n, L) int64 with L <= context_length -> (n, embed_dim), not normalised."""
        if isinstance(text, PreProjection):
            return linear(text.states, self.projection.T)
        stream, branch = self.run_layers(*self.embed_tokens(text))
        return linear(self.store_pre_projection(self.norm(stream, branch)[0]), self.projection.T)

    def packed(self, text: Packed | Tensor) -> Packed:
        """Pack ids (n, L) up to the end tokens. Causal attention never reads what comes after them."""
        if isinstance(text, Packed):
            return text
        end = self._end_score(text).argmax(dim=-1, keepdim=True)
        return pack(text, torch.arange(text.shape[1], device=text.device) <= end)[0]

    def embed_tokens(self, text: Packed | Tensor) -> tuple[Tensor, Sequences, Tensor]:
        """The input (T, D) of the layers, its sequences, and the row of each caption that is projected, (n,) int64."""
        check_text(text, self.config.context_length)
        if isinstance(text, Tensor) and is_exporting():
            columns = torch.arange(text.shape[1], device=text.device)
            end_rows = torch.arange(text.shape[0], device=text.device) * text.shape[1]
            end_rows = end_rows + self._end_score(text).argmax(dim=-1)
            ids, positions = text.flatten(), columns.expand_as(text).flatten()
            sequences = Sequences(text.shape[1], causal=True)
        else:
            text = self.packed(text)
            ids, positions, end_rows = text.ids, text.positions, self._end_rows(text)
            sequences = Sequences(text.max_seqlen, text.cu_seqlens, causal=True)
        return self.token_embedding(ids) + self.pos_embed[positions], sequences, end_rows

    def run_layers(self, x: Tensor, sequences: Sequences, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stream and branch after the layers, of all rows of `x` or, in the last layer, of `rows` only."""
        stream, branch = x, None
        for layer in self.layers:
            selected = rows if layer is self.layers[-1] else None
            stream, branch = self.run_layer(layer, stream, branch, sequences, selected)
        assert branch is not None
        return stream, branch

    def _end_score(self, ids: Tensor) -> Tensor:
        """A score per token that is highest at the end token."""
        return ids if self.config.end_id is None else (ids == self.config.end_id).long()

    def _end_rows(self, text: Packed) -> Tensor:
        """(n,) int64: the row of each caption's first token with the highest score."""
        scores, owners = self._end_score(text.ids), text.owners
        num_rows = text.ids.shape[0]
        row_numbers = torch.arange(num_rows, device=text.ids.device)
        zeros = torch.zeros_like(text.cu_seqlens[1:], dtype=torch.int64)
        highest = zeros.scatter_reduce(0, owners, scores, "amax", include_self=False)[owners]
        no_row = torch.full_like(zeros, num_rows)
        candidates = torch.where(scores == highest, row_numbers, num_rows)
        return no_row.scatter_reduce(0, owners, candidates, "amin")


def check_text(text: Packed | Tensor, max_tokens: int) -> None:
    """Raise UserError unless the captions have a shape and length that a tower takes."""
    if isinstance(text, Packed):
        if text.max_seqlen > max_tokens:
            raise UserError(f"a caption has up to {text.max_seqlen} tokens; this model takes {max_tokens}")
    elif text.dim() != 2 or text.shape[1] > max_tokens:
        raise UserError(f"token ids have shape {tuple(text.shape)}; this model takes (batch, up to {max_tokens})")
