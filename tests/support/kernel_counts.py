"""The emulator's counts of the CUDA kernels: instructions, bank conflicts, sectors and bytes of each block.

`python tests/support/kernel_counts.py` writes benchmarks/results/kernel_counts.json, in about a minute. The bounds in
benchmarks/bounds use this file, and a test compares it with the emulator's counts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import cuda_emulator
import torch

from bclip_fast.ops import cuda_device
from bclip_fast.ops.attention import cuda as attention
from bclip_fast.ops.attention.call import AttentionCall
from bclip_fast.ops.contrastive import cuda as contrastive
from bclip_fast.ops.contrastive.call import ContrastiveCall, SoftmaxGradient
from bclip_fast.ops.contrastive.groups import GroupTile

ROOT = Path(__file__).parents[2]
FILE = ROOT / "benchmarks/results/kernel_counts.json"
KINDS = ("multiply", "ldmatrix", "exp2", "log2", "reciprocal", "shuffle", "warp_barrier", "block_barrier")
KINDS += ("shared_load", "shared_store", "copy", "global_load", "global_store")
SHARED = ("shared_load", "shared_store", "ldmatrix", "copy")
GLOBAL = ("global_load", "global_store", "copy")


@contextmanager
def emulated() -> Iterator[Any]:
    """Let the backend `cuda` of this process run on the emulator. Yields the emulator's module."""
    cached = cuda_device.cuda_module, cuda_device._cuda_device
    path = str(cuda_emulator.path()) if cuda_device.CUDA_HOST is None else cuda_device.CUDA_HOST
    with mock.patch.object(cuda_device, "CUDA_HOST", path):
        try:
            for function in cached:
                function.cache_clear()
            yield cuda_device.cuda_module()
        finally:
            for function in cached:
                function.cache_clear()


def counts(module: Any, call: Callable[[], object]) -> list[dict[str, Any]]:
    """The launches of `call`, as `counters.read()` of the emulator's module returns them."""
    module.counters.start()
    try:
        call()
    finally:
        module.counters.stop()
    return module.counters.read()


def source_of(operation: dict[str, Any]) -> str:
    """The line of source of an operation, without its indentation."""
    return _lines(operation["file"])[operation["line"] - 1].strip()


@functools.cache
def _lines(name: str) -> list[str]:
    (path,) = cuda_emulator.CUDA.rglob(name)
    return path.read_text().splitlines()


def features(rows: int, width: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width)).half()


def contrastive_call(rows: int, columns: int, width: int, grouped: bool = False) -> ContrastiveCall:
    ids = torch.arange(columns, dtype=torch.int32) // 2
    shares = torch.full((columns,), 0.1)
    groups = GroupTile(ids[:rows], ids, shares[:rows], shares) if grouped else None
    return ContrastiveCall(features(rows, width), features(columns, width), torch.tensor(20.0), 0, rows, groups=groups)


def contrastive_forward(call: ContrastiveCall) -> None:
    contrastive.forward(call)


def contrastive_softmax(call: ContrastiveCall) -> None:
    logits = call.scale * call.image.float() @ call.text.float().T
    grad = torch.ones(len(call.image))
    upstream = SoftmaxGradient(logits.logsumexp(1), logits.logsumexp(0), torch.tensor(1.0), grad)
    contrastive.backward(call, upstream, torch.float32)


def contrastive_sigmoid(call: ContrastiveCall) -> None:
    contrastive.siglip(call, 1.0, torch.float32, True)


def attention_call(lengths: list[int], dim: int, causal: bool = False, dropout: float = 0.0) -> AttentionCall:
    bounds = None
    if len(lengths) > 1:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv, seed = torch.randn(sum(lengths), 3, 1, dim).half(), torch.tensor(5) if dropout else None
    return AttentionCall(qkv, bounds, None, max(lengths), causal, dropout, seed, dim**-0.5)


def attention_forward(call: AttentionCall) -> None:
    # As in training, where there are enough sequences and heads for each block to process all queries of one.
    with mock.patch.object(attention, "FEW_BLOCKS", 1):
        attention.forward(call)


def attention_backward(call: AttentionCall) -> None:
    out = torch.randn_like(call.qkv[:, 0])
    attention.backward(call, torch.randn_like(out), out, torch.randn(out.shape[1], len(out)))


