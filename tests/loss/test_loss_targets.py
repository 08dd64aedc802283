"""The losses over ranks with groups, additional texts and hardness, and the order of their collectives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from losses import EXACT, Towers, gradients
from ranks import on_ranks
from targets import dense, dense_siglip
from torch import nn

from bclip_fast import ClipLoss, SigLipLoss, ops
from bclip_fast.loss import collectives
from bclip_fast.ops.contrastive import reference


def data(image_sizes, text_sizes):
    """Inputs and ids of images and texts, by rank. The first texts of a rank pair with its images."""
    generator = torch.Generator().manual_seed(5)
    images, texts = (
        torch.randn(sum(sizes), width, generator=generator, dtype=torch.float64).split(sizes)
        for sizes, width in ((image_sizes, 6), (text_sizes, 5))
    )
    image_ids, text_ids = (
        torch.randint(0, 4, (sum(sizes),), generator=generator).split(sizes) for sizes in (image_sizes, text_sizes)
    )
    return images, texts, image_ids, text_ids


def pairs(image_sizes, text_sizes):
    """The positive pairs without groups: (images, texts) of all ranks, bool."""
    blocks = [torch.eye(*sizes, dtype=torch.bool) for sizes in zip(image_sizes, text_sizes, strict=True)]
    return torch.block_diag(*blocks).bool()


def smoothed(image, text, scale, same, amount=0.1):
    """The loss with F.cross_entropy's smoothing: of images over all texts, and of paired texts over all images."""
    logits, columns = scale * image @ text.T, same.int().argmax(1)
    return (
        F.cross_entropy(logits, columns, label_smoothing=amount)
        + F.cross_entropy(logits.T[columns], torch.arange(len(image)), label_smoothing=amount)
    ) / 2


CASES = {
    "additional texts": (lambda options: ClipLoss(**options), False, dense),
    "hardness": (lambda options: ClipLoss(hardness=7.0, **options), False, lambda *a: dense(*a, 7.0)),
    "smoothing": (lambda options: ClipLoss(label_smoothing=0.1, **options), False, smoothed),
    "groups": (lambda options: ClipLoss(**options), True, dense),
    "siglip": (lambda options: SigLipLoss(**options), False, None),
    "siglip groups": (lambda options: SigLipLoss(**options), True, None),
}
SIZES = [((4, 3), (4, 3)), ((3, 2), (5, 2)), ((2, 4, 1), (2, 6, 3))]


def results_of(rank, image_sizes, text_sizes, chunk_size=None):
    images, texts, image_ids, text_ids = (parts[rank] for parts in data(image_sizes, text_sizes))
    results = {}
    for name, (make, grouped, _) in CASES.items():
        towers = nn.parallel.DistributedDataParallel(Towers())
        image, text, scale, bias = towers(images, texts)
        loss = make({"rank": rank, "world_size": len(image_sizes), "chunk_size": chunk_size})
        groups = {"groups": (image_ids, text_ids)} if grouped else {}
        results[name] = gradients(loss(image, text, scale, bias, **groups), towers.module)
    return results


def all_results(rank, num_ranks):
    return [results_of(rank, *sizes, chunk_size=2) for sizes in SIZES if len(sizes[0]) == num_ranks]


def truth_of(name, image_sizes, text_sizes):
    images, texts, image_ids, text_ids = (torch.cat(parts) for parts in data(image_sizes, text_sizes))
    _, grouped, definition = CASES[name]
    same = image_ids[:, None] == text_ids if grouped else pairs(image_sizes, text_sizes)
    towers = Towers()
    image, text, scale, bias = towers(images, texts)
    if definition is None:
        return gradients(dense_siglip(image, text, scale, bias, same), towers)
    return gradients(definition(image, text, scale, same) + 0 * bias, towers)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_gradients_over_ranks_equal_one_process(num_ranks):
    for of_rank in on_ranks(num_ranks, all_results, num_ranks):
        for sizes, results in zip([s for s in SIZES if len(s[0]) == num_ranks], of_rank, strict=True):
            for name, values in results.items():
                for ours, true in zip(values, truth_of(name, *sizes), strict=True):
                    torch.testing.assert_close(
                        ours, true, **EXACT, msg=lambda text, name=name, sizes=sizes: f"{name} {sizes}: {text}"
                    )


