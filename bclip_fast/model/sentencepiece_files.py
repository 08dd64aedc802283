"""A sentencepiece model file as a pipeline of the `tokenizers` library, without the sentencepiece package.

The file is a protocol buffer (sentencepiece_model.proto, version 0.2). Only the fields that change token ids are read.
This module doesn't import torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from bclip_fast.errors import UserError, first_line
from bclip_fast.io import stand_ins

_UNIGRAM = 1
_END = "</s>"
_SPACE = "▁"
_MAX_BYTES = 256 << 20

_Fields = dict[int, list[int | bytes]]


def read_sentencepiece(path: Path) -> FastTokenizer:
    """Return the pipeline of a unigram model: normalisation, pieces, and `</s>` at the end of each text.

    Raises:
        UserError: the file can't be read, isn't a unigram model, or lacks `</s>`.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} is larger than {_MAX_BYTES >> 20} MiB; it isn't a sentencepiece model")
        model = _fields(path.read_bytes())
        vocabulary = [_piece(_fields(message)) for message in model.get(1, []) if isinstance(message, bytes)]
        trainer, normalizer = (_fields(_bytes(model, number)) for number in (2, 3))
        kind = _int(trainer, 3, _UNIGRAM)
        if kind != _UNIGRAM or _int(trainer, 24, 0) or not _int(normalizer, 3, 1) or not _int(normalizer, 4, 1):
            raise UserError(
                f"{path} isn't a unigram model with single leading spaces; convert it with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes tokenizer.json"
            )
        ids = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        fast = FastTokenizer(models.Unigram(vocabulary, _int(trainer, 40, 0), bool(_int(trainer, 35, 0))))
        steps: list[normalizers.Normalizer] = [normalizers.Replace(Regex(r" {2,}"), " ")]
        if charsmap := _bytes(normalizer, 2):
            steps.insert(0, normalizers.Precompiled(charsmap))
    except UserError:
        raise
    except Exception as error:  # malformed bytes raise IndexError, struct.error, ValueError, or the library's Exception
        stand_ins.refuse(path)
        raise UserError(f"{path} isn't a sentencepiece model: {first_line(error)}") from error
    if _END not in ids:
        raise UserError(f"{path} has no piece {_END!r}, with which the texts of SigLIP and T5 end")
    fast.normalizer = normalizers.Sequence(steps)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    fast.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    fast.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", pair=f"$A {_END} $B {_END}", special_tokens=[(_END, ids[_END])]
    )
    return fast


def _piece(fields: _Fields) -> tuple[str, float]:
    piece, score = fields[1][-1], fields.get(2, [bytes(4)])[-1]
    assert isinstance(piece, bytes) and isinstance(score, bytes)
    return piece.decode("utf-8"), struct.unpack("<f", score)[0]


def _int(fields: _Fields, number: int, default: int) -> int:
    value = fields.get(number, [default])[-1]
    assert isinstance(value, int)
    return value


def _bytes(fields: _Fields, number: int) -> bytes:
    value = fields.get(number, [b""])[-1]
    assert isinstance(value, bytes)
    return value


def _fields(message: bytes) -> _Fields:
    """The values of a message by field number: varints as int, everything else as bytes."""
    fields: _Fields = {}
    for number, value in _read_fields(message):
        fields.setdefault(number, []).append(value)
    return fields


def _read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(message, position)
        else:
            size = {1: 8, 5: 4}[kind]
        if position + size > len(message):
            raise ValueError("it is truncated")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
