"""engine.precision=fp8: emulated products, engines, checkpoints, and devices that refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from synthetic import tiny_model, tiny_run, weights, write_shards

from bclip_fast.errors import UserError
from bclip_fast.hardware import ClusterConfig, cluster_of
from bclip_fast.io.runs import read_metrics
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.transformer import Linear
from bclip_fast.plan import estimate
from bclip_fast.plan.samples import PMC_15M
from bclip_fast.train import float8
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.engine import EngineConfig, deepspeed
from bclip_fast.train.precision import autocast_precision, resolve_precision
from bclip_fast.train.trainer import train

FP8 = EngineConfig(name="ddp", precision="fp8")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setenv("BCLIP_FP8", "emulate")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), num_samples=32, num_val=8)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor as FP8 numbers with one scale, which maps the largest magnitude to the dtype's."""
    scale = torch.finfo(dtype).max / tensor.double().abs().max()
    return (tensor.double() * scale).float().to(dtype).double() / scale


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("tokens", [48, 37])
def test_linear_layer_multiplies_rounded_operands(tokens):
    """The expected results are products in float64 of operands in E4M3, and of gradients in E5M2."""
    model = BiomedClip(tiny_model())
    name = "visual.layers.0.fc1"
    original = model.get_submodule(name)
    assert name in float8.convert(model)
    layer = model.get_submodule(name)
    x = torch.randn(tokens, layer.in_features).bfloat16().requires_grad_()
    upstream = torch.randn(tokens, layer.out_features).bfloat16()
    out = layer(x)
    out.backward(upstream)
    weight, bias = original.weight, original.bias
    assert layer.weight is weight and layer.bias is bias
    operands = [rounded(each.detach(), torch.float8_e4m3fn) for each in (x, weight)]
    grad = rounded(upstream, torch.float8_e5m2)
    expected = operands[0] @ operands[1].T + bias.detach().bfloat16().double()
    pairs = [(out, expected), (x.grad, grad @ operands[1]), (weight.grad, grad.T @ operands[0])]
    for actual, true in pairs:
        assert F.cosine_similarity(actual.double().flatten(), true.flatten(), dim=0) > 1 - 1e-5
        torch.testing.assert_close(actual.double(), true, rtol=2e-2, atol=2e-2 * true.abs().mean().item())
    assert out.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    # The rounding is real: the exact product differs by more than bfloat16's.
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert (out.double() - exact).norm() / exact.norm() > 0.01


