"""Classifiers by `bclip finetune --task classification`: optimum, early stopping, resume, splits and errors."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colours import COLOURS, jpeg
from finetunes import FAST, settings, write_start
from peers import import_torchvision
from ranks import on_ranks
from runs import assert_equal_runs, records, saved_steps, stopped_after
from towers import SMALL

from bclip_fast import pretrained
from bclip_fast.data import group_splits
from bclip_fast.errors import UserError
from bclip_fast.eval import evaluate
from bclip_fast.io.runs import VALIDATION
from bclip_fast.pretrained import class_head
from bclip_fast.train import checkpoint, class_data
from bclip_fast.train.finetune import finetune
from bclip_fast.train.finetune_classes import Classes
from bclip_fast.train.loss_spikes import SpikeConfig
from bclip_fast.train.schedule import OptimConfig

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with images of two patients for each of six shades of four colours."""
    folder = tmp_path_factory.mktemp("classes")
    write_start(folder / "start")
    for name, colour in COLOURS.items():
        for i in range(12):
            shade = tuple(min(255, max(0, part + 9 * i - 50)) for part in colour)
            (folder / f"{name}{i}.jpg").write_bytes(jpeg(shade, 40))  # type: ignore[arg-type]
    write_table(folder / "plain.csv", rows())
    return folder


def rows(**more: str) -> Rows:
    return [
        {"path": f"{name}{i}.jpg", "label": name, "patient_id": f"{name} {i // 2}", **more}
        for name in COLOURS
        for i in range(12)
    ]


def write_table(path: Path, table: Rows) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def config(folder: Path, run: Path, data: str = "plain.csv", **changes: Any) -> Any:
    optim = OptimConfig(lr=1e-3, warmup_steps=2, weight_decay=0.0, decay="linear")
    options: dict[str, Any] = {"task": "classification", "optim": optim, "checkpoint_every": 0, "group": "patient_id"}
    options |= {"crop_scale": (1.0, 1.0), "batch_size": 8} | changes
    start = Path(options.pop("model", folder / "start"))
    return settings(start, folder / data, run, **options)