def image(height: int, width: int, size: int, dtype: torch.dtype) -> None:
    module = cuda_device.cuda_module()
    places = [(0, height, width)]
    plan, words, _ = module.plan_images(places, size, "center", 0, True)
    table, weights = torch.frombuffer(bytearray(plan), dtype=torch.uint8).clone(), torch.empty(words, dtype=torch.int32)
    pixels, out = torch.zeros(height * width * 3, dtype=torch.uint8), torch.empty(3 * size * size, dtype=dtype)
    addresses = [tensor.data_ptr() for tensor in (pixels, table, weights)]
    name = str(dtype).removeprefix("torch.")
    module.resize_images(*addresses, 1, size, True, [1.0] * 3, [0.0] * 3, out.data_ptr(), name, 0)


CONTRASTIVE = contrastive_forward, contrastive_softmax, contrastive_sigmoid
ATTENTION = attention_forward, attention_backward


def cases() -> dict[str, tuple[str, dict[str, Any], Callable[[], object]]]:
    """The cases of the file by name: the first letters of the kernel's name, the sizes, and the call."""
    found: dict[str, tuple[str, dict[str, Any], Callable[[], object]]] = {}
    for run in CONTRASTIVE:
        for width in (512, 1024):
            sizes = {"rows": 256, "columns": 256, "width": width}
            found[f"{run.__name__} 256x256x{width}"] = (
                run.__name__, sizes, lambda run=run, width=width: run(contrastive_call(256, 256, width)),
            )  # fmt: skip
    for run in ATTENTION:
        variants: list[tuple[list[int], int, bool, float]] = [([197], dim, False, 0.0) for dim in (32, 64, 96, 128)]
        variants += [([77], 64, True, 0.0), ([256], 64, False, 0.1), ([256, 130, 77], 64, False, 0.0)]
        for lengths, dim, causal, dropout in variants:
            sizes = {"lengths": lengths, "dim": dim, "causal": causal, "dropout": dropout}
            name = f"{run.__name__} {'+'.join(map(str, lengths))}x{dim}{' causal' if causal else ''}"
            found[name + (" dropout" if dropout else "")] = (
                run.__name__, sizes,
                lambda run=run, variant=(lengths, dim, causal, dropout): run(attention_call(*variant)),
            )  # fmt: skip
    # The scale of 480 x 360 to 224, and a tall image, whose columns are resized first.
    for height, width in ((77, 103), (400, 100)):
        for dtype in (torch.uint8, torch.float16):
            sizes = {"height": height, "width": width, "size": 48}
            call = functools.partial(image, height, width, 48, dtype)
            kind = str(dtype).removeprefix("torch.")
            found[f"image_resize {width}x{height} to 48 {kind}"] = "image_resize", sizes, call
    found["image_weigh 103x77 to 48"] = "image_weigh", sizes, functools.partial(image, 77, 103, 48, torch.uint8)
    return found


def tile_totals(tile: dict[str, Any]) -> dict[str, Any]:
    """The counts of a block by kind, without those that are zero."""
    totals: dict[str, Any] = {"blocks": len(tile["blocks"]), "example": tile["blocks"][0]}
    totals |= _sums(tile, KINDS, "instructions")
    for name, kinds in [("wavefronts", SHARED), ("least_wavefronts", SHARED), ("sectors", GLOBAL), ("bytes", GLOBAL)]:
        totals[name] = _sums(tile, kinds, name)
    return totals


def _sums(tile: dict[str, Any], kinds: tuple[str, ...], name: str) -> dict[str, int]:
    sums = {kind: sum(one[name] for one in tile["operations"] if one["kind"] == kind) for kind in kinds}
    return {kind: value for kind, value in sums.items() if value}


def launches() -> dict[str, dict[str, Any]]:
    """The counted launch of each case."""
    found = {}
    with emulated() as module:
        for name, (kernel, _, call) in cases().items():
            (found[name],) = [one for one in counts(module, call) if one["kernel"].startswith(kernel)]
    return found


def record(launches: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of the file."""
    result: dict[str, Any] = {}
    for name, (_, sizes, _) in cases().items():
        launch = launches[name]
        result[name] = {
            "kernel": launch["kernel"],
            "call": sizes,
            "threads": launch["threads"],
            "shared_bytes": launch["shared_bytes"],
            "blocks": launch["blocks"],
            "tiles": [tile_totals(tile) for tile in launch["tiles"]],
        }
    return result


def text_of(record: dict[str, Any]) -> str:
    """The text of the file. Each tile is a line."""
    cases = []
    for name, case in record.items():
        head = json.dumps({key: value for key, value in case.items() if key != "tiles"})
        tiles = ",\n".join("  " + json.dumps(tile) for tile in case["tiles"])
        cases.append(f'{json.dumps(name)}: {head[:-1]}, "tiles": [\n{tiles}]}}')
    return "{\n" + ",\n".join(cases) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text_of(record(launches())))
