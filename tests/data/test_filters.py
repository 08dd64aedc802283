"""Filters over the manifest: the language, and the samples of a dataset that a filter selects."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_samples import jpeg

from bclip_fast.data import filters
from bclip_fast.data.caption_lengths import caption_lengths
from bclip_fast.data.shards.filtered import FilteredDataset
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.mixed import open_dataset
from bclip_fast.data.shards.positives import group_ids
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.data.sources import Source
from bclip_fast.errors import UserError

TABLE = pa.table(
    {
        "kind": ["ct", "mr", None, "chart"],
        "kind_p": [0.9, 0.4, None, 0.8],
        "year": [2001, 2005, None, 2010],
        "retracted": [True, False, None, True],
        "panel": pa.nulls(4),
    }
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind in ['ct', 'mr'] and p > 0.5", "1000"),
        ("kind in ('ct', 'chart') or year == 2005", "1101"),
        ("2000 < year <= 2005", "1100"),
        ("retracted", "1001"),
        ("not retracted and year > 0", "0100"),
        ("year in [2001, 2010.0, 2000.5]", "1001"),
        ("0.5 < kind_p", "1001"),
        # A missing value makes neither a comparison nor its negation true.
        ("kind == 'ct'", "1000"),
        ("not kind == 'ct'", "0101"),
        ("kind != 'ct'", "0101"),
        ("kind not in ['ct']", "0101"),
        ("kind == 'ct' or year == None", "1010"),
        ("kind is null", "0010"),
        ("kind is not None", "1101"),
        ("kind in [None, 'ct']", "1010"),
        ("kind in []", "0000"),
        # A column without any value has no type.
        ("panel == null and p > 0.1", "1101"),
        ("panel == 3 or panel in ['a']", "0000"),
    ],
)
def test_filter_selects_rows(text, expected):
    chosen = filters.parse(text)
    chosen.check_columns(TABLE.column_names, "the table")
    assert "".join(map(str, chosen.mask(TABLE).astype(int))) == expected
    # The values of rows don't depend on other rows.
    parts = [chosen.mask(TABLE.slice(row, 1)) for row in range(len(TABLE))]
    assert np.array_equal(np.concatenate(parts), chosen.mask(TABLE))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "isn't allowed"),
        ("kind.upper() == 'CT'", "isn't allowed"),
        ("year > 10 ** 9", "isn't allowed"),
        ("f'{kind}' == 'ct'", "isn't allowed"),
        ("[x for x in kind] == 1", "isn't allowed"),
        ("kind in kind_p", "`in` needs a list"),
        ("kind is 'ct'", "use =="),
        ("kind < None", "None has no order"),
        ("1 < 2", "names no column"),
        ("kind ==", "not an expression: invalid syntax"),
        ("(" * 500 + "kind" + ")" * 500, "not an expression"),
        ("not " * 100 + "retracte", "no column retracte; did you mean retracted"),
        ("not " * 400 + "retracted", "nested more than 100 deep"),
        ("kind == 'ct' " * 300, "too long"),
        ("knd == 'ct'", "no column knd; did you mean kind"),
        ("colour == 1", "no column colour; choose one of kind, kind_p"),
        ("kind > 5", "kind is text, and 5 is a number"),
        ("kind in ['ct', 5]", "kind is text, and 5 in its list is a number"),
        ("year == True", "year is a number, and True is true or false"),
        ("kind and retracted", "column kind is text, not true or false"),
        (f"year == {10**30}", "doesn't fit"),
        (r"kind == '\ud800'", "doesn't fit"),
    ],
)
def test_wrong_filter_is_an_error_that_names_the_part(text, message):
    def evaluate():
        chosen = filters.parse(text)
        chosen.check_columns(TABLE.column_names, "the table")
        return chosen.mask(TABLE)

    with pytest.raises(UserError, match=message) as error:
        evaluate()
    assert str(error.value).count("\n") == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 samples in shards of 4 or so: kinds in turn, years, articles of three figures, texts of every second one."""
    folder = tmp_path_factory.mktemp("filters") / "shards"
    with ShardWriter(folder, max_shard_bytes=4 * 5120, texts=True) as writer:
        for i in range(24):
            meta = {"kind": ["ct", "mr", "chart"][i % 3], "year": 2000 + i, "article": f"PMC{i // 3}"}
            texts = {"mention": [f"see {i}"]} if i % 2 else {}
            sample = Sample(f"k{i:02}", jpeg(i), "scan " * (1 + i), meta, texts)
            writer.write(sample, "val" if i >= 18 else "train")
    table = pq.read_table(folder / "manifest.parquet")
    # Rows in any order, in several row groups.
    pq.write_table(table.take(list(reversed(range(24)))), folder / "manifest.parquet", row_group_size=5)
    return folder


