"""The package without compiled modules, which macOS, Windows and machines without a compiler get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loaders import loader, take
from runs import column
from synthetic import tiny_run

from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.ops import build_info
from bclip_fast.train.trainer import train

SUPPORT = Path(__file__).parents[1] / "support"
REASON = "bclip_fast was built without compiled modules: there is no C++ compiler (g++ is not on the PATH)"

# Runs in a process that imports the installed package, and prints one JSON object.
PROGRAM = """
import json, sys
from importlib.util import find_spec
from pathlib import Path

import torch
from loaders import loader, take
from synthetic import tiny_run

import bclip_fast
from bclip_fast import ClipLoss, ops
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.doctor import backends
from bclip_fast.eval import exact_ranks
from bclip_fast.train.trainer import train

shards, run = map(Path, sys.argv[1:])
assert find_spec("bclip_fast._cpu") is None and find_spec("bclip_fast._cuda") is None
out = {"file": bclip_fast.__file__, "doctor": backends.lines()}

torch.manual_seed(0)
pair = [torch.nn.functional.normalize(torch.randn(7, 5), dim=1).requires_grad_() for _ in "it"]
loss = ClipLoss()(*pair, torch.tensor(20.0))
loss.backward()
out["loss"] = [loss.item(), *(part.tolist() for part in pair), *(part.grad.tolist() for part in pair)]
qkv = torch.randn(2, 9, 3, 2, 8)
out["attention"] = [qkv.tolist(), ops.fused_attention(qkv).tolist()]
try:
    ops.fused_attention(qkv, backend="cpu")
except ops.BackendError as error:
    out["refused"] = str(error)
with loader(ShardDataset(shards)) as source:
    out["images"] = [batch.images.tolist() for batch in take(source, 2)]
rows, bounds = torch.eye(4), torch.full((4,), 0.5, dtype=torch.float64)
out["ranks"] = exact_ranks.count(rows, rows, bounds, bounds, 1e-9)[0].tolist()
train(tiny_run(run, shards, max_steps=2))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that the pure package trained."""
    return tmp_path_factory.mktemp("pure") / "run"


@pytest.fixture(scope="module")
def results(pure_package: Path, shards: Path, run: Path) -> dict[str, Any]:
    path = os.pathsep.join([str(pure_package), str(SUPPORT)])
    command = [sys.executable, "-c", PROGRAM, str(shards), str(run)]
    # In the run's folder, because Python looks for the package in the present folder first.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=run.parent, env=environment, text=True, capture_output=True)
    assert out.returncode == 0, out.stderr
    results = json.loads(out.stdout.splitlines()[-1])
    assert Path(results["file"]).is_relative_to(pure_package)
    return results


def test_losses_and_attention_equal_their_definitions(results: dict[str, Any]):
    value, image, text, image_grad, text_grad = (torch.tensor(part, dtype=torch.float64) for part in results["loss"])
    image.requires_grad_(), text.requires_grad_()
    logits = 20 * image @ text.T
    target = torch.arange(len(logits))
    loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    loss.backward()
    for actual, expected in ((value, loss.detach()), (image_grad, image.grad), (text_grad, text.grad)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    qkv, out = (torch.tensor(part, dtype=torch.float64) for part in results["attention"])
    query, key, content = qkv.permute(2, 0, 3, 1, 4)
    expected = torch.softmax(query @ key.mT / 8**0.5, dim=-1) @ content
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_doctor_and_refusals_say_why_modules_are_missing(results: dict[str, Any]):
    (line,) = [line for line in results["doctor"] if line.startswith("  cpu ")]
    assert line.startswith(f"  cpu            missing: {REASON}; on Linux, install a C++ compiler")
    assert results["refused"] == f"fused_attention cannot run: cpu: {REASON}"


def test_loader_gives_the_same_batches(results: dict[str, Any], shards: Path):
    """Pillow and the compiled decoder share libjpeg-turbo's pixels, and the same resize."""
    with loader(ShardDataset(shards)) as source:
        batches = take(source, 2)
    assert torch.equal(torch.tensor(results["images"], dtype=torch.uint8), torch.stack([b.images for b in batches]))


def test_training_gives_the_same_losses(results: dict[str, Any], run: Path, shards: Path, tmp_path: Path):
    train(tiny_run(tmp_path / "run", shards, max_steps=2))
    expected = torch.tensor(column(tmp_path / "run", "loss"))
    assert len(expected) == 2
    torch.testing.assert_close(torch.tensor(column(run, "loss")), expected, rtol=1e-5, atol=0)


def test_exact_ranks_need_no_compiled_module(results: dict[str, Any]):
    assert results["ranks"] == [[1, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (None, "bclip_fast._none is not installed"),
        ("damaged", "bclip_fast._none is not installed"),
        ('{"modules": ["bclip_fast._cpu"], "reason": ""}', "bclip_fast._none is not installed"),
        ('{"modules": ["bclip_fast._none"], "reason": ""}', "bclip_fast._none was built for another Python than this"),
        ('{"modules": [], "reason": "BCLIP_COMPILED=0"}', f"{REASON.partition(':')[0]}: BCLIP_COMPILED=0"),
    ],
)
def test_why_missing_reads_the_record_of_the_build(tmp_path: Path, contents: str | None, reason: str):
    file = tmp_path / "build_info.json"
    if contents is not None:
        file.write_text(contents)
    assert str(build_info.why_missing("bclip_fast._none", file)).startswith(reason)
    assert build_info.why_missing("bclip_fast.ops", file) is None
