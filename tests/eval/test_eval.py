"""Evaluation: metrics against brute force and scikit-learn, zero-shot against its own arithmetic, data sets, errors."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import import_open_clip
from PIL import Image
from torch import Tensor, nn

from bclip_fast import config as configuration
from bclip_fast.data.images import open_image
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.errors import UserError
from bclip_fast.eval import EvalCommand, EvalConfig, evaluate, prompts, retrieval, run, zero_shot
from bclip_fast.eval.datasets import open_dataset
from bclip_fast.eval.embed import Embedder

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "grey": (120, 120, 120)}


class ColourModel(nn.Module):
    """Both towers see colours: an image by its mean, a text by the colour words in it."""

    def __init__(self, poison: str = "") -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.poison = poison

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        features = image.mean((2, 3)) - 0.2
        if self.poison == "image":
            features = features.clone()
            features[-1, 0] = torch.nan
        return F.normalize(features, dim=1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        features = text[:, :3].float() + 0.01 * text[:, 3:].float()
        return F.normalize(features, dim=1) if normalize else features


def preprocess(image: Image.Image) -> Tensor:
    pixels = np.asarray(image.convert("RGB").resize((8, 8)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def tokenizer(texts: list[str]) -> Tensor:
    rows = [[*COLOURS.get(next((c for c in COLOURS if c in text), ""), (1, 1, 1)), len(text)] for text in texts]
    return torch.tensor(rows)


def jpeg(colour: tuple[int, int, int], size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def jitter(colour: tuple[int, int, int], i: int) -> tuple[int, int, int]:
    return tuple(channel + (i * 7 + j * 3) % 11 for j, channel in enumerate(colour))  # type: ignore[return-value]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    names = list(COLOURS)
    with ShardWriter(root) as writer:
        for i in range(20):
            name = names[i % 4]
            meta = {"colour": name, "licence": "CC0", "size": 16} | ({"half": "dark"} if i < 5 else {})
            writer.write(
                Sample(f"s{i:03d}", jpeg(jitter(COLOURS[name], i)), f"a {name} square" + "!" * (i // 8), meta), "val"
            )
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    for split, num in (("train", 1), ("test", 3)):
        for name in ("red", "blue"):
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                (root / split / name / f"{i}.jpg").write_bytes(jpeg(jitter(COLOURS[name], i)))
    return root


def run_on(config: EvalConfig, model: object = None, transform=preprocess, tokens=tokenizer) -> dict:
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(EvalConfig)}
    return evaluate((model or ColourModel(), transform, tokens), settings.pop("task"), **settings)


def unit(num: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def brute_force_recall(queries: Tensor, candidates: Tensor, groups: Tensor, k: int, trials: int = 400) -> float:
    """Share of queries with a right candidate in the first k, over random orders among equal scores."""
    scores = (queries.double() @ candidates.double().T).mul(1e5).round().numpy()
    right = (groups[:, None] == groups[None, :]).numpy()
    generator = np.random.default_rng(0)
    hits = []
    for _ in range(trials):
        for row, mask in zip(scores, right, strict=True):
            order = np.lexsort((generator.random(len(row)), -row))
            hits.append(mask[order[:k]].any())
    return float(np.mean(hits))


# Retrieval


@pytest.mark.parametrize("chunks", [(1024, 8192), (7, 5), (1, 37), (37, 1)])
def test_ranks_equal_brute_force_whatever_the_chunks(chunks: tuple[int, int]) -> None:
    texts = unit(37, 8, 0)
    images = F.normalize(texts + 0.5 * unit(37, 8, 1), dim=1)
    ranks, back = retrieval.rank(images, texts, query_chunk=chunks[0], candidate_chunk=chunks[1])
    scores = images.double() @ texts.double().T
    better = (scores > scores.diagonal()[:, None]).sum(1)
    assert torch.equal(ranks.num_better, better)
    assert torch.equal(ranks.num_tied, torch.ones(37, dtype=torch.int64))
    assert 0 < ranks.recall(1) < 1
    for k in (1, 5, 10):
        assert ranks.recall(k) == pytest.approx(float((better < k).double().mean()), abs=1e-12)
    assert torch.equal(ranks.expected(), better.double() + 1)
    assert torch.equal(back.num_better, (scores > scores.diagonal()[None]).sum(0))


@pytest.mark.parametrize("chunks", [(1024, 8192), (3, 4)])
def test_ranks_with_groups_and_ties_equal_random_orders(chunks: tuple[int, int]) -> None:
    # Rows repeat, so scores tie, within and across groups.
    rows = unit(5, 4, 2)
    texts = rows[torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0, 0])]
    images = F.normalize(texts + 0.8 * unit(10, 4, 3), dim=1)
    groups = torch.tensor([0, 1, 2, 3, 4, 5, 1, 2, 0, 6])
    ranks, back = retrieval.rank(images, texts, [groups], query_chunk=chunks[0], candidate_chunk=chunks[1])
    for k in (1, 2, 5):
        assert ranks.recall(k) == pytest.approx(brute_force_recall(images, texts, groups, k), abs=0.02)
        assert back.recall(k) == pytest.approx(brute_force_recall(texts, images, groups, k), abs=0.02)
    assert ranks.recall(10) == 1
    assert ranks.num_correct.tolist() == [2, 2, 2, 1, 1, 1, 2, 2, 2, 1]


def test_a_constant_embedding_scores_exactly_chance() -> None:
    constant = unit(1, 16, 4).expand(101, 16)
    captions = [f"caption {i // 2}" for i in range(101)]
    for duplicates in ("strict", "captions"):
        result = retrieval.measure(constant, constant, captions, duplicates=duplicates)  # type: ignore[arg-type]
        assert [f["name"] for f in result["figures"]][:4] == [
            "image to text R@1",
            "image to text R@5",
            "image to text R@10",
            "image to text median rank",
        ]
        for figure in result["figures"]:
            assert figure["value"] == pytest.approx(figure["chance"], rel=1e-9)
            assert figure["num_samples"] == 101
    strict = retrieval.measure(constant, constant, captions)["figures"]
    assert [f["chance"] for f in strict[:4]] == pytest.approx([1 / 101, 5 / 101, 10 / 101, 51])


def test_perfect_embeddings_score_one_and_chance_does_not_move() -> None:
    rows = unit(50, 32, 5)
    figures = retrieval.measure(rows, rows, [str(i) for i in range(50)])["figures"]
    assert [f["value"] for f in figures] == [1, 1, 1, 1] * 2
    assert figures[1]["chance"] == pytest.approx(0.1)


def test_chance_with_duplicate_captions_is_hypergeometric() -> None:
    rows = unit(6, 8, 6)
    result = retrieval.measure(rows, rows, ["a", "a ", "b", "c", "d", "e"], duplicates="captions")
    # Two queries have 2 right answers of 6, four have 1; five draws of six cannot miss both of two.
    two = 1 - math.comb(4, 1) / math.comb(6, 1)
    assert result["figures"][0]["chance"] == pytest.approx((2 * two + 4 / 6) / 6)
    assert result["figures"][1]["chance"] == pytest.approx((2 * 1 + 4 * 5 / 6) / 6)
    assert result["num_distinct_captions"] == 5


def test_a_pair_smaller_than_k_and_a_single_pair() -> None:
    rows = unit(1, 8, 7)
    figures = retrieval.measure(rows, rows, ["only"])["figures"]
    assert {f["value"] for f in figures} == {1.0} and {f["chance"] for f in figures} == {1.0}


def test_recall_equals_scikit_learns_top_k_accuracy() -> None:
    from sklearn.metrics import top_k_accuracy_score

    texts = unit(60, 16, 8)
    images = F.normalize(texts + 0.9 * unit(60, 16, 9), dim=1)
    ranks, _ = retrieval.rank(images, texts)
    for k in (1, 5, 10):
        assert ranks.recall(k) == pytest.approx(top_k_accuracy_score(np.arange(60), (images @ texts.T).numpy(), k=k))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda rows: rows.index_put((torch.tensor([3]),), torch.tensor(torch.nan)),
            "NaN or infinity in 1 of 9 rows, first in row 3",
        ),
        (lambda rows: rows * 2, "L2-normalised"),
        (lambda rows: rows[:0], "non-empty"),
        (lambda rows: rows[:5], "pair up"),
    ],
)
def test_embeddings_that_are_not_embeddings_are_refused(spoil, message: str) -> None:
    with pytest.raises(UserError, match=message):
        retrieval.rank(unit(9, 4, 1), spoil(unit(9, 4, 2)))


def test_gallery_takes_queries_at_even_steps_and_marks_the_right_hit() -> None:
    rows = unit(30, 16, 10)
    shown = retrieval.gallery(rows, rows, [str(i % 15) for i in range(30)], num_queries=3)
    assert [query["sample"] for query in shown["text_to_image"]] == [5, 15, 25]
    for query in shown["image_to_text"]:
        assert query["hits"][0] == {
            "sample": query["sample"],
            "score": pytest.approx(1),
            "right": True,
            "same_caption": True,
        }
        assert query["rank_of_right"] == 1 and len(query["hits"]) == 5


# Zero-shot


def test_class_embeddings_are_the_elevater_average() -> None:
    prompt_set = prompts.PromptSet({"x": ("one", "two"), "y": ("three",)}, ("a {}", "the {} here"))
    table = {
        text: unit(1, 6, i)[0]
        for i, text in enumerate(("a one", "the one here", "a two", "the two here", "a three", "the three here"))
    }
    got = zero_shot.class_embeddings(lambda texts: torch.stack([table[text] for text in texts]), prompt_set)
    rows = np.stack([row.double().numpy() for row in table.values()])
    for number, part in enumerate((rows[:4], rows[4:])):
        mean = part.mean(0)
        np.testing.assert_allclose(got[number].numpy(), mean / np.linalg.norm(mean), atol=1e-6)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_figures_equal_scikit_learn(num_classes: int) -> None:
    from sklearn import metrics

    generator = np.random.default_rng(num_classes)
    labels = generator.choice(num_classes, 200, p=np.arange(1, num_classes + 1) / sum(range(1, num_classes + 1)))
    predictions = np.where(generator.random(200) < 0.5, labels, generator.integers(0, num_classes, 200))
    result = zero_shot.measure(
        torch.from_numpy(labels), torch.from_numpy(predictions), [str(i) for i in range(num_classes)]
    )
    accuracy, balanced = result["figures"]
    assert accuracy["value"] == pytest.approx(metrics.accuracy_score(labels, predictions))
    assert balanced["value"] == pytest.approx(metrics.balanced_accuracy_score(labels, predictions))
    assert result["confusion"] == metrics.confusion_matrix(labels, predictions).tolist()
    recalls = metrics.recall_score(labels, predictions, average=None)
    precisions = metrics.precision_score(labels, predictions, average=None)
    assert [row["recall"] for row in result["per_class"]] == pytest.approx(recalls.tolist())
    assert [row["precision"] for row in result["per_class"]] == pytest.approx(precisions.tolist())
    assert accuracy["chance"] == pytest.approx(np.bincount(labels).max() / 200)
    assert balanced["chance"] == 1 / num_classes


def test_degenerate_labels() -> None:
    one = zero_shot.measure(torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 1, 0]), ["a", "b"])
    assert [f["value"] for f in one["figures"]] == [0.75, 0.75]
    assert [f["chance"] for f in one["figures"]] == [1.0, 0.5]
    assert one["per_class"][1]["recall"] is None and one["per_class"][1]["precision"] == 0
    json.dumps(one, allow_nan=False)
    with pytest.raises(UserError, match="at least one labelled sample"):
        zero_shot.measure(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), ["a"])
    with pytest.raises(UserError, match="label must be a whole number from 0 to 1"):
        zero_shot.measure(torch.tensor([0, 2]), torch.tensor([0, 1]), ["a", "b"])


def test_constant_image_embeddings_do_no_better_than_chance() -> None:
    images = unit(1, 8, 0).expand(30, 8)
    predictions, _ = zero_shot.predict(zero_shot.similarities(images, unit(3, 8, 1)))
    labels = torch.arange(30) % 3
    assert zero_shot.measure(labels, predictions, ["a", "b", "c"])["figures"][1]["value"] == pytest.approx(1 / 3)
    tied, num_ties = zero_shot.predict(zero_shot.similarities(images, unit(1, 8, 1).expand(2, 8)))
    assert num_ties == 30 and tied.eq(0).all()
    with pytest.raises(UserError, match="image embeddings hold NaN"):
        zero_shot.similarities(images * torch.nan, unit(3, 8, 1))


# Prompts


def test_the_papers_prompts() -> None:
    assert prompts.named("pcam").prompts("1") == [
        "this is an image of lymph node metastasis",
        "lymph node metastasis presented in image",
    ]
    lung, table = prompts.named("lc25000_lung"), prompts.named("lc25000_lung_table_s10")
    assert lung.templates[0] == "a photo of {}" and table.templates[0] == "this is an image of {}"
    assert lung.classes == table.classes


def test_the_papers_classes_are_the_folders_of_the_public_data(shared_data: Path) -> None:
    data = open_dataset(str(shared_data / "classification" / "lc25000_lung"), "test")
    assert set(data.labels("class")) == set(prompts.named("lc25000_lung").classes)
    assert len(data) >= 300


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('templates = ["see {}"]\n[classes]\nred = ["a {brace}", "scarlet"]\nblue = "navy"\n')
    assert prompts.named(str(file)).prompts("red") == ["see a {brace}", "see scarlet"]
    for text, message in (
        ("classes = 3", "must hold a table"),
        ("[classes]\nred = 3", "string or a list of strings"),
        ('templates = ["none"]\n[classes]\nred = "x"', "exactly once"),
        ("[classes", "not valid TOML"),
        ('color = "x"\n[classes]\nred = "x"', "no other key"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            prompts.named(str(file))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="unknown prompt set 'nope'.*pcam"):
        prompts.named("nope")


# Embedding


def test_embedding_order_norm_and_mode(shards: Path) -> None:
    data = open_dataset(str(shards), "val")
    model = ColourModel().train()
    rows = {}
    for batch_size in (1, 7, 64):
        embedder = Embedder(model, preprocess, tokenizer, batch_size=batch_size, num_workers=3)
        rows[batch_size] = embedder.images(data)
    assert model.training
    expected = torch.stack([preprocess(open_image(data.image(i), str)).mean((1, 2)) - 0.2 for i in range(20)])
    for got in rows.values():
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, F.normalize(expected, dim=1))
    texts = embedder.texts(["red", "green", "blue"])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))


def test_bf16_comes_back_as_unit_float32() -> None:
    class Linear(ColourModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 16)

        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            out = self.layer(text.float() / 255)
            assert out.dtype == torch.bfloat16
            return out

    rows = Embedder(Linear(), preprocess, tokenizer, precision="bf16").texts(["red", "blue"])
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        Embedder(Linear(), preprocess, tokenizer, precision="fp16")


def test_a_nan_embedding_names_its_sample(shards: Path) -> None:
    with pytest.raises(UserError, match="embedding of s006 holds NaN"):
        Embedder(ColourModel("image"), preprocess, tokenizer, batch_size=7).images(open_dataset(str(shards), "val"))


def test_a_broken_logit_scale_is_refused(folder: Path) -> None:
    model = ColourModel()
    model.logit_scale.data.fill_(torch.nan)
    with pytest.raises(UserError, match="logit_scale is nan"):
        run_on(EvalConfig(data=str(folder), split="test", progress=False), model)


# evaluate


def test_evaluate_on_shards(shards: Path) -> None:
    config = EvalConfig(
        data=str(shards), task=("retrieval", "zero_shot"), label=("colour",), progress=False, batch_size=6
    )
    results = run_on(config)
    json.dumps(results, allow_nan=False)
    assert set(results["tasks"]) == {"retrieval", "zero_shot/colour"}
    colour = results["tasks"]["zero_shot/colour"]
    assert colour["classes"] == sorted(COLOURS)
    assert colour["figures"][0]["value"] == 1 and colour["figures"][0]["chance"] == 0.25
    assert results["tasks"]["retrieval"]["task"]["data"]["fingerprint"] == open_dataset(str(shards), "val").fingerprint
    assert results["model"]["logit_scale"] == pytest.approx(10)
    found = results["tasks"]["retrieval"]
    # 20 pairs, 4 colours, 3 captions each: the colour alone narrows a caption down to 5 images.
    assert found["num_distinct_captions"] == 12
    assert found["figures"][5]["name"] == "text to image R@5" and found["figures"][5]["value"] > 0.9
    assert found["figures"][5]["chance"] == pytest.approx(0.25)


def test_samples_without_the_label_are_left_out_and_counted(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "halves.toml"
    file.write_text('[classes]\ndark = "red"\nlight = "blue"\n')
    config = EvalConfig(data=str(shards), task=("zero_shot",), label=("half",), prompts=str(file), progress=False)
    result = run_on(config)["tasks"]["zero_shot/half"]
    assert result["num_samples"] == 5 and result["num_without_label"] == 15


def test_evaluate_on_a_folder_and_on_a_csv_agree(folder: Path, tmp_path: Path) -> None:
    lines = ["path,colour,split"]
    lines += [f"folder/test/{name}/{i}.jpg,{name},mine" for name in ("blue", "red") for i in range(3)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join([*lines, "folder/none.jpg,red,other"]) + "\n")
    by_folder = run_on(EvalConfig(data=str(folder), split="test", progress=False))
    by_csv = run_on(EvalConfig(data=str(table), split="mine", progress=False))
    first, second = by_folder["tasks"]["zero_shot/class"], by_csv["tasks"]["zero_shot/colour"]
    assert first["confusion"] == second["confusion"] == [[3, 0], [0, 3]]


def test_retrieval_on_a_csv_with_captions(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text('path,caption\nfolder/test/red/0.jpg,"red, plain"\nfolder/test/blue/0.jpg,blue\n')
    result = run_on(EvalConfig(data=str(table), progress=False))
    assert set(result["tasks"]) == {"retrieval"}
    assert result["tasks"]["retrieval"]["figures"][0]["value"] == 1


def test_fingerprint_follows_the_content(folder: Path) -> None:
    first = open_dataset(str(folder), "test").fingerprint
    assert open_dataset(str(folder), "test").fingerprint == first != open_dataset(str(folder), "train").fingerprint
    (folder / "test" / "red" / "0.jpg").write_bytes(jpeg((1, 2, 3)))
    assert open_dataset(str(folder), "test").fingerprint != first


def refuse(data: object, message: str, **options: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_on(EvalConfig(data=str(data), progress=False, **options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_data_that_is_not_there_is_one_clear_line(shards: Path, folder: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "does not exist")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "neither shards")
    (tmp_path / "hollow" / "red").mkdir(parents=True)
    refuse(tmp_path / "hollow", "holds no image")
    refuse(shards, "no split 'tset'.*val", split="tset")
    refuse(folder, "no split 'val'.*test, train", split="val")
    refuse(folder, "needs captions", split="test", task=("retrieval",))
    refuse(folder, "'colour' is unknown", split="test", label=("colour",))
    refuse(shards, "'color' is in no sample.*colour", task=("zero_shot",), label=("color",))
    refuse(shards, "needs --label.*colour", task=("zero_shot",))
    refuse(shards, "only value is 'CC0'", task=("zero_shot",), label=("licence",))
    refuse(shards, "no class 'blue'", task=("zero_shot",), label=("colour",), prompts="pcam")
    refuse(shards, "unknown task 'retreival'", task=("retreival",))
    refuse(shards, "device 'gpu' cannot be used", device="gpu")
    (tmp_path / "notes.txt").write_text("x")
    refuse(tmp_path / "notes.txt", "not a .csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'path'"),
        ("path,label\n", "has no row"),
        ("path,label\na.jpg\n", "line 2: 2 columns"),
        ("path,label\na.jpg,x,y\n", "line 2: 2 columns"),
        ("path,label\n,x\n", "line 2: column 'path' is empty"),
        ("path,label,split\na.jpg,x,train\n", "no split 'val'.*train"),
        ("path,label\na.jpg,x\nb.jpg,y\n", "a.jpg, named in .* cannot be read: No such file"),
        ("path,caption\na.jpg, \n", "line 2: the caption is empty"),
        ('path,label\n"a.jpg,x\n', "not a CSV file"),
    ],
)
def test_broken_csv_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    refuse(tmp_path / "t.csv", message)


@pytest.mark.parametrize("content", [b"", b"not an image", jpeg((9, 9, 9), 64)[:300]])
def test_a_broken_image_is_named(folder: Path, content: bytes) -> None:
    (folder / "test" / "red" / "1.jpg").write_bytes(content)
    refuse(folder, "image red/1.jpg cannot be decoded", split="test")


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    header = bytearray(jpeg((1, 2, 3)))
    at = header.index(b"\xff\xc0") + 5
    header[at : at + 4] = b"\x75\x30\x75\x30"
    with pytest.raises(UserError, match="bomb.jpg.*(30000 x 30000|exceeds limit)"):
        open_image(bytes(header), lambda: "bomb.jpg")


def test_the_command_line_takes_tasks_and_labels_repeatedly() -> None:
    command = configuration.parse(
        EvalCommand,
        ["runs/x", "--data", "d", "--task", "retrieval", "--task", "zero_shot", "--label", "plane", "--split", "test"],
        prog="bclip eval",
    )
    assert (command.model, command.data, command.split) == ("runs/x", "d", "test")
    assert command.task == ("retrieval", "zero_shot") and command.label == ("plane",)


def test_a_run_is_evaluated_on_its_own_shards_unless_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder.*--data"):
        run(EvalCommand(model=str(tmp_path)))
    (tmp_path / "config.toml").write_text('[data]\nshards = "/nowhere/shards"\n')
    with pytest.raises(UserError, match="/nowhere/shards"):
        run(EvalCommand(model=str(tmp_path)))


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2, "context_length": 77, "vocab_size": 49408},
}


def test_open_clips_models_are_loaded_by_name(folder: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """By a file of weights and by a tag, whose download is a copy: the figures are those of the model itself."""
    open_clip = import_open_clip()
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY)
    torch.manual_seed(3)
    model, _, transform = open_clip.create_model_and_transforms("tiny")
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    tag = {"url": "https://example.org/tiny.pt", "mean": (0.5,) * 3, "std": (0.2,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"published": tag})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **options: str(tmp_path / "tiny.pt"))
    config = EvalConfig(data=str(folder), split="test", progress=False)
    expected = run_on(config, model.eval(), transform, open_clip.get_tokenizer("tiny"))["tasks"]
    by_file = evaluate(f"open_clip:tiny/{tmp_path / 'tiny.pt'}", data=str(folder), split="test", progress=False)
    assert by_file["tasks"] == expected and by_file["model"]["num_parameters"] == sum(
        p.numel() for p in model.parameters()
    )
    other = open_clip.image_transform(32, is_train=False, mean=tag["mean"], std=tag["std"])
    by_tag = evaluate("open_clip:tiny/published", data=str(folder), split="test", progress=False)["tasks"]
    assert by_tag == run_on(config, model, other, open_clip.get_tokenizer("tiny"))["tasks"] != expected
    (tmp_path / "broken.pt").write_bytes(b"broken")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    for name, words in (
        ("tiny/none", "cannot load none: Pretrained value 'none' is not a known tag"),
        (f"tiny/{tmp_path / 'broken.pt'}", "cannot load .*broken.pt"),
        (f"tiny/{tmp_path / 'other.pt'}", "cannot load .*other.pt: Error.s. in loading state_dict"),
        ("nothing/none", "an architecture that open_clip lists"),
        ("tiny", "use open_clip:ARCHITECTURE/PRETRAINED"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            evaluate(f"open_clip:{name}", data=str(folder), split="test", progress=False)
        assert "\n" not in str(caught.value)


def test_any_open_clip_model_can_be_evaluated(folder: Path) -> None:
    open_clip = import_open_clip()
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY)
    transform = open_clip.image_transform(32, is_train=False)
    config = EvalConfig(data=str(folder), split="test", progress=False)
    result = run_on(config, model, transform, open_clip.SimpleTokenizer())["tasks"]["zero_shot/class"]

    def encode(name: str) -> Tensor:
        ids = open_clip.SimpleTokenizer()([template.format(name) for template in prompts.GENERIC_TEMPLATES])
        return F.normalize(F.normalize(model.encode_text(ids), dim=1).mean(0), dim=0)

    files = sorted((folder / "test").rglob("*.jpg"))
    with torch.no_grad():
        images = F.normalize(model.eval().encode_image(torch.stack([transform(Image.open(f)) for f in files])), dim=1)
        predictions = (images @ torch.stack([encode("blue"), encode("red")]).T).argmax(1)
    expected = [[0, 0], [0, 0]]
    for file, prediction in zip(files, predictions.tolist(), strict=True):
        expected[["blue", "red"].index(file.parent.name)][prediction] += 1
    assert result["confusion"] == expected
