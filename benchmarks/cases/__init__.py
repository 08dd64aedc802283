"""The benchmark cases of every operator, for pytest-benchmark and `bclip bench`."""

from __future__ import annotations

import torch

from .attention import CAPTION_TOKENS, attention_case, varlen_case
from .case import (
    DEVICE,
    MORE,
    TINY,
    Case,
    Contender,
    Inputs,
    Unavailable,
    dtype_name,
    open_clip,
    peer,
    shared_data,
    with_gradients,
)
from .contrastive import contrastive_case, siglip_case
from .image import figures, image_case
from .matmul import linear_case
from .pointwise import norm_case

__all__ = [
    "CAPTION_TOKENS",
    "CASES",
    "DEVICE",
    "DTYPES",
    "MORE",
    "TINY",
    "Case",
    "Contender",
    "Inputs",
    "Unavailable",
    "figures",
    "open_clip",
    "peer",
    "shared_data",
    "with_gradients",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer_cases() -> list[Case]:
    """Return the cases of the towers' operators: attention, linear layers and norms."""
    images, captions = 16 * MORE, CAPTION_TOKENS * MORE
    tokens, heads, dim = (5, 1, 32) if TINY else (197, 12, 64)
    if TINY:
        images, captions = 2, [3, 1, 5]
    suffix = f"-batch-{images}" if MORE > 1 else ""
    return [
        *(
            case
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for dropout_p, ending in ((0.0, suffix), (0.1, f"{suffix}-dropout"))
            for case in (
                attention_case(
                    f"vit-b16-224-{dtype_name(dtype)}{ending}", images, tokens, heads, dim, dtype, dropout_p
                ),
                varlen_case(f"captions-{dtype_name(dtype)}{ending}", captions, heads, dim, dtype, dropout_p),
            )
        ),
        *(
            linear_case(images * tokens, *sizes)
            for sizes in ([(24, 16)] if TINY else [(768, 2304), (768, 768), (768, 3072), (3072, 768)])
        ),
        norm_case(images * tokens, 24 if TINY else 768, 0.0),
        norm_case(10 if TINY else 16 * 78 * MORE, 24 if TINY else 768, 0.1),
    ]


def loss_cases() -> list[Case]:
    """Return the cases of the contrastive losses."""
    sizes, width = ((40,), 24) if TINY else ((2048, 4096, 8192, 32768, 65536), 512)
    return [
        *(contrastive_case(batch, width, dtype) for dtype in DTYPES for batch in sizes),
        *(siglip_case(batch, width, dtype) for dtype in DTYPES for batch in sizes if batch != 2048),
    ]


CASES = [*layer_cases(), *loss_cases(), image_case(2 if TINY else 40)]
