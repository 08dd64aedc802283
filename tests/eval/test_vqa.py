"""Questions: the splits of the public files, answers, figures, METER's head, and fine-tuning that resumes exactly."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_eval import COLOURS, jpeg
from test_pretrained import SMALL, shaken

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.eval import evaluate, tasks, vqa
from bclip_fast.eval.datasets import vqa as vqa_data
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.meter import CrossLayer, MeterConfig, VqaModel, vqa_loss
from bclip_fast.model.text import TextConfig
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionConfig
from bclip_fast.pretrained import vqa_head
from bclip_fast.train import checkpoint
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.finetune import FinetuneConfig, finetune
from bclip_fast.train.schedule import OptimConfig

FP32 = EngineConfig(name="ddp", precision="fp32")
FAST = OptimConfig(lr=1e-4, warmup_steps=2, weight_decay=0.01, decay="linear")


# Splits


def test_the_split_of_vqa_rad(shared_data: Path) -> None:
    root = shared_data / "vqa" / "vqa_rad"
    sizes = {split: len(vqa_data.rad(root, split)) for split in ("train", "train_clean", "test")}
    assert sizes == {"train": 3064, "train_clean": 2780, "test": 451}
    test = vqa_data.rad(root, "test")
    assert len(test) == tasks.load("vqa_rad").num_samples
    assert sorted({q.kind for q in test.questions}) == ["closed", "open"]
    assert [sum(q.kind == kind for q in test.questions) for kind in ("open", "closed")] == [179, 272]
    # What the field's train split leaks: rewrites of test questions, whose rows are in test.
    rows = {q.key for q in test.questions}
    assert sum(q.key.removesuffix("-framed") in rows for q in vqa_data.rad(root, "train").questions) == 284
    assert not any(q.key.removesuffix("-framed") in rows for q in vqa_data.rad(root, "train_clean").questions)
    assert len({q.image for q in vqa_data.rad(root, "train").questions} | {q.image for q in test.questions}) == 314


def test_the_splits_of_slake(shared_data: Path) -> None:
    root = shared_data / "vqa" / "slake_questions_text"
    sizes = {split: len(vqa_data.slake(root, split, images=False)) for split in ("train", "val", "test")}
    assert sizes == {"train": 4919, "val": 1053, "test": 1061}
    assert sizes["test"] == tasks.load("slake").num_samples
    with pytest.raises(UserError, match=r"imgs/xmlab\d+/source.jpg and \d+ more pictures.*BoKelvin/SLAKE"):
        vqa_data.slake(root, "test", tasks.load("slake").where)


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="VQA_RAD_Dataset_Public.json cannot be read.*osf.io/89kps"):
        vqa_data.rad(tmp_path, "test")
    file = tmp_path / vqa_data.RAD_FILE
    row = dict(qid="1", image_name="a.jpg", question="q?", answer="Yes", answer_type="CLOSED ", phrase_type="freeform")
    for content, message in (
        ("[{]", "cannot be read as a JSON list"),
        (json.dumps([{key: row[key] for key in row if key != "answer"}]), "lacks 'answer'"),
        (json.dumps([row | {"answer_type": "MAYBE"}]), "qid 1: answer_type is 'MAYBE'"),
        (json.dumps([row]), "a.jpg and 0 more pictures"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            vqa_data.rad(tmp_path, "train")
        assert "\n" not in str(caught.value)
    file.write_text(json.dumps([row]))
    with pytest.raises(UserError, match="no question in split 'test'"):
        vqa_data.rad(tmp_path, "test")
    with pytest.raises(UserError, match="no split 'val': there are train, train_clean and test"):
        vqa_data.rad(tmp_path, "val")


# Figures


def test_answers_and_token_f1() -> None:
    assert vqa_data.normalise("  Left  Lung. ") == "left lung" and vqa_data.normalise(5) == "5"
    assert vqa.token_f1("left lung", "left lung") == 1 and vqa.token_f1("a", "b") == 0
    assert vqa.token_f1("left lung", "the left lung base") == pytest.approx(2 * 2 / 6)
    assert vqa.token_f1("no no", "no") == pytest.approx(2 / 3)
    assert vqa.token_f1("", "") == 1 and vqa.token_f1("", "x") == 0


def question(i: int, answer: str, kind: str) -> vqa_data.Question:
    return vqa_data.Question(str(i), Path("x.jpg"), f"q{i}?", answer, kind)


def test_open_closed_and_overall() -> None:
    questions = [question(0, "yes", "closed"), question(1, "no", "closed"), question(2, "left lung", "open")]
    result = vqa.measure(questions, ["yes", "yes", "left"], ["yes", "no", "left"], ("left", "yes"))
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert {name: figure["value"] for name, figure in figures.items()} == pytest.approx(
        {"accuracy": 1 / 3, "open accuracy": 0, "closed accuracy": 0.5, "token F1": (1 + 2 / 3) / 3}
    )
    assert figures["closed accuracy"]["chance"] == 0.5 and figures["open accuracy"]["num_samples"] == 1
    assert result["answerable"] == pytest.approx(2 / 3)
    json.dumps(result, allow_nan=False)


# The head


def test_the_head_has_meters_size() -> None:
    with torch.device("meta"):
        layers = torch.nn.ModuleList(CrossLayer(MeterConfig(458)) for _ in range(6))
    assert sum(parameter.numel() for parameter in layers.parameters()) == pytest.approx(56.7e6, rel=0.01)


def test_a_layer_equals_torchs_attention_blocks_in_float64() -> None:
    config = MeterConfig(3, width=24, heads=4, dropout=0.0)
    layer = CrossLayer(config).double().eval()
    x, y = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 7, 24, dtype=torch.float64)
    seen = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])

    def attend(own, a, b, mask):
        reference = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)
        with torch.no_grad():
            reference.in_proj_weight.copy_(torch.cat([own.query.weight, own.key_value.weight]))
            reference.in_proj_bias.copy_(torch.cat([own.query.bias, own.key_value.bias]))
            reference.out_proj.weight.copy_(own.proj.weight)
            reference.out_proj.bias.copy_(own.proj.bias)
        return own.norm(a + reference(a, b, b, key_padding_mask=mask, need_weights=False)[0])

    expected = attend(layer.own, x, x, None)
    expected = attend(layer.cross, expected, y, ~seen)
    expected = layer.norm(expected + layer.fc2(F.gelu(layer.fc1(expected))))
    torch.testing.assert_close(layer(x, y, None, seen[:, None, None]), expected)


def small_vqa(num_answers: int = 4) -> VqaModel:
    clip = shaken(BiomedClip(SMALL))
    config = MeterConfig(num_answers, width=32, layers=2, heads=4)
    return VqaModel(clip, config, tuple(f"answer {i}" for i in range(num_answers)))


@torch.no_grad()
def test_padding_and_packing_do_not_change_the_answer() -> None:
    model = small_vqa().eval()
    words = Tokenizer.train(["is there a red square", "what colour is it"] * 3, 60, context_length=20)
    texts, images = ["is there a red square", "colour"], torch.randn(2, 3, 32, 32)
    both = model(images, words.packed(texts))["logits"]
    torch.testing.assert_close(model(images, words(texts))["logits"], both)
    for i in range(2):
        alone = model(images[i : i + 1], words.packed(texts[i : i + 1]))["logits"]
        torch.testing.assert_close(alone[0], both[i], atol=1e-5, rtol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-3


@torch.no_grad()
def test_token_states_of_the_towers_hold_what_the_embedding_reads() -> None:
    clip = shaken(BiomedClip(SMALL)).eval()
    images = torch.randn(3, 3, 32, 32)
    states = clip.visual(images, tokens=True)
    assert states.shape == (3, 1 + SMALL.vision.num_patches, SMALL.vision.width)
    torch.testing.assert_close(clip.visual.head(states[:, 0]), clip.visual(images))
    words = Tokenizer.train(["is there a red square"] * 3, 60, context_length=20).packed(["red", "a red square"])
    states = clip.text(words, tokens=True)
    assert states.shape == (len(words.ids), SMALL.text.width)
    torch.testing.assert_close(clip.text.proj(states[words.cu_seqlens[:-1].long()]), clip.text(words))


def test_the_loss_is_the_sum_over_answers() -> None:
    logits, targets = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    log = F.logsigmoid
    expected = -(targets * log(logits) + (1 - targets) * log(-logits)).sum(1).mean()
    assert float(vqa_loss(logits, targets)) == pytest.approx(float(expected), rel=1e-6)


def test_only_what_the_answer_reads_is_trained() -> None:
    model = small_vqa()
    words = Tokenizer.train(["is there a red square"] * 3, 60, context_length=20).packed(["red", "a square"])
    vqa_loss(model(torch.randn(2, 3, 32, 32), words)["logits"], torch.eye(4)[:2]).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = VqaModel(model.clip, model.meter_config, model.answers, freeze=True)
    trained = {name.split(".")[0] for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trained == {"fusion", "classifier"}
    with pytest.raises(ValueError, match="3 answers for a head of 4"):
        VqaModel(model.clip, model.meter_config, ("a", "b", "c"))


# Fine-tuning


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A small model whose tokenizer knows the words of the questions."""
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


