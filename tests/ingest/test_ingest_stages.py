"""Duplicates, leaks between splits, the order of the samples, and the columns of the manifest."""

from __future__ import annotations

import io
import json

import numpy as np
from articles import article_xml, encode_image, manifest_rows, noise_image, reject_rows, write_articles, write_files
from PIL import Image

from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.verify import verify
from bclip_fast.ingest.assign import Splits
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.ingest.duplicates import NEAR_BITS, near_pairs
from bclip_fast.ingest.mentions import MAX_SENTENCE
from bclip_fast.ingest.parts import SPLITS
from bclip_fast.ingest.sanitize import perceptual_hash


def similar_image(data: bytes, quality: int = 60, scale: float = 0.8) -> bytes:
    """Return the same image at another size and quality."""
    image = Image.open(io.BytesIO(data))
    size = round(image.width * scale), round(image.height * scale)
    return encode_image(image.resize(size, Image.Resampling.BICUBIC), quality=quality)


def test_near_pairs_equal_those_of_all_distances():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, (40, 256), np.uint8)
    rows = [base]
    for flips in (1, NEAR_BITS // 2, NEAR_BITS, NEAR_BITS + 1, 40):
        changed = base.copy()
        for row in changed:
            row[rng.permutation(256)[:flips]] ^= 1
        rows.append(changed)
    bits = np.concatenate(rows)
    hashes = np.unique(np.packbits(bits, axis=1).view("<u8"), axis=0)
    flat = np.unpackbits(hashes.view(np.uint8), axis=1).astype(int)
    distance = (flat[:, None] != flat[None]).sum(-1)
    expected = {(i, j) for i, j in zip(*np.nonzero(distance <= NEAR_BITS), strict=True) if i < j}
    pairs = list(zip(*(part.tolist() for part in near_pairs(hashes)), strict=True))
    assert set(pairs) == expected
    assert len(pairs) == len(expected) > 100


def test_perceptual_hash_is_near_for_same_image_and_far_for_another():
    def bits(data: bytes) -> int:
        return int(perceptual_hash(Image.open(io.BytesIO(data))), 16)

    for seed in range(5):
        data = noise_image(seed, (400, 300))
        assert (bits(data) ^ bits(similar_image(data))).bit_count() <= NEAR_BITS
        assert (bits(data) ^ bits(noise_image(seed + 100, (400, 300)))).bit_count() > 60
    # In an image without content, rounding errors must not change the hash.
    white = {perceptual_hash(Image.new("RGB", size, "white")) for size in ((64, 64), (301, 77), (1000, 33))}
    assert len(white) == 1


def test_build_duplicates_are_marked_and_leaks_removed(tmp_path):
    splits = Splits(0, 0.2, 0.3)
    numbers = {split: [n for n in range(1, 60) if splits.of(f"PMC{n}") == split] for split in SPLITS}
    train, val, test = (numbers[split] for split in SPLITS)
    one, two, three, four = (noise_image(seed, (300, 200)) for seed in range(4))
    images_of = {
        train[0]: {"f": one}, train[1]: {"f": one}, train[2]: {"f": similar_image(one)},
        test[0]: {"f": two, "g": three}, train[3]: {"f": similar_image(two), "g": noise_image(9)},
        train[4]: {"f": two}, val[0]: {"f": similar_image(three), "g": four}, train[5]: {"f": four},
        train[6]: {"f": noise_image(10)},
    }  # fmt: skip
    for number, images in images_of.items():
        xml = article_xml(*((name, f"Text {name}") for name in images), number=number)
        files = {f"{name}.jpg": data for name, data in images.items()}
        write_files(tmp_path / f"in/{number:03d}", {"x.nxml": xml, **files})
    out = tmp_path / "out"
    build(IngestConfig(str(tmp_path / "in"), out, workers=1, val_fraction=0.2, test_fraction=0.3))
    rows = manifest_rows(out)
    marks = {key: (row["duplicate"], row["duplicate_of"]) for key, row in rows.items() if row["duplicate"]}
    original = f"PMC{train[0]}_f1"
    assert marks == {f"PMC{train[1]}_f1": ("exact", original), f"PMC{train[2]}_f1": ("near", original)}
    assert {article: reason for article, _, _, reason in reject_rows(out)} == {
        f"PMC{train[3]}": f"near duplicate of a test image: PMC{test[0]}_f1",
        f"PMC{train[4]}": f"near duplicate of a test image: PMC{test[0]}_f1",
        f"PMC{val[0]}": f"near duplicate of a test image: PMC{test[0]}_f2",
        f"PMC{train[5]}": f"near duplicate of a val image: PMC{val[0]}_f2",
    }
    assert len(rows) == sum(map(len, images_of.values())) - 4
    counts = json.loads((out / "dataset.json").read_text())["ingest"]
    assert (counts["exact_duplicates"], counts["near_duplicates"], counts["pairs"]) == (1, 1, len(rows))


def test_shards_order_depends_on_seed_and_size_is_bounded(tmp_path):
    write_articles(tmp_path / "in", 40, num_figures=1)
    for number in range(1, 41):
        pixels = np.random.default_rng(number).integers(0, 255, (300, 300, 3), np.uint8)
        (tmp_path / f"in/{number}/f0.jpg").write_bytes(encode_image(Image.fromarray(pixels), quality=95))
    orders = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(orders)}"
        options = {"test_fraction": 0.0, "val_fraction": 0.0, "max_shard_megabytes": 1, "seed": seed}
        build(IngestConfig(str(tmp_path / "in"), out, workers=1, **options))
        assert verify(out) == []
        sizes = [path.stat().st_size for path in sorted(out.glob("*.tar"))]
        assert len(sizes) > 3
        assert max(sizes) <= 1 << 20
        assert sum(size > 800_000 for size in sizes) >= len(sizes) - 1
        rows = manifest_rows(out)
        orders.append(list(rows))
        for row in rows.values():
            with (out / f"{row['shard']}.tar").open("rb") as file:
                file.seek(row["offset"])
                assert file.read(3) == b"\xff\xd8\xff"
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert sorted(orders[0]) == sorted(orders[2])


