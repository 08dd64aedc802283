"""The kernels of the losses for Hopper against those for all GPUs, with other tiles: emulated, and on a Hopper GPU."""

from __future__ import annotations

from pathlib import Path

import cuda_emulator
import pytest
import torch
from cuda_emulator import hosted, outside
from inside import num_passed
from judged import assert_close, features

from bclip_fast.errors import BackendError
from bclip_fast.ops.contrastive import cuda
from bclip_fast.ops.contrastive.call import ContrastiveCall, SoftmaxGradient
from bclip_fast.ops.cuda_device import hopper_refusal

DTYPES = [torch.float16, torch.bfloat16]


@outside
def test_both_sets_of_kernels_agree_on_the_host():
    assert num_passed([Path(__file__).name], "cuda", **cuda_emulator.environment()) == len(DTYPES) * 4


@pytest.fixture
def by_both(monkeypatch):
    """A function that calls another with the kernels for Hopper, then with those for all GPUs."""
    monkeypatch.setenv("BCLIP_HOPPER", "1")
    try:
        assert hopper_refusal(torch.empty(0).device) is None
    except BackendError as error:
        pytest.skip(str(error))

    def call(function):
        results = []
        for variable in ("1", "0"):
            monkeypatch.setenv("BCLIP_HOPPER", variable)
            results.append(function())
        return results

    return call


@hosted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "width", "scale"),
    # A ragged tile, a complete one, several with ragged edges, and logits from -90 to 100.
    [(37, 70, 40, 14.3), (128, 256, 64, 20.0), (200, 300, 72, 50.0), (130, 260, 31, 100.0)],
)
def test_both_sets_of_cuda_kernels_agree(by_both, dtype, rows, columns, width, scale, nan_filled):
    direction = features(1, width, dtype)
    image, text = (
        torch.cat(
            [features(count - count // 3, width, dtype, direction), features(count // 3, width, dtype, -direction)]
        )
        for count in (rows, columns)
    )
    call = ContrastiveCall(image, text, torch.tensor(scale), 3, 1024, bias=torch.tensor(-2.0))
    hopper, general = by_both(lambda: cuda.forward(call))
    assert_close(hopper, general, 1e-6)
    upstream = SoftmaxGradient(*general, torch.tensor(0.1), torch.full((rows,), -0.5))
    # G is rounded to float16, in which equal numbers may have other neighbours.
    assert_close(*by_both(lambda: cuda.backward(call, upstream, torch.float32)), 3e-4)
    assert_close(*by_both(lambda: cuda.siglip(call, 0.1, torch.float32, True)), 3e-4)