def settings(start: Path, data: Path, run: Path, **changes: object) -> FinetuneConfig:
    options = dict(task="vqa", epochs=2, batch_size=4, head_layers=1, optim=FAST, engine=FP32, checkpoint_every=5)
    return FinetuneConfig(model=str(start), data=str(data), run=str(run), **(options | changes))  # type: ignore[arg-type]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_latest(run / "checkpoints").model


def test_a_resumed_run_is_exactly_the_run_that_was_not_stopped(start: Path, table: Path, tmp_path: Path) -> None:
    whole = finetune(settings(start, table, tmp_path / "whole"))
    assert [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, 11)
    )
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000010")
    finetune(settings(start, table, stopped, resume=True))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(stopped)[name]), name
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, stopped)]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 10
    with pytest.raises(UserError, match="holds a run already; add --resume"):
        finetune(settings(start, table, whole))
    with pytest.raises(UserError, match="cannot resume.*the run.batch_size is 4 there and 8 here"):
        finetune(settings(start, table, whole, resume=True, batch_size=8))


def test_questions_are_learnt_saved_and_evaluated(start: Path, table: Path, tmp_path: Path) -> None:
    changes = dict(epochs=45, crop_scale=(1.0, 1.0), checkpoint_every=0)
    run = finetune(settings(start, table, tmp_path / "run", **changes))
    result = evaluate(str(run), ["vqa"], data=str(table), split="train", progress=False)["tasks"]["vqa"]
    figures = {figure["name"]: figure["value"] for figure in result["figures"]}
    # The four open questions are the same words: only the picture tells their answers apart.
    assert figures["open accuracy"] == 1 and figures["accuracy"] >= 0.8
    assert result["num_answers"] == 6 and result["answerable"] == 1
    model, _, _ = vqa_head.load(run)
    assert model.answers == ("blue", "green", "grey", "no", "red", "yes") and model.common_answers == ("blue", "no")
    with pytest.raises(UserError, match="needs a model tuned for it"):
        evaluate(str(start), ["vqa"], data=str(table), split="train", progress=False)
    (run / "vqa" / "head.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="vqa is broken"):
        vqa_head.load(run)


@pytest.mark.long
def test_the_head_overfits_200_questions_of_vqa_rad(shared_data: Path, tmp_path: Path) -> None:
    """Six layers a stream at METER's rates (5 and 50 times `lr`) and dropout, on small random towers that stay frozen.

    The first 150 steps only learn how often an answer is given: attention takes hold after them, all at once.
    """
    questions = vqa_data.rad(shared_data / "vqa" / "vqa_rad", "train").questions[:200]
    with (tmp_path / "q.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "question", "answer", "answer_type"])
        for q in questions:
            with Image.open(q.image) as picture:
                picture.convert("RGB").resize((48, 48)).save(tmp_path / f"{q.image.stem}.png")
            rows.writerow([f"{q.image.stem}.png", q.text, q.answer, q.kind])
    vision = VisionConfig(image_size=48, patch_size=12, width=64, layers=2, heads=4)
    sizes = dict(context_length=40, vocab_size=1000, width=64, layers=2, heads=4, max_positions=48)
    text = TextConfig(**sizes, dropout=0.0, attention_dropout=0.0)  # type: ignore[arg-type]
    torch.manual_seed(0)
    clip = BiomedClip(BiomedClipConfig(embed_dim=64, vision=vision, text=text))
    words = Tokenizer.train([q.text for q in questions], 1000, context_length=40)
    pretrained.save(tmp_path / "start", clip, Preprocess(PreprocessConfig(size=48)), words)
    optim = OptimConfig(lr=1e-4, warmup_steps=50, weight_decay=0.01, decay="linear", eps=1e-8)
    changes = dict(epochs=110, batch_size=40, head_layers=6, crop_scale=(1.0, 1.0), optim=optim, freeze_towers=True)
    run = finetune(settings(tmp_path / "start", tmp_path / "q.csv", tmp_path / "run", **changes, checkpoint_every=0))
    result = evaluate(str(run), ["vqa"], data=str(tmp_path / "q.csv"), progress=False)["tasks"]["vqa"]
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert result["num_samples"] == 200
    assert figures["accuracy"]["value"] >= 0.95 and figures["accuracy"]["chance"] < 0.6


def test_frozen_towers_stay_as_they_were(start: Path, table: Path, tmp_path: Path) -> None:
    run = finetune(settings(start, table, tmp_path / "run", epochs=1, freeze_towers=True))
    before, after = (pretrained.load(path)[0].state_dict() for path in (start, run))
    assert all(torch.equal(before[name], after[name]) for name in before)


def pairs(tmp_path: Path) -> Path:
    lines = ["path,caption"]
    for i in range(16):
        name = list(COLOURS)[i % 4]
        (tmp_path / f"p{i}.jpg").write_bytes(jpeg(tuple(min(255, c + i) for c in COLOURS[name]), 40))  # type: ignore[arg-type]
        lines.append(f"p{i}.jpg,{'a dark' if name == 'grey' else 'is it ' + name} square")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.csv"


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_towers_learn_pairs(start: Path, tmp_path: Path, lora_rank: int) -> None:
    if lora_rank:
        from peers import import_torchvision

        import_torchvision()
        pytest.importorskip("peft")
    data = pairs(tmp_path)
    optim = OptimConfig(lr=3e-3 if lora_rank else 1e-3, warmup_steps=2, weight_decay=0.01)
    changes = dict(
        task="", epochs=25 if lora_rank else 40, batch_size=8, lora_rank=lora_rank, optim=optim, checkpoint_every=0
    )
    run = finetune(settings(start, data, tmp_path / "run", **changes))
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.3
    before, after = (pretrained.load(path)[0].state_dict() for path in (start, run))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if lora_rank:
        # Merged into the linear layers, and nothing else was touched.
        assert changed and all(
            name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) for name in changed
        )
        assert all("layers." in name for name in changed)
        # The merged model is the trained one.
        adapted = weights(run)
        base, a, b = (adapted[f"visual.layers.0.qkv.{part}"] for part in
                      ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"))  # fmt: skip
        torch.testing.assert_close(after["visual.layers.0.qkv.weight"], base + 16.0 / 4 * b @ a)
    else:
        assert {"visual.patch_embed.weight", "text.word_embeddings.weight", "logit_scale"} <= changed
    figure = evaluate(str(run), ["retrieval"], data=str(data), duplicates="captions", progress=False)
    first = evaluate(str(start), ["retrieval"], data=str(data), duplicates="captions", progress=False)
    recalls = [each["tasks"]["retrieval"]["figures"][0]["value"] for each in (first, figure)]
    assert recalls[1] > recalls[0] and recalls[1] > 0.6


def test_what_cannot_be_tuned_is_one_line(start: Path, table: Path, tmp_path: Path) -> None:
    for changes, message in (
        (dict(task="pcam"), "is zero_shot, not vqa"),
        (dict(batch_size=64), "fewer than batch_size 64"),
        (dict(split="nope"), "no question in split 'nope'"),
        (dict(task=""), "no column|no captions"),
        (dict(run=str(start)), "the model's own folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:  # noqa: PT012
            finetune(settings(start, table, changes.pop("run", tmp_path / "run"), **changes))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
