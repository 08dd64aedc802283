"""The kernels of torch's scaled_dot_product_attention, by name: their limits, and calls that take no other kernel.

The limits hold for torch 2.6 to 2.13 (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). A newer release can do
more. torch checks each call again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bclip_fast.errors import BackendError
from bclip_fast.ops.cuda_device import compute_capability

# torch's names of the kernels.
KERNELS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# The largest head dimension of each kernel, forward and backward, on every GPU from sm_80 on. On sm_86, sm_89 and
# sm_120, the flash kernel has no backward pass above 192.
_HEAD_DIM = {"sdpa_cudnn": 128, "sdpa_flash": 192, "sdpa_efficient": 256}


def refusal(
    kernel: str,
    qkv: Tensor,
    dropout_p: float = 0.0,
    packed: bool = False,
    masked: bool = False,
    tokens: int | None = None,
) -> str | None:
    """The reason why a kernel cannot take qkv (..., d), or None.

    Args:
        packed: whether sequences of different lengths are packed.
        masked: whether there is a key mask.
        tokens: length of the longest sequence. None: not known.
    """
    if dropout_p > 0.0:
        return "torch's dropout cannot drop the weights that `seed` selects"
    if qkv.device.type != "cuda":
        return f"device is {qkv.device.type}, not cuda"
    if torch.version.hip is not None:
        return "torch is built for ROCm, where its kernels have other limits"
    dtypes = (torch.float16, torch.bfloat16, *((torch.float32,) if kernel == "sdpa_efficient" else ()))
    if qkv.dtype not in dtypes:
        return f"takes {', '.join(map(str, dtypes))}, not {qkv.dtype}"
    if compute_capability(qkv.device.index or 0) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    dim = qkv.shape[-1]
    if dim % 8 or dim > _HEAD_DIM[kernel]:
        return f"d={dim} is not a multiple of 8 up to {_HEAD_DIM[kernel]}"
    if kernel == "sdpa_flash" and masked:
        return "it takes no key mask"
    if kernel == "sdpa_cudnn":
        return _cudnn_refusal(tokens)
    return None


def _cudnn_refusal(tokens: int | None) -> str | None:
    if not torch.backends.cudnn.is_available():
        return "torch has no cuDNN"
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "cuDNN's backward pass is not deterministic, and torch.use_deterministic_algorithms is on"
    if tokens == 1:
        return "cuDNN takes no sequence of one token"
    return None


LIMITS: dict[str, Callable[..., str | None]] = {kernel: partial(refusal, kernel) for kernel in KERNELS}


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, backend: str
) -> Tensor:
    """scaled_dot_product_attention by the kernel `backend`, or by torch's choice if it is "torch".

    Raises:
        BackendError: torch refuses the kernel for this call.
    """
    call = partial(F.scaled_dot_product_attention, query, key, value, mask, is_causal=causal, scale=scale)
    if backend not in KERNELS:
        return call()
    try:
        with sdpa_kernel(KERNELS[backend]):
            return call()
    except RuntimeError as error:
        if "available kernel" not in str(error) and "viable backend" not in str(error):
            raise
        message = f"attention cannot run: {backend}: torch {torch.__version__} refuses this call; its warnings say why"
        raise BackendError(message) from error
