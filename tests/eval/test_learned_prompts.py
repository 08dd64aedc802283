"""Learned prompts from files: the same as the words whose token embeddings they hold, and faulty files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import ColourModel, assert_refused, evaluate_with, preprocess, unit_rows
from safetensors.torch import save_file
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.eval import EvalConfig, learned_prompts
from bclip_fast.eval.embed import Embedder
from bclip_fast.model.text import BertTower, GptTower, TextConfig

WORDS = ("[pad]", "[start]", "a", "photo", "of", "red", "blue", "x", ".", "[end]", "[unk]")
CLASSES = ("blue", "red")


def tokenizer(texts: list[str]) -> Tensor:
    rows = [["[start]", *text.replace(".", " .").split(), "[end]"] for text in texts]
    ids = [[WORDS.index(word if word in WORDS else "[unk]") for word in row] for row in rows]
    return torch.tensor([row + [0] * (max(map(len, ids)) - len(row)) for row in ids])


class TextModel(ColourModel):
    """The colour model with a transformer as its text tower."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = TextConfig(
            kind=kind, vocab_size=11, width=16, layers=2, heads=2, context_length=16, max_positions=16, pad_id=0,
            end_id=9, dropout=0.0, attention_dropout=0.0,
        )  # fmt: skip
        self.text = (GptTower if kind == "gpt" else BertTower)(config, 3)

    @property
    def table(self) -> torch.nn.Embedding:
        return self.text.word_embeddings if isinstance(self.text, BertTower) else self.text.token_embedding

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        features = self.text(text)
        return F.normalize(features, dim=1) if normalize else features


def embedder_of(model: torch.nn.Module) -> Embedder:
    return Embedder(model, preprocess, tokenizer)


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_load_context_of_words_equals_the_words(kind: str, tmp_path: Path) -> None:
    model = TextModel(kind)
    embedder = embedder_of(model)
    expected = embedder.texts([f"a photo of {name}." for name in CLASSES])
    context = model.table.weight.detach()[[WORDS.index(word) for word in ("a", "photo", "of")]]
    save_file({"context": context.clone()}, tmp_path / "p.safetensors", {"classes": json.dumps(CLASSES)})
    np.savez(tmp_path / "p.npz", classes=np.array(CLASSES), context=np.stack([context.numpy()] * 2))
    for name in ("p.safetensors", "p.npz"):
        prompt_set = learned_prompts.load(str(tmp_path / name), embedder)
        assert list(prompt_set.classes) == list(CLASSES)
        torch.testing.assert_close(prompt_set.embeddings, expected, atol=1e-6, rtol=0)
    # Contexts of single classes reach their classes only, and the tower is unchanged afterwards.
    np.savez(tmp_path / "p.npz", classes=np.array(CLASSES), context=np.stack([context.numpy(), 2 * context.numpy()]))
    embeddings = learned_prompts.load(str(tmp_path / "p.npz"), embedder).embeddings
    torch.testing.assert_close(embeddings[0], expected[0], atol=1e-6, rtol=0)
    assert (embeddings[1] - expected[1]).abs().max() > 1e-3
    assert torch.equal(embedder.texts([f"a photo of {name}." for name in CLASSES]), expected)


def test_evaluate_class_embeddings_take_the_place_of_texts(folder: Path, tmp_path: Path) -> None:
    # Swapped directions: every image gets the other class.
    rows = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) * 5
    np.savez(tmp_path / "p.npz", classes=np.array(CLASSES), class_embeddings=rows)
    settings = {"data": str(folder), "split": "test", "task": ("zero_shot",), "progress": False}
    result = evaluate_with(EvalConfig(prompts=str(tmp_path / "p.npz"), **settings))["tasks"]["zero_shot/class"]
    assert result["confusion"] == [[0, 3], [3, 0]]
    assert result["prompts"]["source"] == "learned prompts of p.npz"
    assert result["prompts"]["learned"] is True
    np.savez(tmp_path / "other.npz", classes=np.array(["blue", "green"]), class_embeddings=rows)
    options = {"split": "test", "task": ("zero_shot",)}
    assert_refused(folder, "has no class 'red'; it has 'blue', 'green'", prompts=str(tmp_path / "other.npz"), **options)
    assert_refused(folder, "take no --templates", prompts=str(tmp_path / "p.npz"), templates=("a {}",), **options)


