"""Questions about images: VQA-RAD, SLAKE, or a CSV file."""

from __future__ import annotations

import csv
import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bclip_fast.errors import UserError, first_line
from bclip_fast.io.hashing import sha256, sha256_of_parts

if TYPE_CHECKING:
    from bclip_fast.eval.tasks import Task

RAD_FILE = "VQA_RAD_Dataset_Public.json"
_RAD_IMAGES = ("images", "VQA_RAD Image Folder")
_SPLITS = {"val": "validate", "valid": "validate", "validation": "validate", "dev": "validate"}


@dataclass(frozen=True)
class Question:
    """`kind` is open or closed; `answer` is normalised; `key` names it in reports."""

    key: str
    image: Path
    text: str
    answer: str
    kind: str


class VqaDataset:
    """The questions of one split, in file order; what `EvalDataset` asks for, and `questions`."""

    label_kinds: tuple[str, ...] = ()

    def __init__(self, path: str, split: str, questions: Sequence[Question]) -> None:
        self.path, self.split, self.questions = path, split, list(questions)

    def __len__(self) -> int:
        return len(self.questions)

    @functools.cached_property
    def fingerprint(self) -> str:
        pictures = {path: sha256(_read(path)) for path in dict.fromkeys(q.image for q in self.questions)}
        return sha256_of_parts("\0".join([pictures[q.image], q.text, q.answer, q.kind]) + "\n" for q in self.questions)

    def key(self, i: int) -> str:
        return self.questions[i].key

    def image(self, i: int) -> bytes:
        return _read(self.questions[i].image)

    def captions(self) -> None:
        return None

    def labels(self, kind: str) -> list[str | None]:
        raise UserError(f"label {kind!r} is unknown: {self.path} holds questions")


def normalise(answer: object) -> str:
    """Lower case, single spaces, no full stop at the end: `"Yes. "` is `yes`."""
    return " ".join(str(answer).lower().split()).rstrip(" .")


def open_dataset(path: str, split: str, task: Task) -> VqaDataset:
    """VQA-RAD's or SLAKE's folder as published, or a CSV with columns image, question, answer[, answer_type, split].

    Raises:
        UserError: a file that is missing or not what it should be; one line says what was expected and where to get it.
    """
    place = Path(path)
    if task.dataset == "vqa_rad":
        return rad(place, split, task.where)
    if task.dataset == "slake":
        return slake(place, split, task.where)
    if not place.is_file() or place.suffix.lower() != ".csv":
        raise UserError(f"task {task.name!r}: {path} is no .csv with columns image,question,answer[,answer_type,split]")
    return _table(place, split)


def rad(root: Path, split: str, where: str = "osf.io/89kps", *, images: bool = True) -> VqaDataset:
    """VQA-RAD: train has 3,064 questions, test 451, train_clean 2,780.

    test: the rows whose phrase_type begins with `test`, each with its `question`. train: all other rows, and of every
    row with a `question_frame` that rewrite as a further question, with the row's answer: 1,797 + 1,267. So the field
    counts (MEVF's script; M3AE, ARL), though 284 of the rewrites are of test rows: train_clean leaves those out.

    images: False checks questions alone, where the pictures are not at hand.
    """
    file = root / RAD_FILE
    rows = _json_rows(file, ("qid", "image_name", "question", "answer", "answer_type", "phrase_type"), where)
    folder = next((root / name for name in _RAD_IMAGES if (root / name).is_dir()), root / _RAD_IMAGES[0])

    def question(row: dict[str, Any], text: str, suffix: str = "") -> Question:
        kind = str(row["answer_type"]).strip().lower()
        if kind not in ("open", "closed"):
            raise UserError(f"{file}, qid {row['qid']}: answer_type is {row['answer_type']!r}, must be OPEN or CLOSED")
        return Question(
            f"{row['qid']}{suffix}", folder / row["image_name"], text.strip(), normalise(row["answer"]), kind
        )

    held = [str(row["phrase_type"]).startswith("test") for row in rows]
    framed = [(row, is_test) for row, is_test in zip(rows, held, strict=True) if _said(row.get("question_frame"))]
    if split == "test":
        found = [question(row, row["question"]) for row, is_test in zip(rows, held, strict=True) if is_test]
    elif split in ("train", "train_clean"):
        found = [question(row, row["question"]) for row, is_test in zip(rows, held, strict=True) if not is_test]
        found += [
            question(row, row["question_frame"], "-framed")
            for row, is_test in framed
            if split == "train" or not is_test
        ]
    else:
        raise UserError(f"VQA-RAD has no split {split!r}: there are train, train_clean and test")
    return _checked(VqaDataset(str(root), split, found), images, where)