def cone(num):
    """Features with cosines near -0.8: at scale 100 their exponentials are zero with any offset from the scale."""
    generator = torch.Generator().manual_seed(6)
    axis = F.normalize(torch.ones(32), dim=0)
    across = torch.randn(num, 32, generator=generator)
    across = F.normalize(across - (across @ axis)[:, None] * axis)
    return -0.8 * axis + 0.6 * across, F.normalize(axis + 0.02 * torch.randn(num, 32, generator=generator))


def in_float32(rank):
    """Gradients on two ranks for a cone of low cosines, and for a float16 SigLIP loss (1e-8 before scaling)."""
    rows = slice(20 * rank, 20 * rank + 20)
    leaves = [part[rows].clone().requires_grad_() for part in cone(40)] + [torch.tensor(100.0, requires_grad=True)]
    low = torch.autograd.grad(ClipLoss(rank=rank, world_size=2)(*leaves), leaves)
    halves = [part[rows].half().requires_grad_() for part in cone(40)]
    loss = 65536 * SigLipLoss(rank=rank, world_size=2)(*halves, 1e-5, -7.0)
    return {"low": low, "half": torch.autograd.grad(loss, halves)}


def order_of_calls(rank):
    """The order of tiles and collectives while two ranks compute a loss and its gradient."""
    calls = []
    definitions = {name: getattr(reference, name) for name in ("forward", "backward", "siglip")}

    def kernel(name):
        def run(call, *args):
            calls.append("remote tile" if call.positive_offset is None else "local tile")
            return definitions[name](call, *args)

        return run

    def collective(name, original):
        def call(output, *args, **options):
            work = original(output, *args, **options)
            if output.dim() == 1 or output.shape[1] == 1:
                return work
            calls.append(f"{name} starts")

            class Work:
                def wait(self):
                    calls.append(f"{name} is awaited")
                    return work.wait()

            return Work()

        return call

    for name in definitions:
        setattr(reference, name, kernel(name))
    collectives._all_gather = collective("gather", collectives._all_gather)
    collectives._reduce_scatter = collective("reduction", collectives._reduce_scatter)
    image, text = (part.requires_grad_() for part in torch.randn(2, 4, 3))
    options = {"rank": rank, "world_size": 2, "backend": "reference"}
    ClipLoss(**options)(image, text, torch.tensor(5.0)).backward()
    clip = ", ".join(calls)
    calls.clear()
    SigLipLoss(**options)(image, text, torch.tensor(5.0)).backward()
    return {"clip": clip, "siglip": ", ".join(calls), **in_float32(rank)}


def test_collectives_overlap_with_local_tile():
    results = on_ranks(2, order_of_calls)
    forward = "gather starts, local tile, gather is awaited, remote tile"
    for result in results:
        assert result["clip"] == f"{forward}, remote tile, reduction starts, local tile, reduction is awaited"
        assert result["siglip"] == f"{forward}, reduction starts, reduction is awaited"

    inputs = [part.double().requires_grad_() for part in cone(40)]
    truth = torch.autograd.grad(ops.clip_loss(*inputs, 100.0), inputs)
    assert (inputs[0] @ inputs[1].T).max() < -0.6
    for index, true in enumerate(truth):
        ours = torch.cat([result["low"][index] for result in results]).double() / 2
        assert (ours - true).norm() <= 1e-5 * true.norm()
    inputs = [part.half().double().requires_grad_() for part in cone(40)]
    truth = torch.autograd.grad(65536 * ops.siglip_loss(*inputs, 1e-5, -7.0), inputs)
    for index, true in enumerate(truth):
        ours = torch.cat([result["half"][index] for result in results]).double() / 2
        assert (ours - true).norm() <= 2.0**-10 * true.norm()
