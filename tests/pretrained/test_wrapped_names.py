"""Weights as wrappers and training programs save them: the names of the model itself are restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import WEIGHTS, convert_to_bin, edit_weights
from torch import nn

from bclip_fast import load
from bclip_fast.errors import UserError
from bclip_fast.model.safe_load import plain_names, read_checkpoint

State = dict[str, Any]


def renamed(state: State, rename: Any) -> State:
    return {rename(name): tensor for name, tensor in state.items()}


def inside(part: str) -> Any:
    """Insert a component below the towers and below each layer, as a wrapper of submodules does."""

    def rename(name: str) -> str:
        parts = name.split(".")
        for position in range(len(parts) - 1, 0, -1):
            if parts[position - 1].isdigit() or parts[position - 1] in ("visual", "text", "trunk"):
                parts.insert(position, part)
        return ".".join(parts)

    return rename


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: renamed(state, lambda name: f"_orig_mod.{name}"),
        lambda state: renamed(state, inside("_orig_mod")),
        lambda state: renamed(state, inside("_fsdp_wrapped_module")),
        lambda state: renamed(state, inside("_checkpoint_wrapped_module")),
        lambda state: renamed(state, lambda name: f"module._orig_mod.{name}"),
        lambda state: {"state_dict": renamed(state, lambda name: f"model.{name}"), "epoch": 3, "callbacks": {}},
        lambda state: {"state_dict": renamed(state, lambda name: f"_forward_module.model._orig_mod.{name}")},
        lambda state: {
            "model": {"state_dict": renamed(state, lambda name: f"_fsdp_wrapped_module._fpw_module.{name}")}
        },
        lambda state: {"module": renamed(state, lambda name: f"module.{name}"), "dp_world_size": 8},
    ],
    ids=["compile", "submodules", "fsdp", "checkpointing", "ddp", "lightning", "fabric", "nests", "deepspeed"],
)
def test_load_wrapped_names_equal_the_model(checkpoint: Path, wrap: Any) -> None:
    expected = load(checkpoint)[0].state_dict()
    edited = convert_to_bin(checkpoint, wrap)
    actual = load(checkpoint)[0].state_dict()
    assert edited.is_file()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_names_of_torchs_own_wrappers_are_restored() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    names = list(model.state_dict())
    model[1] = checkpoint_wrapper(model[1])
    model[1]._checkpoint_wrapped_module[0] = torch.compile(model[1]._checkpoint_wrapped_module[0])
    wrapped = nn.DataParallel(torch.compile(model))
    # checkpoint_wrapper hides its component from state_dict, but not from named_parameters.
    for state in (wrapped.state_dict(), dict(wrapped.named_parameters())):
        assert list(state) != names
        assert list(plain_names(state, "weights.bin")) == names


def test_load_two_models_in_one_file_raises(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda state: state.update({"_orig_mod.logit_scale": torch.zeros(())}))
    with pytest.raises(UserError, match=f"{WEIGHTS} holds _orig_mod.logit_scale and logit_scale, which are both"):
        load(checkpoint)


def test_read_ambiguous_nests_raises_and_a_state_that_holds_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    state = {"weight": torch.zeros(2)}
    torch.save({"state_dict": state, "model": state}, path)
    with pytest.raises(UserError, match="holds weights under state_dict and model; save only"):
        read_checkpoint(path)
    state["state_dict"] = state
    torch.save(state, path)
    with pytest.raises(UserError, match="holds 'state_dict', which isn't a plain tensor"):
        read_checkpoint(path)
    # Not every name has the prefix: these are parts of another module, which no guess may merge.
    torch.save({"state_dict": {"model.weight": torch.zeros(2), "loss.weight": torch.ones(2)}}, path)
    assert read_checkpoint(path).keys() == {"model.weight", "loss.weight"}
