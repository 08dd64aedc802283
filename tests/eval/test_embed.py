"""Embeddings: order, norm and precision, and the embedding cache."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import COLOURS, ColourModel, jitter, jpeg, preprocess, tokenizer
from dicom_files import dicom
from torch import Tensor, nn

from bclip_fast.data.image_files import read_rgb
from bclip_fast.errors import UserError
from bclip_fast.eval import embedding_cache, evaluate
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


def test_cache_entry_depends_on_weights_data_and_preprocessing(tmp_path: Path, monkeypatch) -> None:
    for i, name in enumerate(("red", "blue", "red")):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name / f"{i}.jpg").write_bytes(jpeg(jitter(COLOURS[name], i)))
    store, calls = tmp_path / "store", []
    model = ColourModel()
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda *a, **k: calls.append(len(a[0])) or encode(*a, **k))

    def run(transform=preprocess, **settings: object) -> dict:
        options = {"data": str(tmp_path / "data"), "progress": False, "cache": str(store)} | settings
        return evaluate((model, transform, tokenizer), ["zero_shot"], **options)["tasks"]["zero_shot/class"]

    first = run()
    assert run()["samples"] == first["samples"]
    assert calls == [3]
    assert len(list(store.iterdir())) == 1
    run(lambda image: preprocess(image).flip(1) * 0.9)
    assert calls == [3, 3]
    half = run(keep="bf16")
    again = run(keep="bf16")
    assert half["samples"] == again["samples"]
    assert calls == [3, 3, 3]
    assert half["samples"] != first["samples"], "the first use rounds the embeddings too"
    model.logit_scale.data += 1
    run()
    assert calls == [3, 3, 3, 3]
    (tmp_path / "data" / "red" / "0.jpg").write_bytes(jpeg((250, 10, 10)))
    run()
    assert calls == [3, 3, 3, 3, 3]
    entries = sorted(store.iterdir())
    for path in entries:
        path.write_bytes(path.read_bytes()[:20])
    run()
    assert calls[3:] == [3, 3, 3], "a damaged entry is computed again"
    run(cache="none")
    assert sorted(store.iterdir()) == entries
    assert len(calls) == 7


def test_preprocess_fingerprint_augmentation_raises() -> None:
    with pytest.raises(UserError, match="two results for one image"):
        embedding_cache.preprocess_fingerprint(lambda image: torch.rand(3, 8, 8))
