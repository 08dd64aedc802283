"""Write the artefacts of `tests/compat/written`: every kind of file that users of this version have on disk.

    python tests/compat/write.py FOLDER

FOLDER must not exist. The commands run in it with relative paths, one thread and float32. A run that a test has to
resume is killed while it writes its second checkpoint. An absolute path in a file becomes `@HERE@`, which the tests
replace. `expected.json` holds the numbers that the tests compare with.

To keep a set of a later version beside this one, run the script at that version. Commit the folder as
`tests/compat/written_VERSION`, and add it to SETS in `test_written_before.py`.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

# Runs a command and kills its own process at the first file event whose path contains the mark.
_COMMAND = """
import os, sys
mark = sys.argv[1]
def hook(event, arguments):
    if mark and event in ("open", "os.mkdir", "os.rename") and any(mark in str(value) for value in arguments):
        os._exit(9)
sys.addaudithook(hook)
from bclip_fast.cli import main
sys.exit(main(sys.argv[2:]))
"""

_TRAIN = """\
preset = ""
batch_size = 8
max_steps = 4
seed = 3

[model]
embed_dim = 12
init_logit_scale = 3.9

[model.vision]
image_size = 32
patch_size = 8
width = 8
layers = 2
heads = 1

[model.text]
context_length = 12
vocab_size = 64
width = 8
layers = 2
heads = 1
max_positions = 16

[data]
shards = "shards"
shuffle_block = 16
num_threads = 1

[optim]
lr = 2e-3
warmup_steps = 1
grad_clip_norm = 2.0

[engine]
name = "ddp"
precision = "fp32"

