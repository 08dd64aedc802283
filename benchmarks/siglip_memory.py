"""Peak memory of one rank for the sigmoid loss and its gradients: `python -m bclip_fast.benchmarks.siglip_memory`.

Each rank is a gloo process with one thread on this machine. The peak is resident memory beyond that before the loss,
which holds the features. So it counts everything: tensors, and buffers inside kernels and inside gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from bclip_fast.loss import SigLipLoss

from .measure import peak_extra_bytes


def peak_of_rank(rank: int, num_ranks: int, local_batch: int, width: int) -> int | None:
    """The peak in bytes of loss and gradients on this rank of an existing group. None: the system can't measure it."""
    generator = torch.Generator().manual_seed(rank)
    loss_fn = SigLipLoss(rank=rank, world_size=num_ranks)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)

    def run(rows: int) -> int | None:
        image, text = (
            torch.randn(rows, width, generator=generator).div_(width**0.5).requires_grad_() for _ in range(2)
        )
        return peak_extra_bytes(lambda: loss_fn(image, text, scale, bias).backward())[0]

    run(64)  # loads the kernels and connects the ranks
    return run(local_batch)


def _run(rank: int, num_ranks: int, local_batch: int, width: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=num_ranks)
    peak = peak_of_rank(rank, num_ranks, local_batch, width)
    Path(folder, f"{rank}.json").write_text(json.dumps(peak))
    dist.barrier()
    dist.destroy_process_group()


def measure(num_ranks: int, local_batch: int, width: int) -> int:
    """The largest peak of a rank in bytes, in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_run, (num_ranks, local_batch, width, folder), nprocs=num_ranks, start_method="spawn")
        return max(json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(num_ranks))


def main() -> None:
    """Print a line for each number of ranks, which divide one global batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32768, help="global batch")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for num_ranks in options.ranks:
        local_batch = options.batch // num_ranks
        peak = measure(num_ranks, local_batch, options.width)
        print(f"{num_ranks} ranks of {local_batch} pairs: {peak / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
