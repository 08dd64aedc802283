"""The losses on a simulated GPU: on one rank and over two ranks, the host neither reads nor copies anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fake_cuda import CUDA, FakeCuda, fake_cuda
from ranks import on_ranks

from bclip_fast import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from bclip_fast.ops.dispatch import use_backend

SIZES = (5, 3)
LOSSES: dict[str, Any] = {
    "clip": lambda **ranks: ClipLoss(**ranks),
    "smoothed clip": lambda **ranks: ClipLoss(label_smoothing=0.1, **ranks),
    "siglip": lambda **ranks: SigLipLoss(**ranks),
    "smoothed siglip": lambda **ranks: SigLipLoss(label_smoothing=0.1, **ranks),
    "distill": lambda **ranks: DistillClipLoss(**ranks),
    "coca": lambda **ranks: CoCaLoss(1.0, 1.0, **ranks),
    "captions only": lambda **ranks: CoCaLoss(1.0, 0.0, **ranks),
}


def inputs(name: str, rows: slice, device: torch.device) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    """The leaves image, text and logit scale, and the further arguments of a loss."""
    generator = torch.Generator().manual_seed(0)
    image, text, *teacher = (
        F.normalize(torch.randn(sum(SIZES), 16, generator=generator), dim=-1)[rows].to(device) for _ in range(4)
    )
    leaves = [tensor.requires_grad_() for tensor in (image, text, torch.tensor(20.0).to(device))]
    if name == "distill":
        return leaves, (*teacher, torch.tensor(10.0).to(device))
    if name in ("coca", "captions only"):
        logits = torch.randn(sum(SIZES), 4, 7, generator=generator)[rows].to(device)
        return leaves, (logits.requires_grad_(), torch.arange(1, 5).expand(sum(SIZES), 4)[rows].to(device))
    return leaves, (torch.tensor(-5.0).to(device),) if "siglip" in name else ()


def results(name: str, rows: slice, device: torch.device, fake: FakeCuda | None, **ranks: int) -> list[torch.Tensor]:
    """The losses and the gradients that exist, on the CPU. Check the transfers of the simulated GPU."""
    leaves, extra = inputs(name, rows, device)
    loss = LOSSES[name](**ranks)
    # The choice of backends asks for the properties of the GPU.
    loss._backends_shared = True
    if fake is not None:
        fake.clear()
    # CoCaLoss takes the captions before the logit scale.
    arguments = (*leaves[:2], *extra, leaves[2]) if isinstance(loss, CoCaLoss) else (*leaves, *extra)
    values = loss(*arguments)
    values = values if isinstance(values, tuple) else (values,)
    sum(values).backward()
    if fake is not None:
        assert fake.transfers == [], name
    assert all(value.device == device for value in values)
    return [tensor.detach().cpu() for tensor in (*values, *(leaf.grad for leaf in leaves)) if tensor is not None]


def compare(names: list[str], rows: slice, **ranks: int) -> dict[str, bool]:
    """Whether the results on the simulated GPU equal those on the CPU, by loss."""
    equal = {}
    with use_backend("reference"):
        for name in names:
            expected = results(name, rows, torch.device("cpu"), None, **ranks)
            with fake_cuda() as fake:
                actual = results(name, rows, CUDA, fake, **ranks)
            equal[name] = len(actual) == len(expected) and all(map(torch.equal, actual, expected))
    return equal


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_one_rank_reads_nothing(name: str) -> None:
    assert compare([name], slice(None)) == {name: True}


def two_ranks(rank: int) -> dict[str, bool]:
    rows = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    return compare(list(LOSSES), rows, rank=rank, world_size=2)


def test_losses_of_two_ranks_read_nothing() -> None:
    """The ranks' batch sizes travel in tensors on the CPU, which gloo sends beside NCCL."""
    assert on_ranks(2, two_ranks) == [dict.fromkeys(LOSSES, True)] * 2


def with_gpu_only_group(rank: int) -> list[str]:
    """The kinds of transfers if the group has no backend for CPU tensors."""
    group = dist.group.WORLD
    assert group is not None
    config = dist.distributed_c10d._world.pg_backend_config
    config[group] = dist.BackendConfig(dist.Backend("cuda:gloo"))
    with use_backend("reference"), fake_cuda() as fake:
        leaves, _ = inputs("clip", slice(0, 4), CUDA)
        loss = ClipLoss(rank=rank, world_size=2)
        loss._backends_shared = True
        fake.clear()
        loss(*leaves)
        return sorted({transfer.kind for transfer in fake.transfers})


def test_group_without_cpu_backend_sends_batch_sizes_through_gpu() -> None:
    """A program that uses our losses may have created a group of NCCL only."""
    assert on_ranks(2, with_gpu_only_group) == [["read", "to device"]] * 2
