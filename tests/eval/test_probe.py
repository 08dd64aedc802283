"""Probes: the arithmetic against torch's own, what is chosen by what, and that the test set can't be chosen by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_eval import COLOURS, ColourModel, jitter, jpeg, preprocess, tokenizer
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.eval import evaluate, probe

NAMES = ("a", "b", "c")


def blobs(num: int, seed: int, noise: float = 1.2, dim: int = 12) -> probe.Labelled:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num) % 3
    return probe.Labelled(centres[labels] + noise * torch.randn(num, dim, generator=generator), labels)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_heads_side_by_side_equal_torchs_own_training(batch_statistics: bool) -> None:
    train, init = blobs(150, 0), torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    pairs = [(1e-2, 1e-3), (1e-1, 0.0), (1e-3, 1e-1)]
    heads = probe._Heads(pairs, init, batch_statistics)
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


def test_the_search_finds_what_a_full_search_finds() -> None:
    train, val = blobs(60, 1), blobs(300, 2)
    choice = probe.choose(train, val, torch.zeros(3, 12))
    grid = [(lr, decay) for lr in probe.LEARNING_RATES for decay in probe.WEIGHT_DECAYS[::4]]
    heads = probe._Heads(grid, torch.zeros(3, 12), False)
    heads.train(train, 10, 0, lambda _: None)
    assert choice.val_score >= float(heads.score(val).max()) - 0.02
    assert choice.lr in probe.LEARNING_RATES and choice.weight_decay in probe.WEIGHT_DECAYS
    assert 1 <= choice.num_epochs <= 50


def test_the_sealed_test_set_opens_for_a_choice_alone() -> None:
    sealed = probe.Sealed(blobs(30, 3))
    with pytest.raises(RuntimeError, match="before the hyper-parameters were chosen"):
        sealed.open(None)  # type: ignore[arg-type]
    assert sealed.num_opened == 0


def run(test: probe.Labelled, protocol: probe.Protocol = "held_out") -> list[dict]:
    result = probe.measure(
        blobs(90, 4, 3.0),
        blobs(90, 5, 3.0),
        test,
        NAMES,
        torch.zeros(3, 12),
        shares=(0.5,),
        num_seeds=2,
        protocol=protocol,
    )
    keep = ("lr", "weight_decay", "epoch", "val_score")
    return [{key: run[key] for key in keep} for run in result["settings"][0]["runs"]]


def chosen_without(test: probe.Labelled, protocol: probe.Protocol = "held_out") -> bool:
    """Whether all that was chosen stays the same when the test set's labels are others."""
    others = [probe.Labelled(test.features, test.labels.roll(i)) for i in (1, 7, 20)]
    return all(run(test, protocol) == run(other, protocol) for other in others)


def test_nothing_is_chosen_by_the_test_set() -> None:
    assert chosen_without(blobs(45, 6, 3.0))


def test_a_planted_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above has teeth: it fails where epochs are chosen on test, by ELEVATER's rule or by a slip of ours."""
    test = blobs(45, 6, 3.0)
    assert not chosen_without(test, "elevater")
    honest = probe.choose

    def leaking(train: probe.Labelled, val: probe.Labelled, init: Tensor, **options: object) -> probe.Choice:
        return honest(train, planted[0], init, **options)  # type: ignore[arg-type]

    planted = [test]
    real_measure = probe.measure

    def measure(train, val, test, *args, **options):
        planted[0] = test
        return real_measure(train, val, test, *args, **options)

    monkeypatch.setattr(probe, "choose", leaking)
    monkeypatch.setattr(probe, "measure", measure)
    assert not chosen_without(test)


def test_the_test_set_is_opened_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    honest = probe.Sealed.open
    monkeypatch.setattr(probe.Sealed, "open", lambda self, choice: opened.append(choice) or honest(self, choice))
    run(blobs(45, 6))
    assert len(opened) == 2 and all(isinstance(choice, probe.Choice) for choice in opened)


