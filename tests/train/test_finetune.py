"""Fine-tuning on questions and on pairs: exact resume, learning, LoRA and frozen towers."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colours import COLOURS, jpeg
from fake_cuda import fake_cuda
from peers import import_torchvision
from PIL import Image
from runs import column
from towers import SMALL

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.eval import evaluate
from bclip_fast.eval.datasets import vqa as vqa_data
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.text import TextConfig
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionConfig
from bclip_fast.ops.dispatch import use_backend
from bclip_fast.pretrained import vqa_head
from bclip_fast.train import backends, checkpoint
from bclip_fast.train import finetune as finetune_module
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.finetune import FinetuneConfig, finetune
from bclip_fast.train.schedule import OptimConfig

FP32 = EngineConfig(name="ddp", precision="fp32")


FAST = OptimConfig(lr=1e-4, warmup_steps=2, weight_decay=0.01, decay="linear")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A small model, with the words of the questions in its vocabulary."""
    texts = ["what colour is the square", "is it red", "is it blue", "is it green", "is it grey", "a dark square"]
    words = Tokenizer.train(texts * 3, 100, context_length=20)
    torch.manual_seed(1)
    pretrained.save(tmp_path / "start", BiomedClip(SMALL), Preprocess(PreprocessConfig(size=32)), words)
    return tmp_path / "start"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lines = ["image,question,answer,answer_type,split"]
    for name, colour in COLOURS.items():
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(colour, 40))
        lines.append(f"{name}.jpg,what colour is the square,{name},open,train")
        lines += [f"{name}.jpg,is it {other},{'Yes.' if other == name else 'no'},closed,train" for other in COLOURS]
    (tmp_path / "questions.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "questions.csv"


def write_pairs(tmp_path: Path) -> Path:
    lines = ["path,caption"]
    for i in range(16):
        name = list(COLOURS)[i % 4]
        (tmp_path / f"p{i}.jpg").write_bytes(jpeg(tuple(min(255, c + i) for c in COLOURS[name]), 40))  # type: ignore[arg-type]
        lines.append(f"p{i}.jpg,{'a dark' if name == 'grey' else 'is it ' + name} square")
    (tmp_path / "write_pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "write_pairs.csv"


def settings(start: Path, data: Path, run: Path, **changes: object) -> FinetuneConfig:
    options = {
        "task": "vqa",
        "epochs": 2,
        "batch_size": 4,
        "head_layers": 1,
        "optim": FAST,
        "engine": FP32,
        "checkpoint_every": 5,
    }
    return FinetuneConfig(model=str(start), data=str(data), run=str(run), **(options | changes))  # type: ignore[arg-type]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_latest(run / "checkpoints").model


def test_finetune_resumed_run_equals_uninterrupted_run(start: Path, table: Path, tmp_path: Path) -> None:
    complete = finetune(settings(start, table, tmp_path / "complete"))
    assert [json.loads(line)["step"] for line in (complete / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, 11)
    )
    stopped = tmp_path / "stopped"
    shutil.copytree(complete, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000010")
    finetune(settings(start, table, stopped, resume=True))
    for name, tensor in weights(complete).items():
        assert torch.equal(tensor, weights(stopped)[name]), name
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (complete, stopped)]
    losses = [[json.loads(line)["loss"] for line in run_lines] for run_lines in lines]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10
    with pytest.raises(UserError, match=r"holds a run already.*--resume"):
        finetune(settings(start, table, complete))
    with pytest.raises(UserError, match=r"cannot resume.*batch_size"):
        finetune(settings(start, table, complete, resume=True, batch_size=8))


@pytest.mark.parametrize("task", ["vqa", ""])
def test_finetune_step_on_gpu_waits_once(
    task: str, start: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a simulated GPU, the host waits at the end of a step for its results, which are those of the CPU."""
    data, transfers = table if task else write_pairs(tmp_path), []
    train_step = finetune_module._Loop._train_step
    monkeypatch.setattr(backends, "_devices", lambda: [torch.device("cpu")])

    def noted_step(self: Any, *arguments: Any) -> Any:
        if self.engine.device.type == "cuda":
            fake.clear()
        record = train_step(self, *arguments)
        if self.engine.device.type == "cuda":
            transfers.append([transfer.kind for transfer in fake.transfers if transfer.blocks])
        return record

    monkeypatch.setattr(finetune_module._Loop, "_train_step", noted_step)
    with use_backend("reference"):
        on_cpu = finetune(settings(start, data, tmp_path / "cpu", task=task, epochs=1))
        with fake_cuda() as fake:
            on_gpu = finetune(settings(start, data, tmp_path / "gpu", task=task, epochs=1))
    assert column(on_gpu, "loss") == column(on_cpu, "loss") != []
    assert column(on_gpu, "grad_norm") == column(on_cpu, "grad_norm")
    assert transfers == [["wait"]] * len(transfers) != []


def test_finetune_questions_are_learnt_saved_and_evaluated(start: Path, table: Path, tmp_path: Path) -> None:
    changes = {"epochs": 45, "crop_scale": (1.0, 1.0), "checkpoint_every": 0}
    run = finetune(settings(start, table, tmp_path / "run", **changes))
    result = evaluate(str(run), ["vqa"], data=str(table), split="train", progress=False)["tasks"]["vqa"]
    metrics = {metric["name"]: metric["value"] for metric in result["figures"]}
    # The four open questions have the same words, so only the image determines the answer.
    assert metrics["open accuracy"] == 1
    assert metrics["accuracy"] >= 0.8
    assert result["num_answers"] == 6
    assert result["answerable"] == 1
    model, _, _ = vqa_head.load(run)
    assert model.answers == ("blue", "green", "grey", "no", "red", "yes")
    assert model.common_answers == ("blue", "no")
    with pytest.raises(UserError, match="needs a model tuned for it"):
        evaluate(str(start), ["vqa"], data=str(table), split="train", progress=False)
    (run / "vqa" / "head.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="vqa is damaged"):
        vqa_head.load(run)


@pytest.mark.long
def test_finetune_head_overfits_200_questions_of_vqa_rad(shared_data: Path, tmp_path: Path) -> None:
    """Six layers per stream with METER's rates (5 and 50 times `lr`) and dropout, on small frozen random towers.

    The first 150 steps only learn the frequency of the answers. After them, the attention learns quickly.
    """
    questions = vqa_data.rad(shared_data / "vqa" / "vqa_rad", "train").questions[:200]
    with (tmp_path / "q.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "question", "answer", "answer_type"])
        for q in questions:
            with Image.open(q.image) as image:
                image.convert("RGB").resize((48, 48)).save(tmp_path / f"{q.image.stem}.png")
            rows.writerow([f"{q.image.stem}.png", q.text, q.answer, q.kind])
    vision = VisionConfig(image_size=48, patch_size=12, width=64, layers=2, heads=4)
    sizes = {"context_length": 40, "vocab_size": 1000, "width": 64, "layers": 2, "heads": 4, "max_positions": 48}
    text = TextConfig(**sizes, dropout=0.0, attention_dropout=0.0)  # type: ignore[arg-type]
    torch.manual_seed(0)
    clip = BiomedClip(BiomedClipConfig(embed_dim=64, vision=vision, text=text))
    words = Tokenizer.train([q.text for q in questions], 1000, context_length=40)
    pretrained.save(tmp_path / "start", clip, Preprocess(PreprocessConfig(size=48)), words)
    optim = OptimConfig(lr=1e-4, warmup_steps=50, weight_decay=0.01, decay="linear", eps=1e-8)
    changes = {
        "epochs": 110,
        "batch_size": 40,
        "head_layers": 6,
        "crop_scale": (1.0, 1.0),
        "optim": optim,
        "freeze_towers": True,
    }
    run = finetune(settings(tmp_path / "start", tmp_path / "q.csv", tmp_path / "run", **changes, checkpoint_every=0))
    result = evaluate(str(run), ["vqa"], data=str(tmp_path / "q.csv"), progress=False)["tasks"]["vqa"]
    metrics = {metric["name"]: metric for metric in result["figures"]}
    assert result["num_samples"] == 200
    assert metrics["accuracy"]["value"] >= 0.95
    assert metrics["accuracy"]["chance"] < 0.6


def test_finetune_frozen_towers_do_not_change(start: Path, table: Path, tmp_path: Path) -> None:
    run = finetune(settings(start, table, tmp_path / "run", epochs=1, freeze_towers=True))
    before, after = (pretrained.load(path)[0].state_dict() for path in (start, run))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_finetune_pairs_are_learnt(start: Path, tmp_path: Path, lora_rank: int) -> None:
    if lora_rank:
        import_torchvision()
        pytest.importorskip("peft")
    data = write_pairs(tmp_path)
    optim = OptimConfig(lr=3e-3 if lora_rank else 1e-3, warmup_steps=2, weight_decay=0.01)
    changes = {
        "task": "",
        "epochs": 25 if lora_rank else 40,
        "batch_size": 8,
        "lora_rank": lora_rank,
        "optim": optim,
        "checkpoint_every": 0,
    }
    run = finetune(settings(start, data, tmp_path / "run", **changes))
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.3
    before, after = (pretrained.load(path)[0].state_dict() for path in (start, run))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if lora_rank:
        # LoRA is merged into the linear layers and changes nothing else.
        assert changed
        assert all(name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) for name in changed)
        assert all("layers." in name for name in changed)
        # The merged weights are those of the trained adapter.
        adapted = weights(run)
        base, a, b = (adapted[f"visual.layers.0.qkv.{part}"] for part in
                      ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"))  # fmt: skip
        torch.testing.assert_close(after["visual.layers.0.qkv.weight"], base + 16.0 / 4 * b @ a)
    else:
        assert {"visual.patch_embed.weight", "text.word_embeddings.weight", "logit_scale"} <= changed
    tuned = evaluate(str(run), ["retrieval"], data=str(data), duplicates="captions", progress=False)
    first = evaluate(str(start), ["retrieval"], data=str(data), duplicates="captions", progress=False)
    recalls = [each["tasks"]["retrieval"]["figures"][0]["value"] for each in (first, tuned)]
    assert recalls[1] > recalls[0]
    assert recalls[1] > 0.6


def test_finetune_wrong_settings_raise_one_line(start: Path, table: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"task": "pcam"}, "has the protocol zero_shot, not vqa"),
        ({"batch_size": 64}, "fewer than batch_size=64"),
        ({"split": "nope"}, "no split 'nope'; its splits are train"),
        ({"task": ""}, "no column|no captions"),
        ({"run": str(start)}, "is the folder of the model"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            finetune(settings(start, table, changes.pop("run", tmp_path / "run"), **changes))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_finetune_damaged_image_is_replaced_or_stops(start: Path, tmp_path: Path, caplog) -> None:
    data = write_pairs(tmp_path)
    (tmp_path / "p3.jpg").write_bytes(jpeg((9, 9, 9), 40)[:200])
    changes = {"task": "", "epochs": 2, "checkpoint_every": 0}
    with caplog.at_level("WARNING"):
        finetune(settings(start, data, tmp_path / "run", **changes))
    [message] = [record.message for record in caplog.records if "replaced a sample" in record.message]
    assert "p3.jpg cannot be decoded" in message
    assert "1 of 16 images cannot be decoded" in caplog.text
    assert (tmp_path / "run" / "model").is_dir()
    with pytest.raises(UserError, match=r"image p3\.jpg cannot be decoded"):
        finetune(settings(start, data, tmp_path / "stopped", on_bad_image="stop", **changes))
    for i in range(16):
        (tmp_path / f"p{i}.jpg").write_bytes(b"none")
    with pytest.raises(UserError, match="33 images in a row cannot be decoded"):
        finetune(settings(start, data, tmp_path / "none", **changes))
