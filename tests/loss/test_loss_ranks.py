"""The losses over two, three and four ranks, against one process and against open_clip."""

from __future__ import annotations

import copy
import pickle
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from losses import (
    EXACT,
    MODES,
    Towers,
    assert_global,
    data,
    half_missing,
    open_clip_losses,
    results_of,
    single_process,
)
from ranks import on_ranks

import bclip_fast
from bclip_fast import ClipLoss, SigLipLoss
from bclip_fast.loss import CollectiveError
from bclip_fast.ops.contrastive import reference


def logits_of(losses, rank, sizes, mode):
    features = [value.detach() for value in Towers()(*(parts[rank] for parts in data(sizes)))]
    loss = losses.ClipLoss(*mode, rank=rank, world_size=len(sizes))
    # No bias: without local_loss, open_clip's two results share memory on several ranks, and it adds the bias twice.
    logits = loss.get_logits(*features[:3])
    return [*logits, loss.get_ground_truth(features[0].device, len(logits[0]))]


def lost_rank(rank):
    """The error on rank 0 when rank 1 never reaches the loss."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    if rank == 1:
        time.sleep(3)
        return ""
    features = torch.eye(2)
    try:
        ClipLoss(rank=rank, world_size=2, process_group=group)(features, features, 1.0)
    except CollectiveError as error:
        return str(error)
    return "no error"


def half_precision(losses, dtype, rank=0, world_size=1):
    """Loss and gradients of this rank's half of 64 pairs, for every loss class and features of `dtype`."""
    generator = torch.Generator().manual_seed(4)
    rows = slice(64 * rank // world_size, 64 * (rank + 1) // world_size)
    parts = [F.normalize(torch.randn(64, 32, generator=generator), dim=-1)[rows].bfloat16() for _ in range(4)]
    image, text, *teacher = (part.to(dtype) for part in parts)
    results = []
    for name, extra in [("ClipLoss", ()), ("SigLipLoss", (-5.0,)), ("DistillClipLoss", (*teacher, 10.0))]:
        leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(20.0, requires_grad=True)]
        value = getattr(losses, name)(rank=rank, world_size=world_size)(*leaves, *extra)
        loss = sum(value) if isinstance(value, tuple) else value
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    return results


def on_two(rank):
    losses, sizes = open_clip_losses(), (6, 6)
    ours = results_of(rank, sizes, bclip_fast, chunk_size=4)
    ours_logits = {str(mode): logits_of(bclip_fast, rank, sizes, mode) for mode in MODES}
    theirs = results_of(rank, sizes, losses) if losses else {}
    theirs_logits = {str(mode): logits_of(losses, rank, sizes, mode) for mode in MODES} if losses else {}
    return {
        "ours": ours,
        "logits": ours_logits,
        "theirs": theirs,
        "theirs_logits": theirs_logits,
        "half": half_precision(bclip_fast, torch.bfloat16, rank, 2),
        "lost": lost_rank(rank),
    }


