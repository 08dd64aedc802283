"""Questions: the splits of the public files, and the metrics of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from colours import ColourModel, jpeg, preprocess, tokenizer

from bclip_fast.errors import UserError
from bclip_fast.eval import tasks, vqa
from bclip_fast.eval.datasets import vqa as vqa_data
from bclip_fast.eval.embed import Embedder


def test_rad_splits_have_the_published_sizes(shared_data: Path) -> None:
    root = shared_data / "vqa" / "vqa_rad"
    sizes = {split: len(vqa_data.rad(root, split)) for split in ("train", "train_clean", "test")}
    assert sizes == {"train": 3064, "train_clean": 2780, "test": 451}
    test = vqa_data.rad(root, "test")
    assert len(test) == tasks.load("vqa_rad").num_samples
    assert sorted({q.kind for q in test.questions}) == ["closed", "open"]
    assert [sum(q.kind == kind for q in test.questions) for kind in ("open", "closed")] == [179, 272]
    # The usual train split contains rewrites of test questions.
    rows = {q.key for q in test.questions}
    assert sum(q.key.removesuffix("-framed") in rows for q in vqa_data.rad(root, "train").questions) == 284
    assert not any(q.key.removesuffix("-framed") in rows for q in vqa_data.rad(root, "train_clean").questions)
    assert len({q.image for q in vqa_data.rad(root, "train").questions} | {q.image for q in test.questions}) == 314


def test_slake_splits_have_the_published_sizes(shared_data: Path) -> None:
    root = shared_data / "vqa" / "slake_questions_text"
    sizes = {split: len(vqa_data.slake(root, split, images=False)) for split in ("train", "val", "test")}
    assert sizes == {"train": 4919, "val": 1053, "test": 1061}
    assert sizes["test"] == tasks.load("slake").num_samples
    with pytest.raises(UserError, match=r"imgs/xmlab\d+/source.jpg and \d+ more images.*BoKelvin/SLAKE"):
        vqa_data.slake(root, "test", tasks.load("slake").download_url)


def test_rad_missing_or_invalid_files_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"VQA_RAD_Dataset_Public.json cannot be read.*osf.io/89kps"):
        vqa_data.rad(tmp_path, "test")
    file = tmp_path / vqa_data.RAD_FILE
    row = {
        "qid": "1",
        "image_name": "a.jpg",
        "question": "q?",
        "answer": "Yes",
        "answer_type": "CLOSED ",
        "phrase_type": "freeform",
    }
    for content, message in (
        ("[{]", "cannot be read as a JSON list"),
        (json.dumps([{key: row[key] for key in row if key != "answer"}]), "lacks 'answer'"),
        (json.dumps([row | {"answer_type": "MAYBE"}]), "qid 1: answer_type is 'MAYBE'"),
        (json.dumps([row]), "a.jpg and 0 more images"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            vqa_data.rad(tmp_path, "train")
        assert "\n" not in str(caught.value)
    file.write_text(json.dumps([row]))
    with pytest.raises(UserError, match="no question in split 'test'"):
        vqa_data.rad(tmp_path, "test")
    with pytest.raises(UserError, match="no split 'val'; its splits are test, train, train_clean"):
        vqa_data.rad(tmp_path, "val")


def test_normalise_and_token_f1_give_expected_values() -> None:
    assert vqa_data.normalise("  Left  Lung. ") == "left lung"
    assert vqa_data.normalise(5) == "5"
    assert vqa.token_f1("left lung", "left lung") == 1
    assert vqa.token_f1("a", "b") == 0
    assert vqa.token_f1("left lung", "the left lung base") == pytest.approx(2 * 2 / 6)
    assert vqa.token_f1("no no", "no") == pytest.approx(2 / 3)
    assert vqa.token_f1("", "") == 1
    assert vqa.token_f1("", "x") == 0


def question(i: int, answer: str, kind: str) -> vqa_data.Question:
    return vqa_data.Question(str(i), Path("x.jpg"), f"q{i}?", answer, kind)


def test_measure_open_closed_and_overall_accuracy() -> None:
    questions = [question(0, "yes", "closed"), question(1, "no", "closed"), question(2, "left lung", "open")]
    result = vqa.measure(questions, ["yes", "yes", "left"], ["yes", "no", "left"], ("left", "yes"))
    metrics = {metric["name"]: metric for metric in result["figures"]}
    assert {name: metric["value"] for name, metric in metrics.items()} == pytest.approx(
        {"accuracy": 1 / 3, "open accuracy": 0, "closed accuracy": 0.5, "token F1": (1 + 2 / 3) / 3}
    )
    assert metrics["closed accuracy"]["chance"] == 0.5
    assert metrics["open accuracy"]["num_samples"] == 1
    assert result["answerable"] == pytest.approx(2 / 3)
    json.dumps(result, allow_nan=False)


def test_read_damaged_image_is_named_with_its_question(tmp_path: Path) -> None:
    """Skipping leaves out every question about the image."""
    rows = "image,question,answer,answer_type\ngood.jpg,is it red?,yes,closed\nbad.jpg,is it red?,no,closed\n"
    (tmp_path / "questions.csv").write_text(rows + "bad.jpg,what is it?,a hand,open\n")
    (tmp_path / "good.jpg").write_bytes(jpeg((200, 40, 40)))
    (tmp_path / "bad.jpg").write_bytes(jpeg((200, 40, 40))[:100])
    data = vqa_data.open_dataset(str(tmp_path / "questions.csv"), "all", tasks.load("vqa"))
    with pytest.raises(UserError, match=r"bad\.jpg of question 1 cannot be decoded"):
        Embedder(ColourModel(), preprocess, tokenizer).read(data, 1)
    kept, reasons = Embedder(ColourModel(), preprocess, tokenizer, on_bad_image="skip").readable(data)
    assert list(reasons) == ["1", "2"]
    assert [question.text for question in kept.questions] == ["is it red?"]
    assert [kept.key(0), kept.image(0)] == ["0", data.image(0)]
