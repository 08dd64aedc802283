"""The machine code for sm_90 of the contrastive Triton kernels that read pointers, which Triton before 3.4 launches.

Tensor cores of sm_90 take 64 rows at a time. test_triton_descriptors.py has the kernels of newer versions.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from interpreter import compiled
from resources import TYPES, compiled_resources

from bclip_fast.ops.contrastive.gpu_tiles import GRADIENT_SCALE

triton = pytest.importorskip("triton")
configuration = pytest.importorskip("bclip_fast.ops.contrastive.triton").configuration
kernels = pytest.importorskip("bclip_fast.ops.contrastive.triton_kernels")

WIDTH = 512
IDS, SHARES = ["row_ids", "column_ids"], ["row_shares", "column_shares"]
# Kernel, whether with groups, and the columns of each multiplication. The softmax's gradient with groups has tiles of
# 64 rows, so its groups of warps divide the columns.
CASES = [
    ("_forward_kernel", False, 128),
    ("_siglip_kernel", True, 128),
    ("_backward_kernel", False, 128),
    ("_backward_kernel", True, 64),
    ("_siglip_kernel", False, 128),
]


@compiled
@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "grouped", "columns"), CASES)
def test_kernels_on_sm_90_multiply_the_widest_tiles_without_spills(name, grouped, columns, dtype, tmp_path):
    """64 x 128 x 16 reads a quarter less of shared memory for each product than 64 x 64 x 16."""
    kernel = getattr(kernels, name)
    options = configuration(dtype, WIDTH, grouped and name == "_backward_kernel", (9, 0))
    constants = {**options, "HAS_POSITIVES": not grouped, "WITH_GRADIENTS": True, "GRADIENT_SCALE": GRADIENT_SCALE}
    constants |= {} if grouped else dict.fromkeys(IDS + SHARES)
    compiler = {"num_warps", "num_stages", "enable_fp_fusion"}
    constants = {key: value for key, value in constants.items() if key in compiler or key in kernel.arg_names}
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(IDS, "*i32") | {"grad": "*fp16"}
    types |= dict.fromkeys(["image", "text"], f"*{TYPES[dtype]}")
    types |= dict.fromkeys(["row_partials", "column_partials"], "*fp64")
    types |= dict.fromkeys(["num_rows", "num_columns", "grad_stride", "first"], "i32")
    assert compiled_resources(kernel, types, constants, 90, tmp_path).spilled == 0
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    cubin = tmp_path / "kernel.cubin"
    code = subprocess.run([program, "-c", cubin], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\b(H\w*MMA\.\w+)", code)) == {f"HGMMA.64x{columns}x16"}
