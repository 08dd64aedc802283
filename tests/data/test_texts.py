"""Several texts of a sample: shards that hold them, the draw of one of them, and the batches of the loader."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from loaders import by_key, loader, take
from shard_samples import jpeg
from synthetic import write_shards

from bclip_fast.data.shards.format import KINDS, Sample
from bclip_fast.data.shards.mixed import open_dataset
from bclip_fast.data.shards.positives import group_ids
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.verify import verify
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.data.sources import Source
from bclip_fast.data.texts import CaptionWeights, TextChoice
from bclip_fast.errors import UserError

TEXTS = {"mention": ["a \u03b1", "b"], "panel": ["left", "right", "top"], "title": ["T. caption"]}
WEIGHTS = CaptionWeights(caption=0.5, mention=0.3, title=0.2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("texts") / "shards", num_samples=40, num_val=1, texts=True)


def write(folder: Path, *texts: dict[str, list[str]]) -> Path:
    with ShardWriter(folder, texts=True) as writer:
        for i, each in enumerate(texts):
            writer.write(Sample(f"k{i}", jpeg(i), f"caption {i}", {"n": i}, each), "train")
    return folder


def test_shards_return_their_texts_and_sizes(tmp_path: Path):
    dataset = ShardDataset(write(tmp_path / "shards", TEXTS, {}))
    assert [sample.texts for sample in dataset] == [TEXTS, {}]
    assert dataset.texts(0) == {"caption": ["caption 0"], **TEXTS}
    assert dataset.text_bytes(0) == {"caption": [9], "mention": [4, 1], "panel": [4, 5, 3], "title": [10]}
    assert dataset.text_bytes(1) == {"caption": [9]}
    assert dataset.num_samples_with() == {"caption": 2, "mention": 1, "panel": 1, "title": 1}
    assert list(dataset.captions(("mention", "caption"))) == ["a \u03b1", "b", "caption 0", "caption 1"]
    assert verify(tmp_path / "shards") == []


def test_webdataset_reads_texts(tmp_path: Path):
    webdataset = pytest.importorskip("webdataset")
    write(tmp_path / "shards", TEXTS)
    (item,) = webdataset.WebDataset([str(tmp_path / "shards/train-000000.tar")], shardshuffle=False).decode()
    assert item["texts.json"] == TEXTS


def test_verify_names_damaged_texts(tmp_path: Path):
    folder = write(tmp_path / "shards", TEXTS, {})
    path = folder / "train-000000.tar"
    intact = path.read_bytes()
    path.write_bytes(intact.replace(b'"left"', b'"lift"'))
    with pytest.raises(UserError, match=r"k0.texts.json is damaged: its CRC-32C"):
        ShardDataset(folder).texts(0)
    assert any("k0.texts.json: its CRC-32C differs" in problem for problem in verify(folder))
    path.write_bytes(intact)
    index = folder / "train-000000.index.json"
    entries = json.loads(index.read_text())
    entries["samples"][0]["texts"]["mention"] = [3]
    index.write_text(json.dumps(entries))
    assert verify(folder) == ["train-000000.tar: k0.texts.json: its texts differ from the index"]


def test_dataset_without_texts_keeps_version_1(tmp_path: Path):
    description = json.loads((write_shards(tmp_path / "plain", 4, 1) / "dataset.json").read_text())
    assert description["version"] == 1
    assert not any("texts" in shard for shard in description["splits"]["train"]["files"])


@pytest.mark.parametrize(
    ("keeps_texts", "texts", "message"),
    [
        (False, {"mention": ["a"]}, "has texts besides its caption; pass texts=True"),
        (True, {"abstract": ["a"]}, "has texts of kind 'abstract'; use mention, panel, title"),
        (True, {"caption": ["a"]}, "has texts of kind 'caption'"),
        (True, {"mention": []}, "has an empty mention"),
        (True, {"mention": ["a", " "]}, "has an empty mention"),
    ],
)
def test_writer_refuses_texts_by_name(tmp_path: Path, keeps_texts: bool, texts: dict[str, list[str]], message: str):
    with (
        pytest.raises(UserError, match=message),
        ShardWriter(tmp_path / "out", texts=keeps_texts) as writer,
    ):
        writer.write(Sample("k", jpeg(0), "caption", {}, texts), "train")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"caption": 0.0}, "only weights of 0"),
        ({"mention": -0.1}, r"data.captions.mention=-0.1 must be finite and not negative"),
        ({"title": float("nan")}, "data.captions.title=nan"),
        ({"panel": float("inf")}, "data.captions.panel=inf"),
    ],
)
def test_weights_out_of_range_are_refused(weights: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        CaptionWeights(**weights)


def test_kind_that_no_sample_has_is_refused(shards: Path):
    CaptionWeights(mention=1, title=1).check(ShardDataset(shards))
    message = r"data.captions.panel=0.5: no sample of .*shards .split train. .* have caption \(40 samples\), mention"
    with pytest.raises(UserError, match=message):
        CaptionWeights(panel=0.5).check(ShardDataset(shards))


def test_draws_have_the_weights_of_the_kinds_that_a_sample_has():
    sizes = {"caption": [1], "mention": [1, 1, 1], "title": [1]}
    choice, count = TextChoice(WEIGHTS, 3), 20_000
    drawn = Counter(choice.draw(index // 5000, index % 5000, sizes) for index in range(count))
    expected = {("caption", 0): 0.5, ("title", 0): 0.2, **{("mention", i): 0.1 for i in range(3)}}
    assert drawn.keys() == expected.keys()
    for text, probability in expected.items():
        assert abs(drawn[text] - count * probability) < 5 * np.sqrt(count * probability)
    # Without mentions, the others keep their ratio of 5 to 2.
    del sizes["mention"]
    drawn = Counter(choice.draw(0, index, sizes) for index in range(count))
    assert abs(drawn["caption", 0] - count * 5 / 7) < 5 * np.sqrt(count * 10 / 49)
    assert TextChoice(CaptionWeights(caption=0, mention=1), 3).draw(0, 0, sizes) == ("caption", 0)


def test_draws_equal_recorded_ones():
    # A run that resumes after an update must continue with the same texts, on any machine.
    sizes = {kind: [1] * 4 for kind in KINDS}
    choice = TextChoice(CaptionWeights(1, 1, 1, 1), 7)
    drawn = [choice.draw(epoch, 11, sizes) for epoch in range(6)]
    assert drawn == [
        ("caption", 0), ("caption", 0), ("mention", 0), ("caption", 1), ("caption", 0), ("caption", 1)
    ]  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2])
def test_texts_are_independent_of_ranks_and_resume(shards: Path, world_size: int):
    dataset = ShardDataset(shards)
    choice = TextChoice(WEIGHTS, 1)
    options = {
        "captions": WEIGHTS,
        "tokenize": lambda texts: [[*text.encode()] for text in texts],
        "stream": {"cost": lambda number, index: choice.num_bytes(number, index, dataset), "micro_batch_size": 2},
    }
    with loader(dataset, **{**options, "stream": {}}) as source:
        expected = [take(source, 1)[0] for _ in range(10)]
    with loader(dataset, **options) as source:
        take(source, 4 * 3)
        state = source.state_dict()
    ranks = []
    for rank in range(world_size):
        with loader(dataset, rank, world_size, **options) as source:
            source.load_state_dict(state)
            ranks.append([take(source, 4 // world_size) for _ in range(7)])
    for number, batch in enumerate(expected[3:]):
        assert by_key([part for rank in ranks for part in rank[number]]) == by_key([batch])
    # The cost of a sample is the size of the text that the loader draws.
    key_to_index = {dataset.name_of(index)[0]: index for index in range(len(dataset))}
    for batch in expected:
        sizes = [choice.num_bytes(batch.epoch, key_to_index[key], dataset) for key in batch.keys]
        assert sizes == batch.lengths
    texts = Counter(
        bytes(ids.tolist()).split()[0].decode() for batch in expected for ids in batch.ids.split(batch.lengths)
    )
    assert texts.keys() == {"a", "see", "this", "title"}
    assert texts["a"] > texts["title"] > 3


def test_mixture_of_datasets_with_and_without_texts(shards: Path, tmp_path: Path):
    plain = write_shards(tmp_path / "plain", num_samples=8, num_val=1)
    sources = (Source(str(plain), "plain", 1), Source(str(shards), "texts", 1))
    dataset = open_dataset(sources, "train")
    WEIGHTS.check(dataset)
    assert dataset.num_samples_with() == {"caption": 48, "mention": 20, "title": 10}
    assert dataset.text_bytes(0).keys() == {"caption"}
    assert dataset.text_bytes(8).keys() == {"caption", "mention", "title"}
    assert len(list(dataset.captions(("mention",)))) == 40
    groups = group_ids(dataset, "captions", WEIGHTS.kinds)
    assert groups is not None
    assert len(np.unique(groups[:8])) == 8
    assert sorted(np.unique(groups[8:], return_counts=True)[1].tolist()) == [1] * 24 + [2] * 8
