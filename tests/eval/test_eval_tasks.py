"""Tasks and their data sets as published, embeddings kept by content, parity with an independent ELEVATER."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_eval import COLOURS, ColourModel, jitter, jpeg, preprocess, tokenizer, unit

from bclip_fast.data.images import open_image
from bclip_fast.errors import UserError
from bclip_fast.eval import embedding_cache, evaluate, prompts, report, retrieval, statistics, tasks, zero_shot
from bclip_fast.eval.datasets import open_dataset, rsna

WORDS = {"0": "red", "1": "blue"}


def task_file(where: Path, dataset: str, words: dict[str, str] = WORDS, **keys: object) -> str:
    lines = ['title = "Mine"', 'protocol = "zero_shot"', f'dataset = "{dataset}"', 'label = "class"', 'split = "test"']
    lines += [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in keys.items()
    ]
    lines += ['where = "the shelf"', "[prompts.classes]", *(f'{key} = "{word}"' for key, word in words.items())]
    path = where / "mine.toml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def on(task: str, data: Path, **settings: object) -> dict:
    triple = (ColourModel(), preprocess, tokenizer)
    return evaluate(triple, [task], data=str(data), progress=False, **settings)["tasks"]  # type: ignore[arg-type]


def pixels(names: list[str], side: int) -> np.ndarray:
    rows = [np.broadcast_to(np.array(COLOURS[name], np.uint8), (side, side, 3)) for name in names]
    return np.stack(rows)


def refuse(message: str, *args: object, **options: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(*args, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# Task files


def test_every_task_of_the_package_reads_and_says_where_its_data_are() -> None:
    for name in tasks.names():
        task = tasks.load(name)
        if name in tasks.PROTOCOLS:
            continue
        assert task.where and task.metric and task.num_samples and task.split == "test", name
        assert task.prompts is not None or task.protocol in ("retrieval", "vqa")
        assert all(row.model and row.source and 0 < row.value <= 100 for row in task.published)


def test_golden_numbers_stand_in_the_task_files() -> None:
    golden = {"pcam": 73.41, "lc25000_lung": 65.23, "lc25000_colon": 92.98, "tcga_til": 67.04, "rsna_pneumonia": 78.95}
    for name, value in golden.items():
        first = tasks.load(name).published[0]
        assert (first.model, first.value, first.figure) == ("BiomedCLIP", value, tasks.load(name).metric)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('title = "x"', "protocol is None"),
        ('title = "x"\nprotocol = "zero_shot"\ncolour = 1', "key 'colour'"),
        ('title = "x"\nprotocol = "zero_shot"\nnum_samples = "3"', "key 'num_samples'"),
        ('protocol = "zero_shot"', "title"),
        ('title = "x"\nprotocol = "zero_shot"\n[[published]]\nmodel = "m"', "missing 3 required"),
        ('title = "x"\nprotocol = "zero_shot"\n[prompts]\ntemplates = ["a"]', "must hold a table"),
        ("title = ", "not valid TOML"),
    ],
)
def test_broken_task_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        tasks.load(str(tmp_path / "t.toml"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="unknown task 'pcma'.*pcam"):
        tasks.load("pcma")


# Data sets


def write_pcam(folder: Path, split: str, names: list[str]) -> None:
    h5py = pytest.importorskip("h5py")
    folder.mkdir(exist_ok=True)
    stem = folder / f"camelyonpatch_level_2_split_{split}"
    with h5py.File(f"{stem}_x.h5", "w") as file:
        file["x"] = pixels(names, 96)
    with h5py.File(f"{stem}_y.h5", "w") as file:
        file["y"] = np.array([int(name == "blue") for name in names], np.uint8).reshape(-1, 1, 1, 1)


def test_pcam(tmp_path: Path) -> None:
    names = ["red", "blue", "blue", "red", "blue"]
    write_pcam(tmp_path / "pcam", "test", names)
    data = open_dataset(str(tmp_path / "pcam"), "test", "pcam")
    assert data.labels("class") == ["0", "1", "1", "0", "1"] and len(data) == 5
    assert open_image(data.image(1), str).getpixel((3, 3)) == COLOURS["blue"]
    result = on(task_file(tmp_path, "pcam", folder="pcam"), tmp_path)["mine"]
    assert [figure["name"] for figure in result["figures"]] == ["accuracy", "balanced accuracy", "AUROC"]
    assert [figure["value"] for figure in result["figures"]] == [1, 1, 1]
    assert result["samples"]["key"][0] == "test/0" and len(result["sensitivity"]) == 6


def test_pcam_that_is_not_whole(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    folder = tmp_path / "pcam"
    write_pcam(folder, "test", ["red", "blue"])
    options = {"reader": "pcam", "where": "the shelf"}
    refuse(r"split_valid_x.h5 is not there.*\(N, 96, 96, 3\) uint8; get it from the shelf", folder, "val", **options)
    with gzip.open(folder / "camelyonpatch_level_2_split_valid_x.h5.gz", "w") as file:
        file.write(b"x")
    refuse("split_valid_x.h5 is still packed: gunzip", folder, "val", **options)
    y = folder / "camelyonpatch_level_2_split_test_y.h5"
    y.write_bytes(b"no HDF5")
    refuse("test_y.h5 cannot be read.*the shelf", folder, "test", **options)
    with h5py.File(y, "w") as file:
        file["y"] = np.zeros((3, 1, 1, 1), np.uint8)
    refuse("2 images.* 3 labels", folder, "test", **options)
    with h5py.File(y, "w") as file:
        file["y"] = np.zeros((2, 1), np.int64)
    refuse(r"shape \(2, 1\), int64", folder, "test", **options)


def write_medmnist(path: Path, **arrays: np.ndarray) -> None:
    images, labels = pixels(["red", "blue", "blue"], 28), np.array([[0], [1], [1]], np.uint8)
    np.savez(path, **({"test_images": images, "test_labels": labels} | arrays))


def test_medmnist(tmp_path: Path) -> None:
    write_medmnist(tmp_path / "bloodmnist.npz")
    for place in (tmp_path, tmp_path / "bloodmnist.npz"):
        assert open_dataset(str(place), "test", "medmnist").labels("class") == ["0", "1", "1"]
    assert len(open_dataset(str(tmp_path / "bloodmnist.npz"), "test")) == 3
    refuse("no pathmnist", tmp_path, "test", "medmnist", name="pathmnist")
    refuse("KeyError|val_images", tmp_path, "val", "medmnist", where="the shelf")
    write_medmnist(tmp_path / "bloodmnist.npz", test_labels=np.zeros((2, 1)))
    refuse(r"labels \(2, 1\); MedMNIST needs test_images", tmp_path, "test", "medmnist")
    (tmp_path / "bloodmnist.npz").write_bytes(b"PK\x03\x04 broken")
    refuse("bloodmnist.npz cannot be read.*the shelf", tmp_path, "test", "medmnist", where="the shelf")


def test_several_labels_a_sample_give_a_macro_auroc(tmp_path: Path) -> None:
    write_medmnist(tmp_path / "chestmnist.npz", test_labels=np.array([[1, 0], [0, 1], [0, 0]], np.uint8))
    result = on(task_file(tmp_path, "auto", multi_label=True), tmp_path / "chestmnist.npz")["mine"]
    assert result["samples"]["label"] == ["0", "1", ""]
    # The third is blue and labelled nothing: half a pair of class 1 is lost to the tie with the second.
    assert [row["auroc"] for row in result["per_class"]] == [1, 0.75]
    assert result["figures"][0]["name"] == "AUROC, macro" and result["figures"][0]["value"] == 0.875


def test_the_probe_of_chestmnist(tmp_path: Path) -> None:
    """The task of the package on a set of its shape: 14 findings, three splits; findings 0 and 1 are colours."""
    generator, arrays = np.random.default_rng(0), {}
    for split, num in (("train", 60), ("val", 40), ("test", 30)):
        labels = (generator.random((num, 14)) < 0.4).astype(np.uint8)
        names = [list(COLOURS)[row[0] + 2 * row[1]] for row in labels]
        arrays |= {f"{split}_images": pixels(names, 28), f"{split}_labels": labels}
    write_medmnist(tmp_path / "chestmnist.npz", **arrays)
    triple, names = (ColourModel(), preprocess, tokenizer), ["chestmnist_probe", "chestmnist"]
    results = evaluate(triple, names, data=str(tmp_path), progress=False, share=(1.0,), num_seeds=1)
    result, other = (results["tasks"][name] for name in names)
    assert [figure["name"] for figure in result["figures"]] == [
        "AUROC, macro, 100 % of train",
        "accuracy, 100 % of train",
    ]
    areas = [row["auroc"] for row in result["per_class"]]
    assert min(areas[:2]) > 0.95 and 0.3 < sum(areas[2:]) / 12 < 0.7
    assert result["validation"] == "val" and result["samples"]["key"][0] == "test/0"
    assert [figure["name"] for figure in other["figures"]] == ["AUROC, macro"] == [tasks.load("chestmnist").metric]
    low, high = other["figures"][0]["interval"]
    assert low < other["figures"][0]["value"] < high
    report.write(tmp_path / "report.html", results)
    text = (tmp_path / "report.html").read_text()
    assert "Probe: chestmnist<" in text and "atelectasis" in text and "Runs of the probe" in text


def test_pneumoniamnist_as_it_is(shared_data: Path) -> None:
    place = shared_data / "classification" / "pneumoniamnist"
    data = open_dataset(str(place), "test", "medmnist", name="pneumoniamnist")
    labels = data.labels("class")
    assert (labels.count("0"), labels.count("1")) == (234, 390) and len(data) == tasks.load(
        "pneumoniamnist"
    ).num_samples
    assert open_image(data.image(5), str).size == (28, 28)


def test_tcga_til_with_and_without_cancers(tmp_path: Path) -> None:
    for cancer in ("brca", "luad"):
        for name, colour in (("til-negative", "red"), ("til-positive", "blue")):
            (tmp_path / cancer / "test" / name).mkdir(parents=True)
            (tmp_path / cancer / "test" / name / "a.png").write_bytes(jpeg(COLOURS[colour]))
    assert len(open_dataset(str(tmp_path), "test", "tcga_til")) == 4
    data = open_dataset(str(tmp_path / "luad"), "test", "tcga_til")
    assert data.labels("class") == ["til-negative", "til-positive"]
    refuse(r"CANCER/.train.*get it from the shelf", tmp_path, "train", "tcga_til", where="the shelf")


def write_dicom(path: Path, values: np.ndarray, **tags: object) -> None:
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    header.Rows, header.Columns = values.shape
    header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation = 1, "MONOCHROME2", 0
    header.BitsAllocated = header.BitsStored = values.dtype.itemsize * 8
    header.HighBit = header.BitsStored - 1
    for name, value in tags.items():
        setattr(header, name, value)
    header.PixelData = values.tobytes()
    header.save_as(path, enforce_file_format=True)


def test_rsna_splits_by_the_public_csv_alone(tmp_path: Path) -> None:
    from sklearn.model_selection import train_test_split

    # Of the number of the public file; a positive patient has a row a box, as there.
    patients = [f"{i * 7919 % 26684:08x}" for i in range(rsna.NUM_PATIENTS)]
    splits = rsna.split_patients(sorted(patients))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 18678, "val": 4003, "test": 4003}
    assert len(set().union(*splits.values())) == rsna.NUM_PATIENTS
    train, rest = train_test_split(sorted(patients), test_size=0.3, random_state=0)
    assert splits["test"] == train_test_split(rest, test_size=0.5, random_state=0)[0] and splits["train"] == train


def test_rsna_images_and_labels(tmp_path: Path) -> None:
    (tmp_path / rsna.IMAGES).mkdir()
    lines = ["patientId,x,y,width,height,Target"]
    for i in range(10):
        lines += [f"p{i},1,2,3,4,1", f"p{i},5,6,7,8,1"] if i % 2 else [f"p{i},,,,,0"]
        ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) + i
        write_dicom(tmp_path / rsna.IMAGES / f"p{i}.dcm", ramp)
    (tmp_path / rsna.LABELS).write_text("\n".join(lines) + "\n")
    sizes = {}
    for split in ("train", "val", "test"):
        data = open_dataset(str(tmp_path), split, "rsna")
        sizes[split] = len(data)
        for i, label in enumerate(data.labels("class")):
            number = int(data.key(i)[1:])
            assert label == str(number % 2)
            assert np.asarray(open_image(data.image(i), str))[0, 3] == 3 + number
    assert sizes == {"train": 7, "val": 2, "test": 1}
    inverted = tmp_path / rsna.IMAGES / f"{data.key(0)}.dcm"
    write_dicom(inverted, np.array([[0, 1000], [2000, 4000]], np.uint16), PhotometricInterpretation="MONOCHROME1")
    assert np.asarray(open_image(data.image(0), str)).tolist() == [[255, 191], [127, 0]]
    inverted.write_bytes(b"none")
    with pytest.raises(UserError, match="cannot be decoded as DICOM"):
        data.image(0)
    inverted.unlink()
    with pytest.raises(UserError, match="a patient of stage_2_train_labels.csv, cannot be read"):
        data.image(0)
    (tmp_path / rsna.LABELS).write_text("patientId,Target\np1,2\n")
    refuse("Target '2', must be 0 or 1", tmp_path, "test", "rsna")
    (tmp_path / rsna.LABELS).write_text("patient,Target\np1,1\n")
    refuse("columns patientId, Target.*the shelf", tmp_path, "test", "rsna", where="the shelf")


def test_a_folder_of_pictures_beside_texts(tmp_path: Path) -> None:
    for i, name in enumerate(("red", "blue")):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(COLOURS[name]))
        (tmp_path / f"{i}.txt").write_text(f"a {name} square\n")
    result = on("retrieval", tmp_path)["retrieval"]
    assert [figure["value"] for figure in result["figures"][:1]] == [1]
    (tmp_path / "1.txt").write_text(" ")
    refuse("1.txt, the text of 1.jpg, is empty", tmp_path, "all")
    (tmp_path / "1.txt").unlink()
    refuse("1.txt, the text of 1.jpg, cannot be read", tmp_path, "all")


# Embeddings that are kept


def test_kept_embeddings_are_used_and_follow_weights_data_and_preprocessing(tmp_path: Path, monkeypatch) -> None:
    for i, name in enumerate(("red", "blue", "red")):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name / f"{i}.jpg").write_bytes(jpeg(jitter(COLOURS[name], i)))
    store, calls = tmp_path / "store", []
    model = ColourModel()
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda *a, **k: calls.append(len(a[0])) or encode(*a, **k))

    def run(transform=preprocess, **settings: object) -> dict:
        options = {"data": str(tmp_path / "data"), "progress": False, "cache": str(store)} | settings
        return evaluate((model, transform, tokenizer), ["zero_shot"], **options)["tasks"]["zero_shot/class"]

    first = run()
    assert run()["samples"] == first["samples"] and calls == [3]
    assert len(list(store.iterdir())) == 1
    run(lambda image: preprocess(image).flip(1) * 0.9)
    assert calls == [3, 3]
    half = run(keep="bf16")
    again = run(keep="bf16")
    assert half["samples"] == again["samples"] and calls == [3, 3, 3]
    assert half["samples"] != first["samples"], "what is kept rounded is used rounded at once"
    model.logit_scale.data += 1
    run()
    assert calls == [3, 3, 3, 3]
    (tmp_path / "data" / "red" / "0.jpg").write_bytes(jpeg((250, 10, 10)))
    run()
    assert calls == [3, 3, 3, 3, 3]
    kept = sorted(store.iterdir())
    for path in kept:
        path.write_bytes(path.read_bytes()[:20])
    run()
    assert calls[-1] == 3 and len(calls) == 6, "a broken file is computed anew"
    run(cache="none")
    assert sorted(store.iterdir()) == kept and len(calls) == 7


def test_preprocessing_that_augments_is_refused() -> None:
    with pytest.raises(UserError, match="two results for one image"):
        embedding_cache.of_preprocess(lambda image: torch.rand(3, 8, 8))


# Retrieval: duplicates, indexes


@pytest.mark.parametrize("duplicates", ["strict", "captions", "images", "any"])
def test_duplicates_count_as_stated(duplicates: retrieval.Duplicates) -> None:
    captions = ["a", "b", "b", "c", "d", "d"]
    pictures = ["1", "2", "3", "3", "4", "4"]
    texts, images = unit(6, 8, 1), unit(6, 8, 2)
    result = retrieval.measure(images, texts, captions, duplicates=duplicates, pictures=pictures)
    scores = images.double() @ texts.double().T
    for direction, table in (("image to text", scores), ("text to image", scores.T)):
        hits = []
        for i in range(6):
            same = {"captions": captions, "images": pictures}
            right = [
                j
                for j in range(6)
                if j == i or any(duplicates in (name, "any") and of[i] == of[j] for name, of in same.items())
            ]
            hits.append(int(table[i].argmax()) in right)
        assert result["samples"][f"{direction} R@1"] == [float(hit) for hit in hits]
    with pytest.raises(UserError, match="needs the pictures"):
        retrieval.measure(images, texts, captions, duplicates="images")


@pytest.mark.parametrize("index", ["faiss_flat", "hnsw", "ivf"])
def test_faiss_against_exact_ranks(index: retrieval.Index) -> None:
    pytest.importorskip("faiss")
    texts = unit(3000, 32, 3)
    images = F.normalize(texts + 0.9 * unit(3000, 32, 4), dim=1)
    captions = [str(i // 2) for i in range(3000)]
    for duplicates in ("strict", "captions"):
        of_all = retrieval.measure(images, texts, captions, duplicates=duplicates)  # type: ignore[arg-type]
        found = retrieval.measure(images, texts, captions, duplicates=duplicates, index=index)  # type: ignore[arg-type]
        expected = {figure["name"]: figure for figure in of_all["figures"]}
        for figure in found["figures"]:
            tolerance = 1e-9 if index == "faiss_flat" else 0.08
            if figure["unit"] == "share":
                assert figure["value"] == pytest.approx(expected[figure["name"]]["value"], abs=tolerance)
                assert figure["chance"] == pytest.approx(expected[figure["name"]]["chance"])
    # An index can't say what the rank of a candidate beyond its list is.
    poor = retrieval.measure(images, unit(3000, 32, 5), captions, index=index)
    assert not any("median" in figure["name"] for figure in poor["figures"])


def test_a_part_of_the_queries_has_the_ranks_of_all() -> None:
    texts = unit(300, 16, 6)
    images = F.normalize(texts + unit(300, 16, 7), dim=1)
    whole, _ = retrieval.rank(images, texts)
    part, _ = retrieval.rank(images, texts, num_queries=41, query_chunk=16, candidate_chunk=77)
    assert torch.equal(part.num_better, whole.num_better[:41]) and part.num_candidates == 300


# Zero-shot figures


@pytest.mark.parametrize("num_classes", [2, 4])
def test_auroc_of_scores_equals_scikit_learns(num_classes: int) -> None:
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(num_classes)
    labels = torch.randint(num_classes, (200,), generator=generator)
    scores = (torch.randn(200, num_classes, generator=generator, dtype=torch.float64)
              + F.one_hot(labels, num_classes)).softmax(1)  # fmt: skip
    result = zero_shot.measure(labels, scores.argmax(1), [str(i) for i in range(num_classes)], scores)
    figure = result["figures"][2]
    if num_classes == 2:
        expected = roc_auc_score(labels, scores[:, 1])
        low, high = figure["interval"]
        assert low < figure["value"] < high
    else:
        expected = roc_auc_score(labels, scores, multi_class="ovr", average="macro")
        assert len(result["roc"]) == 4
    assert figure["value"] == pytest.approx(expected)


def test_scores_of_a_single_class_have_no_auroc_and_nan_is_refused() -> None:
    labels = torch.zeros(4, dtype=torch.long)
    scores = torch.rand(4, 2)
    result = zero_shot.measure(labels, labels, ["a", "b"], scores)
    assert [figure["name"] for figure in result["figures"]] == ["accuracy", "balanced accuracy"] and not result["roc"]
    with pytest.raises(UserError, match="scores hold NaN"):
        zero_shot.measure(labels, labels, ["a", "b"], scores * torch.nan)


def test_sensitivity_is_each_template_alone() -> None:
    prompt_set = prompts.PromptSet({"x": ("one",), "y": ("two",)}, ("good {}", "swapped {}"))
    table = {"good one": 0, "good two": 1, "swapped one": 1, "swapped two": 0}
    rows = zero_shot.sensitivity(
        lambda texts: torch.eye(2)[[table[text] for text in texts]],
        prompt_set,
        torch.eye(2)[[0, 1, 1]],
        torch.tensor([0, 1, 1]),
    )
    assert [(row["template"], row["accuracy"]) for row in rows][:2] == [("good {}", 1), ("swapped {}", 0)]
    assert rows[2]["template"] == "all together"


# Parity with open_clip and an independent ELEVATER


@pytest.mark.slow
def test_lc25000_equals_open_clip_and_an_independent_elevater(shared_data: Path, tmp_path: Path, monkeypatch) -> None:
    """Random weights of BiomedCLIP's shapes: features, class embeddings and predictions, on real images.

    Takes 20 seconds or more: two models of the published size embed 12 images, and one of them twice.
    """
    from peers import import_open_clip
    from test_pretrained import BERT_BASE, PUBMEDBERT, shaken

    from bclip_fast import pretrained
    from bclip_fast.data.transform import Preprocess
    from bclip_fast.model.biomedclip import BiomedClip
    from bclip_fast.model.presets import preset
    from bclip_fast.model.tokenizer import Tokenizer

    open_clip = import_open_clip()
    folder = tmp_path / "model"
    words = Tokenizer.from_file(shared_data / "vocab" / "pubmedbert" / "tokenizer.json")
    pretrained.save(folder, shaken(BiomedClip(preset("biomedclip_b16"))), Preprocess(), words)
    # transformers takes a name for a folder where there is one: the hub's model names resolve offline from here.
    (tmp_path / PUBMEDBERT).mkdir(parents=True)
    (tmp_path / PUBMEDBERT / "config.json").write_text(json.dumps(BERT_BASE))
    monkeypatch.chdir(tmp_path)
    lung = tmp_path / "lung"
    for name in ("lung_aca", "lung_n", "lung_scc"):
        (lung / name).mkdir(parents=True)
        for path in sorted((shared_data / "classification" / "lc25000_lung" / name).iterdir())[:4]:
            (lung / name / path.name).symlink_to(path)
    result = evaluate(str(folder), ["lc25000_lung"], data=str(lung), progress=False)["tasks"]["lc25000_lung"]

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    names = {
        "lung_aca": "lung adenocarcinomas",
        "lung_n": "normal lung tissue",
        "lung_scc": "lung squamous cell carcinomas",
    }
    files = sorted(lung.rglob("*.jpeg"))
    with torch.no_grad():
        features = F.normalize(model.encode_image(torch.stack([transform(Image.open(path)) for path in files])), dim=-1)
        weights = []
        for noun in names.values():
            texts = tokens([f"a photo of {noun}", f"{noun} presented in image"])
            mean = F.normalize(model.encode_text(texts), dim=-1).mean(0)
            weights.append(mean / mean.norm())
        logits = 100 * features @ torch.stack(weights).T
    ours, our_transform, our_tokens = pretrained.load(folder)
    with torch.no_grad():
        pictures = torch.stack([our_transform(Image.open(path)) for path in files])
        torch.testing.assert_close(ours.encode_image(pictures), features, atol=2e-6, rtol=0)
        classes = zero_shot.class_embeddings(
            lambda texts: ours.encode_text(our_tokens(texts)), tasks.load("lc25000_lung").prompts
        )
    torch.testing.assert_close(classes, torch.stack(weights), atol=2e-6, rtol=0)
    predictions = [list(names)[i] for i in logits.argmax(1).tolist()]
    assert result["samples"]["key"] == [path.relative_to(lung).as_posix() for path in files]
    assert result["samples"]["prediction"] == predictions
    right = [path.parent.name == said for path, said in zip(files, predictions, strict=True)]
    assert result["figures"][0]["value"] == pytest.approx(np.mean(right))
    area = statistics.auroc(np.array([path.parent.name == "lung_n" for path in files]),
                         (float(model.logit_scale.exp()) / 100 * logits).softmax(1)[:, 1].double().numpy())  # fmt: skip
    assert result["per_class"][1]["auroc"] == pytest.approx(area, abs=1 / 32)


def test_bmp_keeps_every_pixel() -> None:
    from bclip_fast.eval.datasets.arrays import as_bmp

    for shape in ((5, 7), (5, 7, 3)):
        values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(as_bmp(values)))), values)
