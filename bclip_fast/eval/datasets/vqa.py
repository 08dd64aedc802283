"""Questions about images: VQA-RAD, SLAKE, or a CSV file."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bclip_fast.data import splits
from bclip_fast.errors import UserError, first_line
from bclip_fast.eval.tasks import Task
from bclip_fast.io import stand_ins
from bclip_fast.io.folders import Listing
from bclip_fast.io.hashing import sha256, sha256_of_parts
from bclip_fast.io.tables import PATH_COLUMNS, SUFFIXES, read_table

from .files import existing, file_of_split, read_image, split_files
from .table import rows_of_split

RAD_FILE = "VQA_RAD_Dataset_Public.json"
_RAD_IMAGES = ("images", "VQA_RAD Image Folder")
_RAD_SPLITS = ("train", "train_clean", "test")
_SLAKE_SPLITS = ("train", "validate", "test")
_COLUMNS = "image,question,answer[,answer_type,split]"


@dataclass(frozen=True)
class Question:
    """A question about an image.

    key: name in reports. answer: normalised reference answer. kind: open or closed.
    """

    key: str
    image: Path
    text: str
    answer: str
    kind: str


class VqaDataset:
    """The questions of one split, in file order. An `EvalDataset` with `questions`."""

    label_kinds: tuple[str, ...] = ()

    def __init__(self, path: str, split: str, questions: Sequence[Question]) -> None:
        """path: file or folder of the data, for reports."""
        self.path, self.split, self.questions = path, split, list(questions)

    def __len__(self) -> int:
        return len(self.questions)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of images, questions and answers."""
        hashes = {path: sha256(read_image(path)) for path in dict.fromkeys(q.image for q in self.questions)}
        return sha256_of_parts("\0".join([hashes[q.image], q.text, q.answer, q.kind]) + "\n" for q in self.questions)

    def key(self, i: int) -> str:
        """Return the question's key."""
        return self.questions[i].key

    def image_name(self, i: int) -> str:
        """Return the name of the image file and of the question, for errors."""
        return f"{'/'.join(self.questions[i].image.parts[-2:])} of question {self.key(i)}"

    def image(self, i: int) -> bytes:
        """Return the contents of the image file."""
        return read_image(self.questions[i].image)

    def captions(self) -> None:
        """Return None: questions are not captions."""
        return None

    def labels(self, kind: str) -> list[str | None]:
        """Raise UserError: questions have no labels."""
        raise UserError(f"label {kind!r} is unknown; {self.path} holds questions, which have no labels")

    def vocabulary(self) -> tuple[str, ...]:
        """Return the distinct answers in alphabetical order."""
        return tuple(sorted({q.answer for q in self.questions}))

    def common_answers(self) -> tuple[str, str]:
        """Return the most frequent answer to open and to closed questions. On ties, the alphabet decides."""
        counts = [Counter(sorted(q.answer for q in self.questions if q.kind == kind)) for kind in ("open", "closed")]
        return tuple(count.most_common(1)[0][0] if count else "" for count in counts)  # type: ignore[return-value]


def normalise(answer: object) -> str:
    """Convert an answer to lower case with single spaces and without a final full stop: `"Yes. "` becomes `yes`."""
    return " ".join(str(answer).lower().split()).rstrip(" .")


def open_dataset(path: str, split: str, task: Task) -> VqaDataset:
    """Open the published folder of VQA-RAD or SLAKE, or a CSV file.

    The CSV has the columns image, question, answer[, answer_type, split].

    Raises:
        UserError: a missing or unexpected file. The message names the expected file and its source.
    """
    location = Path(path)
    if task.dataset == "vqa_rad":
        return rad(location, split, task.download_url)
    if task.dataset == "slake":
        return slake(location, split, task.download_url)
    if location.is_dir() and (tables := split_files(Listing(location), SUFFIXES)):
        file, name = file_of_split(tables, split, location)
        return _table(file, split, name)
    if not location.is_file() or location.suffix.lower() not in SUFFIXES:
        raise UserError(f"task {task.name!r} needs a .csv with columns {_COLUMNS}; {path} is not one")
    return _table(location, split)


