"""The operators, each with a reference that defines it and backends that are chosen in `dispatch`."""

from ..errors import BackendError
from . import image
from .attention import fused_attention, pooled_attention, varlen_attention
from .contrastive import clip_loss, siglip_loss
from .dispatch import BACKENDS, use_backend
from .matmul import linear
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
    "pooled_attention",
    "siglip_loss",
    "use_backend",
    "varlen_attention",
]
