"""Memory of one rank for the sigmoid loss and its gradients: `python -m benchmarks.siglip_memory`.

Each rank is a process of gloo on this machine. The peak is that of the tensors that torch's operators allocate in the
loss and its backward pass, in bytes, without the features themselves. Buffers inside gloo and our kernels don't count.
One table keeps the global batch, the other one the batch of a rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from bclip_fast.loss import SigLipLoss
from bclip_fast.plan.activations import MemoryMeter


def peak_of_rank(rank: int, num_ranks: int, local_batch: int, width: int) -> int:
    """The peak in bytes of the loss and its gradients on this rank of an existing group."""
    generator = torch.Generator().manual_seed(rank)
    features = [torch.randn(local_batch, width, generator=generator).div_(width**0.5) for _ in range(2)]
    image, text = (tensor.requires_grad_() for tensor in features)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    loss_fn = SigLipLoss(rank=rank, world_size=num_ranks)
    with MemoryMeter(loss_fn, image, text, scale, bias) as meter:
        loss_fn(image, text, scale, bias).backward()
    return meter.peak


def _run(rank: int, num_ranks: int, local_batch: int, width: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=num_ranks)
    peak = peak_of_rank(rank, num_ranks, local_batch, width)
    Path(folder, f"{rank}.json").write_text(json.dumps(peak))
    dist.barrier()
    dist.destroy_process_group()


def measure(num_ranks: int, local_batch: int, width: int) -> int:
    """The largest peak of a rank, in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_run, (num_ranks, local_batch, width, folder), nprocs=num_ranks, start_method="spawn")
        return max(json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(num_ranks))


def main() -> None:
    """Print a line for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32768, help="global batch")
    parser.add_argument("--local", type=int, default=8192, help="batch of a rank in the second table")
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    for name, local_of in (
        ("global batch", lambda ranks: options.batch // ranks),
        ("local batch", lambda ranks: options.local),
    ):
        for num_ranks in (1, 2, 4):
            local = local_of(num_ranks)
            peak = measure(num_ranks, local, options.width)
            print(f"{name}: {num_ranks} ranks, b={local}, B={local * num_ranks}: {peak / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
