"""The operators. A reference defines each operator, and `dispatch` chooses the backend of each call."""

from bclip_fast.errors import BackendError

from . import image
from .attention import fused_attention, single_query_attention, varlen_attention
from .contrastive import clip_loss, siglip_loss
from .dispatch import BACKENDS, use_backend
from .matmul import linear
from .matmul.activated import linear_gelu
from .pointwise import add_norm, gelu

__all__ = [
    "BACKENDS",
    "BackendError",
    "add_norm",
    "clip_loss",
    "fused_attention",
    "gelu",
    "image",
    "linear",
    "linear_gelu",
    "siglip_loss",
    "single_query_attention",
    "use_backend",
    "varlen_attention",
]
