"""The datasets that a setting such as `data.shards` names: one path, or a list of datasets with weights.

In a file, a list has paths or tables:

    [[data.shards]]
    name = "pmc"
    path = "/data/pmc"
    weight = 3

    [[data.shards]]
    path = "s3://bucket/rocov2"
    weight = 1

On the command line, an item is a path, or the same keys with commas between them:

    --data.shards name=pmc,path=/data/pmc,weight=3 path=s3://bucket/rocov2,weight=1
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from bclip_fast.errors import UserError

from .order import Member, Mixture

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Source:
    """One dataset.

    path: folder that `bclip ingest build` wrote, or tar files in WebDataset's layout: a folder, a tar file, or a
        pattern such as DIR/{00000..00099}.tar. URLs work too.
    name: name in metrics, keys of samples and messages. If empty, the last part of the path.
    weight: its part of the samples, relative to the other datasets' weights.
    epochs: number of passes over it in each epoch, in place of a weight. 1 if no dataset has a weight.
    caption_key: key of the caption in the .json files of tar files in WebDataset's layout. If empty, the caption is
        the .txt file, or without one the JSON's `caption`.
    """

    path: str
    name: str = ""
    weight: float | None = None
    epochs: float | None = None
    caption_key: str = ""

    def __post_init__(self) -> None:
        for key, value in (("path", self.path), ("name", self.name), ("caption_key", self.caption_key)):
            if not isinstance(value, str):
                raise UserError(f"{key}={value!r} of a dataset must be text")
        if not self.path:
            raise UserError(f"dataset {self.name or '(without a name)'} has no path; set path to its folder or URL")
        if not self.name:
            object.__setattr__(self, "name", _name_of(self.path))
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"dataset name {self.name!r} must have 1 to 64 characters of A-Z a-z 0-9 . _ -; rename the dataset"
            )
        for key, number in (("weight", self.weight), ("epochs", self.epochs)):
            if number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise UserError(f"dataset {self.name} has {key}={number!r}, which is not a number")
            if not (math.isfinite(number) and number >= 0):
                raise UserError(f"dataset {self.name} has {key}={number}, which must be a number of at least 0")
        if self.weight is not None and self.epochs is not None:
            raise UserError(f"dataset {self.name} has a weight and a number of epochs; remove one of them")

    @property
    def amount(self) -> Fraction:
        """The weight, or the number of epochs, as the decimal number that the user wrote."""
        value = self.epochs if self.weight is None else self.weight
        return Fraction(1) if value is None else Fraction(repr(value))


def _name_of(path: str) -> str:
    """Return the last part of a path that says something: not a pattern of shards, and without .tar."""
    parts = [part for part in re.split(r"[/\\]", path.partition("://")[2] or path) if part.strip(".")]
    while len(parts) > 1 and re.search(r"[{*?]", parts[-1]):
        parts.pop()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1].removesuffix(".tar")) if parts else ""
    return name[:64] or "data"


_FIELDS = tuple(field.name for field in dataclasses.fields(Source))
_ITEM = re.compile(rf"(?:^|,)({'|'.join(_FIELDS)})=")


def _parse(text: str) -> str | Source:
    """Return the dataset that one word of the command line, or a table as JSON, describes. A plain path stays text."""
    if text.startswith("{") and (table := _json(text)) is not None:
        return _from_table(table)
    if not re.match(rf"({'|'.join(_FIELDS)})=", text):
        return text
    pieces = _ITEM.split(text)[1:]
    values: dict[str, Any] = {}
    for key, value in zip(pieces[::2], pieces[1::2], strict=True):
        if key in values:
            raise UserError(f"{text} has {key} twice; remove one")
        values[key] = _number(key, value) if key in ("weight", "epochs") else value
    return _from_table(values)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{key}={text} of a dataset is not a number") from None


def _from_table(table: dict[str, Any]) -> Source:
    if unknown := [key for key in table if key not in _FIELDS]:
        raise UserError(f"a dataset has the unknown key {unknown[0]}; its keys are {', '.join(_FIELDS)}")
    return Source(**{"path": "", **table})


def as_sources(value: Any, setting: str) -> str | tuple[Source, ...]:
    """Return a checked list of datasets, or the path if it names only one.

    Args:
        value: a path, or a list of paths, tables and `Source`s.
        setting: name of the setting, for messages.

    Raises:
        UserError: the list is empty, two datasets have one name, or the weights sum to nothing or are mixed with
            epochs.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise UserError(f"{setting}={value!r} must be a path, or a list of paths or tables")
    try:
        items = [_from_table(item) if isinstance(item, dict) else item for item in value]
        sources = tuple(item if isinstance(item, Source) else Source(str(item)) for item in items)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None
    if not sources:
        raise UserError(f"{setting} is an empty list; name a dataset")
    name, count = Counter(source.name for source in sources).most_common(1)[0]
    if count > 1:
        raise UserError(f"{setting} has {count} datasets with the name {name}; give them different names")
    kind = "weight" if any(source.weight is not None for source in sources) else "epochs"
    if kind == "weight" and (bare := [source.name for source in sources if source.weight is None]):
        raise UserError(f"{setting}: other datasets have a weight, so dataset {bare[0]} needs one too")
    if not any(source.amount for source in sources):
        raise UserError(f"{setting}: the {kind.removesuffix('s')}s of its datasets sum to 0; give one of them more")
    return sources


