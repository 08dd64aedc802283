"""Tests of the check that a GPU kernel must pass before its first use."""

from __future__ import annotations

import os

import pytest
import torch
from records import gelu_backend, half_off

from bclip_fast import ops
from bclip_fast.doctor import backends as doctor
from bclip_fast.ops import dispatch, trial_cases, trials, tuning

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("fresh_records")


def failing(x):
    raise RuntimeError("PTX of an unknown version\nand more")


def test_correct_kernel_is_checked_once_and_used(triton_gelu, caplog):
    x = torch.randn(4, 4)
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ops.gelu(x)
    checked = triton_gelu.calls
    assert checked > 1 and torch.equal(torch.get_rng_state(), state)
    ops.gelu(x)
    assert triton_gelu.calls == checked + 1 and not caplog.messages
    # The next process reads the result of the check from the cache.
    tuning.reset()
    ops.gelu(x)
    assert triton_gelu.calls == checked + 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"forward": half_off}, "the result of 37 x 136 float32 has a relative error of"),
        ({"factor": 1.001}, "gradient 0 of 37 x 136 float32 has a relative error of"),
        ({"forward": lambda x: x.float() * float("nan")}, "error of nan"),
        ({"forward": failing}, "RuntimeError: PTX of an unknown version"),
    ],
    ids=["forward", "gradient", "nan", "raises"],
)
def test_wrong_kernel_is_not_used_and_warns_once(triton_gelu, caplog, fault, words):
    vars(triton_gelu).update(fault)
    x = torch.randn(4, 4)
    for _ in range(3):
        assert torch.equal(ops.gelu(x), ops.gelu(x, backend="cpu"))
    (line,) = caplog.messages
    assert line.startswith("gelu in float32 fails its check on ") and "with the backend triton" in line
    assert words in line and "bclip doctor" in line
    assert any("not triton: fails its check on this device" in line or words in line for line in doctor.lines())
    # The record keeps the result, so neither the check nor the warning comes again.
    calls = triton_gelu.calls
    tuning.reset()
    ops.gelu(x)
    assert triton_gelu.calls == calls and len(caplog.messages) == 1
    # A named backend is used without a check.
    if "factor" in fault:
        assert ops.gelu(x, backend="triton").isfinite().all() and triton_gelu.calls == calls + 1


def test_check_out_of_memory_is_repeated_later(triton_gelu, caplog):
    def out_of_memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    triton_gelu.forward = out_of_memory
    ops.gelu(torch.randn(4))
    assert "out of memory" in caplog.text
    triton_gelu.forward = torch.nn.functional.gelu
    tuning.reset()
    assert gelu_backend() == "triton"


def test_tuning_off_kernel_is_used_unchecked(triton_gelu, monkeypatch):
    monkeypatch.setenv("BCLIP_TUNE", "off")
    tuning.reset()
    triton_gelu.forward = half_off
    x = torch.randn(4, 4)
    assert torch.equal(ops.gelu(x), half_off(x)) and triton_gelu.calls == 1


def test_compiled_call_checks_kernel_once(triton_gelu, caplog):
    triton_gelu.forward = half_off
    torch._dynamo.reset()
    compiled = torch.compile(ops.gelu, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5)
    assert torch.equal(compiled(x), ops.gelu(x, backend="cpu"))
    assert len([line for line in caplog.records if line.name.startswith("bclip_fast")]) == 1


def test_every_backend_here_passes_its_checks():
    small = [trial for dtype in trial_cases.dtypes(CPU) for trial in trial_cases.small(CPU, dtype)]
    for trial in small:
        refusals = trial.decide().refusals
        # Without vector instructions, torch's own attention errs more, and `bclip tune` rejects it.
        rejected = {"torch"} if os.environ.get("ATEN_CPU_CAPABILITY") == "default" else set()
        names = [name for name in dispatch.BACKENDS if name not in refusals and name not in rejected]
        faults = {name: trials.fault_of(trial, name) for name in names}
        assert not any(faults.values()), (trial.operator, faults)


def test_call_that_the_limits_refuse_is_no_fault():
    """For example, a kernel without masks still passes the check of calls without a mask."""
    (masked,) = (trial for trial in trial_cases.small(CPU, torch.float32) if "mask" in trial.what)
    assert masked.operator == "fused_attention"
    assert trials.fault_of(masked, "sdpa_flash") == ""
    assert trials.fault_of(masked, "torch") == ""
    with pytest.raises(ops.BackendError, match="sdpa_flash: device is cpu"):
        masked.run("sdpa_flash", masked.make())
