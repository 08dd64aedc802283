"""The benchmark cases of every operator, for pytest-benchmark and `bclip bench`."""

from __future__ import annotations

import torch

from .attention import CAPTION_TOKENS, attention_case, varlen_case
from .case import DEVICE, Case, Contender, Inputs, Unavailable, open_clip, peer, shared_data, with_gradients
from .contrastive import contrastive_case, siglip_case
from .image import figures, image_case
from .matmul import linear_case
from .pointwise import norm_case

__all__ = [
    "CASES",
    "DEVICE",
    "DTYPES",
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

DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    *(
        case
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
        for dropout_p, suffix in ((0.0, ""), (0.1, "-dropout"))
        for case in (
            attention_case(f"vit-b16-224-{short}{suffix}", 16, 197, 12, 64, dtype, dropout_p),
            varlen_case(f"captions-{short}{suffix}", CAPTION_TOKENS, 12, 64, dtype, dropout_p),
        )
    ),
    *(contrastive_case(batch, 512, dtype) for dtype in DTYPES for batch in (2048, 4096, 8192, 32768, 65536)),
    *(siglip_case(batch, 512, dtype) for dtype in DTYPES for batch in (4096, 8192, 32768, 65536)),
    *(linear_case(16 * 197, *sizes) for sizes in ((768, 2304), (768, 768), (768, 3072), (3072, 768))),
    norm_case(16 * 197, 768, 0.0),
    norm_case(16 * 78, 768, 0.1),
    image_case(40),
]
