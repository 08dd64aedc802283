"""Learning rates by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from grad_cache_steps import ENGINES
from synthetic import tiny_model, tiny_run, weights
from towers import SMALL

from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train.config import CheckpointConfig
from bclip_fast.train.schedule import OptimConfig, layer_scales, parameter_groups
from bclip_fast.train.trainer import train


def test_layer_scales_follow_beit() -> None:
    names = [name for name, _ in BiomedClip(SMALL).named_parameters()]
    scales = layer_scales(names, 0.5)
    for tower, stem in (("visual", "pos_embed"), ("text", "word_embeddings.weight")):
        assert scales[f"{tower}.{stem}"] == 0.5**4
        assert [scales[f"{tower}.layers.{i}.qkv.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert scales["visual.norm.bias"] == scales["visual.head.weight"] == scales["text.proj.2.weight"] == 1
    assert scales["text.embedding_norm.weight"] == 0.5**4
    assert "logit_scale" not in scales
    # These are timm's factors. For timm's trunk, timm's groups differ only in the norm.
    assert set(layer_scales([f"clip.{name}" for name in names], 0.5).values()) == set(scales.values())
    groups = parameter_groups(BiomedClip(SMALL).named_parameters(), OptimConfig(layer_decay=0.5))
    assert sorted({group["lr_scale"] for group in groups}) == [0.5**4, 0.5**3, 0.5**2, 0.5, 1]
    assert sum(len(group["params"]) for group in groups) == len(names)
    with pytest.raises(UserError, match=r"optim\.layer_decay=0"):
        OptimConfig(layer_decay=0.0)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_layer_decay_slows_lower_layers_in_every_engine(shards: Path, tmp_path: Path, name: str) -> None:
    optim = OptimConfig(lr=1e-3, warmup_steps=0, layer_decay=0.3, weight_decay=0.0)
    checkpoint = CheckpointConfig(every_steps=0)
    settings: dict[str, Any] = {"optim": optim, "checkpoint": checkpoint, "max_steps": 1}
    torch.manual_seed(0)
    start = BiomedClip(tiny_model()).state_dict()
    after = weights(train(tiny_run(tmp_path / name, shards, engine=ENGINES[name], **settings)))
    plain = weights(train(tiny_run(tmp_path / "ddp", shards, engine=ENGINES["ddp"], **settings)))
    # AdamW's first update is as large as the learning rate, for any gradient.
    for key, scale in {
        "visual.layers.0.fc1.weight": 0.09,
        "text.layers.1.fc1.weight": 0.3,
        "visual.head.weight": 1,
    }.items():
        assert float((after[key] - start[key]).abs().median()) == pytest.approx(1e-3 * scale, rel=0.02)
    for key in after:
        torch.testing.assert_close(after[key], plain[key], rtol=0, atol=1e-6)
