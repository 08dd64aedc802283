"""The interface of open_clip's losses, and copies of ours."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from losses import open_clip_losses

import bclip_fast
from bclip_fast import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss

NAMES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")
SCALE = torch.tensor(20.0)


def features():
    generator = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(4, 6, 8, generator=generator), dim=-1)


def value_of(loss):
    image, text, *teacher = features()
    if isinstance(loss, DistillClipLoss):
        return sum(loss(image, text, SCALE, *teacher, SCALE))
    if isinstance(loss, CoCaLoss):
        return sum(loss(image, text, torch.zeros(6, 2, 3), torch.ones(6, 2, dtype=torch.int64), SCALE))
    return loss(image, text, SCALE, torch.tensor(-1.0))


def make(name, **options):
    return getattr(bclip_fast, name)(*((1.0, 1.0) if name == "CoCaLoss" else ()), **options)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_begin_with_open_clips(name):
    theirs = getattr(open_clip_losses() or pytest.skip("open_clip is not installed"), name)
    ours = getattr(bclip_fast, name)
    for method in ("__init__", "forward", "get_logits", "get_ground_truth", "dist_loss"):
        if not hasattr(theirs, method):
            continue
        mine, peers = (list(inspect.signature(getattr(kind, method)).parameters.values()) for kind in (ours, theirs))
        for our, their in zip(mine, peers, strict=False):
            assert (our.name, our.kind) == (their.name, their.kind), f"{name}.{method}"
            # Our logit_bias is optional.
            assert our.default == their.default or their.default is their.empty, f"{name}.{method}({our.name})"
        assert len(mine) >= len(peers)


@pytest.mark.parametrize("name", NAMES)
def test_world_size_0_is_a_single_process(name):
    loss = make(name, rank=0, world_size=0)
    assert torch.equal(value_of(loss), value_of(make(name)))
    assert loss.world_size == 0
    if isinstance(loss, ClipLoss):
        assert torch.equal(loss.get_ground_truth("cpu", 3), torch.arange(3))
        logits = loss.get_logits(*features()[:2], SCALE)
        torch.testing.assert_close(*(part.diagonal() for part in logits))


def test_negative_world_size_is_refused():
    with pytest.raises(ValueError, match="world_size=-1 must be the number of ranks"):
        ClipLoss(world_size=-1)


OPTIONS = [
    {}, {"chunk_size": 3, "deterministic": True}, {"operand_dtype": torch.bfloat16}, {"backend": "reference"},
    {"rank": 1, "world_size": 2}, {"cache_labels": True},
]  # fmt: skip


def copies_of(loss):
    saved = io.BytesIO()
    torch.save(loss, saved)
    saved.seek(0)
    return [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(saved, weights_only=False)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_copied_before_and_after_a_step(name, options):
    loss = make(name, **options)
    single = "world_size" not in options
    for _ in range(2):
        for clone in copies_of(loss):
            clone.load_state_dict(loss.state_dict())
            assert {key: getattr(clone, key) for key in options} == options
            assert set(vars(clone)) == set(vars(loss))
            if single:
                assert torch.equal(value_of(clone), value_of(loss))
            else:
                with pytest.raises(ValueError, match="has world_size=2, but the process group has 1 ranks"):
                    value_of(clone)
        if isinstance(loss, ClipLoss):
            loss.get_ground_truth("cpu", 4)
        # The trainer sets this for half-precision towers.
        loss.operand_dtype = options.get("operand_dtype")


@pytest.mark.parametrize("make_loss", [lambda: ClipLoss(label_smoothing=0.1), lambda: ClipLoss(hardness=2.0)])
def test_options_of_clip_loss_are_copied(make_loss):
    loss = make_loss()
    for clone in copies_of(loss):
        assert torch.equal(value_of(clone), value_of(loss))
    assert copy.deepcopy(SigLipLoss(dist_impl="shift", label_smoothing=0.2)).label_smoothing == 0.2


def test_missing_process_group_of_a_loaded_loss_is_named():
    loss = ClipLoss()
    with pytest.raises(ValueError, match=r"ClipLoss was saved with the process group 'images'.* create the groups"):
        ClipLoss.__new__(ClipLoss).__setstate__({**loss.__getstate__(), "process_group": "images"})