def rad(root: Path, split: str, download_url: str = "osf.io/89kps", *, images: bool = True) -> VqaDataset:
    """Open VQA-RAD: 3,064 questions in train, 451 in test, 2,780 in train_clean.

    The test split has the rows whose phrase_type begins with `test`, each with its `question`. The train split has the
    1,797 other rows. It also has the 1,267 rewrites that any row holds as `question_frame`, with the row's answer. The
    field counts like this (MEVF's script, M3AE, ARL), although 284 of the rewrites belong to test rows. train_clean
    leaves those out.

    Without the published file, trainset.json and testset.json are read, as MEVF and M3AE distribute them.

    images: False skips the check for missing image files.
    """
    file, split = _rad_file(root, split)
    keys = ["qid", "image_name", "question", "answer", "answer_type"]
    has_all = file.name == RAD_FILE
    rows = _json_rows(file, [*keys, "phrase_type"] if has_all else keys, download_url)
    folder = next((root / name for name in _RAD_IMAGES if (root / name).is_dir()), root / _RAD_IMAGES[0])

    def question(row: dict[str, Any], text: str, suffix: str = "") -> Question:
        kind = str(row["answer_type"]).strip().lower()
        if kind not in ("open", "closed"):
            raise UserError(f"{file}, qid {row['qid']}: answer_type is {row['answer_type']!r}, must be OPEN or CLOSED")
        return Question(
            f"{row['qid']}{suffix}", folder / row["image_name"], text.strip(), normalise(row["answer"]), kind
        )

    if not has_all:
        questions = [question(row, row["question"]) for row in rows]
        return _checked(VqaDataset(str(root), split, questions), images, download_url)
    is_test = [str(row["phrase_type"]).startswith("test") for row in rows]
    in_split = [row for row, in_test in zip(rows, is_test, strict=True) if in_test == (split == "test")]
    questions = [question(row, row["question"]) for row in in_split]
    if split != "test":
        questions += [
            question(row, row["question_frame"], "-framed")
            for row, in_test in zip(rows, is_test, strict=True)
            if _has_text(row.get("question_frame")) and (split == "train" or not in_test)
        ]
    return _checked(VqaDataset(str(root), split, questions), images, download_url)


def _rad_file(root: Path, split: str) -> tuple[Path, str]:
    """Return the file with the questions of a split, and the split's name."""
    parts = {} if (root / RAD_FILE).is_file() else _json_of_splits(root)
    if parts:
        return file_of_split(parts, split, root)
    return root / RAD_FILE, splits.resolve(split, _RAD_SPLITS, "VQA-RAD", by_program=True)


def _json_of_splits(root: Path) -> dict[str, Path]:
    return split_files(Listing(root), (".json",), certain=True) if root.is_dir() else {}


def slake(root: Path, split: str, download_url: str = "", *, images: bool = True) -> VqaDataset:
    """Open SLAKE's English questions: 4,919 in train, 1,053 in validate, 1,061 in test. The images are in imgs/.

    images: False skips the check for missing image files.
    """
    if parts := _json_of_splits(root):
        file, split = file_of_split(parts, split, root)
    else:
        file = root / f"{splits.resolve(split, _SLAKE_SPLITS, 'SLAKE', by_program=True)}.json"
    rows = _json_rows(file, ("qid", "img_name", "question", "answer", "answer_type", "q_lang"), download_url)
    questions = [
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
    return _checked(VqaDataset(str(root), split, questions), images, download_url)


def _table(file: Path, split: str, name: str = "all") -> VqaDataset:
    """Read a CSV file. name: the split of all rows, if the file does not have a column of splits."""
    table = read_table(
        file, (PATH_COLUMNS, ("question",), ("answer",)), ("answer_type", "split"), texts=("question",), hint=_COLUMNS
    )
    path_column = next(column for column in PATH_COLUMNS if column in table.columns)
    questions = []
    rows, split, _ = rows_of_split(table, split, name, path_column)
    for number, row in enumerate(rows):
        for column in (path_column, "answer", "question"):
            if not row.cells[column].strip():
                raise UserError(f"data {file}, line {row.line}: column {column!r} is empty")
        kind = row.cells.get("answer_type", "open").lower()
        image = existing(file.parent / row.cells[path_column])
        questions.append(Question(str(number), image, row.cells["question"], normalise(row.cells["answer"]), kind))
    return _checked(VqaDataset(str(file), split, questions), True, "your data")


def _has_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() not in ("", "NULL")


def _json_rows(file: Path, keys: Sequence[str], download_url: str) -> list[dict[str, Any]]:
    source = f"get it from {download_url}" if download_url else "get the published file"
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
        missing = next((key for row in rows for key in keys if key not in row), None)
    except (OSError, ValueError, TypeError) as error:
        stand_ins.refuse(file)
        raise UserError(f"{file} cannot be read as a JSON list of questions ({first_line(error)}); {source}") from error
    if missing is not None or not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: a question lacks {missing!r}, which all must have; {source}")
    for number, row in enumerate(rows):  # keys[1:3]: image and question
        if wrong := next((key for key in keys[1:3] if not isinstance(row[key], str)), None):
            raise UserError(f"{file}, row {number + 1}: {wrong!r} is not a text; {source}")
    return rows


def _checked(data: VqaDataset, images: bool, source: str) -> VqaDataset:
    if not data.questions:
        raise UserError(f"{data.path} has no question in split {data.split!r}")
    if invalid := next((q for q in data.questions if q.kind not in ("open", "closed") or not q.text), None):
        raise UserError(
            f"{data.path}, question {invalid.key}: its type is {invalid.kind!r}, must be open or closed, "
            "and its text must not be empty"
        )
    missing = sorted({q.image for q in data.questions if not q.image.is_file()}) if images else []
    if missing:
        raise UserError(
            f"{data.path}: {missing[0]} and {len(missing) - 1} more images are missing; get them from {source}"
        )
    return data
