"""The text towers: BERT with the projection of BiomedCLIP, and the GPT-style tower of its ablation.

Both compute on packed tokens; padded ids are packed first, which changes no result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops import linear
from .packed import Packed
from .transformer import (
    MAX_TOKENS,
    Linear,
    Norm,
    Pooled,
    PostNormLayer,
    PreNormLayer,
    Sequences,
    Tower,
    check_range,
    check_sizes,
    linear_std,
)

BERT_NORM_EPS = 1e-12
GPT_NORM_EPS = 1e-5


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower; the defaults are PubMedBERT with 256 tokens."""

    kind: Literal["bert", "gpt"] = "bert"
    """bert: post-norm, bidirectional, first token read. gpt: pre-norm, causal, end token read."""
    context_length: int = 256
    """Tokens that a caption is cut to and padded to."""
    vocab_size: int = 30522
    """Rows of the embedding table; PubMedBERT's is larger than its vocabulary."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    max_positions: int = 512
    """Rows of BERT's position table; the gpt tower has context_length of them."""
    dropout: float = 0.1
    """After the embeddings and each sublayer of bert, in training."""
    attention_dropout: float = 0.1
    """Of bert's attention weights, in training."""
    pad_id: int = 0
    end_id: int | None = None
    """gpt: the token whose output is read, at its first position; None reads at the highest id, as CLIP does."""
    projection: Literal["mlp", "linear"] = "mlp"
    """bert: width -> (width + embed_dim) // 2 -> embed_dim with GELU, or one linear layer; neither has biases."""

    def __post_init__(self) -> None:
        check_sizes("text", self.width, self.layers, self.heads, self.mlp_ratio)
        if self.kind not in ("bert", "gpt"):
            raise UserError(f"text.kind is {self.kind!r}; choose bert or gpt")
        if self.projection not in ("mlp", "linear"):
            raise UserError(f"text.projection is {self.projection!r}; choose mlp or linear")
        check_range("text.context_length", self.context_length, 2, MAX_TOKENS)
        check_range("text.vocab_size", self.vocab_size, 2, 10_000_000)
        check_range("text.max_positions", self.max_positions, 2, MAX_TOKENS)
        check_range("text.pad_id", self.pad_id, 0, self.vocab_size - 1)
        if self.end_id is not None:
            check_range("text.end_id", self.end_id, 0, self.vocab_size - 1)
        if self.kind == "bert" and self.context_length > self.max_positions:
            raise UserError(
                f"text.context_length {self.context_length} exceeds text.max_positions {self.max_positions}"
            )
        for name in ("dropout", "attention_dropout"):
            check_range(f"text.{name}", getattr(self, name), 0.0, 0.99)


def pack(ids: Tensor, wanted: Tensor) -> tuple[Packed, Tensor]:
    """(B, L) ids and which of them to keep, bool -> those, and (T,) int64 their columns.

    Waits for an accelerator to count them: pack in the loader.
    """
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    bounds = torch.nn.functional.pad(wanted.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Packed(ids[wanted], bounds, ids.shape[1]), columns[wanted]


class BertTower(Tower):
    """Hugging Face's BertModel without pooler, the first token's last hidden state, and the projection."""

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
        self._initialise()

    def _initialise(self) -> None:
        """BERT's: normal, zero biases; 0.02 for embeddings, and for linear layers at width 768; the projection keeps
        PyTorch's."""
        for module in [*self.children(), *self.layers.modules()]:
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=linear_std(self.config.width))
                nn.init.zeros_(module.bias)

    def forward(self, text: Packed | Tensor | Pooled, *, tokens: bool = False) -> Tensor:
        """n captions, packed or (n, L) int64 padded with pad_id -> (n, embed_dim), not normalised.

        With `tokens`, the states of all T tokens, packed as they come, instead: (T, width).

        Padding inside a row keeps its position and is attended to by none; a row of padding alone keeps its first.
        """
        if isinstance(text, Pooled):
            return self.proj(text.states)
        check_text(text, self.config.max_positions)
        if isinstance(text, Packed):
            positions = text.positions
        else:
            wanted = text != self.config.pad_id
            wanted[:, :1] = True
            text, positions = pack(text, wanted)
        # Looked up through their modules, although row 0 of the token types is all that is read: ZeRO-3 gathers a
        # parameter only where its own module runs.
        x = self.word_embeddings(text.ids) + self.position_embeddings(positions)
        x = x + self.token_type_embeddings(torch.zeros_like(positions[:1]))
        normed, stream = self.embedding_norm(x, post=True)
        stream = self.dropout(stream)
        normed = stream.to(normed.dtype)
        sequences = Sequences(text.max_seqlen, text.cu_seqlens)
        first = text.cu_seqlens[:-1].long()
        for layer in self.layers:
            rows = first if layer is self.layers[-1] and not tokens else None
            normed, stream = self.run(layer, normed, stream, sequences, rows)
        return normed if tokens else self.proj(self.keep(normed))


