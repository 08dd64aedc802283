"""Which samples are positives of one another, by the manifest."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from shard_samples import jpeg

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.positives import KINDS, connect, group_ids
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.errors import UserError

# key, caption, article, figure number, key of the image that it duplicates
ROWS = [
    ("a", "A scan  of the chest.", "PMC1", 1, None),
    ("b", "a scan of the chest. ", "PMC2", 1, None),
    ("c", "another", "PMC2", 1, "a"),
    ("d", "third", "PMC2", 2, "gone"),
    ("e", "fourth", "PMC3", 1, "gone"),
    ("f", "fifth", "PMC3", 2, None),
]
EXPECTED = {
    "captions": [0, 0, 2, 3, 4, 5],
    "images": [0, 1, 0, 3, 3, 5],
    "duplicates": [0, 0, 0, 3, 3, 5],
    "figure": [0, 1, 1, 3, 4, 5],
    "article": [0, 1, 1, 1, 4, 4],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("positives") / "shards"
    # A sample a shard, so that the rows need the shards' starts. The row of the other split must not count.
    with ShardWriter(folder, max_shard_bytes=1) as writer:
        for key, caption, article, number, original in ROWS:
            meta = {"article": article, "figure_number": number}
            writer.write(
                Sample(key, jpeg(0), caption, meta | ({"duplicate_of": original} if original else {})), "train"
            )
        writer.write(Sample("v", jpeg(0), "another", {"article": "PMC1", "figure_number": 1}), "val")
    table = pq.read_table(folder / "manifest.parquet")
    pq.write_table(table.take(list(reversed(range(len(table))))), folder / "manifest.parquet")
    return folder


@pytest.mark.parametrize("kind", EXPECTED)
def test_group_ids_follow_the_manifest(folder, kind):
    assert group_ids(ShardDataset(folder), kind).tolist() == EXPECTED[kind]


def test_groups_join_samples_with_a_text_in_common(tmp_path):
    texts = [{"mention": ["As  A shows.", "B"]}, {}, {"mention": ["as a shows."]}, {"title": ["b"], "panel": ["One"]}]
    captions = ["zero", "one", "two", "zero."]
    with ShardWriter(tmp_path / "shards", texts=True) as writer:
        for number, (caption, each) in enumerate(zip(captions, texts, strict=True)):
            writer.write(Sample(f"k{number}", jpeg(0), caption, {}, each), "train")
    dataset = ShardDataset(tmp_path / "shards")
    for kinds, expected in [
        (("caption",), [0, 1, 2, 3]),
        (("caption", "mention"), [0, 1, 0, 3]),
        (("mention", "title"), [0, 1, 0, 0]),
        (("caption", "panel"), [0, 1, 2, 1]),
    ]:
        assert group_ids(dataset, "captions", kinds).tolist() == expected


def test_pairs_have_no_groups(folder):
    assert group_ids(ShardDataset(folder), "pair") is None
    assert {"pair", *EXPECTED} == KINDS.keys()


def test_groups_are_connected_through_others():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 400, (2, 250))
    groups = connect(np.arange(400), first, second)
    expected = list(range(400))
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted((expected[a], expected[b]))
        expected = [low if group == high else group for group in expected]
    assert groups.tolist() == expected


def test_manifest_that_does_not_fit_is_an_error(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    table, dataset = pq.read_table(copy / "manifest.parquet"), ShardDataset(copy)
    for change, message in [
        (lambda: pq.write_table(table.slice(2), copy / "manifest.parquet"), "lists 5 samples"),
        (lambda: pq.write_table(table.drop(["article"]), copy / "manifest.parquet"), "no column article"),
        (lambda: (copy / "manifest.parquet").write_bytes(b"PAR1"), "cannot be read"),
        (lambda: (copy / "manifest.parquet").unlink(), "is missing"),
    ]:
        change()
        with pytest.raises(UserError, match=message):
            group_ids(dataset, "article")