def test_manifest_row_has_metadata_of_article_and_image(tmp_path):
    xml = (
        b'<article xmlns:xlink="http://www.w3.org/1999/xlink"><front><journal-meta><journal-title>J</journal-title>'
        b'</journal-meta><article-meta><article-id pub-id-type="pmc">5</article-id><article-id pub-id-type="doi">10.1/x'
        b"</article-id><title-group><article-title>On tests.</article-title></title-group><contrib-group>"
        b'<contrib contrib-type="author"><name><surname>Doe</surname><given-names>J</given-names></name></contrib>'
        b"</contrib-group><pub-date><year>2020</year></pub-date></article-meta></front><body>"
        b'<p>See <xref ref-type="fig" rid="F1">figure 1</xref> and <xref ref-type="fig" rid="F1">again</xref>.</p>'
        b'<fig id="F1"><label>1</label><caption><p>Cells</p></caption><graphic xlink:href="f"/></fig></body></article>'
    )
    write_files(tmp_path / "in", {"x.nxml": xml, "f.jpg": noise_image(1)})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cell", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    build(IngestConfig(str(tmp_path / "in"), tmp_path / "out", workers=1, tokenizer=tmp_path / "vocab.txt"))
    (row,) = manifest_rows(tmp_path / "out").values()
    assert row["citation"] == "Doe J. On tests. J. 2020. doi:10.1/x"
    assert json.loads(row["mentions"]) == ["See figure 1 and again."]
    assert (row["num_tokens"], row["width"], row["source_bytes"]) == (4, 64, len(noise_image(1)))
    assert (row["num_words"], row["caption_language"], row["caption_quality"]) == (1, "", "near_empty")
    assert len(row["phash"]) == len(row["source_sha256"]) == 64


def test_shards_keep_the_texts_about_a_figure(tmp_path):
    xml = article_xml(("f0", "Two views. (A) From above. (B) From below."), ("f1", "Another figure"), number=3)
    mention = b'<p>The view in <xref rid="F1">Fig. 1A</xref> shows the animal from above.</p>'
    title = b"<title-group><article-title>On views.</article-title></title-group></article-meta>"
    xml = xml.replace(b"<body>", b"<body>" + mention).replace(b"</article-meta>", title)
    write_files(tmp_path / "in", {"x.nxml": xml, "f0.jpg": noise_image(1), "f1.jpg": noise_image(2)})
    build(IngestConfig(str(tmp_path / "in"), tmp_path / "out", workers=1, val_fraction=0, test_fraction=0))
    dataset = ShardDataset(tmp_path / "out")
    texts = {sample.key: sample.texts for sample in dataset}
    assert texts == {
        "PMC3_f1": {
            "mention": ["The view in Fig. 1A shows the animal from above."],
            "panel": ["Two views. From above.", "Two views. From below."],
            "title": ["On views. Two views. (A) From above. (B) From below."],
        },
        "PMC3_f2": {"title": ["On views. Another figure"]},
    }
    assert verify(tmp_path / "out") == []
    assert json.loads(manifest_rows(tmp_path / "out")["PMC3_f1"]["texts"]) == texts["PMC3_f1"]
    build(IngestConfig(str(tmp_path / "in"), tmp_path / "plain", workers=1, texts=False))
    description = json.loads((tmp_path / "plain/dataset.json").read_text())
    assert description["version"] == 1
    assert "texts" not in description["ingest"]["config"]


def test_long_texts_of_a_figure_are_cut(tmp_path):
    write_files(tmp_path / "in", {"x.nxml": article_xml(("f0", "word " * 3000), number=3), "f0.jpg": noise_image(1)})
    xml = (tmp_path / "in/x.nxml").read_bytes()
    title = b"<title-group><article-title>A</article-title></title-group></article-meta>"
    (tmp_path / "in/x.nxml").write_bytes(xml.replace(b"</article-meta>", title))
    build(IngestConfig(str(tmp_path / "in"), tmp_path / "out", workers=1, val_fraction=0, test_fraction=0))
    (sample,) = ShardDataset(tmp_path / "out")
    assert [len(text) for text in sample.texts["title"]] == [MAX_SENTENCE]