def test_elevaters_figure_is_never_below_ours_at_its_last_epoch() -> None:
    train, val, test = blobs(30, 7, 3.0), blobs(30, 8, 3.0), blobs(300, 9, 3.0)
    choice = probe.choose(train, val, torch.zeros(3, 12), protocol="elevater")
    logits, epoch = probe.final(train, val, probe.Sealed(test), torch.zeros(3, 12), choice, protocol="elevater", seed=0)
    heads = probe._Heads([(choice.lr, choice.weight_decay)], torch.zeros(3, 12), True)
    found: list[float] = []
    heads.train(train.with_(val), 50, 0, lambda _: found.append(float(heads.score(test))))
    assert float((logits.argmax(1) == test.labels).double().mean()) == max(found) and found[epoch - 1] == max(found)


def test_measure_reports_mean_and_deviation_of_its_runs() -> None:
    result = probe.measure(
        blobs(300, 10),
        blobs(60, 11),
        blobs(90, 12),
        NAMES,
        torch.zeros(3, 12),
        shares=(0.1, 1.0),
        shots=(2,),
        num_seeds=3,
    )
    json.dumps(result, allow_nan=False)
    assert [row["setting"] for row in result["settings"]] == ["10 % of train", "100 % of train", "2 shots"]
    assert [row["runs"][0]["num_train"] for row in result["settings"]] == [30, 300, 6]
    for figure in result["figures"]:
        kind, setting = figure["name"].split(", ")
        values = torch.tensor(
            [run[kind] for row in result["settings"] if row["setting"] == setting for run in row["runs"]],
            dtype=torch.float64,
        )
        assert figure["value"] == pytest.approx(float(values.mean()))
        assert figure["deviation"] == pytest.approx(float(values.std()), abs=1e-12)
    by_name = {figure["name"]: figure["value"] for figure in result["figures"]}
    assert by_name["accuracy, 100 % of train"] > by_name["accuracy, 2 shots"] > 1 / 3


