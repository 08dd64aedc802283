"""Which kernels the CUDA losses take: those for Hopper, or those for all GPUs. No kernel runs here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bclip_fast.doctor import backends
from bclip_fast.errors import BackendError
from bclip_fast.ops import build_info, cuda_device
from bclip_fast.ops.contrastive import cuda
from bclip_fast.ops.contrastive.call import ContrastiveCall, SoftmaxGradient
from bclip_fast.ops.contrastive.groups import GroupTile

GPU = torch.device("cuda", 1)
KERNELS = [f"{family}_{name}" for family in ("contrastive", "hopper") for name in ("forward", "softmax", "sigmoid")]


@pytest.fixture
def machine(monkeypatch):
    """A function that pretends a GPU of a capability, and a module with the kernels for Hopper or without."""

    def pretend(capability=(9, 0), tile=(128, 256), host=None, variable=None):
        launched = []
        arguments = {name: lambda *values: values for name in ("Features", "Groups", "GradientTile", "Normalizers")}
        functions = {name: lambda *values, name=name: launched.append((name, values)) for name in KERNELS}
        module = SimpleNamespace(
            CONTRASTIVE_TILE=128, CONTRASTIVE_HOPPER=tile, CUTLASS="4.2.0", **arguments, **functions
        )
        for place in (cuda_device, cuda):
            monkeypatch.setattr(place, "cuda_module", lambda: module)
        monkeypatch.setattr(cuda_device, "compute_capability", {1: capability}.__getitem__)
        monkeypatch.setattr(cuda_device, "CUDA_HOST", host)
        monkeypatch.setattr(cuda_device, "why_no_hopper", lambda: "CUTLASS is not installed")
        monkeypatch.delenv("BCLIP_HOPPER", raising=False)
        if variable is not None:
            monkeypatch.setenv("BCLIP_HOPPER", variable)
        return launched

    return pretend


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, None),
        ({"variable": "1"}, None),
        ({"variable": "0"}, "BCLIP_HOPPER=0"),
        ({"capability": (8, 0)}, "the device is sm_80, and they need sm_90"),
        # Code for sm_90a runs on no later GPU.
        ({"capability": (10, 0)}, "the device is sm_100, and they need sm_90"),
        ({"tile": None}, "the CUDA module is built without them: CUTLASS is not installed"),
        ({"host": "emulator.so"}, "the emulator takes them only with BCLIP_HOPPER=1"),
        ({"host": "emulator.so", "variable": "1"}, None),
    ],
    ids=str,
)
def test_kernels_for_hopper_run_only_there(machine, facts, reason):
    machine(**facts)
    assert cuda_device.hopper_refusal(GPU) == reason
    told = backends._loss_kernels(1)
    assert told == ("the kernels for Hopper" if reason is None else f"the kernels for all GPUs: {reason}")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"capability": (8, 0), "variable": "1"}, "BCLIP_HOPPER=1, but .*: the device is sm_80"),
        ({"tile": None, "variable": "1"}, "BCLIP_HOPPER=1, but .*: the CUDA module is built without them"),
        ({"variable": "yes"}, "BCLIP_HOPPER='yes' is unknown; set it to 0, 1 or auto"),
    ],
    ids=str,
)
def test_demanded_kernels_for_hopper_are_never_replaced(machine, facts, message):
    machine(**facts)
    with pytest.raises(BackendError, match=message):
        cuda_device.hopper_refusal(GPU)
    assert backends._loss_kernels(1).startswith("no kernel: BCLIP_HOPPER=")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("variable", ["0", "1"])
def test_losses_launch_kernels_of_one_set_with_its_tiles(machine, variable, grouped):
    """On tensors of the CPU, as in the emulator. Only the kernels for all GPUs take groups."""
    launched = machine(host="emulator.so", variable=variable)
    rows, columns = 300, 500
    ids = torch.arange(columns, dtype=torch.int32)
    groups = GroupTile(ids[:rows], ids, torch.zeros(rows), torch.zeros(columns)) if grouped else None
    image, text = torch.zeros(rows, 8, dtype=torch.float16), torch.zeros(columns, 8, dtype=torch.float16)
    call = ContrastiveCall(image, text, torch.ones(()), None if grouped else 0, 1024, groups=groups)
    upstream = SoftmaxGradient(
        torch.zeros(rows).double(), torch.zeros(columns).double(), torch.ones(()), torch.ones(rows)
    )
    cuda.forward(call)
    cuda.backward(call, upstream, torch.float16)
    cuda.siglip(call, 1.0, torch.float16, True)
    hopper = variable == "1" and not grouped
    assert [name for name, _ in launched] == (KERNELS[3:] if hopper else KERNELS[:3])
    tile = (128, 256) if hopper else (128, 128)
    assert cuda._tile(call) == tile


def test_doctor_names_the_remedy_for_missing_kernels(monkeypatch):
    monkeypatch.setattr(build_info, "why_no_hopper", lambda: "CUTLASS is not installed")
    with_them = SimpleNamespace(CONTRASTIVE_HOPPER=(128, 256), CUTLASS="4.2.0")
    assert backends._hopper_kernels(with_them) == "with kernels for Hopper from CUTLASS 4.2.0"
    text = backends._hopper_kernels(SimpleNamespace(CONTRASTIVE_HOPPER=None, CUTLASS=""))
    assert text.startswith("without kernels for Hopper: CUTLASS is not installed. To get them, `pip install --no-deps")


def test_why_no_hopper_reads_the_file_of_the_build(tmp_path):
    file = tmp_path / "build_info.json"
    assert build_info.why_no_hopper(file) == ""
    file.write_text('{"no_hopper": "BCLIP_CUTLASS=0"}')
    assert build_info.why_no_hopper(file) == "BCLIP_CUTLASS=0"