@pytest.mark.usefixtures("emulated")
def test_convert_changes_layers_of_both_towers_and_no_name():
    model = BiomedClip(tiny_model())
    before = {name: (parameter.dtype, id(parameter)) for name, parameter in model.named_parameters()}
    keys = list(model.state_dict())
    names = float8.convert(model)
    parts = {name.rsplit(".", 1)[1] for name in names}
    assert parts == {"qkv", "proj", "fc1", "fc2"} and {name.split(".")[0] for name in names} == {"visual", "text"}
    assert {name: (parameter.dtype, id(parameter)) for name, parameter in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    others = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert sorted(others) == sorted(names)


@pytest.mark.usefixtures("emulated")
def test_lora_factors_stay_in_bf16():
    """peft gives an adapted layer the modules base_layer, lora_A and lora_B, whatever their sizes."""
    tower = BiomedClip(tiny_model()).visual
    layer = tower.layers[0]
    layer.fc1 = torch.nn.ModuleDict(
        {"base_layer": layer.fc1, "lora_A": torch.nn.ModuleDict({"default": Linear(32, 16)})}
    )
    names = float8.convert(tower)
    assert "layers.0.fc1.base_layer" in names and not any("lora_A" in name for name in names)


@pytest.mark.usefixtures("emulated")
def test_dimensions_that_are_no_multiples_of_16_are_refused():
    tower = BiomedClip(tiny_model(width=24)).visual
    with pytest.raises(UserError, match="no linear layer of the towers has dimensions that are multiples of 16"):
        float8.convert(tower)


@pytest.mark.usefixtures("emulated")
def test_layer_compiles_to_one_graph():
    torch._dynamo.reset()
    model = BiomedClip(tiny_model())
    float8.convert(model)
    layer, x = model.get_submodule("visual.layers.0.fc1"), torch.randn(10, 32).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.usefixtures("emulated")
def test_run_trains_resumes_and_loads_without_torchao(shards, tmp_path):
    config = tiny_run(tmp_path / "run", shards, engine=FP8, max_steps=3)
    bf16 = tiny_run(tmp_path / "bf16", shards, engine=replace(FP8, precision="bf16"), max_steps=3)
    run = train(config)
    other = train(bf16)
    assert losses(run) != losses(other)
    assert losses(run)[0] == pytest.approx(losses(other)[0], rel=0.1)
    assert {name: (w.shape, w.dtype) for name, w in weights(run).items()} == {
        name: (w.shape, w.dtype) for name, w in weights(other).items()
    }
    # `auto` keeps the precision of the run, and another one must be allowed.
    resumed = replace(config, resume=True, max_steps=6)
    train(replace(resumed, engine=replace(FP8, precision="auto")))
    whole = train(tiny_run(tmp_path / "whole", shards, engine=FP8, max_steps=6))
    assert losses(run) == losses(whole)
    changed = replace(config, resume=True, max_steps=7, engine=replace(FP8, precision="bf16"))
    with pytest.raises(UserError, match=r"engine.precision: fp8 -> bf16"):
        train(changed)
    code = (
        "import sys; sys.modules['torchao'] = None\n"
        "from bclip_fast import pretrained\n"
        f"print(pretrained.load({str(run)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"BCLIP_FP8": ""})


def _train_on_ranks(rank: int, folder: str) -> dict[str, Any]:
    os.environ |= {"LOCAL_RANK": str(rank), "BCLIP_FP8": "emulate"}
    settings = deepspeed.deepspeed_config

    def sharded(*arguments: Any) -> dict[str, Any]:
        # Below the default, the weights of a small model would not be sharded.
        result = settings(*arguments)
        if result["zero_optimization"]["stage"] == 3:
            result["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return result

    deepspeed.deepspeed_config = sharded
    root, curves = Path(folder), {}
    for name, engine in {
        "ddp": FP8,
        "zero1": EngineConfig(zero_stage=1, precision="fp8"),
        "zero2": EngineConfig(zero_stage=2, precision="fp8"),
        "zero3": EngineConfig(zero_stage=3, precision="fp8", grad_checkpointing=True),
    }.items():
        curves[name] = losses(train(tiny_run(root / name, root / "shards", engine=engine, max_steps=3)))
    return curves


def test_engines_on_two_ranks_give_the_same_losses(tmp_path):
    pytest.importorskip("torchao")
    write_shards(tmp_path / "shards", num_samples=32, num_val=8)
    curves = on_ranks(2, _train_on_ranks, str(tmp_path))[0]
    assert len(curves["ddp"]) == 3
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["ddp"], abs=2e-3), name


def test_device_without_fp8_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.delenv("BCLIP_FP8", raising=False)
    words = r"engine.precision=fp8 needs a GPU of compute capability 8.9 or newer.* the device is cpu; or set .*=bf16"
    with pytest.raises(UserError, match=words):
        resolve_precision("fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert "NVIDIA A100 has 8.0" in (float8.refusal(torch.device("cuda", 0)) or "")
    monkeypatch.setenv("BCLIP_FP8", "yes")
    with pytest.raises(UserError, match="BCLIP_FP8=yes must be emulate"):
        resolve_precision("fp8")


def test_missing_torchao_names_the_extra(monkeypatch):
    monkeypatch.setenv("BCLIP_FP8", "emulate")
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"needs torchao .*pip install 'bclip_fast\[fp8\]'"):
        resolve_precision("fp8")


def _refusal_on_ranks(rank: int) -> str:
    if rank:
        float8.refusal = lambda device: "needs a GPU"
    else:
        float8.refusal = lambda device: None
    try:
        resolve_precision("fp8")
    except UserError as error:
        return str(error)
    return ""


def test_rank_without_fp8_stops_every_rank():
    assert all("on rank 1" in message for message in on_ranks(2, _refusal_on_ranks))


def test_zero_3_needs_checkpointed_layers():
    with pytest.raises(UserError, match=r"zero_stage=3 needs engine.grad_checkpointing=true"):
        EngineConfig(zero_stage=3, precision="fp8")
    assert EngineConfig(zero_stage=3, precision="fp8", grad_checkpointing=True).precision == "fp8"


def test_teacher_of_an_fp8_run_computes_in_bf16():
    assert [autocast_precision(precision) for precision in ("fp8", "bf16", "fp32")] == ["bf16", "bf16", "fp32"]


def test_plan_of_fp8_counts_casts_and_refuses_other_devices():
    """The casts of the largest layer add to the backward pass, and the time is that of bf16."""
    config = TrainConfig(
        preset="", model=tiny_model(), batch_size=64, engine=EngineConfig(name="ddp", precision="bf16")
    )
    fp8 = replace(config, engine=replace(config.engine, precision="fp8"))
    plans = [
        estimate.build_plan(each, PMC_15M, cluster_of(ClusterConfig(device="h100", devices_per_node=1)))
        for each in (config, fp8)
    ]
    before, after = (plan.memory["backward"]["temporary"] for plan in plans)
    assert after - before == 2 * (64 * 17 * (32 + 128) + 32 * 128)
    assert plans[0].hours == plans[1].hours and "fp8 counts as bf16" in plans[1].rates
    for device in ("a100-80", "cpu"):
        with pytest.raises(UserError, match="fp8 needs GPUs with FP8.* set engine.precision=bf16"):
            estimate.build_plan(fp8, PMC_15M, cluster_of(ClusterConfig(device=device, devices_per_node=1)))
