"""The protocol of medpmc-clip-eval on all 26 rows, in their true layouts, and the means of the suite."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from benchmark_data import SUBSETS, bench_rows, hash_model, tokenizer, write_all, write_microbench
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from bclip_fast.data.image_files import read_rgb
from bclip_fast.errors import UserError
from bclip_fast.eval import (
    EvalCommand,
    EvalConfig,
    Evaluation,
    command,
    medpmc,
    results,
    suites,
    tasks,
    yardstick_metrics,
)
from bclip_fast.eval.suite_results import add, scores_of


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yardstick_metrics, "NUM_DRAWS", 300)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> tuple[Evaluation, dict[str, Any]]:
    evaluation = Evaluation(EvalConfig(suite="medpmc", data=str(folder), cache="none", progress=False))
    return evaluation, evaluation.run(hash_model())


def cosines(data: Any, texts: list[str]) -> np.ndarray:
    """The cosine similarities (N, texts), computed here image by image."""
    model, preprocess, _ = hash_model()
    images = [preprocess(read_rgb(data.image(i), str)) for i in range(len(data))]
    rows = F.normalize(model.encode_text(tokenizer(texts)), dim=1).double()
    return np.stack([(F.normalize(model.encode_image(x[None]), dim=1).double() @ rows.T)[0].detach() for x in images])


def softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


TEXTS = {
    "medpmc_breastmnist": [
        "breast ultrasound of a malignant tumor",
        "breast ultrasound of benign lesion or normal tissue",
    ],
    "medpmc_rsna_pneumonia": ["chest x-ray of no pneumonia", "chest x-ray of pneumonia"],
    "medpmc_pcam": [f"histopathology image of {x}" for x in ("normal lymph node tissue", "metastatic tumor tissue")],
    "medpmc_lc25000_colon": [f"histopathology image of {x}" for x in ("benign colon tissue", "colon adenocarcinoma")],
    "medpmc_deepdrid": [
        f"a colorful fundus photo of {level} diabetic retinopathy"
        for level in ("no", *(f"{x} non-proliferative" for x in ("mild", "moderate", "severe")), "proliferative")
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_medpmc_classes_have_the_prompts_scores_and_metrics_of_the_yardstick(name: str, evaluated: Any) -> None:
    evaluation, outcome = evaluated
    result, data = outcome["tasks"][name], evaluation.data[name]
    scores = medpmc.from_samples(result).scores
    assert scores == pytest.approx(softmax(100 * cosines(data, TEXTS[name])), abs=1e-5)  # 100 times float32 cosines
    names = result["classes"]
    labels = np.array([names.index(label) for label in data.labels("class")])
    found = scores.argmax(1)
    expected = [
        accuracy_score(labels, found),
        f1_score(labels, found, average="macro", zero_division=0),
        roc_auc_score(np.eye(len(names))[labels].ravel(), scores.ravel()),
    ]
    assert [figure["name"] for figure in result["figures"][:4]] == [
        "accuracy", "macro F1", "pooled AUC", "balanced accuracy",
    ]  # fmt: skip
    assert [figure["value"] for figure in result["figures"][:3]] == pytest.approx(expected, rel=1e-6)
    for figure in result["figures"][:3]:
        assert figure["interval"][0] <= figure["value"] + 0.35 and figure["interval"][1] >= figure["value"] - 0.35


def test_medpmc_labels_compare_the_text_with_a_label_and_the_text_without_it(evaluated: Any) -> None:
    evaluation, outcome = evaluated
    result, data = outcome["tasks"]["medpmc_dad"], evaluation.data["medpmc_dad"]
    names = [
        "colon",
        "inferior mesenteric artery",
        "intestinal veins",
        "liver",
        "pancreas",
        "small intestine",
        "spleen",
    ]
    names += ["stomach", "ureter", "vesicular glands"]
    pairs = [[f"laparoscopic view without the {name}", f"laparoscopic view of the {name}"] for name in names]
    logits = cosines(data, [text for pair in pairs for text in pair]).reshape(len(data), 10, 2)
    scores = medpmc.from_samples(result).scores
    assert scores == pytest.approx(softmax(100 * logits)[..., 1], abs=1e-5)
    labels = [set((label or "").split("|")) for label in data.labels("class")]
    truth = np.array([[str(number) in label for number in range(1, 11)] for label in labels])
    found = scores >= 0.5
    both = [i for i in range(10) if 0 < truth[:, i].sum() < len(truth)]
    expected = [
        (found == truth).mean(),
        np.mean([f1_score(truth[:, i], found[:, i], zero_division=0) for i in range(10)]),
        np.mean([roc_auc_score(truth[:, i], scores[:, i]) for i in both]),
    ]
    assert [figure["name"] for figure in result["figures"]] == ["accuracy", "macro F1", "AUROC, macro"]
    assert [figure["value"] for figure in result["figures"]] == pytest.approx(expected, rel=1e-6)
    assert tasks.load("medpmc_chestmnist").prompts.negative_templates == ("chest x-ray without {}",)  # type: ignore[union-attr]


def test_medpmc_options_are_scored_in_their_own_question(evaluated: Any) -> None:
    evaluation, outcome = evaluated
    name = "medpmc_kather_et_al_2016"
    result, data = outcome["tasks"][name], evaluation.data[name]
    questions = [question for row in bench_rows("kather_et_al_2016") for question in row["captions"].values()]
    answers, found, flat_labels, flat_scores = [], [], [], []
    for place, question in enumerate(questions):
        own = softmax(100 * cosines(data, question["options"])[place // 2])
        answers.append(question["answer_idx"])
        found.append(int(own.argmax()))
        flat_labels += [i == question["answer_idx"] for i in range(len(own))]
        flat_scores += own.astype(np.float32).tolist()
    expected = [
        accuracy_score(answers, found),
        f1_score(answers, found, average="macro", zero_division=0),
        roc_auc_score(flat_labels, flat_scores),
    ]
    assert [figure["value"] for figure in result["figures"][:3]] == pytest.approx(expected, rel=1e-6)
    assert [figure["name"] for figure in result["figures"][3:]] == ["AUROC, within questions", "balanced accuracy"]
    assert result["samples"]["key"][:2] == [f"kather_et_al_2016-0/classification_{i}" for i in (0, 1)]
    assert result["samples"]["answer"] == answers


def test_medpmc_means_are_unweighted_over_rows_and_over_domains(evaluated: Any) -> None:
    _, outcome = evaluated
    add(outcome, suites.load("medpmc"))
    rows = {(row["kind"], row["name"]): row for row in outcome["suite"]["rows"]}
    points = {
        result["task"]["row"]: (result["task"]["domain"], result["medpmc"]["auc"])
        for result in outcome["tasks"].values()
    }
    assert len(points) == 26 and outcome["suite"]["missing"] == {}
    by_domain: dict[str, list[float]] = {}
    for domain, value in points.values():
        by_domain.setdefault(domain, []).append(value)
    assert len(by_domain) == 11
    assert rows["overall", "OVERALL"]["auc"] == pytest.approx(np.mean([value for _, value in points.values()]))
    means = {domain: np.mean(values) for domain, values in by_domain.items()}
    assert {name: row["auc"] for (kind, name), row in rows.items() if kind == "domain"} == pytest.approx(means)
    macro = rows["overall", "OVERALL_SPECIALTY_MACRO"]
    assert macro["auc"] == pytest.approx(np.mean(list(means.values())))
    draws = [each for _, _, each in scores_of(outcome["tasks"]).values()]
    low, high = np.quantile(np.mean([each[:, 2] for each in draws], axis=0), [0.025, 0.975])
    assert (rows["overall", "OVERALL"]["auc_low"], rows["overall", "OVERALL"]["auc_high"]) == pytest.approx((low, high))


def test_medpmc_kept_scores_alone_give_the_same_means_and_intervals(evaluated: Any, tmp_path: Path) -> None:
    """results.read has only the files. The scores come back bit by bit."""
    _, outcome = evaluated
    add(outcome, suites.load("medpmc"))
    results.write(tmp_path, outcome)
    again = results.read(tmp_path)
    medpmc._DRAWS.clear()
    rows = [row.as_json() for row in suites.summarise(scores_of(again["tasks"]))]
    assert json.loads(json.dumps(rows)) == json.loads(json.dumps(outcome["suite"]["rows"]))
    for name, result in outcome["tasks"].items():
        kept, read = medpmc.from_samples(result), medpmc.from_samples(again["tasks"][name])
        assert np.array_equal(kept.scores, read.scores, equal_nan=True) and np.array_equal(kept.targets, read.targets)
    assert (tmp_path / "suite.csv").read_text().count("\n") == 1 + 26 + 11 + 2
    del again["tasks"]["medpmc_pcam"]["samples"]["score of 1"]
    with pytest.raises(UserError, match="not those of protocol medpmc"):
        medpmc.from_samples(again["tasks"]["medpmc_pcam"])


def test_suite_names_the_missing_rows_and_stops_at_a_faulty_one(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_microbench(tmp_path / "data" / "ubench", bench_rows("jung_et_al_2022") + bench_rows("other"))
    monkeypatch.setattr(importlib.import_module("bclip_fast.eval.evaluate"), "load_model", lambda *_: hash_model())
    shared: Any = {"suite": "medpmc", "cache": "none", "progress": False, "out": str(tmp_path / "out")}
    command.run(EvalCommand(model="m", data=str(tmp_path / "data"), **shared))
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 26" in printed and "missing rows, which the means leave out: BreastMNIST, ChestMNIST" in printed
    assert "tang_et_al_2019" in printed and "jung_et_al_2022" in printed
    missing = json.loads((tmp_path / "out" / "results.json").read_text())["suite"]["missing"]
    assert len(missing) == 25 and set(SUBSETS) - set(missing) == {"jung_et_al_2022"}
    assert "breastmnist_224.npz" in missing["BreastMNIST"]
    assert "it holds jung_et_al_2022, other" in missing["tang_et_al_2019"]
    assert "OVERALL" in (tmp_path / "out" / "report.html").read_text()
    path.write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match="0000.parquet cannot be read"):
        command.run(EvalCommand(model="m", data=str(tmp_path / "data"), **shared))
    path.unlink()
    with pytest.raises(UserError, match="none of the 26 rows of suite medpmc"):
        command.run(EvalCommand(model="m", data=str(tmp_path / "data"), **shared))
    with pytest.raises(UserError, match="needs --data"):
        command.run(EvalCommand(model="m", **shared))
    with pytest.raises(UserError, match="leave one of them out"):
        EvalConfig(suite="medpmc", task=("pcam",))
    with pytest.raises(UserError, match="unknown suite 'medpcm'"):
        EvalConfig(suite="medpcm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('title = "x"\nsource = "y"', "must hold title, source and a list of tasks"),
        ('title = "x"\nsource = "y"\ntasks = ["pcam"]', "task pcam needs protocol medpmc"),
        ('title = "x"\nsource = "y"\ntasks = ["medpmc_pcam", "medpmc_pcam"]', "two tasks with the same row"),
    ],
)
def test_suite_file_that_is_invalid_raises(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        suites.load(str(tmp_path / "s.toml"))


def test_medpmc_needs_negative_templates_for_labels(tmp_path: Path, folder: Path) -> None:
    task = (suites.FOLDER.parent / "tasks" / "medpmc_dad.toml").read_text()
    lines = [line for line in task.splitlines() if not line.startswith(("negative", "row", "domain"))]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    evaluation = Evaluation(
        EvalConfig(task=(str(tmp_path / "mine.toml"),), data=str(folder), progress=False, cache="none")
    )
    with pytest.raises(UserError, match="'mine' needs negative_templates"):
        evaluation.run(hash_model())


def test_medpmc_windows_dicom_to_its_percentiles(folder: Path, evaluated: Any) -> None:
    """The window in the file counts for the other tasks, not for this one."""
    import pydicom

    data = evaluated[0].data["medpmc_rsna_pneumonia"]
    assert [data.key(i) for i in range(len(data))] == [f"p{i}" for i in range(5)] == data.groups
    assert data.labels("class") == ["0", "1", "0", "1", "0"]
    values = pydicom.dcmread(folder / "rsna" / "stage_2_train_images" / "p0.dcm").pixel_array.astype(np.float32)
    low, high = np.percentile(values, [0.5, 99.5])
    levels = (np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    image = read_rgb(data.image(0), str)
    assert np.array_equal(np.asarray(image), np.repeat(levels[..., None], 3, 2))
    assert isinstance(image, Image.Image) and levels.min() == 0 and levels.max() == 255
