"""The process group: NCCL for tensors on a GPU, and gloo for the messages of the hosts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fake_cuda import fake_cuda
from ranks import on_ranks
from synthetic import tiny_model
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers the backend "fake"

from bclip_fast import distributed
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train.bad_samples import BadSamples
from bclip_fast.train.engine import EngineConfig, build_engine
from bclip_fast.train.schedule import OptimConfig


def messages_beside_nccl(rank: int, folder: str) -> dict[str, Any]:
    """Join a group whose NCCL is the backend "fake", which sends nothing, and send messages through it."""
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "", "MASTER_PORT": "1"}
    init, asked = dist.init_process_group, {}

    def init_without_nccl(**options: Any) -> None:
        asked.update(options)
        backend = options["backend"].replace("nccl", "fake")
        init(backend, init_method=f"file://{folder}/joined", rank=rank, world_size=2)

    with fake_cuda() as fake, mock.patch.object(dist, "init_process_group", init_without_nccl):
        distributed.init()
        bad = BadSamples(Path(folder), 0, 1)
        fake.clear()
        results: dict[str, Any] = {
            "total": distributed.total(rank + 1),
            "objects": distributed.all_gather_object(rank),
            "stops": [bad.agree(step, [], None, stop=step == 2 and rank == 1) for step in (1, 2)],
            "transfers": [transfer.kind for transfer in fake.transfers],
            "backend": asked["backend"],
            "device": str(asked["device_id"]),
        }
    # DeepSpeed keeps the group, and makes its own groups with the same backends.
    model = BiomedClip(tiny_model())
    engine = build_engine(model, EngineConfig(zero_stage=1, precision="fp32"), OptimConfig(), 4)
    output = engine(torch.rand(2, 3, 32, 32), torch.randint(1, 90, (2, 12)))
    engine.backward((output["image_features"] * output["text_features"]).sum())
    results["skipped"] = engine.step(1e-3).skipped
    # DeepSpeed's timer of the throughput would wait for the GPU twice in each step.
    results["timed"] = engine._engine.tput_timer.config.enabled  # type: ignore[attr-defined]
    results["kept"] = dist.get_backend_config()
    results["total after DeepSpeed"] = distributed.total(rank + 1)
    return results


def test_messages_travel_beside_nccl(tmp_path: Path) -> None:
    for rank, results in enumerate(on_ranks(2, messages_beside_nccl, str(tmp_path))):
        assert results == {
            "total": 3,
            "objects": [0, 1],
            "stops": [False, True],
            "transfers": [],
            "backend": "cpu:gloo,cuda:nccl",
            "device": f"cuda:{rank}",
            "skipped": False,
            "timed": False,
            "kept": "cpu:gloo,cuda:fake",
            "total after DeepSpeed": 3,
        }


def test_group_of_one_rank_for_deepspeed_names_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from bclip_fast.train.engine import deepspeed

    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda **options: asked.update(options))
    monkeypatch.setattr(deepspeed.atexit, "register", lambda function: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with fake_cuda():
        deepspeed._ensure_process_group()
    assert asked["backend"] == "cpu:gloo,cuda:nccl"
    assert asked["device_id"] == torch.device("cuda", 0)
    deepspeed._ensure_process_group()
    assert asked["backend"] == "gloo"


def test_explicit_backend_without_nccl_takes_no_gpu() -> None:
    with fake_cuda():
        assert distributed.group_options("gloo") == {"backend": "gloo"}
    assert distributed.group_options() == {"backend": "gloo"}
