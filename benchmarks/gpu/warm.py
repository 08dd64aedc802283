"""Import slow modules and start the GPU, so that no later step waits for a cold disk or for the GPU's start.

It runs beside the build and therefore imports nothing of the package.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib

MODULES = ("torch", "triton", "numpy", "PIL.Image", "pytest", "torch._dynamo", "torch.distributed", "rich.table")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    print("torch", torch.__version__, "CUDA", torch.version.cuda, flush=True)
    square = torch.ones(64, 64, device=device)
    half = (square @ square).half()
    print("64 x 64 products:", float((half @ half)[0, 0]), flush=True)
    if device == "cuda":
        print(torch.cuda.get_device_name(), torch.cuda.mem_get_info(), flush=True)
        torch.nn.functional.scaled_dot_product_attention(*(half.view(1, 1, 64, 64),) * 3)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
