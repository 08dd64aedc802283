"""Search: the files of an index, queries against brute force, the commands, and errors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from colours import COLOURS, ColourModel, colour_model, evaluate_with, jpeg, preprocess, tokenizer
from damage import flip_bit
from dicom_files import dicom
from PIL import Image
from towers import SMALL, shaken

from bclip_fast import cli, pretrained
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.eval.config import EvalConfig
from bclip_fast.eval.datasets import open_dataset
from bclip_fast.eval.embed import Embedder
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.search.index import EmbedConfig, embed
from bclip_fast.search.index_files import ROWS
from bclip_fast.search.searcher import OpenConfig, Searcher, page


def test_embed_files_hold_embeddings_and_metadata(index: Path, shards: Path) -> None:
    data = open_dataset(str(shards), "val")
    expected = Embedder(*colour_model()).images(data)
    table = pq.read_table(index / "embeddings.parquet")
    rows = np.stack(table["embedding"].to_numpy())
    np.testing.assert_allclose(rows, expected.numpy(), atol=1e-6)
    assert table["key"].to_pylist() == [data.key(i) for i in range(40)]
    assert table["caption"].to_pylist() == data.captions()
    assert table["licence"].to_pylist()[:4] == ["CC BY", "CC0", "CC0", ""]
    assert sorted(path.name for path in index.iterdir()) == ["embeddings.parquet", "index.faiss"]


@pytest.mark.parametrize("kind", ["faiss_flat", "hnsw", "ivf"])
def test_searcher_hits_equal_brute_force(kind: str, shards: Path, tmp_path: Path) -> None:
    config = EmbedConfig(model="colours", data=str(shards), out=str(tmp_path / "i"), index=kind, progress=False)  # type: ignore[arg-type]
    searcher = Searcher(OpenConfig(folder=str(embed(config, colour_model()))), colour_model())
    data = open_dataset(str(shards), "val")
    embedder = Embedder(*colour_model())
    images = embedder.images(data)
    for colour in COLOURS:
        hits = searcher.text(f"some {colour} thing", 7)
        scores = (images @ embedder.texts([f"some {colour} thing"])[0]).sort(descending=True).values
        np.testing.assert_allclose([hit.score for hit in hits], scores[:7], atol=1e-5)
        assert all(colour in (hit.caption or "") for hit in hits[:3])
    hits = searcher.image(data.image(17), 3)
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert 17 in {hit.row for hit in hits if hit.score > 1 - 1e-5}
    assert len(searcher.text("red", 200)) == 40


@pytest.mark.parametrize("change", ["16 bits", "long texts", "small"])
def test_searcher_model_that_differs_for_some_inputs_raises(index: Path, change: str) -> None:
    class Other(ColourModel):
        def encode_image(self, image, normalize=False):
            return super().encode_image(image + (torch.tensor([3e-4, 0, 0])[:, None, None] if change == "small" else 0))

    def transform(image: Image.Image) -> torch.Tensor:
        grey = np.ptp(np.asarray(image.resize((8, 8))), axis=2).max() == 0
        return preprocess(image) ** 2 if grey and change == "16 bits" else preprocess(image)

    def tokens(texts: list[str]) -> torch.Tensor:
        return tokenizer(["red" if len(text) > 1000 and change == "long texts" else text for text in texts])

    with pytest.raises(UserError, match="made with another model"):
        Searcher(OpenConfig(folder=str(index)), (Other(), transform, tokens))


def test_searcher_other_model_or_data_or_damaged_index_raises(index: Path, shards: Path, tmp_path: Path) -> None:
    class Other(ColourModel):
        def encode_image(self, image, normalize=False):
            return super().encode_image(image.flip(1), normalize)

    with pytest.raises(UserError, match="made with another model"):
        Searcher(OpenConfig(folder=str(index)), (Other(), preprocess, tokenizer))
    with pytest.raises(UserError, match="not a complete index"):
        Searcher(OpenConfig(folder=str(tmp_path)), colour_model())
    with ShardWriter(tmp_path / "fewer") as writer:
        writer.write(Sample("x", jpeg((1, 2, 3)), "one"), "val")
    moved = Searcher(OpenConfig(folder=str(index), data=str(tmp_path / "fewer")), colour_model())
    with pytest.raises(UserError, match=r"has 1 images, but .* is of 40; run bclip embed again"):
        moved.thumbnail(moved.text("red")[0])
    with ShardWriter(tmp_path / "renamed") as writer:
        for i in range(40):
            writer.write(Sample(f"other{i}", jpeg((1, 2, 3)), "one"), "val")
    moved = Searcher(OpenConfig(folder=str(index), data=str(tmp_path / "renamed")), colour_model())
    assert "not s0" in page(moved, moved.text("red", 1)), "an image with another key is not shown"
    content = (index / "index.faiss").read_bytes()
    for file, damage in (
        ("index.faiss", content[:-9]),
        ("index.faiss", content[:-1] + b"x"),
        ("embeddings.parquet", b"x"),
    ):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(index, tmp_path / "broken")
        (tmp_path / "broken" / file).write_bytes(damage)
        with pytest.raises(UserError, match="not a complete index") as caught:
            Searcher(OpenConfig(folder=str(tmp_path / "broken")), colour_model())
        assert "\n" not in str(caught.value)


def test_searcher_invalid_queries_raise(searcher: Searcher) -> None:
    for search, message in (
        (lambda: searcher.text(" "), "a query must have 1 to"),
        (lambda: searcher.text("x" * 4001), "a query must have 1 to"),
        (lambda: searcher.text("red", 0), "k=0 must be"),
        (lambda: searcher.image(b"GIF89a", 3, "upload"), "image upload cannot be decoded"),
    ):
        with pytest.raises(UserError, match=message):
            search()


def test_hit_links_come_only_from_valid_numbers(searcher: Searcher) -> None:
    hits = {hit.row % 4: hit for hit in searcher.text("red", 40)}
    assert hits[0].article == "https://pmc.ncbi.nlm.nih.gov/articles/PMC123/"
    assert hits[0].licence_url == "https://creativecommons.org/licenses/by/4.0/"
    assert hits[1].article is None
    assert hits[1].licence_url is None
    assert hits[2].article == "https://doi.org/10.1234/a%22%3E%3Cb%3E"
    assert hits[3].article is None


@pytest.fixture
def start(tmp_path: Path) -> Path:
    words = Tokenizer.train(["a red square", "a blue square"] * 3, 60, context_length=20)
    torch.manual_seed(1)
    pretrained.save(tmp_path / "start", shaken(BiomedClip(SMALL)), Preprocess(PreprocessConfig(size=32)), words)
    return tmp_path / "start"


def test_commands_embed_and_search_a_folder_of_images(start: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli.log, "configure", lambda *args, **options: None)
    images, out, gallery = tmp_path / "images", tmp_path / "out", tmp_path / "hits.html"
    (images / "deep").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(6):
        noise = generator.integers(0, 256, 3)
        (images / ("deep" if i % 2 else ".") / f"p{i}.jpg").write_bytes(jpeg(tuple(noise.tolist()), 40))
    (images / "notes.md").write_text("not an image")
    assert cli.main(["embed", str(start), "--data", str(images), "--out", str(out), "--no-progress"]) == 0
    assert cli.main(["search", str(out), str(images / "deep" / "p3.jpg"), "-k", "2", "--gallery", str(gallery)]) == 0
    assert "p3.jpg" in capsys.readouterr().out
    assert (
        cli.main(["embed", str(start), "--data", str(images), "--out", str(tmp_path / "no"), "--plan", "10000000"]) == 0
    )
    plan = capsys.readouterr().out
    assert "10,000,000 images, 24 dimensions" in plan
    assert "faiss_flat │ fp16" in plan and "hours at" in plan
    assert not (tmp_path / "no").exists()
    html = gallery.read_text()
    assert html.count("<img ") == 2
    assert "<form" not in html
    assert "<script" not in html
    assert cli.main(["search", str(out), "a red square"]) == 0
    assert capsys.readouterr().out.count(".jpg") == 6
    for args, words in (
        (["search", str(out), "nowhere.png"], "image nowhere.png cannot be read"),
        (["search", str(tmp_path), "red"], "is not a complete index of bclip embed"),
        (["serve", str(out), "--k", "0"], "must be 1 to"),
        (["embed", str(start), "--data", str(tmp_path / "start")], "holds no image"),
    ):
        assert cli.main(args) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error


def test_embed_damaged_image_is_left_out_and_search_finds_the_others(start: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(cli.log, "configure", lambda *args, **options: None)
    images, out = tmp_path / "images", str(tmp_path / "out")
    images.mkdir()
    good = {name: jpeg(colour, 40) for name, colour in (("a.jpg", (250, 9, 9)), ("c.jpg", (9, 9, 250)))}
    for name, data in {**good, "b.jpg": good["a.jpg"][:100]}.items():
        (images / name).write_bytes(data)
    command = ["embed", str(start), "--data", str(images), "--out", out, "--no-progress"]
    assert cli.main(command) == 0
    searcher = Searcher(OpenConfig(folder=out))
    assert len(searcher) == 2
    for name, data in good.items():
        hit = searcher.image(data, 1)[0]
        assert hit.key == name
        assert hit.score > 0.999
        assert searcher.thumbnail(hit).startswith("data:image/jpeg")
    capsys.readouterr()
    assert cli.main([*command, "--on_bad_image", "stop"]) == 2
    assert "image b.jpg cannot be decoded" in capsys.readouterr().err


@pytest.mark.parametrize("member", ["jpg", "txt", "json"])
def test_embed_leaves_out_a_damaged_sample_of_shards(shards: Path, tmp_path: Path, member: str, caplog) -> None:
    """One bit of image, caption or metadata. The index has the other samples with their captions."""
    name = flip_bit(shards, member, "val-000000", 2)
    config = EmbedConfig(model="colours", data=str(shards), out=str(tmp_path / "index"), progress=False)
    table = pq.read_table(embed(config, colour_model()) / ROWS)
    expected = [sample for i, sample in enumerate(ShardDataset(shards, "val").fetch(range(40))()) if i != 2]
    assert table["key"].to_pylist() == [sample.key for sample in expected]
    assert table["caption"].to_pylist() == [sample.caption for sample in expected]
    assert table["licence"].to_pylist() == [sample.meta["licence"] for sample in expected]
    assert "skipped 1 of 40 images" in caplog.text
    assert f"{name} is damaged" in caplog.text


def test_embed_names_images_in_formats_that_are_not_read(start: Path, tmp_path: Path, caplog) -> None:
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "deep" / ".ipynb_checkpoints").mkdir()
    for name in ("a.jpg", "b.jp2", "deep/c.AVIF", "notes.md", "deep/.ipynb_checkpoints/a.jpg"):
        (images / name).write_bytes(jpeg((250, 9, 9), 40))
    with caplog.at_level("INFO"):
        embed(EmbedConfig(model=str(start), data=str(images), out=str(tmp_path / "out"), progress=False))
    assert "left out 1 hidden files and folders: deep/.ipynb_checkpoints" in caplog.text
    assert f"1 images in {tmp_path / 'out'}" in caplog.text
    assert "left out 2 images in formats that are not read: b.jp2, deep/c.AVIF" in caplog.text


def test_embed_and_evaluate_files_whose_names_are_not_utf8(start: Path, tmp_path: Path) -> None:
    for folder, colour in ((b"red\xff", (250, 9, 9)), (b"blue", (9, 9, 250))):
        path = tmp_path / "images" / os.fsdecode(folder)
        path.mkdir(parents=True)
        (path / os.fsdecode(b"a\xfe.jpg")).write_bytes(jpeg(colour, 40))
        (path / "b.jpg").write_bytes(jpeg(colour, 40))
    data, out = str(tmp_path / "images"), str(tmp_path / "out")
    embed(EmbedConfig(model=str(start), data=data, out=out, progress=False))
    searcher = Searcher(OpenConfig(folder=out))
    hit = searcher.image(jpeg((250, 9, 9), 40), 4)[0]
    assert hit.key in ("red\\xff/a\\xfe.jpg", "red\\xff/b.jpg")
    assert "<img " in page(searcher, [hit])
    results = evaluate_with(EvalConfig(data=data, task=("zero_shot",), progress=False))
    assert results["tasks"]["zero_shot/class"]["classes"] == ["blue", "red\\xff"]


def test_search_file_of_any_name_is_an_image(start: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli.log, "configure", lambda *args, **options: None)
    images, out = tmp_path / "images", str(tmp_path / "out")
    images.mkdir()
    (images / "a.jfif").write_bytes(jpeg((250, 9, 9), 40))
    scan = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40)
    (images / "scan.dcm").write_bytes(dicom(scan))
    assert cli.main(["embed", str(start), "--data", str(images), "--out", out, "--no-progress"]) == 0
    for name, content, key in (
        ("photo", jpeg((250, 9, 9), 40), "a.jfif"),
        ("scan.bin", dicom(scan), "scan.dcm"),
    ):
        (tmp_path / name).write_bytes(content)
        assert cli.main(["search", out, str(tmp_path / name), "-k", "1"]) == 0
        assert key in capsys.readouterr().out
    (tmp_path / "notes.md").write_text("not an image")
    assert cli.main(["search", out, str(tmp_path / "notes.md")]) == 2
    assert "notes.md cannot be decoded: not an image" in capsys.readouterr().err
