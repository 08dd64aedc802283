"""Muon and optimisers of the user's own: their steps, states in checkpoints, refused steps, memory and errors."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from runs import assert_equal_runs, stopped_after
from synthetic import tiny_model, tiny_run
from torch import Tensor

from bclip_fast import config as config_files
from bclip_fast.errors import UserError
from bclip_fast.loss import ClipLoss
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.packed import Packed
from bclip_fast.train import checkpoint
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.engine import Engine, EngineConfig, build_engine
from bclip_fast.train.engine.optimizer import OptimizerState, state_sizes
from bclip_fast.train.engine.own_optimizer import import_optimizer, traits_of
from bclip_fast.train.finetune_config import FinetuneConfig
from bclip_fast.train.schedule import MAX_LOG_LOGIT_SCALE, OptimConfig, is_muon_matrix, parameter_groups
from bclip_fast.train.trainer import train

DDP = EngineConfig(name="ddp", precision="fp32")
ZERO = [EngineConfig(zero_stage=stage, precision="fp32") for stage in (0, 1, 2, 3)]  # type: ignore[arg-type]
MUON = OptimConfig(name="muon", lr=1e-3, warmup_steps=2, grad_clip_norm=2.0, muon_lr=3e-3, muon_weight_decay=0.1)
# The gradient of a layer's key bias consists of rounding errors, which a small eps would amplify.
NADAM = OptimConfig(name="torch.optim:NAdam", lr=1e-3, warmup_steps=2, weight_decay=0.01, eps=1e-3)
SGD = OptimConfig(name="torch.optim:SGD", lr=1e-3, warmup_steps=2, weight_decay=0.0)
COUNTER = OptimConfig(name="test_optimizers:Counter", lr=1e-3, warmup_steps=2)


class Counter(torch.optim.Optimizer):
    """The mean of the gradients, with a learning rate that falls with a Python number."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(mean=torch.zeros_like(parameter), calls=0, unused=None)
                state["calls"] += 1
                state["mean"].lerp_(parameter.grad, 0.1)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(state["mean"], alpha=group["lr"] / state["calls"])


