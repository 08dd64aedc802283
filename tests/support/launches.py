"""Types and constants of our Triton kernels in a model: arguments for `resources`, without tensors.

Each function returns (kernel, types of its arguments, constants and options). An argument without a type is an i32.
"""

from __future__ import annotations

from typing import Any

import torch
from resources import TYPES

Launch = tuple[Any, dict[str, str], dict[str, Any]]

ATTENTION_KERNELS = ["_row_forward", "_row_backward", "_block_forward", "_query_backward", "_key_backward"]
ATTENTION_VARIANTS = {
    "images": {"CAUSAL": False, "DROPOUT": False, "cu_seqlens": None, "key_mask": None, "seed": None},
    "images with dropout": {"CAUSAL": False, "DROPOUT": True, "cu_seqlens": None, "key_mask": None},
    "captions": {"CAUSAL": False, "DROPOUT": True, "key_mask": None},
    "masks": {"CAUSAL": True, "DROPOUT": True, "cu_seqlens": None},
}
CONTRASTIVE_VARIANTS = {
    "_forward_kernel": {"HAS_POSITIVES": True},
    "_backward_kernel": {"HAS_POSITIVES": True},
    "_siglip_kernel": {"HAS_POSITIVES": True, "WITH_GRADIENTS": True},
    "_backward_kernel of groups": {"HAS_POSITIVES": False},
    "_siglip_kernel of groups": {"HAS_POSITIVES": False, "WITH_GRADIENTS": True},
}
_GROUPS = ["row_ids", "column_ids", "row_shares", "column_shares"]


def attention(name: str, dtype: torch.dtype, dim: int, max_seqlen: int, variant: str) -> Launch:
    """name: one of ATTENTION_KERNELS. variant: a key of ATTENTION_VARIANTS."""
    from bclip_fast.ops.attention import triton, triton_kernels

    kernel = getattr(triton_kernels, name + "_kernel")
    constants = {**triton.configuration(name, dtype, dim, max_seqlen), "HEADS": 12}
    constants |= {arg: value for arg, value in ATTENTION_VARIANTS[variant].items() if arg in kernel.arg_names}
    types = dict.fromkeys(["qkv", "out", "grad_out", "grad_qkv"], f"*{TYPES[dtype]}")
    types |= {"cu_seqlens": "*i32", "key_mask": "*u8", "seed": "*i64", "lse": "*fp32", "delta": "*fp32"}
    return kernel, types | {"keep_scale": "fp32", "scale": "fp32"}, constants


def single_query(name: str, dtype: torch.dtype, dim: int) -> Launch:
    from bclip_fast.ops.attention.single_query import triton

    types = dict.fromkeys(["query", "key_value", "out", "grad_out", "query_grad", "grad"], f"*{TYPES[dtype]}")
    types |= {"rows": "*i64", "cu_seqlens": "*i32", "seed": "*i64", "lse": "*fp32"}
    constants = {"CAUSAL": True, "DROPOUT": True, "HEADS": 12, **triton.configuration(dim)}
    return getattr(triton, name), types | {"keep_scale": "fp32", "scale": "fp32"}, constants


def contrastive(name: str, dtype: torch.dtype, width: int, capability: int) -> Launch:
    """name: a key of CONTRASTIVE_VARIANTS, or "_redo_kernel" on sm_90. capability: 90 for sm_90."""
    from bclip_fast.ops.contrastive import gpu_tiles, triton, triton_kernels, triton_tma_gradients, triton_tma_kernels

    short, pair = name.split()[0], divmod(capability, 10)
    descriptors = triton.takes_descriptors(dtype, pair)
    if descriptors:
        kernel = getattr(triton_tma_gradients, short, None) or getattr(triton_tma_kernels, short)
        constants = triton.descriptor_configuration(width)
    else:
        kernel = getattr(triton_kernels, short)
        # As in triton.py, SigLIP takes the same half tile at widths that are not multiples of 64.
        grouped = name == "_backward_kernel of groups" or ("siglip" in name and width % 64 != 0)
        constants = triton.configuration(dtype, width, grouped, pair)
    constants = constants | CONTRASTIVE_VARIANTS.get(name, triton.REDO)
    absent = () if name.endswith("groups") else tuple(_GROUPS)
    constants |= {argument: None for argument in absent if argument in kernel.arg_names}
    if "GRADIENT_SCALE" in kernel.arg_names:
        constants["GRADIENT_SCALE"] = 1.0 if dtype == torch.float32 else gpu_tiles.GRADIENT_SCALE
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(_GROUPS[:2], "*i32")
    types |= {"image": f"*{TYPES[dtype]}", "text": f"*{TYPES[dtype]}", "votes": "*i8"}
    types |= dict.fromkeys(["row_partials", "column_partials"], "*fp64")
    types |= dict.fromkeys(["rows_lse", "columns_lse"], "*fp64" if dtype == torch.float32 else "*fp32")
    types |= {"grad": "*fp32" if dtype == torch.float32 else "*fp16"}
    if descriptors:
        path = triton.Path(True, constants)
        shapes = zip(("image", "text", "grad"), (dtype, dtype, torch.float16), path.blocks, strict=True)
        types |= {matrix: f"tensordesc<{TYPES[kind]}{list(block)}>" for matrix, kind, block in shapes}
    # Batches are multiples of 16. Without this number, the compiler takes other registers.
    types |= dict.fromkeys(["num_rows", "num_tiles", "grad_stride", "first"], "i32") | {"num_columns": "i32:16"}
    return kernel, types, constants


def add_norm(name: str, dim: int) -> Launch:
    """The post-norm text tower has a float32 stream, a bfloat16 branch, dropout, and uses both results."""
    from bclip_fast.ops.pointwise import triton

    kernel = getattr(triton, name)
    types = dict.fromkeys(kernel.arg_names, "*fp32")
    types |= dict.fromkeys(["branch", "normed", "grad", "branch_grad"], "*bf16")
    types |= {"seed": "*i64", "threshold": "i32", "num_rows": "i32", "keep_scale": "fp32", "eps": "fp32"}
    return kernel, types, {**triton.configuration(dim), "DROPOUT": True}


def gelu(name: str) -> Launch:
    from bclip_fast.ops.pointwise import triton

    types = {**dict.fromkeys(["x", "out", "grad"], "*bf16"), "size": "i32:16"}
    return getattr(triton, name), types, dict(triton.GELU)
