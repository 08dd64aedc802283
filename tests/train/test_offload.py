"""Offloading to the host, the weights that ZeRO 3 gathers, DeepSpeed's AdamW, and CUDA graphs."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from synthetic import tiny_model
from towers import SMALL, padded_ids

from bclip_fast.errors import UserError
from bclip_fast.model import transformer
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train.engine import EngineConfig, build_engine
from bclip_fast.train.engine.deepspeed import DeepSpeedEngine
from bclip_fast.train.schedule import MAX_LOG_LOGIT_SCALE, OptimConfig


def test_offloaded_activations_give_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the inputs of trainable layers go to the host, and the gradients are bitwise equal."""
    offloaded: list[torch.Tensor] = []

    class Recording(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(lambda tensor: offloaded.append(tensor) or tensor.cpu(), lambda tensor: tensor)

    monkeypatch.setattr(transformer, "save_on_cpu", Recording)
    gradients = []
    for offload in (False, True):
        torch.manual_seed(0)
        model = BiomedClip(SMALL).train()
        model.text.lock(1)
        model.set_grad_checkpointing(True, offload)
        output = model(torch.rand(2, 3, 32, 32), padded_ids([20, 7]))
        (output["image_features"] * output["text_features"]).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        assert bool(offloaded) == offload
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    # The three image layers save two tensors each, except the first, and so does the only trainable text layer.
    assert [tuple(tensor.shape) for tensor in offloaded if tensor.dim() == 2] == 5 * [(34, 48)] + 2 * [(27, 32)]


@pytest.mark.parametrize(("stage", "parameters"), [(1, False), (2, False), (3, True)])
def test_offloaded_optimizer_takes_same_steps(stage: int, parameters: bool) -> None:
    """DeepSpeed's offloading gives the same steps. On a CPU, host memory is the only memory."""
    after = []
    for offload in (False, True):
        torch.manual_seed(0)
        settings = EngineConfig(
            zero_stage=stage, precision="fp32", offload_optimizer=offload, offload_parameters=offload and parameters
        )
        optim = OptimConfig(grad_clip_norm=1.0, eps=1e-3)
        engine = DeepSpeedEngine(BiomedClip(tiny_model()), settings, optim, 2, torch.device("cpu"))
        image, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 90, (2, 12))
        for step in range(3):
            if step == 2:
                engine.load_optimizer_state(engine.optimizer_state())
            output = engine(image, ids)
            engine.backward((output["image_features"] * output["text_features"]).sum() * output["logit_scale"])
            norm = engine.step(1e-3).grad_norm
        after.append((norm, engine.optimizer_state(), engine.model_state()))
        engine.close()
    (norm, state, model), (other_norm, other_state, other_model) = after
    assert other_norm == pytest.approx(norm, rel=1e-6)
    assert other_state.num_steps == state.num_steps == 3
    for name, tensor in model.items():
        torch.testing.assert_close(other_model[name], tensor, rtol=0, atol=1e-6)
        for key, moment in state.moments[name].items():
            torch.testing.assert_close(other_state.moments[name][key], moment, rtol=1e-4, atol=1e-8)


def test_zero3_gathers_weights_layer_by_layer() -> None:
    """After DeepSpeed has recorded their order, it gathers at most one prefetched bucket and the current layer."""
    sizes = tiny_model(width=192)
    model = BiomedClip(replace(sizes, vision=replace(sizes.vision, layers=6)))
    engine = build_engine(model, EngineConfig(zero_stage=3, precision="fp32", bucket_mib=1), OptimConfig(), 2)
    # DeepSpeed never shards small parameters.
    parts: Any = [part for part in model.parameters() if not part.ds_persist]  # type: ignore[attr-defined]
    gathered = []

    def count(*_: Any) -> None:
        gathered.append(sum(part.ds_numel for part in parts if part.ds_status.name == "AVAILABLE"))

    for module in model.visual.layers.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
            module.register_full_backward_hook(count)
    image, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 90, (2, 12))
    for _ in range(3):
        output = engine(image, ids)
        engine.backward((output["image_features"] * output["text_features"]).sum())
        engine.step(1e-3)
    engine.close()
    total, largest = sum(part.ds_numel for part in parts), max(part.ds_numel for part in parts)
    assert total > 2_000_000
    assert 0 < max(gathered) <= (1 << 18) + largest


