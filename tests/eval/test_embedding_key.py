"""The key of kept embeddings: all that decides an embedding changes it, and nothing else does."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import ColourModel, preprocess, tokenizer
from PIL import Image
from torch import Tensor, nn

from bclip_fast.errors import UserError
from bclip_fast.eval import identity
from bclip_fast.eval.embed import Embedder
from bclip_fast.ops import dispatch

WINDOW = 400
TABLE = {"a": [1, 2], "b": "c"}


class Towers(ColourModel):
    """A model whose behaviour hangs on all that a module can hold."""

    scale = 1.0

    def __init__(self, activation: Callable[..., Any] = F.gelu, heads: int = 2, options: Any = None) -> None:
        super().__init__()
        self.activation, self.heads, self.options = activation, heads, options
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.block = nn.Sequential(nn.Linear(3, 3), nn.GELU())
        self.num_calls, self.memo = 0, {}
        with torch.no_grad():
            self.block[0].weight.fill_(0.1)
            self.block[0].bias.zero_()

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        self.num_calls += 1
        self.memo[len(self.memo)] = image
        return super().encode_image(image, normalize)


class OtherTowers(Towers):
    scale = 2.0


def windowed(image: Image.Image) -> Tensor:
    return preprocess(image) * WINDOW


def helped(image: Image.Image) -> Tensor:
    return HELPERS.shift(preprocess(image))


HELPERS = types.ModuleType("helpers_of_a_user")
HELPERS.shift = lambda pixels: pixels + 1  # type: ignore[attr-defined]


def closure(factor: float, calls: list[int] | None = None) -> Callable[[Image.Image], Tensor]:
    def call(image: Image.Image) -> Tensor:
        if calls is not None:
            calls.append(1)
        return preprocess(image) * factor

    return call


class Window:
    __slots__ = ("limits",)

    def __init__(self, *limits: float) -> None:
        self.limits = np.array(limits)

    def __call__(self, image: Image.Image) -> Tensor:
        return preprocess(image).clamp(*self.limits)


def keys(model: Any = None, transform: Any = preprocess, tokens: Any = tokenizer, **settings: Any) -> tuple[str, ...]:
    key = Embedder(model or Towers(), transform, tokens, **settings)._key
    return *key.images("data"), *key.texts(["a text"], "texts")


def changed(model: nn.Module, change: Callable[[Any], object]) -> nn.Module:
    change(model)
    return model


CHANGES: dict[str, Callable[[], tuple[str, ...]]] = {
    "functional activation": lambda: keys(Towers(F.silu)),
    "activation with options": lambda: keys(Towers(functools.partial(F.gelu, approximate="tanh"))),
    "activation as lambda": lambda: keys(Towers(lambda x: x * torch.sigmoid(1.702 * x))),
    "activation as module": lambda: keys(changed(Towers(), lambda m: m.block.__setitem__(1, nn.SiLU()))),
    "option of a module": lambda: keys(changed(Towers(), lambda m: setattr(m.block[1], "approximate", "tanh"))),
    "heads": lambda: keys(Towers(heads=4)),
    "weight": lambda: keys(changed(Towers(), lambda m: m.block[0].weight.data.add_(1))),
    "buffer that no checkpoint has": lambda: keys(changed(Towers(), lambda m: m.mask.zero_())),
    "configuration": lambda: keys(Towers(options={"layers": [1, {2}], "of": Window(0, 1)})),
    "nested configuration": lambda: keys(Towers(options={"layers": [1, {2}], "of": Window(0, 2)})),
    "class": lambda: keys(OtherTowers()),
    "method of the instance": lambda: keys(changed(Towers(), lambda m: setattr(m, "forward", lambda x: x + 1))),
    "hook": lambda: keys(changed(Towers(), lambda m: m.block.register_forward_hook(lambda *a: a[2] * 2))),
    "lambda": lambda: keys(transform=lambda image: preprocess(image) * 0.5),
    "lambda with another constant": lambda: keys(transform=lambda image: preprocess(image) * 0.25),
    "closure": lambda: keys(transform=closure(2.0)),
    "closure with another value": lambda: keys(transform=closure(3.0)),
    "global": lambda: keys(transform=windowed),
    "helper of another module": lambda: keys(transform=helped),
    "object with slots": lambda: keys(transform=Window(0, 1)),
    "object with other values": lambda: keys(transform=Window(0, 0.5)),
    "tokenizer": lambda: keys(tokens=lambda texts: tokenizer(texts) % (2 if len(texts) > 1000 else 256)),
    "precision": lambda: keys(precision="bf16"),
    "kept format": lambda: keys(cache_dtype="bf16"),
    "conversion": lambda: keys(image_conversion="open_clip"),
}


def test_key_every_change_gives_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Counter([keys(), *(change() for change in CHANGES.values())])
    with dispatch.use_backend("reference"):
        found[keys()] += 1
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False, raising=False)
    monkeypatch.setitem(globals(), "WINDOW", 350)
    found[keys(transform=windowed)] += 1
    monkeypatch.setattr(HELPERS, "shift", lambda pixels: pixels + 2)
    found[keys(transform=helped)] += 1
    # A function of a package that someone replaced.
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: x)
    found[keys()] += 1
    assert max(found.values()) == 1, [name for name, change in CHANGES.items() if found[change()] > 1]


def test_key_of_equal_objects_is_equal_and_calls_do_not_change_it() -> None:
    assert keys() == keys()
    model, calls = Towers(), []
    transform = closure(2.0, calls)
    first = keys(model, transform)
    embedder = Embedder(model, transform, tokenizer)
    embedder._call()
    embedder.texts(["red"] * 3)
    assert model.num_calls > 2
    assert keys(model, transform) == first
    assert first != keys(Towers(), closure(2.5, calls))


def test_key_is_the_same_in_another_process(tmp_path: Path) -> None:
    """Hashes of texts, and so the order of sets, differ between processes. So do addresses."""
    code = (
        "import re, torch\nfrom bclip_fast.eval import identity\nclass Window:\n"
        "    names = {'a', 'b', 'c', 'd', 'e'}\n    pattern = re.compile('a+')\n"
        "    def __call__(self, x): return x in {'k', 'l', 'm', 'n'} and max(x) or torch.nn.GELU()\n"
        "    def __eq__(self, other): return True\n"
        "print(identity.digest(identity.Reader().read(x=[Window(), torch.nn.GELU(), Window.__call__])))"
    )
    run = functools.partial(subprocess.Popen, [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    processes = [run(env=os.environ | {"PYTHONHASHSEED": seed}) for seed in ("1", "2")]
    first, second = (process.communicate()[0] for process in processes)
    assert first == second != ""


def test_reader_cycles_and_large_graphs_end(monkeypatch: pytest.MonkeyPatch) -> None:
    loop: list[Any] = [object(), {"vocabulary": {str(i): i for i in range(50_000)}}]
    loop.append(loop)
    facts = identity.Reader().read(x=loop)
    assert len(facts) < 20
    monkeypatch.setattr(identity, "MAX_OBJECTS", 5)
    assert any(
        fact.startswith("not read") for fact in identity.Reader().read(x=[Window(i, 1) for i in range(9)]).values()
    )


def test_check_preprocess_augmentation_raises() -> None:
    with pytest.raises(UserError, match="two results for one image"):
        Embedder(Towers(), lambda image: torch.rand(3, 8, 8), tokenizer)._key.check_preprocess()