class GptTower(Tower):
    """CLIP's text transformer: causal, GELU, final norm, the end token's output, a projection matrix."""

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, width))
        self.layers = nn.ModuleList(
            PreNormLayer(width, config.heads, config.mlp_ratio, GPT_NORM_EPS, quick_gelu) for _ in range(config.layers)
        )
        self.norm = Norm(width, GPT_NORM_EPS)
        self.projection = nn.Parameter(torch.empty(width, embed_dim))
        self._initialise()

    def _initialise(self) -> None:
        """CLIP's: standard deviations that fall with width and depth."""
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

    def forward(self, text: Packed | Tensor | Pooled) -> Tensor:
        """n captions, packed or (n, L) int64, L up to context_length -> (n, embed_dim), not normalised."""
        if isinstance(text, Pooled):
            return linear(text.states, self.projection.T)
        check_text(text, self.config.context_length)
        if isinstance(text, Tensor):
            # Nothing attends to what comes after it.
            end = self._key(text).argmax(dim=-1, keepdim=True)
            text = pack(text, torch.arange(text.shape[1], device=text.device) <= end)[0]
        stream: Tensor = self.token_embedding(text.ids) + self.pos_embed[text.positions]
        branch: Tensor | None = None
        sequences = Sequences(text.max_seqlen, text.cu_seqlens, causal=True)
        for layer in self.layers:
            rows = self._ends(text) if layer is self.layers[-1] else None
            stream, branch = self.run(layer, stream, branch, sequences, rows)
        return linear(self.keep(self.norm(stream, branch)[0]), self.projection.T)

    def _key(self, ids: Tensor) -> Tensor:
        """What is highest where the end token is."""
        return ids if self.config.end_id is None else (ids == self.config.end_id).long()

    def _ends(self, text: Packed) -> Tensor:
        """(n,) int64: the token where each caption's key is highest for the first time."""
        key, owners, places = self._key(text.ids), text.owners, torch.arange(len(text.ids), device=text.ids.device)
        lowest = torch.zeros_like(text.cu_seqlens[1:], dtype=torch.int64)
        highest = lowest.scatter_reduce(0, owners, key, "amax", include_self=False)[owners]
        beyond = torch.full_like(lowest, len(places))
        return beyond.scatter_reduce(0, owners, torch.where(key == highest, places, len(places)), "amin")


def check_text(text: Packed | Tensor, longest: int) -> None:
    if isinstance(text, Packed):
        if text.max_seqlen > longest:
            raise UserError(f"a caption has up to {text.max_seqlen} tokens; this model takes {longest}")
    elif text.dim() != 2 or text.shape[1] > longest:
        raise UserError(f"token ids have shape {tuple(text.shape)}; this model takes (batch, up to {longest})")


def text_tower(config: TextConfig, embed_dim: int, quick_gelu: bool = False) -> BertTower | GptTower:
    return BertTower(config, embed_dim) if config.kind == "bert" else GptTower(config, embed_dim, quick_gelu)