def host_steps(settings: EngineConfig, limits: list[float], begin: Any = None) -> list[Any]:
    """(norm, AdamW's state, weights) after each step.

    begin: state of AdamW to start from.
    """
    torch.manual_seed(0)
    # The loss drives the logit scale to its bound, so start near it.
    model = BiomedClip(replace(tiny_model(), init_logit_scale=MAX_LOG_LOGIT_SCALE - 1.5e-3))
    image, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 90, (2, 12))
    if begin is not None:
        model.load_state_dict(begin[2])
    engine = DeepSpeedEngine(model, settings, OptimConfig(grad_clip_norm=1.0), 2, torch.device("cpu"))
    if begin is not None:
        # The engine modifies these tensors, so pass a copy.
        engine.load_optimizer_state(copy.deepcopy(begin[1]))
    after = []
    for limit in limits:
        output = engine(image, ids)
        engine.backward((output["image_features"] * output["text_features"]).sum() - output["logit_scale"])
        norm = engine.step(1e-3, limit).grad_norm
        after.append((norm, engine.optimizer_state(), engine.model_state()))
    engine.close()
    return after


@pytest.mark.long
@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (1, True), (2, True), (3, True)])
def test_deepspeed_adam_equals_torch_adam(stage: int, offload: bool) -> None:
    """The weights agree to 1e-6, also after a refused step and at the logit scale's bound. A resume is bitwise."""
    settings = EngineConfig(zero_stage=stage, precision="fp32", offload_optimizer=offload)
    limits = [math.inf, math.inf, -1.0, math.inf, math.inf]
    expected = host_steps(settings, limits)
    actual = host_steps(replace(settings, cpu_adam="deepspeed"), limits)
    assert actual[-1][1].num_steps == 4
    assert actual[-1][2]["logit_scale"] == torch.tensor(MAX_LOG_LOGIT_SCALE)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        assert ours[1].num_steps == theirs[1].num_steps
        for name, tensor in theirs[2].items():
            torch.testing.assert_close(ours[2][name], tensor, rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, actual[1][2][name]) for name, tensor in actual[2][2].items())
    resumed = host_steps(replace(settings, cpu_adam="deepspeed"), limits[3:], actual[2])
    assert_equal(resumed[-1], actual[-1])
    # Each implementation reads the other's state.
    mixed = host_steps(settings, limits[3:], actual[2])
    for name, tensor in actual[-1][2].items():
        torch.testing.assert_close(mixed[-1][2][name], tensor, rtol=0, atol=1e-6)


def assert_equal(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert one[1].num_steps == other[1].num_steps
    assert all(torch.equal(tensor, other[2][name]) for name, tensor in one[2].items())
    for name, moments in one[1].moments.items():
        assert all(torch.equal(moment, other[1].moments[name][key]) for key, moment in moments.items())


def test_deepspeed_adam_without_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    def load(self: Any) -> None:
        raise RuntimeError("ninja is not installed")

    monkeypatch.setattr(CPUAdamBuilder, "load", load)
    with pytest.raises(UserError, match=r"ninja is not installed; install a C\+\+ compiler.*engine.cpu_adam=torch"):
        build_engine(BiomedClip(tiny_model()), EngineConfig(precision="fp32", cpu_adam="deepspeed"), OptimConfig(), 2)


def test_cuda_graphs_cover_only_image_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the calls of torch.compile, because no GPU is needed for that."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: calls.append(options))
    marks: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    model = BiomedClip(SMALL)
    model.compile_layers(True)
    static, any_length = {"dynamic": False, "mode": "reduce-overhead"}, {"dynamic": True}
    assert calls == [{"fullgraph": True, **options} for options in 3 * [static] + 3 * [any_length]]
    model(torch.rand(1, 3, 32, 32), padded_ids([3]))
    assert len(marks) == 1
    model.compile_layers()
    assert calls[6:] == 6 * [{"fullgraph": True, "dynamic": True}]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "ddp", "offload_optimizer": True}, "offload_optimizer=true needs engine.name=deepspeed"),
        ({"name": "ddp", "cpu_adam": "deepspeed"}, "cpu_adam=deepspeed needs engine.name=deepspeed"),
        ({"zero_stage": 2, "offload_parameters": True}, "offload_parameters=true needs .*zero_stage >= 3"),
        ({"offload_activations": True}, "offload_activations=true needs engine.grad_checkpointing"),
        ({"offload_optimizer": True}, "offload_optimizer=true needs a GPU"),
        ({"cuda_graphs": True}, "cuda_graphs=true needs engine.compile"),
        ({"cuda_graphs": True, "compile": True}, "cuda_graphs=true needs a GPU"),
    ],
)
def test_impossible_engine_options_are_errors(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_engine(BiomedClip(tiny_model()), EngineConfig(**settings), OptimConfig(), 2)
