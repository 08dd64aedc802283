"""Plans are compared with real runs, and the configuration overlays with the paper's tables."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import tiny_model, tiny_run, write_shards

from bclip_fast import cli, pretrained
from bclip_fast import config as config_files
from bclip_fast.config import CONFIGS, parse
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.hardware import GIB, Cluster, ClusterConfig, cluster_of
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.packed import Packed
from bclip_fast.model.presets import preset
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.plan import activations, command, estimate
from bclip_fast.plan.samples import PMC_15M, samples_of
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.losses import LossConfig
from bclip_fast.train.trainer import train

VIT_B = "hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k"
PUBMEDBERT = "hf-hub:microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"

# arXiv 2303.00915 v3, supplementary tables: image width, pixels, text kind, context length, epochs, batch schedule, and
# the parts with pretrained weights.
TABLES = {
    "s1_gpt_77": (768, 224, "gpt", 77, 8, [(0, 4096)], "vision"),
    "s1_pubmedbert_77": (768, 224, "bert", 77, 8, [(0, 4096)], "vision text"),
    "s1_pubmedbert_256": (768, 224, "bert", 256, 8, [(0, 4096)], "vision text"),
    "s2_vit_s16": (384, 224, "bert", 256, 8, [(0, 4096)], "vision text"),
    "s2_vit_m16": (512, 224, "bert", 256, 8, [(0, 4096)], "text"),
    "s2_vit_b16": (768, 224, "bert", 256, 8, [(0, 4096)], "vision text"),
    "s3_vision_random": (768, 224, "bert", 256, 32, [(0, 4096)], "text"),
    "s3_vision_imagenet": (768, 224, "bert", 256, 32, [(0, 4096)], "vision text"),
    "s4_224px": (768, 224, "bert", 256, 32, [(0, 4096)], "vision text"),
    "s4_384px": (768, 384, "bert", 256, 32, [(0, 4096)], "vision text"),
    "s6_batch_2k": (768, 224, "bert", 256, 32, [(0, 2048)], "vision text"),
    "s6_batch_4k": (768, 224, "bert", 256, 32, [(0, 4096)], "vision text"),
    "s7_4k_4k": (768, 224, "bert", 256, 40, [(0, 4096)], "vision text"),
    "s7_4k_64k": (768, 224, "bert", 256, 40, [(0, 4096), (8, 65536)], "vision text"),
    "s8_clip_continual": (768, 224, "gpt", 77, 32, [(0, 4096)], "model"),
    "s8_rn50_continual": (64, 224, "gpt", 77, 32, [(0, 4096)], "model"),
    "s8_own_init": (768, 224, "bert", 256, 32, [(0, 4096)], "vision text"),
}
MACHINES = ("gpu1", "a100_80g_x8", "h100_x8", "nodes4")
# Fields that change neither the result nor the metrics.
SPEED = ("micro_batch_size", "engine", "cluster")


def load(*names: str) -> TrainConfig:
    return parse(TrainConfig, ["biomedclip_b16.toml", *(f"{name}.toml" for name in names)], prog="t").resolved()


@pytest.mark.parametrize("name", TABLES)
def test_overlay_equals_row_of_paper(name: str):
    width, pixels, kind, context, epochs, batches, starts = TABLES[name]
    config = load(name)
    vision, text = config.model.vision, config.model.text
    side = 32 if vision.kind == "resnet" else 16
    assert (vision.width, vision.image_size, vision.patch_size) == (width, pixels, side)
    assert (vision.kind == "resnet") == ("rn50" in name)
    assert (text.kind, text.context_length, config.epochs) == (kind, context, epochs)
    assert (list(config.batch_schedule) or [(0, config.batch_size)]) == batches
    assert " ".join(part for part in ("model", "vision", "text") if getattr(config.init, part)) == starts
    # Everything else comes from table S9.
    assert dataclasses.replace(load(), optim=config.optim).optim == load().optim


def test_published_config_has_published_init_and_validates_every_epoch():
    config = load()
    assert (config.init.vision, config.init.text, config.init.model) == (VIT_B, PUBMEDBERT, "")
    assert config.validation.every_epochs == 1
    assert config.data.augment
    assert config.data.crop_scale == (0.9, 1.0)


def test_every_row_has_a_short_overlay():
    overlays = {path.stem for path in CONFIGS.glob("s[1-8]_*.toml")}
    assert overlays == set(TABLES)
    for name in (*overlays, *MACHINES):
        lines = [line for line in (CONFIGS / f"{name}.toml").read_text().splitlines() if not line.startswith("#")]
        assert len([line for line in lines if line.strip()]) <= 11, name


@pytest.mark.parametrize("name", MACHINES)
def test_machine_overlay_keeps_hyperparameters(name: str):
    base, config = load(), load(name)
    same = {field: getattr(base, field) for field in SPEED}
    data = dataclasses.replace(config.data, num_threads=base.data.num_threads)
    assert dataclasses.replace(config, data=data, **same) == base
    assert config.engine.precision == base.engine.precision


def gpus(ranks: int = 8, gib: float = 80, nodes: int = 1, host: float = 0) -> Cluster:
    return cluster_of(ClusterConfig(nodes, ranks, "a100-80", gib, host))


@pytest.mark.parametrize("name", MACHINES)
def test_longest_run_of_paper_fits_each_machine(name: str):
    config = load("s7_4k_64k", name)
    plan = estimate.build_plan(config, PMC_15M, cluster_of(config.cluster))
    command.check_fits(config, plan)
    assert [stage.num_steps for stage in plan.stages] == [8 * (13_900_000 // 4096), 32 * (13_900_000 // 65536)]
    assert sum(plan.parameters[tower] for tower in ("image tower", "text tower")) == 195_902_720
    assert plan.hours is not None
    assert plan.rates.startswith("NOT MEASURED")
    assert plan.stages[1].flops["forward"] == pytest.approx(16 * plan.stages[0].flops["forward"])
    assert plan.stages[1].flops["loss"] == pytest.approx(256 * plan.stages[0].flops["loss"])


def test_run_that_does_not_fit_is_refused_with_remedies():
    # Two layers are enough for the message.
    shallow = {name: dataclasses.replace(getattr(load().model, name), layers=2) for name in ("vision", "text")}
    config = dataclasses.replace(load("gpu1"), model=BiomedClipConfig(**shallow), micro_batch_size=0)
    plan = estimate.build_plan(config, PMC_15M, gpus(1, gib=30))
    with pytest.raises(UserError) as error:
        command.check_fits(config, plan)
    assert "is: image tower's activations" in str(error.value)
    for knob in ("micro_batch_size=2048", "engine.grad_checkpointing=true"):
        assert knob in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 4100}, "batch_size=4100 must be a positive multiple of the 8 ranks"),
        ({"micro_batch_size": 300}, "micro_batch_size=300 does not divide the 512 pairs of a rank"),
    ],
)
def test_indivisible_batch_is_an_error(changes: dict[str, Any], words: str):
    config = dataclasses.replace(load(), **changes)
    with pytest.raises(UserError, match=words):
        estimate.build_plan(config, PMC_15M, gpus())


def test_planned_memory_follows_zero_stage():
    """Moments take 8 bytes a parameter, and master weights 4. The ranks share them, and in stage 3 also the weights."""
    model = tiny_model()
    number = 4 * sum(parameter.numel() for parameter in BiomedClip(model).parameters())
    for stage, optimiser in ((0, 2 * number), (1, 3 * number / 8), (2, 3 * number / 8), (3, 2 * number / 8)):
        config = dataclasses.replace(load(), model=model, engine=EngineConfig(zero_stage=stage), micro_batch_size=64)
        parts = estimate.build_plan(config, PMC_15M, gpus()).memory["update"]
        assert parts["optimiser"] == pytest.approx(optimiser)
        assert parts["weights"] == pytest.approx(number / (8 if stage == 3 else 1))


def test_offloaded_memory_is_planned_on_host():
    number = 4 * sum(parameter.numel() for parameter in BiomedClip(tiny_model()).parameters())
    engine = EngineConfig(zero_stage=2, grad_checkpointing=True, offload_optimizer=True, offload_activations=True)
    config = dataclasses.replace(load(), model=tiny_model(), engine=engine)
    plan = estimate.build_plan(config, PMC_15M, gpus())
    assert plan.host["step"]["optimiser"] == pytest.approx(5 * number / 8)
    assert plan.host["step"]["activations"] > 0
    assert "optimiser" not in plan.memory["update"]
    with pytest.raises(UserError, match="requires GPUs"):
        estimate.build_plan(config, PMC_15M, cluster_of(ClusterConfig(1, 1, "cpu")))


def counted(model: BiomedClip, lengths: list[int]) -> tuple[int, int, int]:
    """(saved, peak, gradients): bytes of the storages in a real step, without weights and inputs."""
    side = model.config.vision.image_size
    images = torch.zeros((len(lengths), side, side, 3), dtype=torch.uint8)
    text = Packed.of(torch.ones(sum(lengths), dtype=torch.int64), lengths)
    with activations.MemoryMeter(model, images, *text[:2]) as meter:
        output = model(images, text)
        saved, meter.peak = meter.now, meter.now
        (output["image_features"].sum() + output["text_features"].sum()).backward()
    return saved, meter.peak, sum(4 * p.numel() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_measured_activations_equal_real_step(checkpointing: bool):
    model = BiomedClip(tiny_model(dropout=0.1)).train()
    model.set_grad_checkpointing(checkpointing)
    lengths = [12, 3, 7, 5] * 8
    measured = activations.measure_activations(model, lengths, precision="fp32")
    saved, peak, gradients = counted(model, lengths)
    # A real forward pass also stores normalised features, the logit scale, and the sums of the test.
    features = 32 * model.config.embed_dim * 4
    assert measured.image + measured.text <= saved <= measured.image + measured.text + 6 * features
    assert abs(measured.step - peak) <= 6 * features
    collected = activations.measure_activations(model, lengths, precision="fp32", gradients="collected")
    present = activations.measure_activations(model, lengths, precision="fp32", gradients="present")
    assert max(collected.step, present.step) <= measured.step <= collected.step + gradients
    assert 0 < present.embed < present.image + present.text or checkpointing


def test_locked_tower_saves_no_activations():
    model = BiomedClip(tiny_model()).train()
    model.visual.lock(0)
    free = activations.measure_activations(BiomedClip(tiny_model()), [5] * 16, precision="fp32")
    locked = activations.measure_activations(model, [5] * 16, precision="fp32")
    assert locked.image < 0.2 * free.image
    assert locked.text == free.text


RUN = """
import sys
from bclip_fast.cli import main
code = main(["train", sys.argv[1]])
print("peak", next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def measured_peak(config: TrainConfig, folder: Path, ranks: int) -> int:
    """The peak of a rank's resident memory, in new processes."""
    file = folder / "config.toml"
    file.write_text(config_files.to_toml(config))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        if ranks > 1:
            launched = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            environment.update({name: str(value) for name, value in launched.items()})
        command = [sys.executable, "-c", RUN, str(file)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    peaks = []
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        peaks.append(int(out.rsplit("peak", 1)[1]))
    return max(peaks)


def shallow() -> BiomedClipConfig:
    """The published model with two layers per tower."""
    vision, text = (dataclasses.replace(getattr(BiomedClipConfig(), name), layers=2) for name in ("vision", "text"))
    return BiomedClipConfig(vision=vision, text=text)


def write_teacher(folder: Path, sizes: BiomedClipConfig) -> None:
    preprocess = Preprocess(PreprocessConfig(size=sizes.vision.image_size))
    tokenizer = Tokenizer.train(["a square at the left"] * 4, 96, sizes.text.context_length)
    pretrained.save(folder, BiomedClip(sizes), preprocess, tokenizer)


def test_teacher_is_planned_in_each_step_or_before_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_teacher(tmp_path / "teacher", tiny_model())
    shards = write_shards(tmp_path / "shards")
    plans = {}
    for mode in ("off", "fp16"):
        loss = LossConfig(kind="distill", teacher=str(tmp_path / "teacher"), teacher_cache=mode)
        plans[mode] = command.run(tiny_run(tmp_path / "run", shards, loss=loss))
    clip = command.run(tiny_run(tmp_path / "run", shards))
    weights = sum(p.nbytes for p in BiomedClip(tiny_model()).state_dict().values())
    flops = {mode: plan.stages[0].flops for mode, plan in plans.items()}
    assert flops["off"]["teacher"] == pytest.approx(flops["off"]["forward"])
    assert flops["off"]["loss"] == 1.5 * clip.stages[0].flops["loss"]
    assert "teacher" not in flops["fp16"]
    assert plans["off"].memory["backward"]["teacher"] == weights
    assert "teacher" not in plans["fp16"].memory["backward"]
    assert plans["fp16"].memory["teacher"]["teacher"] == weights
    # 96 samples of two times 24 numbers.
    assert 96 * plans["fp16"].teacher.cache_bytes == 96 * 2 * 24 * 2
    shown = capsys.readouterr().out
    assert "24 features" in shown
    assert "in the run folder" in shown
    assert not (tmp_path / "run").exists()


PUBLISHED = preset("biomedclip_b16")
CASES: dict[str, tuple[dict[str, Any], EngineConfig, int]] = {
    "two layers": ({"model": shallow(), "batch_size": 8}, EngineConfig(name="ddp", precision="fp32"), 1),
    "micro-batches": (
        {"model": PUBLISHED, "batch_size": 16, "micro_batch_size": 4}, EngineConfig(name="ddp", precision="bf16"), 1,
    ),
    "checkpointed": (
        {"model": PUBLISHED, "batch_size": 8},
        EngineConfig(zero_stage=0, precision="bf16", grad_checkpointing=True), 1,
    ),
    "teacher": ({"model": shallow(), "batch_size": 8}, EngineConfig(name="ddp", precision="fp32"), 1),
    "zero 1 on two ranks": ({"model": PUBLISHED, "batch_size": 8}, EngineConfig(zero_stage=1, precision="bf16"), 2),
}  # fmt: skip


def compare(name: str, folder: Path) -> None:
    settings, engine, ranks = CASES[name]
    shards = write_shards(folder / "shards", num_samples=256)
    config = tiny_run(folder / "run", shards, engine=engine, max_steps=2, cluster=ClusterConfig(1, ranks), **settings)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_steps=0))
    if name == "teacher":
        write_teacher(folder / "teacher", shallow())
        config = dataclasses.replace(config, loss=LossConfig(kind="distill", teacher=str(folder / "teacher")))
    plan = estimate.build_plan(config, samples_of(config), cluster_of(config.cluster))
    peak = measured_peak(config, folder, ranks)
    print(f"{name}: {peak / GIB:.2f} GiB measured, {plan.peak / GIB:.2f} planned, {plan.peak / peak - 1:+.1%}")
    assert abs(plan.peak / peak - 1) <= 0.15, {key: sum(parts.values()) for key, parts in plan.memory.items()}


