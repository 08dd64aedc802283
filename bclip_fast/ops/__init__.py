"""The operators, each with a reference that defines it and backends that are chosen in `dispatch`."""

from . import image
from .attention import fused_attention, varlen_attention
from .contrastive import clip_loss, siglip_loss
from .dispatch import BACKENDS, BackendError, use_backend

__all__ = [
    "BACKENDS",
    "BackendError",
    "clip_loss",
    "fused_attention",
    "image",
    "siglip_loss",
    "use_backend",
    "varlen_attention",
]
