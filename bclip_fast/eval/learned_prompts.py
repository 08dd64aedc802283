"""Learned prompts as data: context vectors or class embeddings, with the names of the classes.

A file is an .npz or a .safetensors file, so it cannot run code. It holds `classes`, C names, and one of two arrays:

    class_embeddings  (C, D): the classes as the text tower embeds them, or as any method computes them
    context           (n, W), or (C, n, W) with vectors for each class: input vectors of the text tower. They take the
                      place of the n token embeddings before the class name, as in CoOp (Zhou et al. 2022): "V1 ... Vn
                      NAME."

`nouns`, C texts, may replace the class names in the text. In a .safetensors file, `classes` and `nouns` are JSON lists
in the metadata.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast.errors import UserError, first_line

from .embed import Embedder
from .prompts import PromptSet

SUFFIXES = (".npz", ".safetensors")
_MAX_BYTES = 1 << 30
_PLACEHOLDERS = ("x", "q", "z", "k", "v")
"""Words whose token embeddings the context vectors replace. The first one that is a single token and is in no text is
taken."""


@dataclass(frozen=True)
class LearnedPrompts:
    """The content of a file. One of `class_embeddings` (C, D) and `context` (n, W) or (C, n, W) is None."""

    classes: tuple[str, ...]
    nouns: tuple[str, ...]
    class_embeddings: Tensor | None
    context: Tensor | None


def load(path: str, embedder: Embedder) -> PromptSet:
    """Read a file of learned prompts, and embed its classes with the text tower if it holds context vectors.

    Raises:
        UserError: a damaged file, or one that does not fit the model.
    """
    learned = read(Path(path))
    if learned.class_embeddings is not None:
        embeddings = learned.class_embeddings.to(embedder.device)
        if (dim := embedder.texts(["x"]).shape[1]) != embeddings.shape[1]:
            raise UserError(
                f"{path} has class embeddings of {embeddings.shape[1]} numbers, but the model has {dim}; use prompts "
                "that were learned for this model"
            )
    else:
        assert learned.context is not None
        embeddings = _embed(path, learned.nouns, learned.context, embedder)
    classes = {name: (noun,) for name, noun in zip(learned.classes, learned.nouns, strict=True)}
    return PromptSet(
        classes, ("{}",), f"learned prompts of {Path(path).name}", embeddings=F.normalize(embeddings, dim=1)
    )


def read(path: Path) -> LearnedPrompts:
    """Read and check a file. Raises UserError, which names the file and the fault."""
    needs = "it needs `classes` and either `class_embeddings` (C, D) or `context` (n, W) or (C, n, W)"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, more than {_MAX_BYTES}")
        arrays, texts = (_read_npz if path.suffix == ".npz" else _read_safetensors)(path)
    except UserError:
        raise
    except Exception as error:  # the readers of both formats raise many kinds for damaged files
        raise UserError(f"prompt file {path} cannot be read ({first_line(error)}); {needs}") from error
    if "classes" not in texts or len(arrays) != 1 or not arrays.keys() <= {"class_embeddings", "context"}:
        raise UserError(f"prompt file {path} holds {', '.join([*texts, *arrays]) or 'nothing'}; {needs}")
    [(name, values)] = arrays.items()
    classes = texts["classes"]
    nouns = texts.get("nouns", [each.replace("_", " ") for each in classes])
    if len(set(classes)) != len(classes) or len(classes) < 2 or len(nouns) != len(classes):
        raise UserError(
            f"prompt file {path} has {len(classes)} classes, {len(set(classes))} of them distinct, and {len(nouns)} "
            "nouns; it needs at least two distinct classes, and one noun for each"
        )
    allowed = (2,) if name == "class_embeddings" else (2, 3)
    per_class = name == "class_embeddings" or values.ndim == 3
    if (
        values.dtype.kind != "f" or values.ndim not in allowed or not values.size
        or (per_class and len(values) != len(classes))
    ):  # fmt: skip
        raise UserError(
            f"prompt file {path} has {name} of shape {values.shape}, {values.dtype}, for {len(classes)} classes; "
            f"{needs}"
        )
    tensor = torch.from_numpy(values.astype(np.float32))
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"prompt file {path}: {name} holds NaN or infinity; export the prompts again")
    if name == "class_embeddings" and not bool(tensor.norm(dim=1).gt(0).all()):
        raise UserError(f"prompt file {path}: a class embedding is zero; export the prompts again")
    is_context = name == "context"
    return LearnedPrompts(tuple(classes), tuple(nouns), None if is_context else tensor, tensor if is_context else None)


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    with zipfile.ZipFile(path) as archive:
        if (num := sum(member.file_size for member in archive.infolist())) > _MAX_BYTES:
            raise ValueError(f"it unpacks to {num} bytes, more than {_MAX_BYTES}")
    with np.load(path, allow_pickle=False) as file:
        content = {name: file[name] for name in file.files}
    texts = {name: array.ravel().tolist() for name, array in content.items() if array.dtype.kind == "U"}
    return {name: array for name, array in content.items() if name not in texts}, texts


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        # bfloat16 has no numpy dtype.
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata: dict[str, Any] = file.metadata() or {}
    texts: dict[str, Any] = {name: json.loads(metadata[name]) for name in ("classes", "nouns") if name in metadata}
    for name, values in texts.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{name} in its metadata is not a JSON list of texts")
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy() for name, tensor in arrays.items()
    }, texts


def _embed(path: str, nouns: Sequence[str], context: Tensor, embedder: Embedder) -> Tensor:
    """Return the class embeddings (C, D) of context vectors and nouns."""
    num = context.shape[-2]
    texts, word, token = _with_placeholders(path, nouns, num, embedder)
    table = _token_table(path, embedder, word, token)
    if context.shape[-1] != table.embedding_dim:
        raise UserError(
            f"{path} has context vectors of {context.shape[-1]} numbers, but the model's token embeddings have "
            f"{table.embedding_dim}; use prompts that were learned for this model"
        )
    rows = []
    for number, text in enumerate(texts):
        vectors = context[number] if context.ndim == 3 else context
        with _replaced(table, token, vectors):
            rows.append(embedder.texts([text]))
    return torch.cat(rows)


def _with_placeholders(path: str, nouns: Sequence[str], num: int, embedder: Embedder) -> tuple[list[str], str, int]:
    """Return the texts, with `num` placeholders before the noun, the placeholder, and its token."""
    for word in _PLACEHOLDERS:
        once, twice = (Counter(embedder.tokenizer([text])[0].tolist()) for text in (word, f"{word} {word}"))
        extra = list((twice - once).elements())
        texts = [f"{' '.join([word] * num)} {noun}." for noun in nouns]
        if len(extra) == 1 and all((row == extra[0]).sum() == num for row in embedder.tokenizer(texts)):
            return texts, word, extra[0]
    raise UserError(
        f"{path} has {num} context vectors, but the tokenizer has no placeholder for them in texts such as "
        f"{nouns[0]!r}, or they exceed its length; import class embeddings instead"
    )


def _token_table(path: str, embedder: Embedder, word: str, token: int) -> nn.Embedding:
    """Return the table of token embeddings: the one that looks up a repeated token as often as it is in a text."""
    num = 4
    tables_of_tokens: list[nn.Embedding] = []

    def record(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if int((inputs[0] == token).sum()) == num:
            tables_of_tokens.append(module)

    tables = [module for module in embedder.model.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_hook(record) for module in tables]
    try:
        embedder.texts([" ".join([word] * num)])
    finally:
        for handle in handles:
            handle.remove()
    if not tables_of_tokens:
        raise UserError(
            f"{path} has context vectors, but the text tower looks tokens up in no nn.Embedding; import class "
            "embeddings instead"
        )
    return tables_of_tokens[0]


@contextlib.contextmanager
def _replaced(table: nn.Embedding, token: int, vectors: Tensor) -> Iterator[None]:
    """Put `vectors` (n, W) in the place of the embeddings of the n tokens `token`."""

    def replace(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[inputs[0] == token] = vectors.to(output)
        return output

    handle = table.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
