"""Retrieval: ranks and metrics against brute force and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import unit_rows
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.eval import faiss_index, retrieval


def brute_force_recall(queries: Tensor, candidates: Tensor, groups: Tensor, k: int, trials: int = 400) -> float:
    """Return the share of queries with a correct candidate among the first k, over random orders of tied scores."""
    scores = (queries.double() @ candidates.double().T).mul(1e5).round().numpy()
    right = (groups[:, None] == groups[None, :]).numpy()
    generator = np.random.default_rng(0)
    hits = []
    for _ in range(trials):
        for row, mask in zip(scores, right, strict=True):
            order = np.lexsort((generator.random(len(row)), -row))
            hits.append(mask[order[:k]].any())
    return float(np.mean(hits))


@pytest.mark.parametrize("chunks", [(1024, 8192), (7, 5), (1, 37), (37, 1)])
def test_rank_any_chunk_size_equals_brute_force(chunks: tuple[int, int]) -> None:
    texts = unit_rows(37, 8, 0)
    images = F.normalize(texts + 0.5 * unit_rows(37, 8, 1), dim=1)
    ranks, back = retrieval.rank(images, texts, query_chunk=chunks[0], candidate_chunk=chunks[1])
    scores = images.double() @ texts.double().T
    better = (scores > scores.diagonal()[:, None]).sum(1)
    assert torch.equal(ranks.num_better, better)
    assert torch.equal(ranks.num_tied, torch.ones(37, dtype=torch.int64))
    assert 0 < ranks.recall(1) < 1
    for k in (1, 5, 10):
        assert ranks.recall(k) == pytest.approx(float((better < k).double().mean()), abs=1e-12)
    assert torch.equal(ranks.expected(), better.double() + 1)
    assert torch.equal(back.num_better, (scores > scores.diagonal()[None]).sum(0))


@pytest.mark.parametrize("chunks", [(1024, 8192), (3, 4)])
def test_rank_groups_and_ties_equal_mean_of_random_orders(chunks: tuple[int, int]) -> None:
    # Repeated rows give tied scores, within and across groups.
    rows = unit_rows(5, 4, 2)
    texts = rows[torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0, 0])]
    images = F.normalize(texts + 0.8 * unit_rows(10, 4, 3), dim=1)
    groups = torch.tensor([0, 1, 2, 3, 4, 5, 1, 2, 0, 6])
    ranks, back = retrieval.rank(images, texts, [groups], query_chunk=chunks[0], candidate_chunk=chunks[1])
    for k in (1, 2, 5):
        assert ranks.recall(k) == pytest.approx(brute_force_recall(images, texts, groups, k), abs=0.02)
        assert back.recall(k) == pytest.approx(brute_force_recall(texts, images, groups, k), abs=0.02)
    assert ranks.recall(10) == 1
    assert ranks.num_correct.tolist() == [2, 2, 2, 1, 1, 1, 2, 2, 2, 1]


def test_rank_num_queries_gives_the_first_ranks_of_all() -> None:
    texts = unit_rows(300, 16, 6)
    images = F.normalize(texts + unit_rows(300, 16, 7), dim=1)
    all_ranks, _ = retrieval.rank(images, texts)
    first_ranks, _ = retrieval.rank(images, texts, num_queries=41, query_chunk=16, candidate_chunk=77)
    assert torch.equal(first_ranks.num_better, all_ranks.num_better[:41])
    assert first_ranks.num_candidates == 300


def test_rank_overlapping_groups_count_each_pair_once() -> None:
    """Compare with all pairs at once, for all queries and for some. Many samples belong to two groups."""
    generator = torch.Generator().manual_seed(11)
    groups = [torch.randint(0, most, (120,), generator=generator) for most in (25, 40)]
    texts = unit_rows(120, 6, 12)[torch.randint(0, 60, (120,), generator=generator)]
    images = F.normalize(texts + 0.5 * unit_rows(120, 6, 13), dim=1)
    for num in (120, 50):
        right = ((groups[0][:, None] == groups[0]) | (groups[1][:, None] == groups[1]))[:num]
        scores = (images.double() @ texts.double().T)[:num]
        both_ranks = retrieval.rank(images, texts, groups, num_queries=num)
        for ranks, scores_, right_ in zip(both_ranks, (scores, scores.T[:num]), (right, right.T[:num]), strict=True):
            best = scores_.masked_fill(~right_, -2).amax(1, keepdim=True)
            tied = (scores_ - best).abs() <= retrieval.TIE_TOLERANCE
            assert torch.equal(ranks.num_better, (~right_ & (scores_ > best + retrieval.TIE_TOLERANCE)).sum(1))
            assert torch.equal(ranks.num_tied, tied.sum(1))
            assert torch.equal(ranks.num_tied_correct, (tied & right_).sum(1))
            assert torch.equal(ranks.num_correct, right_.sum(1))


def test_measure_constant_embedding_scores_exactly_chance() -> None:
    constant = unit_rows(1, 16, 4).expand(101, 16)
    captions = [f"caption {i // 2}" for i in range(101)]
    for duplicates in ("strict", "captions"):
        result = retrieval.measure(constant, constant, captions, duplicates=duplicates)  # type: ignore[arg-type]
        assert [m["name"] for m in result["figures"]][:4] == [
            "image to text R@1",
            "image to text R@5",
            "image to text R@10",
            "image to text median rank",
        ]
        for metric in result["figures"]:
            assert metric["value"] == pytest.approx(metric["chance"], rel=1e-9)
            assert metric["num_samples"] == 101
    strict = retrieval.measure(constant, constant, captions)["figures"]
    assert [m["chance"] for m in strict[:4]] == pytest.approx([1 / 101, 5 / 101, 10 / 101, 51])


def test_measure_perfect_embeddings_score_one_with_same_chance() -> None:
    rows = unit_rows(50, 32, 5)
    metrics = retrieval.measure(rows, rows, [str(i) for i in range(50)])["figures"]
    assert [m["value"] for m in metrics] == [1, 1, 1, 1] * 2
    assert metrics[1]["chance"] == pytest.approx(0.1)


def test_measure_duplicate_captions_have_hypergeometric_chance() -> None:
    rows = unit_rows(6, 8, 6)
    result = retrieval.measure(rows, rows, ["a", "a ", "b", "c", "d", "e"], duplicates="captions")
    # Two queries have 2 correct answers among 6, and four have 1. Five draws from six cannot miss both correct answers.
    two = 1 - math.comb(4, 1) / math.comb(6, 1)
    assert result["figures"][0]["chance"] == pytest.approx((2 * two + 4 / 6) / 6)
    assert result["figures"][1]["chance"] == pytest.approx((2 * 1 + 4 * 5 / 6) / 6)
    assert result["num_distinct_captions"] == 5


def test_measure_single_pair_scores_one() -> None:
    rows = unit_rows(1, 8, 7)
    metrics = retrieval.measure(rows, rows, ["only"])["figures"]
    assert {m["value"] for m in metrics} == {1.0}
    assert {m["chance"] for m in metrics} == {1.0}


def test_recall_equals_top_k_accuracy_of_scikit_learn() -> None:
    from sklearn.metrics import top_k_accuracy_score

    texts = unit_rows(60, 16, 8)
    images = F.normalize(texts + 0.9 * unit_rows(60, 16, 9), dim=1)
    ranks, _ = retrieval.rank(images, texts)
    for k in (1, 5, 10):
        assert ranks.recall(k) == pytest.approx(top_k_accuracy_score(np.arange(60), (images @ texts.T).numpy(), k=k))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda rows: rows.index_put((torch.tensor([3]),), torch.tensor(torch.nan)),
            "NaN or infinity in 1 of 9 rows, first in row 3",
        ),
        (lambda rows: rows * 2, "L2-normalised"),
        (lambda rows: rows[:0], "non-empty"),
        (lambda rows: rows[:5], "pair up"),
    ],
)
def test_rank_invalid_embeddings_raise(spoil, message: str) -> None:
    with pytest.raises(UserError, match=message):
        retrieval.rank(unit_rows(9, 4, 1), spoil(unit_rows(9, 4, 2)))


@pytest.mark.parametrize("duplicates", ["strict", "captions", "images", "any"])
def test_measure_duplicates_count_as_configured(duplicates: retrieval.Duplicates) -> None:
    captions = ["a", "b", "b", "c", "d", "d"]
    image_hashes = ["1", "2", "3", "3", "4", "4"]
    texts, images = unit_rows(6, 8, 1), unit_rows(6, 8, 2)
    result = retrieval.measure(images, texts, captions, duplicates=duplicates, image_hashes=image_hashes)
    scores = images.double() @ texts.double().T
    for direction, table in (("image to text", scores), ("text to image", scores.T)):
        hits = []
        for i in range(6):
            same = {"captions": captions, "images": image_hashes}
            right = [
                j
                for j in range(6)
                if j == i or any(duplicates in (name, "any") and of[i] == of[j] for name, of in same.items())
            ]
            hits.append(int(table[i].argmax()) in right)
        assert result["samples"][f"{direction} R@1"] == [float(hit) for hit in hits]
    with pytest.raises(UserError, match="needs image_hashes"):
        retrieval.measure(images, texts, captions, duplicates="images")


@pytest.mark.parametrize("index", ["faiss_flat", "hnsw", "ivf"])
def test_measure_faiss_is_close_to_exact_ranks(index: faiss_index.Index) -> None:
    pytest.importorskip("faiss")
    texts = unit_rows(3000, 32, 3)
    images = F.normalize(texts + 0.9 * unit_rows(3000, 32, 4), dim=1)
    captions = [str(i // 2) for i in range(3000)]
    for duplicates in ("strict", "captions"):
        exact = retrieval.measure(images, texts, captions, duplicates=duplicates)  # type: ignore[arg-type]
        approximate = retrieval.measure(images, texts, captions, duplicates=duplicates, index=index)  # type: ignore[arg-type]
        expected = {metric["name"]: metric for metric in exact["figures"]}
        for metric in approximate["figures"]:
            tolerance = 1e-9 if index == "faiss_flat" else 0.08
            if metric["unit"] == "share":
                assert metric["value"] == pytest.approx(expected[metric["name"]]["value"], abs=tolerance)
                assert metric["chance"] == pytest.approx(expected[metric["name"]]["chance"])
    # An index cannot give the rank of a candidate beyond its list, so the median rank is missing.
    unrelated = retrieval.measure(images, unit_rows(3000, 32, 5), captions, index=index)
    assert not any("median" in metric["name"] for metric in unrelated["figures"])


def test_gallery_queries_are_evenly_spaced_and_correct_hits_marked() -> None:
    rows = unit_rows(30, 16, 10)
    shown = retrieval.gallery(rows, rows, [str(i % 15) for i in range(30)], num_queries=3)
    assert [query["sample"] for query in shown["text_to_image"]] == [5, 15, 25]
    for query in shown["image_to_text"]:
        assert query["hits"][0] == {
            "sample": query["sample"],
            "score": pytest.approx(1),
            "right": True,
            "same_caption": True,
        }
        assert query["rank_of_right"] == 1
        assert len(query["hits"]) == 5