def made_splits(run: Path) -> Rows:
    with (run / "splits.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def validations(run: Path) -> list[tuple[int, float]]:
    name = f"{VALIDATION}auroc"
    return [(record["step"], record[name]) for record in records(run) if name in record]


def test_classifier_learns_keeps_groups_apart_and_reports(folder: Path, tmp_path: Path) -> None:
    run = finetune(config(folder, tmp_path / "run", epochs=6))
    groups: dict[str, set[str]] = {}
    for row in made_splits(run):
        groups.setdefault(row["patient_id"], set()).add(row["split"])
    assert len(groups) == 24 and all(len(splits) == 1 for splits in groups.values())
    assert {row["split"] for row in made_splits(run)} == {"train", "val", "test"}
    page = (run / "report.html").read_text()
    for part in ("Confusion matrix", "ROC curve", "Training loss", "Validation: auroc", "Mistakes", "95 % interval"):
        assert part in page, part
    figures = json.loads((run / "eval" / "test" / "results.json").read_text())["tasks"]["classification"]["figures"]
    values = {figure["name"]: figure["value"] for figure in figures}
    assert values["AUROC, macro"] > 0.9
    again = evaluate(str(run), ["classification"], data=str(run / "splits.csv"), split="test", progress=False)
    assert again["tasks"]["classification"]["figures"] == figures


def test_head_alone_reaches_the_optimum_of_scikit_learn(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without regularisation, labels that no plane separates have one best classifier."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    small = write_start(tmp_path / "start", dataclasses.replace(SMALL, embed_dim=4))
    generator = np.random.default_rng(3)
    table = [row | {"label": "abc"[i % 3]} for i, row in enumerate(rows(split="train"))]
    data = write_table(folder / "random.csv", table + [row | {"split": "val"} for row in table[:9]])
    features = generator.normal(size=(48, 4))
    features[::3] += 0.7
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    embedded = torch.tensor(features, dtype=torch.float32)
    monkeypatch.setattr(Classes, "_embed", lambda self, data: embedded[: len(data)])
    optim = OptimConfig(lr=0.1, warmup_steps=0, weight_decay=0.0, decay="cosine")
    run = finetune(
        config(
            folder, tmp_path / "run", data.name, model=str(small), epochs=200, batch_size=48, group="", optim=optim,
            freeze_towers=True, patience=0, metric="accuracy", class_weights="a=2,c=0.5",
        )
    )  # fmt: skip
    head = checkpoint.load_latest(run / "checkpoints").model
    ours = (embedded @ head["head.weight"].T * head["head.scale"] + head["head.bias"]).softmax(1).numpy()
    peer = linear_model.LogisticRegression(
        C=np.inf, tol=1e-10, max_iter=10_000, class_weight={"a": 2, "b": 1, "c": 0.5}
    )
    peer.fit(features, [row["label"] for row in table])
    np.testing.assert_allclose(ours, peer.predict_proba(features), atol=2e-3)


def test_best_epoch_is_kept_exported_and_ends_the_run(folder: Path, tmp_path: Path) -> None:
    """With an absurd learning rate the metric soon falls. The exported head is that of the best epoch."""
    optim = OptimConfig(lr=0.5, warmup_steps=0, weight_decay=0.0, decay="linear")
    run = finetune(
        config(folder, tmp_path / "run", epochs=40, patience=2, optim=optim, metric="loss", freeze_towers=True)
    )
    values = [(r["step"], r[f"{VALIDATION}loss"]) for r in records(run) if f"{VALIDATION}loss" in r]
    best_step = min(values, key=lambda value: value[1])[0]
    assert [step for step, _ in values].index(best_step) == len(values) - 3 < 37
    assert best_step in saved_steps(run) and saved_steps(run)[-1] == values[-1][0]
    best = checkpoint.read(run / "checkpoints" / f"step-{best_step:08d}").model
    head = class_head.load(run, SMALL.embed_dim)
    assert torch.equal(head.weight, best["head.weight"])
    before = (run / "classifier" / "head.safetensors").read_bytes()
    finetune(config(folder, run, epochs=40, patience=2, optim=optim, metric="loss", freeze_towers=True, resume=True))
    assert (run / "classifier" / "head.safetensors").read_bytes() == before


@pytest.mark.parametrize("changes", [{"freeze_towers": True}, {"lora_rank": 2, "prompts": "labels"}])
def test_resumed_classifier_equals_uninterrupted_one(changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    if "lora_rank" in changes:
        import_torchvision()
        pytest.importorskip("peft")
    changes = changes | {"epochs": 3, "checkpoint_every": 3, "optim": FAST, "patience": 2}
    whole = finetune(config(folder, tmp_path / "whole", **changes))
    first = saved_steps(whole)[0]
    assert first < saved_steps(whole)[-1]
    run = stopped_after(whole, tmp_path / "run", first)
    for name in ("model", "classifier", "eval"):
        shutil.rmtree(run / name)
    finetune(config(folder, run, **changes, resume=True))
    assert_equal_runs(run, whole)
    assert validations(run) == validations(whole)
    for name in ("classifier/head.safetensors", "splits.csv", "eval/test/figures.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    (run / "splits.csv").unlink()
    with pytest.raises(UserError, match="another group"):
        finetune(config(folder, run, **changes | {"group": "", "resume": True}))


def test_head_starts_as_the_zero_shot_classifier_and_lora_is_merged(folder: Path, tmp_path: Path) -> None:
    import_torchvision()
    pytest.importorskip("peft")
    still = dataclasses.replace(FAST, lr=1e-12, warmup_steps=0)
    run = finetune(config(folder, tmp_path / "run", prompts="labels", lora_rank=2, epochs=1, optim=still))
    options = {"data": str(run / "splits.csv"), "split": "test", "progress": False, "cache": "none"}
    tuned = evaluate(str(run), ["classification"], **options)["tasks"]["classification"]
    first = evaluate(str(folder / "start"), ["zero_shot"], **options, label=("label",))["tasks"]["zero_shot/label"]
    for name in COLOURS:
        column = f"score of {name}"
        np.testing.assert_allclose(tuned["samples"][column], first["samples"][column], atol=1e-5)
    assert not any("lora" in name for name in pretrained.load(str(run))[0].state_dict())


def _on_two_ranks(rank: int, folder: str, run: str) -> None:
    for name, changes in (("frozen", {"freeze_towers": True}), ("full", {})):
        finetune(config(Path(folder), Path(run) / name, epochs=1, optim=FAST, **changes))


def test_classifier_on_two_ranks_equals_one(folder: Path, tmp_path: Path) -> None:
    on_ranks(2, _on_two_ranks, str(folder), str(tmp_path / "two"))
    for name, changes in (("frozen", {"freeze_towers": True}), ("full", {})):
        one = finetune(config(folder, tmp_path / name, epochs=1, optim=FAST, **changes))
        assert (one / "splits.csv").read_bytes() == (tmp_path / "two" / name / "splits.csv").read_bytes()
        states = [checkpoint.load_latest(run / "checkpoints").model for run in (one, tmp_path / "two" / name)]
        for key, tensor in states[0].items():
            torch.testing.assert_close(tensor, states[1][key], atol=2e-4, rtol=1e-3)


def test_multi_label_classifier_weighs_positives(folder: Path, tmp_path: Path) -> None:
    table = [row | {"label": row["label"] + ("|dark" if i % 12 < 6 else "")} for i, row in enumerate(rows())]
    write_table(folder / "several.csv", table)
    changes = {"multi_label": True, "class_weights": "balanced", "freeze_towers": True, "epochs": 2}
    run = finetune(config(folder, tmp_path / "run", "several.csv", **changes))
    result = json.loads((run / "eval" / "test" / "results.json").read_text())["tasks"]["classification"]
    assert result["classes"] == sorted([*COLOURS, "dark"]) and result["multi_label"]
    with pytest.raises(
        UserError, match=r"several.csv, line 2: label .*\|dark' joins several classes; add --multi_label"
    ):
        finetune(config(folder, tmp_path / "other", "several.csv"))


def test_class_weights_are_those_of_scikit_learn() -> None:
    sklearn_weights = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    targets = torch.tensor([0] * 7 + [1] * 2 + [2])
    names = ("a", "b", "c")
    expected = sklearn_weights("balanced", classes=np.arange(3), y=targets.numpy())
    np.testing.assert_allclose(class_data.class_weights("balanced", targets, names), expected, rtol=1e-6)
    assert class_data.class_weights("c=4, a=0.5", targets, names).tolist() == [0.5, 1, 4]
    several = torch.tensor([[True, False], [True, True], [True, False], [False, False]])
    np.testing.assert_allclose(class_data.class_weights("balanced", several, names[:2]), [1 / 3, 3])
    for setting, words in (("d=1", "'d' is not a class"), ("a=-1", "must be a positive number"), ("a=x", "positive")):
        with pytest.raises(UserError, match=words):
            class_data.class_weights(setting, targets, names)


def test_made_splits_keep_groups_whole_and_classes_even() -> None:
    for seed in range(40):
        generator = np.random.default_rng(seed)
        num_groups, num_classes = int(generator.integers(12, 60)), int(generator.integers(2, 5))
        sizes = generator.integers(1, 6, num_groups)
        kind = np.r_[np.repeat(np.arange(num_classes), 3), generator.integers(0, num_classes, num_groups)][:num_groups]
        groups = [f"g{i}" for i in np.repeat(np.arange(num_groups), sizes)]
        targets = np.repeat(np.eye(num_classes, dtype=bool)[kind], sizes, axis=0)
        splits = group_splits.assign(targets, groups, seed)
        assert splits == group_splits.assign(targets, groups, seed)
        by_split = {
            split: [g for g, other in zip(groups, splits, strict=True) if other == split] for split in set(splits)
        }
        assert set(by_split) == set(group_splits.SHARES) and group_splits.shared(by_split) == {}
        table = np.array([targets[np.array(splits) == split].sum(0) for split in group_splits.SHARES])
        assert (table > 0).all(), table
        assert num_groups < 30 or abs(table[0].sum() / len(groups) - 0.7) < 0.1
    many = np.eye(2, dtype=bool)[np.arange(400) % 2]
    names = [str(i) for i in range(400)]
    splits = group_splits.assign(many, names, 0)
    assert [splits.count(split) for split in group_splits.SHARES] == [280, 60, 60]
    assert group_splits.assign(many, names, 1) != splits


def _changed(**columns: Any) -> Rows:
    """Rows with a column split, of which the row after the first of each class has other cells."""
    splits = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    table = [row | {"split": splits[i % 12]} for i, row in enumerate(rows())]
    return [row | columns if i == 8 else row for i, row in enumerate(table)]


FREEZE = {"on_bad_image": "stop", "freeze_towers": True}
NO_RED = [row for row in _changed() if (row["label"], row["split"]) != ("red", "val")]
TWICE = _changed(patient_id=f"{next(iter(COLOURS))} 0")


@pytest.mark.parametrize(
    ("table", "changes", "words"),
    [
        (rows(), {"label": "finding"}, r"label 'finding' is not a column of .*\.csv; its labels are label, patient_id"),
        (rows(), {"group": "patient"}, r"group=patient is not a column of .*; did you mean patient_id"),
        ([row | {"label": "red"} for row in rows()], {}, "has only the class 'red'; a classifier needs samples of two"),
        (TWICE, {}, r"is in the splits train \(.*line 2\) and val \(.*line 10\)"),
        (_changed(patient_id=""), {}, r"line 10: column 'patient_id' is empty; name the group of every image"),
        (_changed(label="violet"), {}, r"line 10: the training split has no sample of class 'violet'; add some"),
        (NO_RED, {}, "val has no sample of class 'red'; each class needs samples"),
        (rows(), {"class_weights": "violet=2"}, "class_weights=violet=2: 'violet' is not a class"),
        (rows(), {"prompts": "pcam"}, "prompts=pcam has no class '.*'; add it to the file, or leave out --prompts"),
        (_changed(path="missing.jpg"), FREEZE, "missing.jpg"),
    ],
)
def test_faulty_class_table_is_one_line(
    table: Rows, changes: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    for row in table:
        row["path"] = str(folder / row["path"])
    data = write_table(tmp_path / "faulty.csv", table)
    with pytest.raises(UserError, match=words) as caught:
        finetune(config(folder, tmp_path / "run", data=str(data), **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "model").exists()


def test_settings_that_contradict_a_classifier_are_refused(folder: Path, tmp_path: Path) -> None:
    for words, changes in {
        "group=patient_id needs --task classification": {"task": ""},
        "lora_rank=2 trains the image tower": {"lora_rank": 2, "freeze_towers": True},
        "metric=balanced_accuracy is for one class": {"multi_label": True, "metric": "balanced_accuracy"},
        "patience=-1 must not be negative": {"patience": -1},
        "would skip the hard images": {"spikes": SpikeConfig(loss=3)},
    }.items():
        with pytest.raises(UserError, match=words):
            config(folder, tmp_path / "run", **changes)