def test_two_ranks_every_mode_gives_global_gradient():
    sizes = (6, 6)
    results = on_ranks(2, on_two)
    assert_global([result["ours"] for result in results], sizes, open_clip_losses())
    truth = half_precision(bclip_fast, torch.float64)
    for ranks, (loss, image, text, scale) in zip(zip(*(r["half"] for r in results), strict=True), truth, strict=True):
        losses, images, texts, scales = zip(*ranks, strict=True)
        torch.testing.assert_close(losses[0].double(), loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(sum(scales).double() / 2, scale.double(), rtol=1e-4, atol=0)
        for ours, true in [(images, image), (texts, text)]:
            assert (torch.cat(ours).double() / 2 - true).norm() <= 2**-8 * true.norm()
    message = results[0]["lost"]
    assert "ClipLoss, rank 0 of 2: broadcast of backends failed" in message, message
    if not results[0]["theirs"]:
        pytest.skip("our losses passed; open_clip is not installed to compare with")
    truth = single_process(sizes)
    towers = slice(3, 7)  # weight and bias of both towers, after loss, scale and bias
    half = single_process(sizes, half_missing)
    for result in results:
        theirs = result["theirs"]
        for mode, expected in {
            "clip (False, False)": [grad / 2 for grad in truth[towers]],
            "clip (False, True)": truth[towers],
            "clip (True, False)": half[towers],
            "clip (True, True)": truth[towers],
        }.items():
            for value, true in zip(theirs[mode][towers], expected, strict=True):
                torch.testing.assert_close(
                    value, true, **EXACT, msg=lambda text, mode=mode: f"open_clip, {mode}: {text}"
                )
        assert all(
            (part - true).norm() > 0.1 * true.norm() for part, true in zip(half[towers], truth[towers], strict=True)
        )
        for mode, logits in result["theirs_logits"].items():
            for ours, true in zip(result["logits"][mode], logits, strict=True):
                torch.testing.assert_close(ours, true, **EXACT)


FOUR_RANKS = [(2, 3, 1, 4), (2, 2, 2, 2)]


def on_four(rank):
    return [results_of(rank, sizes, bclip_fast) for sizes in FOUR_RANKS]


def test_four_ranks_equal_and_unequal_batches_give_global_gradient():
    for sizes, results in zip(FOUR_RANKS, zip(*on_ranks(4, on_four), strict=True), strict=True):
        assert_global(results, sizes, open_clip_losses())


def compiled_on_two(rank):
    """The eager and the compiled loss. A compiler easily loses an all-reduce inside an autograd function."""
    generator = torch.Generator().manual_seed(rank)
    features = [F.normalize(torch.randn(5, 16, generator=generator), dim=-1) for _ in range(2)]
    results = []
    for loss in (ClipLoss(rank=rank, world_size=2), SigLipLoss(rank=rank, world_size=2)):
        inputs = (*features, torch.tensor(10.0), torch.tensor(-1.0))
        results.append([loss(*inputs), torch.compile(loss, backend="aot_eager")(*inputs)])
    return results


def test_two_ranks_compiled_loss_equals_eager():
    for results in on_ranks(2, compiled_on_two):
        for eager, compiled in results:
            torch.testing.assert_close(compiled, eager)


def on_three(rank):
    unequal = results_of(rank, (5, 1, 7), bclip_fast, clip=False, chunk_size=3)
    equal = results_of(rank, (4, 4, 4), bclip_fast)
    group = dist.new_group([1, 2])
    if rank == 0:
        return {"equal": equal, "unequal": unequal}
    images, texts = data((4, 3))
    features = [value.detach() for value in Towers()(images[rank - 1], texts[rank - 1])]
    options = {"rank": rank - 1, "world_size": 2, "process_group": group}
    loss = ClipLoss(**options)
    result = {"equal": equal, "unequal": unequal, "sub-group": loss(*features)}
    result["copies"] = [clone(*features) for clone in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)))]
    result["sub-group siglip"] = SigLipLoss(**options)(*features)
    calls = {
        "world_size": lambda: ClipLoss(**{**options, "world_size": 3})(*features),
        "rank": lambda: ClipLoss(**{**options, "rank": 2 - rank})(*features),
        "width": lambda: ClipLoss(**options)(torch.zeros(2, 3 + rank), torch.zeros(2, 3 + rank), 1.0),
    }
    return result | {name: value_error_of(call) for name, call in calls.items()}


def value_error_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("the call raised no ValueError")


def test_three_ranks_and_sub_group_give_global_gradient():
    results = on_ranks(3, on_three)
    losses = open_clip_losses()
    assert_global([result["equal"] for result in results], (4, 4, 4), losses)
    assert_global([result["unequal"] for result in results], (5, 1, 7), losses)
    for rank, result in enumerate(results[1:]):
        torch.testing.assert_close(result["sub-group"], single_process((4, 3))[0])
        assert all(torch.equal(value, result["sub-group"]) for value in result["copies"])
        torch.testing.assert_close(result["sub-group siglip"], single_process((4, 3), reference.dense_siglip)[0])
        assert result["world_size"] == "ClipLoss has world_size=3, but the process group has 2 ranks"
        assert result["rank"] == f"ClipLoss has rank={1 - rank}, but this process is rank {rank} of the process group"
        assert f"ranks {rank} and {1 - rank} differ in their features' width or dtype" in result["width"]
