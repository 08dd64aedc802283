"""Small data sets in the true layouts of the 26 rows of medpmc-clip-eval, and a model that tells their images apart."""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dicom_files import dicom
from PIL import Image
from torch import Tensor, nn

from bclip_fast.eval import suites

SUBSETS = [task.row for task in suites.load("medpmc").tasks if task.dataset == "microbench"]
DIM = 8


class HashModel(nn.Module):
    """Embeds an image by its mean colour, and a text by a random vector that depends on its hash and on `seed`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(7.0)))
        self.seed = nn.Parameter(torch.tensor(float(seed)))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(int(self.seed))
        features = (image.mean((2, 3)) - 0.5) @ torch.randn(3, DIM, generator=generator)
        return F.normalize(features, dim=1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        seeds = (text[:, 0] + 1000 * int(self.seed)).tolist()
        rows = [torch.randn(DIM, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        features = torch.stack(rows)
        return F.normalize(features, dim=1) if normalize else features


def preprocess(image: Image.Image) -> Tensor:
    pixels = np.asarray(image.convert("RGB").resize((4, 4)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def tokenizer(texts: list[str]) -> Tensor:
    return torch.tensor([[zlib.crc32(text.encode()) % 1_000_003] for text in texts])


def hash_model(seed: int = 0) -> tuple[nn.Module, Callable[[Image.Image], Tensor], Callable[[list[str]], Tensor]]:
    return HashModel(seed), preprocess, tokenizer


def picture(seed: int, side: int = 12, suffix: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    colour = tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist())
    Image.new("RGB", (side, side), colour).save(buffer, suffix)
    return buffer.getvalue()


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed, suffix="JPEG" if path.suffix in (".jpg", ".jpeg") else "PNG"))


def write_medmnist(folder: Path, name: str = "breastmnist", num: int = 6, labels: int = 1, side: int = 224) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(name))
    shades = random.integers(0, 256, num, dtype=np.uint8)
    images = np.broadcast_to(shades[:, None, None], (num, side, side))
    values = random.integers(0, 2, (num, labels))
    values[:2] = [[0], [1]]
    np.savez_compressed(folder / f"{name}_224.npz", test_images=images, test_labels=values.astype(np.uint8))
    return folder / f"{name}_224.npz"


def write_pcam(folder: Path, num: int = 6) -> None:
    import h5py

    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / "camelyonpatch_level_2_split_test"
    colours = np.random.default_rng(1).integers(0, 256, (num, 1, 1, 3), dtype=np.uint8)
    with h5py.File(f"{stem}_x.h5", "w") as file:
        file["x"] = np.broadcast_to(colours, (num, 96, 96, 3))
    with h5py.File(f"{stem}_y.h5", "w") as file:
        file["y"] = (np.arange(num) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)


def write_deepdrid(folder: Path, rows: Sequence[tuple[str, object]] = (), *, xlsx: bool = False) -> Path:
    """As the repository has it: Challenge1_labels beside Images/PATIENT/STEM.jpg."""
    place = folder / "regular_fundus_images" / "Online-Challenge1&2-Evaluation"
    rows = rows or [(f"{patient}_l1", patient % 5) for patient in range(347, 354)]
    for i, (name, _) in enumerate(rows):
        write_picture(place / "Images" / name.partition("_")[0] / f"{name}.jpg", 20 + i)
    if not xlsx:
        table = place / "Challenge1_labels.csv"
        table.write_text("image_id,DR_Levels\n" + "".join(f"{name},{level}\n" for name, level in rows))
        return table
    from openpyxl import Workbook

    book = Workbook()
    sheet = book.active
    for row in [("image_id", "DR_Levels"), *rows]:
        sheet.append(list(row))
    book.save(place / "Challenge1_labels.xlsx")
    return place / "Challenge1_labels.xlsx"


def write_rsna(folder: Path, num: int = 5) -> None:
    """Patients p0, p1, ...: DICOM, PNG and JPEG in turn. p0 has two boxes."""
    images = folder / "stage_2_train_images"
    images.mkdir(parents=True, exist_ok=True)
    lines = ["patientId,x,y,width,height,Target"]
    for i in range(num):
        lines += [f"p{i},1,2,3,4,{i % 2}"] if i else ["p0,1,2,3,4,0", "p0,5,6,7,8,0"]
        if i % 3 == 0:
            pixels = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint16) * (10 + i)
            (images / f"p{i}.dcm").write_bytes(dicom(pixels, WindowCenter=5, WindowWidth=2))
        else:
            write_picture(images / f"p{i}{'.png' if i % 3 == 1 else '.jpg'}", 40 + i)
    (folder / "stage_2_train_labels.csv").write_text("\n".join(lines) + "\n")


def write_ham10000(folder: Path, num: int = 9) -> Path:
    names = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    lines = [f"image,{','.join(names)}"]
    for i in range(num):
        write_picture(folder / "ISIC2018_Task3_Test_Input" / f"ISIC_00{i}.jpg", 60 + i)
        lines.append(f"ISIC_00{i}," + ",".join("1.0" if i % 7 == j else "0.0" for j in range(7)))
    file = folder / "ISIC2018_Task3_Test_GroundTruth.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def write_lc25000(folder: Path) -> None:
    for i, name in enumerate(("colon_n", "colon_aca", "lung_n", "lung_aca", "lung_scc")):
        for j in range(3):
            write_picture(folder / "Test Set" / name / f"{name}{j}.jpeg", 80 + 10 * i + j)


def write_dad(folder: Path, num: int = 6, categories: Sequence[dict[str, Any]] = ()) -> Path:
    annotations = [{"image_id": i, "category_id": 1 + (i + j) % 11} for i in range(num) for j in (0, 2, 2)]
    images = [{"id": i, "file_name": f"{i:03d}.png"} for i in range(num)]
    for i in range(num):
        write_picture(folder / "images" / f"{i:03d}.png", 100 + i)
    content = {"images": images, "annotations": annotations, "categories": list(categories)}
    (folder / "test.json").write_text(json.dumps(content))
    return folder / "test.json"


def bench_rows(subset: str, num: int = 3) -> list[dict[str, Any]]:
    rows = []
    for i in range(num):
        captions = {}
        for kind in (0, 1):
            options = [
                f"{subset} {word} {kind}" for word in ("cell", "fibre", "pollen", "tumour")[: 2 + (i + kind) % 3]
            ]
            options = options[i % 2 :] + options[: i % 2]
            captions[f"classification_{kind}"] = {"options": options, "answer_idx": (i + kind) % len(options)}
        image = {"bytes": picture(200 + i + len(subset)), "path": f"{i}.png"}
        rows.append({"image_id": f"{subset}-{i}", "image": image, "dataset": subset, "captions": captions})
    return rows


def write_microbench(folder: Path, rows: Sequence[dict[str, Any]], *, arrow: bool = False) -> Path:
    """As the hub has it: Parquet files of a conversion, or Arrow streams of `datasets`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows))
    path = folder / ("perception/0.1.0/ubench-test-00000-of-00001.arrow" if arrow else "default/test/0000.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    if arrow:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    else:
        pq.write_table(table, path, row_group_size=4)
    return path


def write_all(root: Path) -> Path:
    """Write all 26 rows below `root`."""
    write_medmnist(root / "medmnist")
    write_medmnist(root / "medmnist", "chestmnist", num=8, labels=14)
    write_pcam(root / "pcam")
    write_deepdrid(root / "deepdrid")
    write_rsna(root / "rsna")
    write_ham10000(root / "ham10000")
    write_lc25000(root / "lc25000")
    write_dad(root / "dad")
    write_microbench(root / "ubench", [row for subset in SUBSETS for row in bench_rows(subset)])
    return root
