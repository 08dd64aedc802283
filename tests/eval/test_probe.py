"""Probes: arithmetic against torch, the search for hyper-parameters, and a test set that cannot influence it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from colours import colour_model, write_class_folders
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.eval import evaluate, probe
from bclip_fast.eval.linear_heads import LabelledFeatures, LinearHeads

NAMES = ("a", "b", "c")


def blobs(num: int, seed: int, noise: float = 1.2, dim: int = 12) -> LabelledFeatures:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num) % 3
    return LabelledFeatures(centres[labels] + noise * torch.randn(num, dim, generator=generator), labels)


def findings(num: int, seed: int, dim: int = 12) -> LabelledFeatures:
    """Return samples with any number of four findings. Only 3 % of the samples have the last finding."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4, dim, generator=torch.Generator().manual_seed(98))
    labels = torch.rand(num, 4, generator=generator) < torch.tensor([0.5, 0.3, 0.2, 0.03])
    return LabelledFeatures(labels.float() @ directions + torch.randn(num, dim, generator=generator), labels)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_linear_heads_equal_separate_torch_training(batch_statistics: bool) -> None:
    train, init = blobs(150, 0), torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    pairs = [(1e-2, 1e-3), (1e-1, 0.0), (1e-3, 1e-1)]
    heads = LinearHeads(pairs, init, batch_statistics)
    heads.train(train, 3, 5, lambda _: None)
    for i, (lr, decay) in enumerate(pairs):
        layer = torch.nn.Linear(12, 3)
        with torch.no_grad():
            layer.weight.copy_(init)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
        norm = torch.nn.BatchNorm1d(12, affine=False)
        mean, std = train.features.mean(0), train.features.std(0, correction=0)
        scale = norm if batch_statistics else (lambda x: (x - mean) / std)  # noqa: B023
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            for rows in torch.randperm(150, generator=generator).split(64):
                optimizer.zero_grad()
                F.cross_entropy(layer(scale(train.features[rows])), train.labels[rows]).backward()
                optimizer.step()
        norm.eval()
        with torch.no_grad():
            torch.testing.assert_close(
                heads.logits(train.features)[i], layer(scale(train.features)), atol=1e-4, rtol=1e-4
            )


def test_linear_heads_multi_label_equal_logistic_regressions() -> None:
    train, pairs = findings(150, 0), [(1e-2, 1e-3), (1e-1, 0.0)]
    init = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    heads = LinearHeads(pairs, init, False)
    heads.train(train, 3, 5, lambda _: None)
    mean, std = train.features.mean(0), train.features.std(0, correction=0)
    for i, (lr, decay) in enumerate(pairs):
        for kind in range(4):
            weight, bias = init[kind].clone().requires_grad_(), torch.zeros((), requires_grad=True)
            optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9, weight_decay=decay)
            generator = torch.Generator().manual_seed(5)
            for _ in range(3):
                for rows in torch.randperm(150, generator=generator).split(64):
                    optimizer.zero_grad()
                    logits = ((train.features[rows] - mean) / std) @ weight + bias
                    F.binary_cross_entropy_with_logits(logits, train.labels[rows, kind].float()).backward()
                    optimizer.step()
            expected = ((train.features - mean) / std) @ weight.detach() + bias.detach()
            torch.testing.assert_close(heads.logits(train.features)[i, :, kind], expected, atol=1e-4, rtol=1e-4)


def test_choose_scores_like_a_full_search() -> None:
    train, val = blobs(60, 1), blobs(300, 2)
    choice = probe.choose(train, val, torch.zeros(3, 12))
    grid = [(lr, decay) for lr in probe.LEARNING_RATES for decay in probe.WEIGHT_DECAYS[::4]]
    heads = LinearHeads(grid, torch.zeros(3, 12), False)
    heads.train(train, 10, 0, lambda _: None)
    assert choice.val_score >= float(heads.score(val).max()) - 0.02
    assert choice.lr in probe.LEARNING_RATES
    assert choice.weight_decay in probe.WEIGHT_DECAYS
    assert 1 <= choice.num_epochs <= 50


def test_held_out_test_set_opens_only_for_a_choice() -> None:
    held_out = probe.HeldOutTestSet(blobs(30, 3))
    with pytest.raises(RuntimeError, match="after the hyper-parameters are chosen"):
        held_out.open(None)  # type: ignore[arg-type]
    assert held_out.num_opened == 0


def choices(test: LabelledFeatures, protocol: probe.Protocol = "held_out") -> list[dict]:
    result = probe.measure(
        blobs(90, 4, 3.0),
        blobs(90, 5, 3.0),
        test,
        NAMES,
        torch.zeros(3, 12),
        train_fractions=(0.5,),
        num_seeds=2,
        protocol=protocol,
    )
    keys = ("lr", "weight_decay", "epoch", "val_score")
    return [{key: choices[key] for key in keys} for choices in result["settings"][0]["runs"]]


