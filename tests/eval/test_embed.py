"""Embeddings: order, norm and precision, and the embedding cache."""

from __future__ import annotations

import os
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import COLOURS, ColourModel, jitter, jpeg, preprocess, tokenizer
from dicom_files import dicom
from PIL import Image
from torch import Tensor, nn

from bclip_fast.data.image_files import read_rgb
from bclip_fast.errors import UserError
from bclip_fast.eval import embedding_cache, evaluate, spot_check
from bclip_fast.eval.datasets import open_dataset
from bclip_fast.eval.embed import Embedder


def test_embedder_any_batch_size_keeps_order_norm_and_mode(shards: Path) -> None:
    data = open_dataset(str(shards), "val")
    model = ColourModel().train()
    rows = {}
    for batch_size in (1, 7, 64):
        embedder = Embedder(model, preprocess, tokenizer, batch_size=batch_size, num_workers=3)
        rows[batch_size] = embedder.images(data)
    assert model.training
    expected = torch.stack([preprocess(read_rgb(data.image(i), str)).mean((1, 2)) - 0.2 for i in range(20)])
    for embeddings in rows.values():
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings, F.normalize(expected, dim=1))
    texts = embedder.texts(["red", "green", "blue"])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))


def test_embedder_bf16_returns_unit_float32() -> None:
    class Linear(ColourModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 16)

        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            out = self.layer(text.float() / 255)
            assert out.dtype == torch.bfloat16
            return out

    rows = Embedder(Linear(), preprocess, tokenizer, precision="bf16").texts(["red", "blue"])
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        Embedder(Linear(), preprocess, tokenizer, precision="fp16")


@pytest.mark.parametrize("keep", ["fp32", "fp16"])
def test_images_skipped_by_an_earlier_evaluation_are_embedded_once_readable(
    folder: Path, tmp_path: Path, monkeypatch, keep: str
) -> None:
    """The cache may hold an image that was skipped because a decoder was not installed."""
    bad = folder / "test" / "red" / "1.jpg"
    bad.write_bytes(dicom(np.full((16, 16), 200, np.uint8)))
    data = open_dataset(str(folder), "test")

    def embedder(on_bad_image: str) -> Embedder:
        cache = embedding_cache.EmbeddingCache(tmp_path / "cache")
        return Embedder(ColourModel(), preprocess, tokenizer, cache=cache, cache_dtype=keep, on_bad_image=on_bad_image)

    with monkeypatch.context() as context:
        context.setitem(sys.modules, "pydicom", None)
        first = embedder("skip")
        assert len(first.readable(data, first.images(data))[0]) == 5
    for on_bad_image in ("skip", "stop"):
        later = embedder(on_bad_image)
        rows = later.images(data)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
        assert len(later.readable(data, rows)[0]) == 6


def test_embedder_nan_error_names_the_sample(shards: Path) -> None:
    with pytest.raises(UserError, match="embedding of s006 holds NaN"):
        Embedder(ColourModel("image"), preprocess, tokenizer, batch_size=7).images(open_dataset(str(shards), "val"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """24 coloured images by class, one of them of 16 bits."""
    for i in range(24):
        name = ("red", "blue")[i % 2]
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name / f"{i:02d}.jpg").write_bytes(jpeg(jitter(COLOURS[name], i)))
    deep = Image.fromarray(np.full((16, 16), 30_000, np.uint16))
    (tmp_path / "data" / "red" / "02.jpg").unlink()
    deep.save(tmp_path / "data" / "red" / "02.png")
    return tmp_path / "data"


def zero_shot(data: Path, model: object = None, transform=preprocess, **settings: object) -> dict:
    options = {"data": str(data), "progress": False} | settings
    return evaluate((model or ColourModel(), transform, tokenizer), ["zero_shot"], **options)["tasks"][
        "zero_shot/class"
    ]


def test_cache_entry_depends_on_weights_data_and_preprocessing(pairs: Path, tmp_path: Path, monkeypatch) -> None:
    store, calls = tmp_path / "store", []
    model = ColourModel()
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda *a, **k: calls.append(len(a[0])) or encode(*a, **k))

    def run(transform=preprocess, **settings: object) -> dict:
        return zero_shot(pairs, model, transform, **{"cache": str(store)} | settings)

    first = run()
    assert run()["samples"] == first["samples"]
    assert calls.count(24) == 1
    assert len(list(store.iterdir())) == 1
    run(lambda image: preprocess(image).flip(1) * 0.9)
    assert calls.count(24) == 2
    half = run(keep="bf16")
    again = run(keep="bf16")
    assert half["samples"] == again["samples"]
    assert calls.count(24) == 3
    assert half["samples"] != first["samples"], "the first use rounds the embeddings too"
    model.logit_scale.data += 1
    run()
    assert calls.count(24) == 4
    (pairs / "red" / "00.jpg").write_bytes(jpeg((250, 10, 10)))
    run()
    assert calls.count(24) == 5
    assert max(Counter(calls) - Counter({24: 5})) <= 15, "a kept set costs a few samples"
    entries = sorted(store.iterdir())
    run(cache="none")
    assert sorted(store.iterdir()) == entries
    assert calls.count(24) == 6