def shown(data: str | tuple[Source, ...]) -> str:
    """Return the paths of datasets for a message."""
    return data if isinstance(data, str) else ", ".join(source.path for source in data)


def refuse_weights(data: str | tuple[Source, ...], command: str) -> None:
    """Raise UserError if a dataset has a weight or epochs, for a command that takes each sample once."""
    for source in () if isinstance(data, str) else data:
        if source.weight is not None or source.epochs is not None:
            raise UserError(f"dataset {source.name} has a weight or epochs, which {command} doesn't use; remove them")


def absolute(data: str | tuple[Source, ...]) -> str | list[dict[str, Any]]:
    """Return datasets with absolute paths for a JSON file. `as_sources` reads them."""
    if isinstance(data, str):
        return data if "://" in data else str(Path(data).resolve())
    return [
        {key: value for key, value in vars(source).items() if value not in (None, "")} | {"path": absolute(source.path)}
        for source in data
    ]


def mixture_of(
    sources: Sequence[Source], num_samples: Sequence[int], num_shards: Sequence[int], fingerprints: Sequence[str]
) -> Mixture:
    """Return the mixture of datasets with positive weights, whose sizes are known now.

    With weights, an epoch has as many samples as the datasets together. With epochs, it has
    `epochs` passes over each dataset.

    Raises:
        UserError: a dataset has no samples.
    """
    amounts = [source.amount for source in sources]
    for source, num in zip(sources, num_samples, strict=True):
        if not num:
            raise UserError(f"dataset {source.name} has no samples; remove it, or set its weight or epochs to 0")
    if sources[0].weight is None:
        parts = [round(amount * num) for amount, num in zip(amounts, num_samples, strict=True)]
        length = sum(parts)
        if not length:
            raise UserError("the datasets' epochs give no sample; give one of them more")
    else:
        denominator = math.lcm(*(amount.denominator for amount in amounts))
        parts = [int(amount * denominator) for amount in amounts]
        length = sum(num_samples)
    divisor = math.gcd(*parts)
    facts = zip(sources, num_shards, parts, fingerprints, strict=True)
    return Mixture(tuple(Member(source.name, num, part // divisor, text) for source, num, part, text in facts), length)


def _from_words(words: list[str]) -> Any:
    """Return the value of the setting from the words of the command line, not yet checked by `as_sources`."""
    items = [_parse(word) for word in words]
    return items[0] if len(items) == 1 and isinstance(items[0], str) else tuple(items)


def _to_words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [json.dumps({key: item for key, item in vars(source).items() if item is not None}) for source in value]


Sources = Annotated[
    str | tuple[Source, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="PATH|path=PATH,weight=W[,KEY=VALUE] ...",
        instance_from_str=_from_words,
        is_instance=lambda value: isinstance(value, str | tuple),
        str_from_instance=_to_words,
    ),
]
"""The type of a setting that names datasets."""