def keys(dataset):
    return [sample.key for sample in dataset]


def test_filtered_dataset_works_like_a_dataset_of_the_selected_samples(folder):
    whole, chosen = ShardDataset(folder), open_dataset(str(folder), "train", filter="kind == 'ct' or year == 2017")
    places = [0, 3, 6, 9, 12, 15, 17]
    assert keys(chosen) == [f"k{i:02}" for i in places]
    assert len(whole.shard_sizes) > 2
    assert sum(chosen.shard_sizes) == len(chosen) == 7
    assert all(chosen.shard_sizes)
    assert [chosen.name_of(i) for i in range(7)] == [whole.name_of(i) for i in places]
    assert chosen[-1] == whole[17]
    assert [sample.key for sample in chosen.fetch([6, 0, 3])()] == ["k17", "k00", "k09"]
    assert list(chosen.captions(("caption", "mention"))) == [
        text for i in places for text in [whole.caption(i), *whole.texts(i).get("mention", [])]
    ]
    assert chosen.num_samples_with() == {"caption": 7, "mention": 4}
    assert keys(pickle.loads(pickle.dumps(chosen))) == keys(chosen)
    assert caption_lengths(chosen, lambda texts: [text.split() for text in texts]).tolist() == [
        len(whole.caption(i).split()) for i in places
    ]
    # 15 and 17 are of one article.
    assert group_ids(chosen, "article").tolist() == [0, 1, 2, 3, 4, 5, 5]
    with pytest.raises(IndexError):
        chosen[7]


def test_fingerprint_follows_the_selected_samples(folder):
    def fingerprint(filter):
        return open_dataset(str(folder), "train", filter=filter).fingerprint

    assert fingerprint("kind == 'ct'") == fingerprint("kind not in ['mr', 'chart']")
    assert len({fingerprint("kind == 'ct'"), fingerprint("kind == 'mr'"), fingerprint("all")}) == 3


def test_dataset_has_a_selection_of_its_own(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    description = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**description, "filter": "kind == 'mr'"}))
    assert keys(open_dataset(str(copy), "val", filter="")) == ["k19", "k22"]
    assert keys(open_dataset(str(copy), "val", filter="year > 2022")) == ["k23"]
    assert len(open_dataset(str(copy), "val", filter="all")) == len(open_dataset(str(copy), "val")) == 6
    mixture = open_dataset((Source(str(copy)), Source(str(folder), "b")), "val", filter="")
    assert keys(mixture)[:3] == ["copy/k19", "copy/k22", "b/k18"]
    assert mixture.mixture.epoch_samples == 8
    assert keys(open_dataset(f"file://{copy}", "val", filter="")) == ["k19", "k22"]


def test_selection_that_does_not_fit_is_an_error(folder, tmp_path):
    with pytest.raises(UserError, match=r"selects none of the 18 samples .*kind == 'ct': 6; year > 2016: 1\)"):
        open_dataset(str(folder), "train", filter="kind == 'ct' and year > 2016")
    copy = shutil.copytree(folder, tmp_path / "copy")
    table = pq.read_table(copy / "manifest.parquet")
    for change, message in [
        (lambda: pq.write_table(table.slice(7), copy / "manifest.parquet"), "does not list every sample"),
        (lambda: (copy / "manifest.parquet").write_bytes(b"PAR1"), "cannot be read"),
        (lambda: (copy / "manifest.parquet").unlink(), "is missing"),
    ]:
        change()
        with pytest.raises(UserError, match=message):
            FilteredDataset(ShardDataset(copy), "kind == 'ct'")