def findings(num: int, seed: int, dim: int = 12) -> probe.Labelled:
    """Samples with any number of four findings, the last of which only one in thirty has."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4, dim, generator=torch.Generator().manual_seed(98))
    labels = torch.rand(num, 4, generator=generator) < torch.tensor([0.5, 0.3, 0.2, 0.03])
    return probe.Labelled(labels.float() @ directions + torch.randn(num, dim, generator=generator), labels)


def test_each_finding_is_a_logistic_regression_of_its_own() -> None:
    train, pairs = findings(150, 0), [(1e-2, 1e-3), (1e-1, 0.0)]
    init = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    heads = probe._Heads(pairs, init, False)
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


def test_findings_are_judged_as_medmnist_judges_them() -> None:
    from sklearn.metrics import accuracy_score, roc_auc_score

    names = tuple("wxyz")
    parts = findings(200, 2), findings(100, 3), findings(300, 4)
    result = probe.measure(*parts, names, torch.zeros(4, 12), shares=(0.5,), num_seeds=2)
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert list(figures) == ["AUROC, macro, 50 % of train", "accuracy, 50 % of train"]
    # The samples are those of the last setting's first seed.
    truth = findings(300, 4).labels.numpy()
    scores = torch.tensor([result["samples"][f"score of {name}"] for name in names]).T.numpy()
    run = result["settings"][0]["runs"][0]
    assert run["AUROC, macro"] == pytest.approx(roc_auc_score(truth, scores, average="macro"), abs=1e-6)
    of_each = [accuracy_score(truth[:, i], scores[:, i] > 0.5) for i in range(4)]
    assert run["accuracy"] == pytest.approx(sum(of_each) / 4, abs=1e-6)
    assert run["AUROC, macro"] > 0.85 and run["accuracy"] > figures["accuracy, 50 % of train"]["chance"]
    assert [run["num_train"] for run in result["settings"][0]["runs"]] == [100, 100]
    majority = sum(max(column.mean(), 1 - column.mean()) for column in truth.T) / 4
    assert figures["accuracy, 50 % of train"]["chance"] == pytest.approx(majority)
    with pytest.raises(UserError, match="cannot be drawn by shots"):
        probe.subset(torch.from_numpy(truth), 4, shots=5)
    with pytest.raises(UserError, match="no class of the probe's data has both"):
        probe.choose(findings(9, 5), probe.Labelled(torch.randn(3, 12), torch.ones(3, 4).bool()), torch.zeros(4, 12))


def test_findings_are_not_chosen_by_the_test_set() -> None:
    def chosen(shift: int) -> list[dict]:
        test = findings(60, 7)
        test = probe.Labelled(test.features, test.labels.roll(shift, 0))
        result = probe.measure(
            findings(90, 5), findings(90, 6), test, tuple("wxyz"), torch.zeros(4, 12), shares=(1.0,), num_seeds=1
        )
        return [
            {key: run[key] for key in ("lr", "weight_decay", "epoch", "val_score")}
            for run in result["settings"][0]["runs"]
        ]

    assert chosen(0) == chosen(7) == chosen(20)


def test_subsets_are_drawn_class_by_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 3)
    rows = probe.subset(labels, 3, share=0.1, seed=1)
    assert torch.bincount(labels[rows]).tolist() == [10, 1, 1]
    assert torch.equal(rows, probe.subset(labels, 3, share=0.1, seed=1))
    assert not torch.equal(rows, probe.subset(labels, 3, share=0.1, seed=2))
    assert torch.equal(probe.subset(labels, 3), torch.arange(113))
    with pytest.raises(UserError, match="class 2 has 3 training samples, 4 are asked for"):
        probe.subset(labels, 3, shots=4)


def test_features_with_nan_and_constant_features() -> None:
    bad = blobs(30, 13)
    bad.features[3, 4] = torch.nan
    with pytest.raises(UserError, match="train features must be there and finite"):
        probe.measure(bad, blobs(30, 1), blobs(30, 2), NAMES, torch.zeros(3, 12))
    parts = [blobs(30, seed) for seed in (1, 2, 3)]
    for part in parts:
        part.features[:, 0] = 7
    result = probe.measure(*parts, NAMES, torch.zeros(3, 12), shares=(1.0,), num_seeds=1)
    assert result["figures"][0]["value"] > 0.5 and result["figures"][0]["deviation"] is None


def write(root: Path, splits: dict[str, int]) -> Path:
    for split, num in splits.items():
        for name in ("red", "blue"):
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                (root / split / name / f"{i}.jpg").write_bytes(jpeg(jitter(COLOURS[name], i)))
    return root


def test_the_probe_as_a_task(tmp_path: Path) -> None:
    triple = (ColourModel(), preprocess, tokenizer)
    options = {"split": "test", "progress": False, "share": (1.0,), "num_seeds": 1}
    whole = write(tmp_path / "whole", {"train": 6, "val": 4, "test": 5})
    found = evaluate(triple, ["probe"], data=str(whole), **options)["tasks"]["probe"]  # type: ignore[arg-type]
    assert found["figures"][0]["value"] == 1 and found["validation"] == "val"
    assert found["settings"][0]["runs"][0]["num_train"] == 12 and found["samples"]["key"][0] == "blue/0.jpg"
    no_val = write(tmp_path / "no_val", {"train": 10, "test": 5})
    found = evaluate(triple, ["probe"], data=str(no_val), **options)["tasks"]["probe"]  # type: ignore[arg-type]
    assert found["validation"] == "a fifth of train"
    assert [found["settings"][0]["runs"][0][key] for key in ("num_train", "num_val")] == [16, 4]
    with pytest.raises(UserError, match="has no split 'train'"):
        evaluate(triple, ["probe"], data=str(write(tmp_path / "alone", {"test": 2})), **options)  # type: ignore[arg-type]
    flat = write(tmp_path / "flat", {"": 3})
    with pytest.raises(UserError, match="needs a train split"):
        evaluate(triple, ["probe"], data=str(flat), **options)  # type: ignore[arg-type]