class Normalised(Counter):
    """Divides by the norm of the whole gradient."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad / parameter.grad.norm(), alpha=group["lr"])


class WithList(Counter):
    def step(self, closure: Any = None) -> None:
        self.state[self.param_groups[0]["params"][0]]["history"] = [1]


class WithGroupState(Counter):
    def step(self, closure: Any = None) -> None:
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1


def make(optim: OptimConfig, config: EngineConfig) -> Engine:
    torch.manual_seed(0)
    return build_engine(BiomedClip(tiny_model()).train(), config, optim, 8)


def inputs(seed: int) -> tuple[Tensor, Packed]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return images, Packed.of(torch.randint(5, 90, (40,), generator=generator), [5] * 8)


def forward_loss(engine: Any, seed: int) -> Tensor:
    output = engine(*inputs(seed))
    return ClipLoss()(output["image_features"], output["text_features"], output["logit_scale"])


def steps(engine: Engine, first: int, last: int) -> None:
    for number in range(first, last):
        engine.backward(forward_loss(engine, number))
        engine.step(1e-3)


def test_muon_step_equals_torchs_muon_and_adamw():
    engine = make(MUON, DDP)
    model = copy.deepcopy(engine.module)
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if is_muon_matrix(name, parameter)]
    others = [(name, parameter) for name, parameter in named if not is_muon_matrix(name, parameter)]
    # Queries with keys and values, their output, and the two matrices of the MLP in each of four layers.
    assert len(matrices) == 4 * 4
    decays = [parameter for name, parameter in others if parameter.ndim >= 2 and not name.endswith("bias")]
    rest = [parameter for _, parameter in others if not any(parameter is other for other in decays)]
    muon = torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.98), eps=1e-6, fused=True,
    )  # fmt: skip
    for number in range(3):
        engine.backward(forward_loss(engine, number))
        engine.step(1e-3)
        forward_loss(model, number).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        muon.step()
        adamw.step()
        model.zero_grad()
    for (name, expected), actual in zip(named, engine.module.parameters(), strict=True):
        assert torch.equal(actual, expected), name
    state = engine.optimizer_state()
    assert state.num_steps == 3
    assert sum(list(moments) == ["momentum_buffer"] for moments in state.moments.values()) == len(matrices)


def test_step_of_a_class_that_refuses_found_inf_equals_torchs():
    """torch.optim.SGD without its fused kernel fails if it sees a `found_inf`."""
    engine = make(SGD, DDP)
    model = copy.deepcopy(engine.module)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    for number in range(2):
        engine.backward(forward_loss(engine, number))
        assert not engine.step(1e-3).skipped
        forward_loss(model, number).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SGD.grad_clip_norm or float("inf"))
        sgd.step()
        sgd.zero_grad()
    for (name, expected), actual in zip(model.named_parameters(), engine.module.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def test_learning_rates_of_muon_follow_its_own_peak_and_layer_decay():
    model = BiomedClip(tiny_model())
    groups = parameter_groups(model.named_parameters(), replace(MUON, layer_decay=0.5))
    scales = {(group["lr_scale"], group["weight_decay"]) for group in groups if "muon" in group}
    # The matrices of the first and of the last of two layers, whose AdamW parameters have 0.25 and 0.5.
    assert scales == {(0.75, 0.1), (1.5, 0.1)}
    plain = parameter_groups(model.named_parameters(), OptimConfig(name="muon", lr=1e-3))
    assert {(group["lr_scale"], group["weight_decay"]) for group in plain if "muon" in group} == {(1.0, 0.2)}
    assert not any("muon" in group for group in parameter_groups(model.named_parameters(), OptimConfig()))


def through_checkpoint(state: OptimizerState, folder: Path) -> OptimizerState:
    saved = checkpoint.Checkpoint(1, {"weight": torch.zeros(1)}, state, {}, {})
    return checkpoint.read(checkpoint.save(folder, saved)).optimizer


def weights_of(engine: Engine) -> dict[str, Tensor]:
    return engine.model_state()


@pytest.mark.parametrize(
    ("optim", "engines"),
    [(MUON, [DDP, ZERO[0]]), (NADAM, [DDP, *ZERO]), (COUNTER, [DDP, *ZERO])],
    ids=["muon", "nadam", "counter"],
)
def test_state_moves_between_engines(optim: OptimConfig, engines: list[EngineConfig], tmp_path: Path):
    """Two steps under each engine and two more under the next one give four steps of one engine."""
    whole = make(optim, engines[0])
    steps(whole, 0, 4)
    expected = weights_of(whole)
    for config, following in zip(engines, [*engines[1:], engines[0]], strict=True):
        engine = make(optim, config)
        steps(engine, 0, 2)
        state = through_checkpoint(engine.optimizer_state(), tmp_path / f"{config.name}{config.zero_stage}")
        model = weights_of(engine)
        engine.close()
        torch.manual_seed(0)
        network = BiomedClip(tiny_model()).train()
        network.load_state_dict(model)
        resumed = build_engine(network, following, optim, 8)
        resumed.load_optimizer_state(state)
        steps(resumed, 2, 4)
        for name, tensor in weights_of(resumed).items():
            off = float((tensor - expected[name]).abs().max())
            assert off <= 1e-6, f"{config} to {following}: {name} is off by {off:.2g}"
        resumed.close()


def nadam_on_ranks(rank: int, path: str, stage: int) -> dict[str, Any]:
    """Two steps of each rank on the same batch, from the state in the file `path` if it is not empty."""
    os.environ["LOCAL_RANK"] = str(rank)
    engine = make(NADAM, ZERO[stage])
    if path:
        engine.close()
        state = torch.load(path)
        network = BiomedClip(tiny_model()).train()
        network.load_state_dict(state["model"])
        engine = build_engine(network, ZERO[stage], NADAM, 8)
        engine.load_optimizer_state(OptimizerState(2, state["moments"], {}))
    steps(engine, *((2, 4) if path else (0, 2)))
    result = {"model": engine.model_state(), "moments": engine.optimizer_state().moments}
    engine.close()
    return result


def test_own_optimizer_is_sharded_and_resharded(tmp_path: Path):
    """ZeRO 1 on two ranks, then ZeRO 3 on two ranks and ZeRO 2 on one, give the steps of one process."""
    whole = make(NADAM, DDP)
    steps(whole, 0, 4)
    half = on_ranks(2, nadam_on_ranks, "", 1)[0]
    assert half["moments"]["logit_scale"]["step"].shape == ()
    torch.save(half, tmp_path / "half.pt")
    for num_ranks, stage in ((2, 3), (1, 2)):
        result = on_ranks(num_ranks, nadam_on_ranks, str(tmp_path / "half.pt"), stage)[0]
        for name, tensor in weights_of(whole).items():
            torch.testing.assert_close(result["model"][name], tensor, rtol=0, atol=2e-6, msg=f"{stage}: {name}")


@pytest.mark.parametrize("optim", [MUON, NADAM, COUNTER], ids=["muon", "nadam", "counter"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(optim: OptimConfig, shards: Path, tmp_path: Path):
    config = tiny_run(tmp_path / "run", shards, optim=optim, model=tiny_model(dropout=0.1))
    train(config)
    resumed = stopped_after(tmp_path / "run", tmp_path / "resumed", 3)
    train(replace(config, run=str(resumed), resume=True))
    assert_equal_runs(resumed, tmp_path / "run")
    with pytest.raises(
        UserError, match=r"with another optim.name: the checkpoint has optim.name .*, this run has adamw"
    ):
        train(replace(config, run=str(resumed), resume=True, allow_changes=True, optim=OptimConfig(lr=1e-3)))


@pytest.mark.parametrize(
    ("optim", "config"), [(MUON, DDP), (MUON, ZERO[0]), (NADAM, DDP), (NADAM, ZERO[0]), (NADAM, ZERO[1])]
)
def test_refused_step_changes_nothing(optim: OptimConfig, config: EngineConfig):
    engine = make(optim, config)
    steps(engine, 0, 1)
    before, state = weights_of(engine), engine.optimizer_state()
    for limit in (1e-9, float("nan")):
        engine.backward(forward_loss(engine, 1))
        assert engine.step(1e-3, limit).skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(engine).items())
    after = engine.optimizer_state()
    assert after.num_steps == state.num_steps == 1
    assert all(
        torch.equal(tensor, state.moments[name][key])
        for name, moments in after.moments.items()
        for key, tensor in moments.items()
    )
    engine.close()


@pytest.mark.parametrize("optim", [MUON, NADAM, SGD], ids=["muon", "nadam", "sgd"])
def test_fp16_overflow_is_one_and_the_logit_scale_is_clamped(optim: OptimConfig):
    engine = make(replace(optim, weight_decay=0.0), replace(DDP, precision="fp16"))
    before = weights_of(engine)
    engine.backward(forward_loss(engine, 0) * 1e30)
    result = engine.step(1e-3)
    assert (result.skipped, result.overflow) == (True, True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(engine).items())
    for number in range(3):
        # A loss that falls with the scale.
        engine.backward(-engine(*inputs(number))["logit_scale"])
        assert not engine.step(0.5).skipped
    assert float(weights_of(engine)["logit_scale"]) == pytest.approx(MAX_LOG_LOGIT_SCALE)


def test_plan_knows_the_states():
    model = BiomedClip(tiny_model())
    matrices = sum(p.numel() for name, p in model.named_parameters() if is_muon_matrix(name, p))
    weights = sum(p.numel() for p in model.parameters())
    assert state_sizes(model, OptimConfig()) == 4 * 2 * weights
    assert state_sizes(model, MUON) == 4 * (2 * weights - matrices)
    assert state_sizes(model, NADAM) == 4 * 2 * weights
    assert state_sizes(model, COUNTER) == 4 * weights
    assert state_sizes(model, OptimConfig(name="torch.optim:SGD")) == 0


def test_traits_of_torchs_optimizers():
    def traits(name: str, **changes: Any) -> Any:
        optim = OptimConfig(name=f"torch.optim:{name}", lr=0.1, **changes)
        return traits_of(import_optimizer(optim.name), optim)

    torch.manual_seed(3)
    state = torch.get_rng_state()
    for name in ("Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "SGD", "Adamax"):
        assert traits(name).is_elementwise, name
    adafactor = traits("Adafactor")
    assert not adafactor.is_elementwise
    assert adafactor.num_moments == 0
    assert traits("NAdam").moments == ("exp_avg", "exp_avg_sq")
    assert torch.equal(torch.get_rng_state(), state)


REFUSED = {
    "optim.name=sgd must be adamw, muon or module:Class": {"name": "sgd"},
    r"optim.muon_lr=0.1 needs optim.name=muon, but it is adamw": {"muon_lr": 0.1},
    r"optim.muon_momentum=1.0 must lie in \[0, 1\)": {"name": "muon", "muon_momentum": 1.0},
    "optim.name=nowhere:Thing cannot be imported: No module named 'nowhere'; set PYTHONPATH": {"name": "nowhere:Thing"},
    "optim.name=torch.optim:Nothing cannot be imported": {"name": "torch.optim:Nothing"},
    "optim.name=pathlib:Path must be a class derived from torch.optim.Optimizer": {"name": "pathlib:Path"},
    r"optim.name=torch.optim:LBFGS fails in a step of a 4 x 6 matrix: ": {"name": "torch.optim:LBFGS"},
    r"optim.name=torch.optim:Rprop has no weight_decay, but optim.weight_decay=0.2": {"name": "torch.optim:Rprop"},
    "optim.name=test_optimizers:WithList keeps a list named history": {"name": "test_optimizers:WithList"},
    "optim.name=test_optimizers:WithGroupState keeps k in its parameter groups": {
        "name": "test_optimizers:WithGroupState"
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_optimizers_are_refused(message: str, shards: Path, tmp_path: Path):
    with pytest.raises(UserError, match=message) as caught:
        train(tiny_run(tmp_path / "run", shards, optim=OptimConfig(**REFUSED[message])))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_shards_are_refused_to_optimizers_of_whole_parameters(shards: Path, tmp_path: Path):
    words = r"updates a parameter as a whole, but engine.zero_stage=1 gives it shards; set engine.zero_stage=0"
    optim = OptimConfig(name="test_optimizers:Normalised")
    with pytest.raises(UserError, match=rf"optim.name=test_optimizers:Normalised {words}"):
        train(tiny_run(tmp_path / "run", shards, optim=optim, engine=ZERO[1]))
    assert not (tmp_path / "run").exists()
    words = words.replace("parameter", "matrix").replace("=1", "=3")
    with pytest.raises(UserError, match=f"optim.name=muon {words}"):
        tiny_run(tmp_path / "run", shards, optim=MUON, engine=ZERO[3])
    with pytest.raises(UserError, match="optim.name=muon updates a matrix as a whole"):
        FinetuneConfig(model="m", data="d", optim=MUON, engine=ZERO[1])
    with pytest.raises(UserError, match=r"engine.cpu_adam=deepspeed is an AdamW, but optim.name=torch.optim:NAdam"):
        tiny_run(tmp_path / "run", shards, optim=NADAM, engine=replace(ZERO[1], cpu_adam="deepspeed"))


def test_class_in_a_file_and_on_the_command_line_names_the_optimiser(tmp_path: Path) -> None:
    path = tmp_path / "optim.toml"
    path.write_text('[optim]\nclass = "torch.optim:NAdam"\n')
    for arguments in ([str(path)], ["--optim.class", "torch.optim:NAdam"]):
        assert config_files.parse(TrainConfig, arguments, prog="train").optim.name == "torch.optim:NAdam"