def is_independent_of_test_labels(test: LabelledFeatures, protocol: probe.Protocol = "held_out") -> bool:
    """Return whether other labels of the test set give the same choices."""
    others = [LabelledFeatures(test.features, test.labels.roll(i)) for i in (1, 7, 20)]
    return all(choices(test, protocol) == choices(other, protocol) for other in others)


def test_measure_choices_do_not_depend_on_the_test_set() -> None:
    assert is_independent_of_test_labels(blobs(45, 6, 3.0))


def test_measure_injected_leak_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the test above must fail if the test set chooses the epochs, by ELEVATER's rule or by a bug."""
    test = blobs(45, 6, 3.0)
    assert not is_independent_of_test_labels(test, "elevater")
    original_choose, original_measure = probe.choose, probe.measure

    def leaking(train: LabelledFeatures, val: LabelledFeatures, init: Tensor, **options: object) -> probe.Choice:
        return original_choose(train, leaked[0], init, **options)  # type: ignore[arg-type]

    leaked = [test]

    def measure(train, val, test, *args, **options):
        leaked[0] = test
        return original_measure(train, val, test, *args, **options)

    monkeypatch.setattr(probe, "choose", leaking)
    monkeypatch.setattr(probe, "measure", measure)
    assert not is_independent_of_test_labels(test)


def test_measure_multi_label_choices_do_not_depend_on_the_test_set() -> None:
    def chosen(shift: int) -> list[dict]:
        test = findings(60, 7)
        test = LabelledFeatures(test.features, test.labels.roll(shift, 0))
        result = probe.measure(
            findings(90, 5),
            findings(90, 6),
            test,
            tuple("wxyz"),
            torch.zeros(4, 12),
            train_fractions=(1.0,),
            num_seeds=1,
        )
        return [
            {key: run[key] for key in ("lr", "weight_decay", "epoch", "val_score")}
            for run in result["settings"][0]["runs"]
        ]

    assert chosen(0) == chosen(7) == chosen(20)


def test_measure_opens_the_test_set_once_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original_open = probe.HeldOutTestSet.open
    monkeypatch.setattr(
        probe.HeldOutTestSet, "open", lambda self, choice: opened.append(choice) or original_open(self, choice)
    )
    choices(blobs(45, 6))
    assert len(opened) == 2
    assert all(isinstance(choice, probe.Choice) for choice in opened)


def test_train_and_test_elevater_reports_the_best_test_epoch() -> None:
    train, val, test = blobs(30, 7, 3.0), blobs(30, 8, 3.0), blobs(300, 9, 3.0)
    choice = probe.choose(train, val, torch.zeros(3, 12), protocol="elevater")
    logits, epoch = probe.train_and_test(
        train, val, probe.HeldOutTestSet(test), torch.zeros(3, 12), choice, protocol="elevater", seed=0
    )
    heads = LinearHeads([(choice.lr, choice.weight_decay)], torch.zeros(3, 12), True)
    test_scores: list[float] = []
    heads.train(train.concat(val), 50, 0, lambda _: test_scores.append(float(heads.score(test))))
    assert float((logits.argmax(1) == test.labels).double().mean()) == max(test_scores)
    assert test_scores[epoch - 1] == max(test_scores)


def test_measure_reports_mean_and_deviation_of_runs() -> None:
    result = probe.measure(
        blobs(300, 10),
        blobs(60, 11),
        blobs(90, 12),
        NAMES,
        torch.zeros(3, 12),
        train_fractions=(0.1, 1.0),
        shots=(2,),
        num_seeds=3,
    )
    json.dumps(result, allow_nan=False)
    assert [row["setting"] for row in result["settings"]] == ["10 % of train", "100 % of train", "2 shots"]
    assert [row["runs"][0]["num_train"] for row in result["settings"]] == [30, 300, 6]
    for metric in result["figures"]:
        kind, setting = metric["name"].split(", ")
        values = torch.tensor(
            [run[kind] for row in result["settings"] if row["setting"] == setting for run in row["runs"]],
            dtype=torch.float64,
        )
        assert metric["value"] == pytest.approx(float(values.mean()))
        assert metric["deviation"] == pytest.approx(float(values.std()), abs=1e-12)
    by_name = {metric["name"]: metric["value"] for metric in result["figures"]}
    assert by_name["accuracy, 100 % of train"] > by_name["accuracy, 2 shots"] > 1 / 3


