"""The ranking loss of sentence-transformers: definitions, the class's interface, ranks and derivatives."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from peers import import_torchvision
from ranks import on_ranks
from torch import nn
from torch.func import grad, jvp

from bclip_fast.integrations import sentence_transformers as sbert


def cosine_cross_entropies(queries, positives, negatives, scale):
    """Return the (query_to_doc, doc_to_query) losses by loops over pairs in float64, without our package."""
    candidates = [*positives, *(row for part in negatives for row in part)]
    terms = []
    for rows, columns in [(queries, candidates), (positives, list(queries))]:
        losses = []
        for index, row in enumerate(rows):
            scores = torch.stack([scale * row @ other / (row.norm() * other.norm()) for other in columns])
            losses.append(scores.exp().sum().log() - scores[index])
        terms.append(torch.stack(losses).mean())
    return terms


@pytest.mark.parametrize("num_negatives", [0, 2])
@pytest.mark.parametrize(
    "directions", [("query_to_doc",), ("doc_to_query",), ("query_to_doc", "doc_to_query")], ids=len
)
def test_ranking_loss_and_gradients_equal_definition(directions, num_negatives):
    columns = torch.randn(2 + num_negatives, 7, 5, dtype=torch.float64).requires_grad_()
    queries, positives, *negatives = columns
    terms = dict(zip(sbert.DIRECTIONS[:2], cosine_cross_entropies(queries, positives, negatives, 20.0), strict=True))
    truth = torch.stack([terms[name] for name in directions]).mean()
    loss = sbert.multiple_negatives_ranking_loss(queries, [positives, *negatives], directions=directions, chunk_size=3)
    torch.testing.assert_close(loss, truth)
    gradients = [torch.autograd.grad(value, columns)[0] for value in (loss, truth)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    if num_negatives == 0:
        torch.testing.assert_close(
            sbert.multiple_negatives_ranking_loss(queries, positives, directions=directions), truth
        )


@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "doc_to_query")], ids=len)
def test_ranking_hardness_equals_definition(mode, directions):
    """For queries, hardness adds the constant strength * cosine to the scores of the documents that the mode names."""
    columns = torch.randn(4, 5, 6, dtype=torch.float64).requires_grad_()
    queries, *documents = columns
    candidates = [(row, index, part) for part, rows in enumerate(documents) for index, row in enumerate(rows)]
    losses = []
    for index, query in enumerate(queries):
        scores = []
        for row, owner, part in candidates:
            cosine = F.cosine_similarity(query, row, dim=0)
            in_batch, hard = owner != index, owner == index and part > 0
            weighted = {"in_batch_negatives": in_batch, "hard_negatives": hard, "all_negatives": in_batch or hard}[mode]
            scores.append(20 * cosine + (9 * cosine.detach() if weighted else 0))
        losses.append(torch.stack(scores).logsumexp(0) - scores[index])
    terms = [torch.stack(losses).mean()]
    if len(directions) == 2:
        terms.append(cosine_cross_entropies(queries, documents[0], documents[1:], 20.0)[1])
    truth = torch.stack(terms).mean()
    loss = sbert.MultipleNegativesRankingLoss(
        nn.Identity(), directions=directions, partition_mode="per_direction", chunk_size=2, hardness_mode=mode,
        hardness_strength=9.0,
    )([{"sentence_embedding": column} for column in columns])  # fmt: skip
    torch.testing.assert_close(loss, truth)
    gradients = [torch.autograd.grad(value, columns)[0] for value in (loss, truth)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def columns_of(embeddings):
    return [{"sentence_embedding": part} for part in embeddings]


def definition(embeddings, scale, similarity, directions, joint, rows=None, hardness=0.0):
    """The loss of the queries `rows` by loops over pairs in float64, without our package.

    hardness: added to in-batch negatives, times their constant similarity.
    """
    queries, *documents = embeddings
    total = 0.0
    rows = range(len(queries)) if rows is None else rows
    for q in rows:
        own = documents[0][q]
        terms = {name: [] for name in directions}
        for column in documents:
            for d, document in enumerate(column):
                value = similarity(queries[q], document)
                extra = hardness * value.detach() if d != q else 0.0
                terms["query_to_doc"].append(scale * value + extra)
                if "doc_to_doc" in directions and d != q:
                    terms["doc_to_doc"].append(scale * similarity(own, document))
        for i, other in enumerate(queries):
            if "doc_to_query" in directions:
                terms["doc_to_query"].append(scale * similarity(own, other))
            if "query_to_query" in directions and i != q:
                terms["query_to_query"].append(scale * similarity(queries[q], other))
        sums = (
            [torch.cat([torch.stack(part) for part in terms.values()])] if joint else map(torch.stack, terms.values())
        )
        sums = [part.logsumexp(0) for part in sums]
        total = total + sum(sums) / len(sums) - scale * similarity(queries[q], own)
    return total / len(rows)


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0)


def negative_distance(a, b):
    """A similarity that no kernel has."""
    return -(a[:, None] - b).square().sum(-1)


SIMILARITIES = {
    "cos_sim": (sbert.cos_sim, cosine),
    "dot_score": (sbert.dot_score, torch.dot),
    "another": (negative_distance, lambda a, b: -(a - b).square().sum()),
}
BOTH = ("query_to_doc", "doc_to_query")
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@pytest.mark.parametrize("directions", [BOTH[:1], BOTH, ALL], ids=len)
@pytest.mark.parametrize("mode", ["joint", "per_direction"])
@pytest.mark.parametrize("name", SIMILARITIES)
def test_ranking_similarities_and_partitions_equal_definition(name, mode, directions):
    if mode == "per_direction" and directions == ALL:
        with pytest.raises(ValueError, match="per_direction"):
            sbert.MultipleNegativesRankingLoss(nn.Identity(), directions=directions, partition_mode=mode)
        return
    ours, theirs = SIMILARITIES[name]
    for num_columns in (2, 3):
        embeddings = torch.randn(num_columns, 5, 4, dtype=torch.float64).requires_grad_()
        options = {"directions": directions, "partition_mode": mode, "chunk_size": 2}
        loss = sbert.MultipleNegativesRankingLoss(nn.Identity(), 2.0, ours, **options)(columns_of(embeddings))
        truth = definition(embeddings, 2.0, theirs, directions, mode == "joint")
        torch.testing.assert_close(loss, truth)
        torch.testing.assert_close(*(torch.autograd.grad(value, embeddings) for value in (loss, truth)))


def test_ranking_class_has_sentence_transformers_interface():
    parameters = list(inspect.signature(sbert.MultipleNegativesRankingLoss).parameters.items())
    assert [(name, each.default) for name, each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD] == [
        ("model", inspect.Parameter.empty), ("scale", 20.0), ("similarity_fct", sbert.cos_sim),
        ("gather_across_devices", False), ("directions", ("query_to_doc",)), ("partition_mode", "joint"),
        ("hardness_mode", None), ("hardness_strength", 0.0),
    ]  # fmt: skip
    loss = sbert.MultipleNegativesRankingLoss(nn.Identity(), 10.0, sbert.dot_score)
    assert loss.get_config_dict() == {
        "scale": 10.0, "similarity_fct": "dot_score", "gather_across_devices": False, "directions": ("query_to_doc",),
        "partition_mode": "joint", "hardness_mode": None, "hardness_strength": 0.0,
    }  # fmt: skip
    assert loss.temperature == 0.1
    assert "1807.03748" in loss.citation
    both = sbert.MultipleNegativesRankingLoss(loss.model, directions=BOTH, partition_mode="per_direction")
    assert "2310.19923" in both.citation
    assert "2308.03281" in sbert.MultipleNegativesRankingLoss(loss.model, directions=ALL).citation
    assert [type(value) for value in (both.model, both.scale)] == [nn.Identity, float]
    for clone in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert clone.get_config_dict() == both.get_config_dict()


def test_ranking_class_equals_sentence_transformers():
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed")
    import_torchvision()
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    theirs = losses.MultipleNegativesRankingLoss
    ours = sbert.MultipleNegativesRankingLoss
    names = [name for name, each in inspect.signature(ours).parameters.items() if each.kind is not each.KEYWORD_ONLY]
    assert names == list(inspect.signature(theirs).parameters)
    for options in ({}, {"directions": ALL}, {"directions": BOTH, "partition_mode": "per_direction"}):
        pair = [kind(nn.Identity(), **options) for kind in (ours, theirs)]
        assert pair[0].get_config_dict() == pair[1].get_config_dict()
        assert set(vars(pair[1])) <= set(vars(pair[0]))
        embeddings = list(torch.randn(3, 6, 4))
        torch.testing.assert_close(*(loss.compute_loss_from_embeddings(embeddings, None) for loss in pair))


def gathered_on_two(rank):
    generator = torch.Generator().manual_seed(4)
    rows = (range(3), range(3, 5))[rank]
    embeddings = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)[:, rows.start : rows.stop]
    embeddings = embeddings.requires_grad_()
    loss = sbert.MultipleNegativesRankingLoss(
        nn.Identity(), 2.0, gather_across_devices=True, directions=ALL, hardness_mode="in_batch_negatives",
        hardness_strength=3.0, chunk_size=2, backend="reference",
    )  # fmt: skip
    value = loss(columns_of(embeddings))
    (gradient,) = torch.autograd.grad(value, embeddings, create_graph=True)
    return {"loss": value.detach(), "second": torch.autograd.grad(gradient.sin().sum(), embeddings)[0]}


def test_ranking_over_two_ranks_equals_definition():
    results = on_ranks(2, gathered_on_two)
    embeddings = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    embeddings = embeddings.requires_grad_()
    parts = [definition(embeddings, 2.0, cosine, ALL, True, rows, 3.0) for rows in (range(3), range(3, 5))]
    torch.testing.assert_close(torch.stack([result["loss"] for result in results]), torch.stack(parts))
    # Backward passes on all ranks differentiate the sum of the ranks' losses.
    (gradient,) = torch.autograd.grad(sum(parts), embeddings, create_graph=True)
    truth = torch.autograd.grad(gradient.sin().sum(), embeddings)[0]
    torch.testing.assert_close(torch.cat([result["second"] for result in results], 1), truth)


@pytest.mark.parametrize("directions", [BOTH[:1], BOTH], ids=len)
def test_ranking_further_derivatives_are_right_or_refused_by_name(directions):
    embeddings = torch.randn(2, 5, 4, dtype=torch.float64)

    def value(x, **options):
        return sbert.multiple_negatives_ranking_loss(*x, 2.0, directions=directions, chunk_size=2, **options)

    def plain(x):
        return definition(x, 2.0, cosine, directions, False)

    for derive in (grad, lambda f: lambda x: jvp(f, (x,), (x,))[1], lambda f: lambda x: jvp(grad(f), (x,), (x,))[1]):
        ours = derive(lambda x: value(x, backend="reference"))(embeddings)
        torch.testing.assert_close(ours, derive(plain)(embeddings), check_dtype=False)
    leaf = embeddings.clone().requires_grad_()
    seconds = []
    for function in (lambda x: value(x, backend="reference"), plain):
        (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        seconds.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    torch.testing.assert_close(*seconds)
    if directions == BOTH:
        leaf = embeddings.float().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf, backend="cpu"), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match='backend="reference"'):
            gradient.sum().backward()


def test_ranking_hardness_without_strength_warns(caplog):
    sbert.MultipleNegativesRankingLoss(nn.Identity(), hardness_mode="all_negatives")
    assert "hardness_strength is 0" in caplog.text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: sbert.multiple_negatives_ranking_loss(x, x, directions=("doc",)), "must be some of"),
        (lambda x: sbert.multiple_negatives_ranking_loss(x, x[:1]), "as many rows, got 2 and 1"),
        (lambda x: sbert.multiple_negatives_ranking_loss(x, [x, x], backend="cpu"), "backend='cpu'"),
        (
            lambda x: sbert.MultipleNegativesRankingLoss(x, directions=("doc_to_query",)),
            "query_to_doc, which has the positive pairs",
        ),
        (lambda x: sbert.multiple_negatives_ranking_loss(x, x, hardness_mode="hard"), "hardness_mode='hard' must be"),
        (lambda x: sbert.MultipleNegativesRankingLoss(x, hardness_mode="hard"), "hardness_mode='hard' must be one of"),
        (lambda x: sbert.MultipleNegativesRankingLoss(x, hardness_strength=-1.0), "hardness_strength=-1.0 must be"),
        (lambda x: sbert.MultipleNegativesRankingLoss(x, partition_mode="all"), "partition_mode='all' must be joint"),
        (lambda x: sbert.MultipleNegativesRankingLoss(x, 0.0), "Scale must be a positive value. Got scale=0.0"),
        (lambda x: sbert.MultipleNegativesRankingLoss(x, 1.0, "cos_sim"), "similarity_fct='cos_sim' must be"),
        (lambda x: sbert.MultipleNegativesRankingLoss(nn.Identity())([{"sentence_embedding": x}]), "two columns"),
    ],
)
def test_ranking_unsupported_arguments_raise(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.eye(2))