def test_load_prompts_of_another_model_raises(tmp_path: Path) -> None:
    embedder = embedder_of(TextModel("gpt"))
    file = tmp_path / "p.npz"
    np.savez(file, classes=np.array(CLASSES), class_embeddings=unit_rows(2, 5, 0).numpy())
    with pytest.raises(UserError, match="class embeddings of 5 numbers, but the model has 3"):
        learned_prompts.load(str(file), embedder)
    np.savez(file, classes=np.array(CLASSES), context=unit_rows(2, 5, 0).numpy())
    with pytest.raises(UserError, match="context vectors of 5 numbers, but the model's token embeddings have 16"):
        learned_prompts.load(str(file), embedder)
    np.savez(file, classes=np.array(CLASSES), nouns=np.array(["x mystery", "red"]), context=unit_rows(2, 16, 0).numpy())
    with pytest.raises(UserError, match="no placeholder"):
        learned_prompts.load(str(file), embedder)


def test_read_faulty_files_raises_one_line(tmp_path: Path) -> None:
    file = tmp_path / "p.npz"
    rows = unit_rows(2, 4, 0).numpy()
    for content, message in (
        ({"classes": np.array(CLASSES)}, "holds classes; it needs"),
        ({"classes": np.array(CLASSES), "class_embeddings": rows, "context": rows}, "it needs"),
        ({"classes": np.array(["a", "a"]), "class_embeddings": rows}, "2 classes, 1 of them distinct"),
        ({"classes": np.array(CLASSES), "class_embeddings": rows[:1]}, r"shape \(1, 4\)"),
        ({"classes": np.array(CLASSES), "class_embeddings": rows * np.nan}, "NaN"),
        ({"classes": np.array(CLASSES), "class_embeddings": rows * 0}, "is zero"),
        ({"classes": np.array(CLASSES), "context": rows[0]}, r"shape \(4,\)"),
        ({"classes": np.array(CLASSES), "context": np.array([["1"]])}, "it needs"),
    ):
        np.savez(file, **content)
        with pytest.raises(UserError, match=message) as caught:
            learned_prompts.read(file)
        assert "\n" not in str(caught.value)
    for name, data in (("p.npz", b"none"), ("p.safetensors", b"\xff" * 40), ("missing.npz", None)):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            learned_prompts.read(tmp_path / name)
    save_file({"context": torch.ones(2, 4)}, tmp_path / "p.safetensors", {"classes": "{}"})
    with pytest.raises(UserError, match="is not a JSON list"):
        learned_prompts.read(tmp_path / "p.safetensors")


def test_read_never_unpickles(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    np.savez(tmp_path / "p.npz", classes=np.array([Attack(), Attack()], dtype=object), context=np.ones((2, 4)))
    (tmp_path / "q.npz").write_bytes(pickle.dumps(Attack()))
    for name in ("p.npz", "q.npz"):
        with pytest.raises(UserError, match="cannot be read"):
            learned_prompts.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_evaluate_templates_replace_those_of_the_prompt_set(folder: Path) -> None:
    options = {"split": "test", "task": ("zero_shot",)}
    config = EvalConfig(data=str(folder), templates=("one {}", "two {} here"), progress=False, **options)
    result = evaluate_with(config)["tasks"]["zero_shot/class"]
    assert result["prompts"]["templates"] == ["one {}", "two {} here"]
    assert [row["template"] for row in result["sensitivity"]] == ["one {}", "two {} here", "all together"]
    assert_refused(folder, "must hold {} exactly once", templates=("no place",), **options)