DAMAGE = {
    "truncated": lambda content: content[:20],
    "empty": lambda content: b"",
    # In a row that the spot check leaves out, by less than rounding.
    "a bit": lambda content: content[:-48] + bytes([content[-48] ^ 1]) + content[-47:],
    "another file": lambda content: b"PK" * 4000,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entry_is_computed_again_and_named(pairs: Path, tmp_path: Path, damage: str, caplog) -> None:
    first = zero_shot(pairs, cache=str(tmp_path / "store"))
    (entry,) = (tmp_path / "store").iterdir()
    content = entry.read_bytes()
    entry.write_bytes(DAMAGE[damage](content))
    for num_warnings in (1, 0):
        caplog.clear()
        assert zero_shot(pairs, cache=str(tmp_path / "store"))["samples"] == first["samples"]
        # The name of this test's folder has the word, too.
        messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        warnings = [message for message in messages if "damaged" in message]
        assert len(warnings) == num_warnings
        assert not any("\n" in warning for warning in warnings)


def test_change_that_no_key_shows_is_found_by_the_spot_check(pairs: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """The change affects one image of 24, of another mode than the others. The key cannot know the environment."""

    def transform(image: Image.Image) -> torch.Tensor:
        shift = float(os.environ.get("SHIFT_OF_16_BITS", 0)) if image.mode.startswith("I") else 0
        return preprocess(image) + torch.tensor([shift, 0, 0])[:, None, None]

    settings = {"image_conversion": "open_clip", "cache": str(tmp_path / "store")}
    before = zero_shot(pairs, None, transform, **settings)["samples"]
    monkeypatch.setenv("SHIFT_OF_16_BITS", "0.01")
    for num_warnings in (1, 0):
        caplog.clear()
        after = zero_shot(pairs, None, transform, **settings)["samples"]
        warnings = [record.getMessage() for record in caplog.records if "differs by" in record.getMessage()]
        assert len(warnings) == num_warnings
        assert all("red/02.png" in warning and "24 embeddings again" in warning for warning in warnings)
    assert before != after == zero_shot(pairs, None, transform, **settings | {"cache": "none"})["samples"]
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_texts_that_a_tokenizer_splits_otherwise_are_found(tmp_path: Path, monkeypatch, caplog) -> None:
    """The change affects only the text beyond the context length."""
    texts = [f"red {i}" for i in range(300)]
    texts[150] = "blue " * 100

    def tokens(texts: list[str]) -> torch.Tensor:
        return tokenizer([text[-int(os.environ.get("CONTEXT", 400)) :] for text in texts])

    def embed(folder: Path | None) -> torch.Tensor:
        return Embedder(ColourModel(), preprocess, tokens, cache=embedding_cache.EmbeddingCache(folder)).texts(texts)

    before = embed(tmp_path)
    monkeypatch.setenv("CONTEXT", "300")
    after = embed(tmp_path)
    assert "'blue blue" in caplog.text
    assert not torch.equal(before, after)
    assert torch.equal(after, embed(None))


@pytest.mark.parametrize("fault", ["a file in its place", "full disk", "no home"])
def test_cache_that_cannot_be_written_is_one_warning(pairs: Path, tmp_path: Path, fault: str, monkeypatch, caplog):
    store = tmp_path / "store"
    expected = zero_shot(pairs, cache="none")["samples"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = {"cache": str(store)}
    if fault == "no home":
        monkeypatch.delenv("BCLIP_CACHE", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        settings = {"cache": "auto"}
    elif fault == "a file in its place":
        store.write_text("")
    try:
        if fault == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        result = zero_shot(pairs, keep="fp32", **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result["samples"] == expected
    (warning,) = [record.getMessage() for record in caplog.records if "--cache" in record.getMessage()]
    assert "\n" not in warning
    assert not store.is_dir() or not list(store.iterdir())


def test_spot_check_chooses_every_kind_and_the_extremes() -> None:
    kinds = [spot_check.Kind("rgb", 100) for _ in range(1000)]
    kinds[321], kinds[500] = spot_check.Kind("grey of 16 bits", 100), spot_check.Kind("rgb", 10)
    kinds[700], kinds[800] = spot_check.Kind("rgb", 900), spot_check.Kind("rgb", 100, 20.0)
    assert {0, 321, 500, 700, 800, 999} <= set(spot_check.choose(kinds, range(1000)))
    many = [spot_check.Kind(str(i), i) for i in range(1000)]
    assert len(spot_check.choose(many, range(1000))) <= 15
    assert spot_check.choose(kinds, []) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_spot_check_tolerance_covers_other_batch_sizes_only(precision: str) -> None:
    """A tower of 12 layers: rounding in another batch stays below the tolerance, another activation does not."""
    torch.manual_seed(0)
    towers = [nn.Sequential(*(Residual(activation) for _ in range(12))) for activation in (F.gelu, quick_gelu)]
    towers[1].load_state_dict(towers[0].state_dict())
    x = torch.randn(64, 192)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        full, other = (F.normalize(tower(x).float(), dim=1) for tower in towers)
        few = F.normalize(towers[0](x[:3]).float(), dim=1)
    tolerance = spot_check.tolerance(precision, "fp32", torch.device("cpu"))
    assert spot_check.largest_distance(full[:3], few)[0] < tolerance / 2
    if precision == "fp32":
        assert spot_check.largest_distance(full, other)[0] > 10 * tolerance


class Residual(nn.Module):
    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(192), nn.Linear(192, 768), nn.Linear(768, 192)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.activation(self.up(self.norm(x))))


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)
