"""The options of the contrastive operators: positives by index, groups, and weighted negatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from judged import judge_clip_loss, judge_siglip_loss
from oracle import every_backend_and
from pairwise import pairwise
from targets import dense, dense_siglip

from bclip_fast import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def features(rows, columns, width, dtype=torch.float64):
    return [F.normalize(torch.randn(size, width, dtype=torch.float64)).to(dtype) for size in (rows, columns)]


def close(ours, definition, inputs):
    """Loss and gradients in float64."""
    results = []
    for function in (ours, definition):
        leaves = [tensor.double().clone().requires_grad_() for tensor in inputs]
        loss = function(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for actual, true in zip(*results, strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-11, atol=1e-14)


POSITIVE = torch.tensor([5, -1, 0, 7, 30, -1, 2, 11, 44])  # the texts of nine images


def same_of(positive, num_texts):
    return positive[:, None] == torch.arange(num_texts)


def random_ids(rows, columns):
    """Ids of groups of many sizes, with some images without a text and some texts without an image."""
    return torch.randint(0, rows // 2, (rows,)) * 7 - 9, torch.randint(1, rows // 2 + 4, (columns,)) * 7 - 9


@pytest.mark.parametrize("hardness", [0.0, 4.5, -50.0])
@pytest.mark.parametrize("shape", [(9, 47), (12, 47), (12, 12)], ids=str)
def test_pairs_match_the_definition(shape, hardness):
    image, text = features(*shape, 6)
    scale = torch.tensor(50.0)
    same = torch.eye(*shape, dtype=torch.bool)
    close(
        lambda *a: ops.clip_loss(*a, hardness=hardness, chunk_size=5),
        lambda *a: dense(*a, same, hardness),
        [image, text, scale],
    )
    if shape[0] == 9:
        same = same_of(POSITIVE, 47)
        close(
            lambda *a: ops.clip_loss(*a, positive=POSITIVE, hardness=hardness, chunk_size=5),
            lambda *a: dense(*a, same, hardness),
            [image, text, scale],
        )


@pytest.mark.parametrize("shape", [(30, 30), (20, 45), (45, 20), (1, 1)], ids=str)
def test_groups_match_the_definition(shape):
    image, text = features(*shape, 6)
    ids = random_ids(*shape) if shape[0] > 1 else (torch.zeros(1, dtype=torch.int64),) * 2
    same = ids[0][:, None] == ids[1]
    inputs = [image, text, torch.tensor(20.0)]
    close(lambda *a: ops.clip_loss(*a, groups=ids, chunk_size=7), lambda *a: dense(*a, same), inputs)
    inputs.append(torch.tensor(-3.0))
    close(lambda *a: ops.siglip_loss(*a, groups=ids, chunk_size=7), lambda *a: dense_siglip(*a, same), inputs)


def test_one_tensor_of_groups_and_groups_of_one_pair_match():
    image, text = features(12, 12, 5)
    scale = torch.tensor(9.0)
    ids = torch.arange(12).int() // 3
    assert torch.equal(
        ops.clip_loss(image, text, scale, groups=ids), ops.clip_loss(image, text, scale, groups=(ids, ids))
    )
    close(lambda *a: ops.clip_loss(*a, groups=torch.randperm(12)), lambda *a: ops.clip_loss(*a), [image, text, scale])


def test_siglip_with_positives_matches_the_definition():
    inputs = [*features(9, 47, 6), torch.tensor(10.0), torch.tensor(-5.0)]
    same = same_of(POSITIVE, 47)
    close(lambda *a: ops.siglip_loss(*a, positive=POSITIVE), lambda *a: dense_siglip(*a, same), inputs)
    same = torch.eye(9, 47, dtype=torch.bool)
    close(lambda *a: ops.siglip_loss(*a), lambda *a: dense_siglip(*a, same), inputs)


# More columns than a tile of 512, and more rows than a tile of 128.
@pairwise(backend_and_dtype=every_backend_and("contrastive", *DTYPES), shape=[(131, 531), (70, 67)])
def test_groups_are_as_accurate_as_eager(backend, dtype, shape, nan_filled):
    ids = random_ids(*shape)
    same = ids[0][:, None] == ids[1]
    options = {"groups": ids, "backend": backend, "chunk_size": 50}
    scalars = [torch.tensor(10.0), torch.tensor(-5.0)]
    judge_clip_loss(
        lambda *a: ops.clip_loss(*a, **options), lambda: [*features(*shape, 24, dtype), torch.tensor(20.0)], same
    )
    judge_siglip_loss(lambda *a: ops.siglip_loss(*a, **options), lambda: features(*shape, 24, dtype) + scalars, same)


@pairwise(backend_and_dtype=every_backend_and("contrastive", *DTYPES))
def test_rectangles_and_hardness_are_as_accurate_as_eager(backend, dtype, nan_filled):
    positive = torch.randperm(531)[:140]
    positive[::7] = -1
    options = {"positive": positive, "hardness": 9.0, "backend": backend, "chunk_size": 50}
    same = same_of(positive, 531)

    def draw(scale):
        return [*features(140, 531, 24, dtype), torch.tensor(scale)]

    judge_clip_loss(lambda *a: ops.clip_loss(*a, **options), lambda: draw(20.0), same, 9.0)
    same = torch.eye(140, 531, dtype=torch.bool)
    judge_clip_loss(lambda *a: ops.clip_loss(*a, backend=backend), lambda: draw(50.0), same)


def test_equal_images_and_texts_without_a_loss_give_no_nan():
    """The logit of the last image and text exceeds every log-sum-exp. Its exponential must not become inf * 0."""

    def draw():
        image, text = (0.01 * part.float() for part in features(20, 30, 8))
        image[-1] = text[-1] = F.normalize(torch.ones(8), dim=0)
        return [image, text, torch.tensor(300.0)]

    ids = torch.arange(20), torch.arange(30)
    ids[0][-1], ids[1][-11:] = 100, 200
    same = ids[0][:, None] == ids[1]
    for backend in ("cpu", "reference"):
        judge_clip_loss(lambda *a, backend=backend: ops.clip_loss(*a, groups=ids, backend=backend), draw, same)


IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"positive": torch.tensor([0, 1, 1, 2])}, r"images 1 and 2 have the same text 1; .* groups="),
        ({"positive": torch.tensor([0, 1, 6, 2])}, "below 6"),
        ({"positive": torch.tensor([-1] * 4)}, "at least one row of text"),
        ({"positive": torch.tensor([0, 1])}, r"positive must be 4 int64, got torch.int64 \(2,\)"),
        ({"positive": IDS, "groups": (IDS, torch.arange(6))}, "pass one of them"),
        ({"groups": IDS}, r"groups of the texts must be 6 integers, got torch.int64 \(4,\)"),
        ({"groups": (IDS.float(), torch.arange(6))}, "groups of the images must be 4 integers, got torch.float32"),
        ({"groups": (IDS, torch.arange(6) + 4)}, "no image shares its id with a text"),
        ({"groups": (IDS, torch.arange(6)), "hardness": 1.0}, "hardness with groups"),
        ({"hardness": float("nan")}, "hardness must be a finite number"),
    ],
)
def test_bad_option_raises_an_error_that_names_it(options, words):
    with pytest.raises(ValueError, match=words):
        ops.clip_loss(torch.eye(4), torch.eye(6, 4), 1.0, **options)