@pytest.mark.parametrize(
    "name", ["two layers", *(pytest.param(name, marks=pytest.mark.long) for name in list(CASES)[1:])]
)
def test_planned_memory_is_within_15_percent_of_measured_peak(name: str, tmp_path: Path):
    """These models are dominated by weights. Many activations would fragment the heap (estimate.py)."""
    compare(name, tmp_path)


def test_dry_run_prints_plan_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tiny_run(tmp_path / "run", write_shards(tmp_path / "shards"))
    (tmp_path / "config.toml").write_text(config_files.to_toml(config))
    (tmp_path / "dry_run.toml").write_text("dry_run = true\n")
    outputs = []
    for line in ("plan", "train --dry_run", "train dry_run.toml"):
        name, *changes = line.replace("dry_run.toml", str(tmp_path / "dry_run.toml")).split()
        assert cli.main([name, str(tmp_path / "config.toml"), *changes]) == 0
        assert not (tmp_path / "run").exists()
        outputs.append(capsys.readouterr().out)
    shown = outputs[0]
    assert outputs == [shown] * 3
    for words in ("96 an epoch", "6 steps, 96 pairs seen", "image tower's activations", "padded to 12, checkpointed"):
        assert words in shown


def test_trainer_refuses_dry_run(tmp_path: Path):
    with pytest.raises(UserError, match="plan"):
        train(TrainConfig(run=str(tmp_path / "run"), dry_run=True))