def test_measure_multi_label_metrics_equal_medmnists() -> None:
    from sklearn.metrics import accuracy_score, roc_auc_score

    names = tuple("wxyz")
    parts = findings(200, 2), findings(100, 3), findings(300, 4)
    result = probe.measure(*parts, names, torch.zeros(4, 12), train_fractions=(0.5,), num_seeds=2)
    metrics = {metric["name"]: metric for metric in result["figures"]}
    assert list(metrics) == [f"{name}, 50 % of train" for name in ("AUROC, macro", "accuracy", "ECE, mean over labels")]
    # The result holds the samples of the last setting's first seed.
    truth = findings(300, 4).labels.numpy()
    scores = torch.tensor([result["samples"][f"score of {name}"] for name in names]).T.numpy()
    run = result["settings"][0]["runs"][0]
    assert run["AUROC, macro"] == pytest.approx(roc_auc_score(truth, scores, average="macro"), abs=1e-6)
    accuracies = [accuracy_score(truth[:, i], scores[:, i] > 0.5) for i in range(4)]
    assert run["accuracy"] == pytest.approx(sum(accuracies) / 4, abs=1e-6)
    assert run["AUROC, macro"] > 0.85
    assert run["accuracy"] > metrics["accuracy, 50 % of train"]["chance"]
    assert [run["num_train"] for run in result["settings"][0]["runs"]] == [100, 100]
    majority = sum(max(column.mean(), 1 - column.mean()) for column in truth.T) / 4
    assert metrics["accuracy, 50 % of train"]["chance"] == pytest.approx(majority)
    with pytest.raises(UserError, match="cannot be drawn by shots"):
        probe.subset(torch.from_numpy(truth), 4, shots=5)
    with pytest.raises(UserError, match="no class with both positive and negative"):
        probe.choose(findings(9, 5), LabelledFeatures(torch.randn(3, 12), torch.ones(3, 4).bool()), torch.zeros(4, 12))


def test_subset_draws_within_each_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 3)
    rows = probe.subset(labels, 3, train_fraction=0.1, seed=1)
    assert torch.bincount(labels[rows]).tolist() == [10, 1, 1]
    assert torch.equal(rows, probe.subset(labels, 3, train_fraction=0.1, seed=1))
    assert not torch.equal(rows, probe.subset(labels, 3, train_fraction=0.1, seed=2))
    assert torch.equal(probe.subset(labels, 3), torch.arange(113))
    with pytest.raises(UserError, match="class 2 has only 3 training samples for 4 shots"):
        probe.subset(labels, 3, shots=4)


def test_measure_nan_features_raise_and_constant_ones_are_ignored() -> None:
    bad = blobs(30, 13)
    bad.features[3, 4] = torch.nan
    with pytest.raises(UserError, match="train features must be non-empty and finite"):
        probe.measure(bad, blobs(30, 1), blobs(30, 2), NAMES, torch.zeros(3, 12))
    parts = [blobs(30, seed) for seed in (1, 2, 3)]
    for part in parts:
        part.features[:, 0] = 7
    result = probe.measure(*parts, NAMES, torch.zeros(3, 12), train_fractions=(1.0,), num_seeds=1)
    assert result["figures"][0]["value"] > 0.5
    assert result["figures"][0]["deviation"] is None


def test_probe_task_uses_the_splits_of_a_folder(tmp_path: Path) -> None:
    options = {"split": "test", "progress": False, "share": (1.0,), "num_seeds": 1}
    all_splits = write_class_folders(tmp_path / "all", {"train": 6, "val": 4, "test": 5})
    result = evaluate(colour_model(), ["probe"], data=str(all_splits), **options)["tasks"]["probe"]  # type: ignore[arg-type]
    assert result["figures"][0]["value"] == 1
    assert result["validation"] == "val"
    assert result["settings"][0]["runs"][0]["num_train"] == 12
    assert result["samples"]["key"][0] == "blue/0.jpg"
    no_val = write_class_folders(tmp_path / "no_val", {"train": 10, "test": 5})
    result = evaluate(colour_model(), ["probe"], data=str(no_val), **options)["tasks"]["probe"]  # type: ignore[arg-type]
    assert result["validation"] == "a fifth of train, no val found"
    assert [result["settings"][0]["runs"][0][key] for key in ("num_train", "num_val")] == [16, 4]
    with pytest.raises(UserError, match="has no split 'train'"):
        evaluate(colour_model(), ["probe"], data=str(write_class_folders(tmp_path / "alone", {"test": 2})), **options)  # type: ignore[arg-type]
    flat = write_class_folders(tmp_path / "flat", {"": 3})
    with pytest.raises(UserError, match="needs a train split"):
        evaluate(colour_model(), ["probe"], data=str(flat), **options)  # type: ignore[arg-type]