def slake(root: Path, split: str, where: str = "", *, images: bool = True) -> VqaDataset:
    """SLAKE's English questions: 4,919 train, 1,053 validate, 1,061 test; pictures in imgs/."""
    split = _SPLITS.get(split, split)
    if split not in ("train", "validate", "test"):
        raise UserError(f"SLAKE has no split {split!r}: there are train, validate and test")
    file = root / f"{split}.json"
    rows = _json_rows(file, ("qid", "img_name", "question", "answer", "answer_type", "q_lang"), where)
    found = [
        Question(
            str(row["qid"]),
            root / "imgs" / row["img_name"],
            row["question"].strip(),
            normalise(row["answer"]),
            str(row["answer_type"]).strip().lower(),
        )
        for row in rows
        if row["q_lang"] == "en"
    ]
    return _checked(VqaDataset(str(root), split, found), images, where)


def _table(file: Path, split: str) -> VqaDataset:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines, strict=True))
        if rows and "split" in rows[0]:
            rows = [row for row in rows if row["split"] == split]
        found = [
            Question(
                str(i),
                file.parent / row["image"],
                row["question"],
                normalise(row["answer"]),
                row.get("answer_type", "open").strip().lower(),
            )
            for i, row in enumerate(rows)
        ]
    except (OSError, csv.Error, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: needs columns image, question, answer[, answer_type, split]: {error}") from error
    return _checked(VqaDataset(str(file), split, found), True, "your own data")


def _said(text: object) -> bool:
    return isinstance(text, str) and text.strip() not in ("", "NULL")


def _json_rows(file: Path, keys: Sequence[str], where: str) -> list[dict[str, Any]]:
    source = f"get it from {where}" if where else "get the published file"
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
        missing = next((key for row in rows for key in keys if key not in row), None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read as a JSON list of questions ({first_line(error)}); {source}") from error
    if missing is not None or not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: a question lacks {missing!r}, which all must have; {source}")
    return rows


def _checked(data: VqaDataset, images: bool, where: str) -> VqaDataset:
    if not data.questions:
        raise UserError(f"{data.path} has no question in split {data.split!r}")
    if bad := next((q for q in data.questions if q.kind not in ("open", "closed") or not q.text), None):
        raise UserError(
            f"{data.path}, question {bad.key}: its type is {bad.kind!r}, must be open or closed, and its text not empty"
        )
    missing = sorted({q.image for q in data.questions if not q.image.is_file()}) if images else []
    if missing:
        raise UserError(
            f"{missing[0]} and {len(missing) - 1} more pictures of {data.path} are not there; get them: {where}"
        )
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {error.strerror}") from error


def vocabulary(train: VqaDataset) -> tuple[str, ...]:
    """The distinct answers of the training questions, in alphabetical order."""
    return tuple(sorted({q.answer for q in train.questions}))


def common_answers(train: VqaDataset) -> tuple[str, str]:
    """The most frequent training answer of open and of closed questions; of equals the first in the alphabet."""
    counts = [Counter(sorted(q.answer for q in train.questions if q.kind == kind)) for kind in ("open", "closed")]
    return tuple(count.most_common(1)[0][0] if count else "" for count in counts)  # type: ignore[return-value]
