"""Token ids from the `tokenizers` library, identical to those of transformers' tokenizers.

open_clip cleans a text before it tokenizes it: ftfy, HTML entities, white space. BiomedCLIP was trained on such text,
in which curly quotes are straight. `tokenizer_cleaning` does the same. It changes the ids of 5 to 10 % of the captions
of PMC articles.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import trainers
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.io.atomic import write_text

from . import tokenizer_files
from .packed import Packed
from .special_tokens import DEFAULTS, SpecialTokens
from .tokenizer_cleaning import CLEANERS, Cleaning, clean


class Tokenizer:
    """Converts captions to token ids, padded or packed, after cleaning each caption.

    Attributes:
        context_length: number of tokens to which captions are truncated and padded.
        vocab_size: number of tokens. Every id is below it.
        pad_id: the id that fills a row after its last token.
        special: the special tokens by their role, such as `pad_token`.
        cleaning: name of the cleaning in `tokenizer_cleaning.CLEANERS`.
        has_start: whether captions begin with a start token. SigLIP's have only an end token.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        context_length: int = 256,
        special: SpecialTokens | None = None,
        cleaning: Cleaning = "whitespace",
    ) -> None:
        """special: BERT's by default, as far as the vocabulary has them."""
        self.context_length = _checked_length(context_length)
        self.fast = fast
        self.special = DEFAULTS if special is None else special
        # This class truncates and pads. The library would keep both as state that threads share.
        self.fast.no_truncation()
        self.fast.no_padding()
        self.vocab_size: int = 1 + max(fast.get_vocab(with_added_tokens=True).values(), default=-1)
        pad = self.special.get("pad_token")
        # CLIP's byte-pair tokenizer doesn't have a padding token, and open_clip fills its rows with 0.
        self.pad_id: int = (fast.token_to_id(pad.content) if pad else 0) or 0
        self.cleaning: Cleaning = cleaning
        ends = fast.encode("").ids
        self.has_start = len(ends) == 2
        if not self.has_start and (len(ends) != 1 or fast.encode("a").ids[-1:] != ends):
            raise UserError("the tokenizer doesn't add start and end tokens; its file needs a post_processor")

    def encode(self, texts: list[str], context_length: int | None = None) -> list[list[int]]:
        """Token ids of each text: start, pieces, end. Beyond context_length, the last pieces are dropped."""
        length = _checked_length(context_length or self.context_length)
        cleaned = list(map(CLEANERS[self.cleaning], texts))
        encodings = self.fast.encode_batch_fast(cleaned)
        return [ids if len(ids) <= length else [*ids[: length - 1], ids[-1]] for ids in (e.ids for e in encodings)]

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """(number of texts, context_length) int64: the ids of `encode`, each row filled with pad_id."""
        rows = self.encode([texts] if isinstance(texts, str) else list(texts), context_length)
        ids = torch.full((len(rows), context_length or self.context_length), self.pad_id, dtype=torch.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def packed(self, texts: list[str], context_length: int | None = None) -> Packed:
        """The ids of `encode` without padding, for `BiomedClip.encode_text`."""
        rows = self.encode(texts, context_length)
        return Packed.of(
            torch.tensor([token for row in rows for token in row], dtype=torch.int64), list(map(len, rows))
        )

    @classmethod
    def from_file(cls, path: Path | str, context_length: int | None = None) -> Tokenizer:
        """Load a `tokenizer.json`, a BERT's `vocab.txt` or a SigLIP's `spiece.model`, with the settings in its folder.

        `tokenizer_files` describes the settings.

        Args:
            context_length: 256 by default, or the settings' limit if that is lower.

        Raises:
            UserError: a file can't be read or isn't a tokenizer, a setting isn't supported, or context_length is above
                the limit in the settings.
        """
        files = tokenizer_files.read(Path(path))
        if context_length is None:
            context_length = min(256, files.max_length or 256)
        elif files.max_length is not None and context_length > files.max_length:
            raise UserError(
                f"{path} is made for {files.max_length} tokens (model_max_length of its settings), fewer than the "
                f"context length {context_length}; set that to {files.max_length}, or correct the settings"
            )
        return cls(files.fast, context_length, files.special, files.cleaning)

    def with_context_length(self, context_length: int) -> Tokenizer:
        """Return the same tokenizer with another context length."""
        return type(self)(self.fast, context_length, self.special, self.cleaning)

    def with_cleaning(self, cleaning: Cleaning) -> Tokenizer:
        """Return the same tokenizer with another cleaning of the captions."""
        return type(self)(self.fast, self.context_length, self.special, cleaning)

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, context_length: int = 256, min_frequency: int = 2
    ) -> Tokenizer:
        """Learn an uncased WordPiece vocabulary of at most vocab_size tokens. [PAD] has id 0, as in PubMedBERT.

        Raises:
            UserError: the captions hold no text.
        """
        if vocab_size < 15:
            raise UserError(f"vocab_size={vocab_size} must be at least 15")
        fast = tokenizer_files.wordpiece({}, DEFAULTS)
        texts = [clean(caption) for caption in captions]
        special = [token.content for token in DEFAULTS.values()]
        initial, continuing = _characters(fast, texts, at_most=vocab_size // 3)
        # By default the library numbers continuing characters in the order of a hash table and breaks ties by these
        # numbers. It also lets the characters exceed the vocabulary's size. Naming them makes every run equal.
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[*special, *(f"##{character}" for character in continuing)],
            initial_alphabet=initial,
            limit_alphabet=len(initial),
            show_progress=False,
        )
        fast.train_from_iterator(texts, trainer)
        vocabulary = fast.get_vocab()
        if len(vocabulary) <= len(special):
            raise UserError("the captions hold no text to learn a vocabulary from")
        return cls(tokenizer_files.wordpiece(vocabulary, DEFAULTS), context_length)

    def save(self, folder: Path | str, **settings: Any) -> None:
        """Write `tokenizer.json`, and the `tokenizer_config.json` that transformers' AutoTokenizer needs.

        settings: further keys of tokenizer_config.json.
        """
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self.fast.to_str(pretty=True))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.context_length,
        }
        if self.cleaning != "whitespace":
            config["clean"] = self.cleaning
        config |= {
            name: token.content
            for name, token in self.special.items()
            if name.endswith("_token") and self.fast.token_to_id(token.content) is not None
        }
        write_text(folder / "tokenizer_config.json", json.dumps(config | settings, indent=2) + "\n")


def _checked_length(context_length: int) -> int:
    if context_length < 2:
        raise UserError(f"context_length={context_length} must be at least 2")
    return context_length


def _characters(fast: FastTokenizer, texts: list[str], at_most: int) -> tuple[list[str], list[str]]:
    """The most frequent characters, and those of them that also continue a word. Both lists follow the code points."""
    counts: Counter[str] = Counter()
    continuing: set[str] = set()
    for text in texts:
        for word, _ in fast.pre_tokenizer.pre_tokenize_str(fast.normalizer.normalize_str(text)):
            counts.update(word)
            continuing.update(word[1:])
    frequent = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:at_most])
    return frequent, [character for character in frequent if character in continuing]
