"""torch's attention kernels on a GPU, each named as a backend. test_sdpa.py tests their calls and limits on a CPU."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import ON_GPU

from bclip_fast.ops import trials
from bclip_fast.ops.attention import sdpa_kernels

DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")


# On a CPU torch chooses the kernel. So a rehearsal of `make gpu` runs this test, too.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ["fused_attention", "varlen_attention"])
@pytest.mark.parametrize("kernel", sdpa_kernels.KERNELS if ON_GPU else ["torch"])
def test_kernel_of_a_gpu_agrees_with_the_definition(kernel, operator, dtype):
    """Dense, causal, masked and packed calls, with gradients."""
    assert any(trial.operator == operator for trial in trials.small(DEVICE, dtype))
    assert trials.check(operator, kernel, DEVICE, dtype)[0] == ""
