"""Zero-shot classification: class embeddings, metrics against scikit-learn, prompt sensitivity."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import unit_rows

from bclip_fast.errors import UserError
from bclip_fast.eval import prompts, zero_shot


def test_class_embeddings_equal_elevaters_mean() -> None:
    prompt_set = prompts.PromptSet({"x": ("one", "two"), "y": ("three",)}, ("a {}", "the {} here"))
    table = {
        text: unit_rows(1, 6, i)[0]
        for i, text in enumerate(("a one", "the one here", "a two", "the two here", "a three", "the three here"))
    }
    embeddings = zero_shot.class_embeddings(lambda texts: torch.stack([table[text] for text in texts]), prompt_set)
    rows = np.stack([row.double().numpy() for row in table.values()])
    for number, part in enumerate((rows[:4], rows[4:])):
        mean = part.mean(0)
        np.testing.assert_allclose(embeddings[number].numpy(), mean / np.linalg.norm(mean), atol=1e-6)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_measure_equals_scikit_learn(num_classes: int) -> None:
    from sklearn import metrics

    generator = np.random.default_rng(num_classes)
    labels = generator.choice(num_classes, 200, p=np.arange(1, num_classes + 1) / sum(range(1, num_classes + 1)))
    predictions = np.where(generator.random(200) < 0.5, labels, generator.integers(0, num_classes, 200))
    result = zero_shot.measure(
        torch.from_numpy(labels), torch.from_numpy(predictions), [str(i) for i in range(num_classes)]
    )
    accuracy, balanced = result["figures"]
    assert accuracy["value"] == pytest.approx(metrics.accuracy_score(labels, predictions))
    assert balanced["value"] == pytest.approx(metrics.balanced_accuracy_score(labels, predictions))
    assert result["confusion"] == metrics.confusion_matrix(labels, predictions).tolist()
    recalls = metrics.recall_score(labels, predictions, average=None)
    precisions = metrics.precision_score(labels, predictions, average=None)
    assert [row["recall"] for row in result["per_class"]] == pytest.approx(recalls.tolist())
    assert [row["precision"] for row in result["per_class"]] == pytest.approx(precisions.tolist())
    assert accuracy["chance"] == pytest.approx(np.bincount(labels).max() / 200)
    assert balanced["chance"] == 1 / num_classes


@pytest.mark.parametrize("num_classes", [2, 4])
def test_measure_auroc_equals_scikit_learn(num_classes: int) -> None:
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(num_classes)
    labels = torch.randint(num_classes, (200,), generator=generator)
    scores = (torch.randn(200, num_classes, generator=generator, dtype=torch.float64)
              + F.one_hot(labels, num_classes)).softmax(1)  # fmt: skip
    result = zero_shot.measure(labels, scores.argmax(1), [str(i) for i in range(num_classes)], scores)
    metric = result["figures"][2]
    if num_classes == 2:
        expected = roc_auc_score(labels, scores[:, 1])
        low, high = metric["interval"]
        assert low < metric["value"] < high
    else:
        expected = roc_auc_score(labels, scores, multi_class="ovr", average="macro")
        assert len(result["roc"]) == 4
    assert metric["value"] == pytest.approx(expected)


def test_measure_single_class_has_no_auroc_and_nan_raises() -> None:
    labels = torch.zeros(4, dtype=torch.long)
    scores = torch.rand(4, 2)
    result = zero_shot.measure(labels, labels, ["a", "b"], scores)
    assert [metric["name"] for metric in result["figures"]] == ["accuracy", "balanced accuracy"]
    assert not result["roc"]
    with pytest.raises(UserError, match="scores hold NaN"):
        zero_shot.measure(labels, labels, ["a", "b"], scores * torch.nan)


def test_measure_degenerate_labels_give_valid_json_or_an_error() -> None:
    one = zero_shot.measure(torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 1, 0]), ["a", "b"])
    assert [m["value"] for m in one["figures"]] == [0.75, 0.75]
    assert [m["chance"] for m in one["figures"]] == [1.0, 0.5]
    assert one["per_class"][1]["recall"] is None
    assert one["per_class"][1]["precision"] == 0
    json.dumps(one, allow_nan=False)
    with pytest.raises(UserError, match="at least one labelled sample"):
        zero_shot.measure(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), ["a"])
    with pytest.raises(UserError, match="label must be a whole number from 0 to 1"):
        zero_shot.measure(torch.tensor([0, 2]), torch.tensor([0, 1]), ["a", "b"])


def test_predict_constant_embeddings_score_chance() -> None:
    images = unit_rows(1, 8, 0).expand(30, 8)
    predictions, _ = zero_shot.predict(zero_shot.similarities(images, unit_rows(3, 8, 1)))
    labels = torch.arange(30) % 3
    assert zero_shot.measure(labels, predictions, ["a", "b", "c"])["figures"][1]["value"] == pytest.approx(1 / 3)
    tied, num_ties = zero_shot.predict(zero_shot.similarities(images, unit_rows(1, 8, 1).expand(2, 8)))
    assert num_ties == 30
    assert tied.eq(0).all()
    with pytest.raises(UserError, match="image embeddings hold NaN"):
        zero_shot.similarities(images * torch.nan, unit_rows(3, 8, 1))


def test_sensitivity_rows_are_single_templates_and_all_together() -> None:
    prompt_set = prompts.PromptSet({"x": ("one",), "y": ("two",)}, ("good {}", "swapped {}"))
    table = {"good one": 0, "good two": 1, "swapped one": 1, "swapped two": 0}
    rows = zero_shot.sensitivity(
        lambda texts: torch.eye(2)[[table[text] for text in texts]],
        prompt_set,
        torch.eye(2)[[0, 1, 1]],
        torch.tensor([0, 1, 1]),
    )
    assert [(row["template"], row["accuracy"]) for row in rows][:2] == [("good {}", 1), ("swapped {}", 0)]
    assert rows[2]["template"] == "all together"
