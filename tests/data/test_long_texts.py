"""Parts of whole sentences of long texts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from loaders import loader, take
from shard_samples import jpeg

from bclip_fast.data.long_texts import LongTexts
from bclip_fast.data.sentences import split_sentences
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.data.texts import CaptionWeights, TextChoice
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.train.inputs import long_texts


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One ends. Two ends? (B) Three.", ["One ends. ", "Two ends? ", "(B) Three."]),
        ("Cells. (b) in lower case", ["Cells. ", "(b) in lower case"]),
        ("See Fig. 1 of E. coli vs. Bs (ref. 2). Next", ["See Fig. 1 of E. coli vs. Bs (ref. 2). ", "Next"]),
        ("Of 3.5 mm. of cells", ["Of 3.5 mm. of cells"]),
        ("\u80ba\u90e8\u3002\u53f3\u4fa7\u3002", ["\u80ba\u90e8\u3002", "\u53f3\u4fa7\u3002"]),
        ("", []),
    ],
)  # fmt: skip
def test_sentences(text: str, sentences: list[str]):
    assert list(split_sentences(text)) == sentences


def test_parts_are_runs_of_words_that_fit():
    words = LongTexts(lambda texts: [2 + len(text.split()) for text in texts], 7)
    text = "An ox. Of it so. Be no up. He is it; or as if, to be by me on us we do. At."
    assert words.parts([text, "A b c d e", ""]) == [
        ["An ox. Of it so.", "Be no up.", "He is it;", "or as if,", "to be by me", "on us we do. At."],
        ["A b c d e"],
        [""],
    ]
    # A word that is too long by itself stays one part.
    assert LongTexts(lambda texts: list(map(len, texts)), 3).parts(["abcd ef gh"]) == [["abcd", "ef", "gh"]]


def test_real_captions_are_divided_at_sentences_and_keep_every_word(shared_data: Path):
    with gzip.open(shared_data / "pairs/jats_captions_ccby_text.jsonl.gz", "rt") as file:
        lines = file.readlines()[::40]
    captions = [" ".join(json.loads(line)["caption"].split()) for line in lines]
    tokenizer = Tokenizer.from_file(shared_data / "vocab/pubmedbert/vocab.txt", 77)
    count = [len(ids) for ids in tokenizer.encode(captions, 4096)]
    parts = long_texts(tokenizer).parts(captions)
    num_divided = num_cut = 0
    for caption, tokens, each in zip(captions, count, parts, strict=True):
        assert " ".join(each) == caption
        assert max(map(len, tokenizer.encode(each, 4096))) <= 77
        assert (len(each) > 1) == (tokens > 77)
        num_divided += len(each) > 1
        ends = {sentence.strip() for sentence in split_sentences(caption)}
        for part in each:
            last = list(split_sentences(part))[-1].strip()
            if last not in ends:
                num_cut += 1
                (sentence,) = [end for end in ends if last in end][:1]
                assert len(tokenizer.encode([sentence], 4096)[0]) > 77
    # These captions have 86 tokens in the median.
    assert num_divided > 0.4 * len(captions)
    assert num_cut < 0.2 * sum(map(len, parts))


def test_loader_draws_every_part_and_resumes_exactly(tmp_path: Path):
    captions = [f"First {i}. Second {i} has more. Third {i}. " + f"Fourth {i} is, {i} too long" for i in range(8)]
    with ShardWriter(tmp_path / "shards") as writer:
        for i, caption in enumerate(captions):
            writer.write(Sample(f"k{i}", jpeg(i), caption), "train")
    dataset = ShardDataset(tmp_path / "shards")
    texts = LongTexts(lambda each: list(map(len, each)), 40)
    options = {"tokenize": lambda each: [[*text.encode()] for text in each], "long_texts": texts}
    with loader(dataset, **options) as source:
        expected = [take(source, 1)[0] for _ in range(16)]
    with loader(dataset, **options) as source:
        take(source, 5)
        state = source.state_dict()
    with loader(dataset, **options) as source:
        source.load_state_dict(state)
        assert [take(source, 1)[0].captions for _ in range(11)] == [batch.captions for batch in expected[5:]]
    choice, parts = TextChoice(CaptionWeights(), 1), texts.parts(captions)
    for batch in expected:
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            i = int(key[1:])
            number = choice.draw_part(
                batch.epoch, next(n for n in range(8) if dataset.name_of(n)[0] == key), len(parts[i])
            )
            assert caption == parts[i][number]
    assert {part for each in parts for part in each} >= {text for batch in expected for text in batch.captions}
    assert len({text for batch in expected for text in batch.captions}) > 0.8 * sum(map(len, parts))