[checkpoint]
every_steps = 2
keep = 0
"""

_COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chdir(folder)
    expected: dict[str, object] = {
        "versions": {name: version(name) for name in ("bclip_fast", "torch", "numpy", "pillow", "pyarrow")},
        "machine": platform.machine(),
    }
    _write_articles(Path("articles"))
    _write_tables()
    Path("train.toml").write_text(_TRAIN)

    # Write shards with the Python writer, with the command, and with builds that are killed at the fourth article and
    # at the second shard.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from synthetic import write_shards

    write_shards(Path("shards"), num_samples=24, num_val=8)
    bclip("ingest build", "articles", "-o", "ingest", *INGEST)
    killed("00000003", "ingest build", "articles", "-o", "interrupted", *INGEST)
    killed("test-000000", "ingest build", "articles", "-o", "planned", *INGEST)

    # Train runs. Each has a checkpoint after step 2 and the metrics of 4 steps.
    for name, flags in RUNS.items():
        killed("step-00000004", "train", "train.toml", "--run", name, *flags)
        bclip("train", "train.toml", "--run", "whole", *flags)
        expected[name] = {"losses": losses(name), "norms": norms("whole")}
        shutil.rmtree("whole")
    failed("train", "train.toml", "--run", "given_up", *GIVE_UP)
    for path in Path("given_up").iterdir():
        if path.name not in ("dumps", "events.jsonl", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # Fine-tune: killed runs to resume, and finished ones to evaluate.
    for name, flags in FINETUNED.items():
        killed("step-00000004", "finetune", "train_ddp", "--run", name, *flags)
        bclip("finetune", "train_ddp", "--run", "whole", *flags)
        expected[name] = {"losses": losses(name), "norms": norms("whole")}
        shutil.rmtree("whole")
    bclip("finetune", "train_ddp", "--run", "answers_finished", *FINETUNED["answers"])
    shutil.rmtree(Path("answers_finished", "checkpoints"))
    bclip("finetune", "train_ddp", "--run", "pairs_finished", *FINETUNED["pairs"])

    # Run every command that reads a run.
    bclip("export", "train_ddp", "--out", "exported")
    bclip("eval", "train_ddp", "--out", "evaluated", "--cache", "embeddings", *EVAL)
    bclip("eval", "answers_finished", "--out", "evaluated_answers", "--cache", "none", *EVAL_ANSWERS)
    bclip("eval", "pairs_finished", "--out", "evaluated_pairs", "--cache", "none", *EVAL)
    shutil.rmtree("pairs_finished")
    bclip("embed", "train_ddp", "--data", "ingest", "--split", "train", "--out", "index", "--no_progress")
    expected["search"] = {
        query: hits(bclip("search", "index", query, "-k", "20")) for query in ("a red square", "tables/red.jpg")
    }
    bclip("tune", "--device", "cpu", "--operators", "gelu", "--seconds", "0.01", "--out", "tuning.json")
    for page in Path().glob("evaluated*/report.html"):
        page.unlink()
    for curves in Path().glob("*/tb"):
        shutil.rmtree(curves)
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    _hide_paths(folder)


INGEST = ("--workers", "1", "--val_fraction", "0.2", "--test_fraction", "0.2", "--seed", "5")
RUNS = {
    "train_ddp": (),
    "train_zero1": ("--engine.name", "deepspeed", "--engine.zero_stage", "1"),
    "train_accumulated": (
        *("--micro_batch_size", "4", "--ema_decay", "0.8", "--validation.every_steps", "2"),
        *("--model.text.dropout", "0.1", "--model.vision.patch_dropout", "0.25"),
    ),
}
# A limit below every norm: the third step in a row that is skipped stops the run.
GIVE_UP = ("--spikes.window", "2", "--spikes.grad_norm", "1e-9", "--spikes.max_skipped", "1", "--max_steps", "60")
_FEW_STEPS = ("--batch_size", "4", "--epochs", "1", "--checkpoint_every", "2", "--num_workers", "1")
_FP32 = ("--seed", "2", "--engine.precision", "fp32", "--optim.lr", "1e-3", "--optim.warmup_steps", "1")
FINETUNED = {
    "pairs": ("--data", "tables/pairs.csv", *_FEW_STEPS, *_FP32),
    "answers": ("--data", "tables/questions.csv", "--task", "vqa", "--head_layers", "1", *_FEW_STEPS, *_FP32),
}
EVAL = (
    *("--data", "tables/pairs.csv", "--task", "retrieval", "--task", "zero_shot", "--task", "probe"),
    *("--label", "colour", "--share", "1.0", "--num_seeds", "1", "--split", "test", "--num_workers", "1"),
    *("--no_progress", "--device", "cpu"),
)
EVAL_ANSWERS = (
    *("--data", "tables/questions.csv", "--split", "train", "--task", "vqa", "--num_workers", "1"),
    *("--no_progress", "--device", "cpu"),
)


def bclip(name: str, *arguments: str, mark: str = "", status: int = 0) -> str:
    """Run a command here and return its stdout. Raises SystemExit when its exit status is another one."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("BCLIP_")},
        **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "BCLIP_TUNE": "off", "COLUMNS": "160"},
        **{"CUDA_VISIBLE_DEVICES": ""},
    }
    command = [sys.executable, "-c", _COMMAND, mark, *name.split(), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != status:
        raise SystemExit(f"bclip {name} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def killed(mark: str, name: str, *arguments: str) -> None:
    bclip(name, *arguments, mark=mark, status=9)


def failed(name: str, *arguments: str) -> None:
    bclip(name, *arguments, status=2)


def losses(run: str) -> list[float]:
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def norms(run: str) -> dict[str, float]:
    """The norm of every tensor in the checkpoint of step 4: weights, moments and EMA."""
    from safetensors.torch import load_file

    files = sorted(Path(run, "checkpoints", "step-00000004").glob("*.safetensors"))
    tensors = {f"{path.stem} {name}": tensor for path in files for name, tensor in load_file(path).items()}
    return {name: float(tensor.double().norm()) for name, tensor in tensors.items()}


def hits(printed: str) -> dict[str, float]:
    """The cosine of each image's key in the table that `bclip search` prints."""
    rows = [[cell.strip() for cell in line.split("\u2502")] for line in printed.splitlines()]
    return {row[3]: float(row[2]) for row in rows if len(row) > 4 and row[1].isdigit()}


def _jpeg(pixels: np.ndarray, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _write_articles(folder: Path) -> None:
    """Six articles of two figures under two licences. One figure has no image, and one image occurs twice."""
    generator = np.random.default_rng(0)
    first = b""
    for number in range(1, 7):
        home = folder / f"PMC{number}"
        home.mkdir(parents=True)
        for figure in (1, 2):
            data = _jpeg(generator.integers(0, 255, (9, 12, 3)), (48, 36))
            first = first or data
            if (number, figure) != (3, 2):
                (home / f"f{figure}.jpg").write_bytes(first if (number, figure) == (5, 1) else data)
        licence = "by" if number % 2 else "by-nc"
        figures = "".join(
            f'<fig id="F{figure}"><label>Figure {figure}</label><caption><p>Figure {figure} of article {number}, a '
            f'{list(_COLOURS)[(number + figure) % 4]} square.</p></caption><graphic xlink:href="f{figure}"/></fig>'
            for figure in (1, 2)
        )
        (home / "article.nxml").write_text(
            f'<article xmlns:xlink="http://www.w3.org/1999/xlink"><front><article-meta>'
            f'<article-id pub-id-type="pmc">{number}</article-id><article-id pub-id-type="doi">10.1/{number}'
            f"</article-id><title-group><article-title>Article {number}</article-title></title-group><permissions>"
            f'<license xlink:href="https://creativecommons.org/licenses/{licence}/4.0/"><license-p>Open.</license-p>'
            f"</license></permissions></article-meta></front><body><p>See Figure 1.</p>{figures}</body></article>"
        )


def _write_tables() -> None:
    """Coloured images with pairs.csv (captions, labels, splits) and questions.csv."""
    folder = Path("tables")
    folder.mkdir()
    questions, pairs = ["image,question,answer,answer_type,split"], ["path,caption,colour,split"]
    for name, colour in _COLOURS.items():
        for shade in range(8):
            file = f"{name}{shade or ''}.jpg"
            (folder / file).write_bytes(_jpeg(np.full((8, 8, 3), colour) * (1 - 0.06 * shade), (40, 36)))
            pairs.append(f"{file},a {name} square {shade},{name},{'train' if shade < 4 else 'test'}")
        questions.append(f"{name}.jpg,what colour is it,{name},open,train")
        questions += [
            f"{name}.jpg,is it {other},{'yes' if other == name else 'no'},closed,train" for other in list(_COLOURS)[:3]
        ]
    (folder / "pairs.csv").write_text("\n".join(pairs) + "\n")
    (folder / "questions.csv").write_text("\n".join(questions) + "\n")


def _hide_paths(folder: Path) -> None:
    """Replace the folder's own path by @HERE@, in texts and in the metadata of Parquet files."""
    import pyarrow.parquet as pq

    here = str(folder.resolve())
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or here.encode() not in path.read_bytes():
            continue
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            metadata = {key: value.replace(here.encode(), b"@HERE@") for key, value in table.schema.metadata.items()}
            pq.write_table(table.replace_schema_metadata(metadata), path)
        else:
            path.write_bytes(path.read_bytes().replace(here.encode(), b"@HERE@"))
        print(f"{path.relative_to(folder)}: its path is now @HERE@")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
