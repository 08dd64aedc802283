"""Run a peer's own tests on our classes: `python tests/support/peer_suites.py open_clip CHECKOUT`.

CHECKOUT is a clone of the peer's repository at the commit in `SUITES`. The tests run in a child process. There this
module is a plugin of pytest, which puts our classes in the place of the peer's before it imports a test.
docs/peers.md lists the results and the reasons of each test that doesn't pass.
"""

from __future__ import annotations

import importlib
import os
import re
import string
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers

from bclip_fast.benchmarks import peers
from bclip_fast.integrations import open_clip
from bclip_fast.integrations.sentence_transformers import MultipleNegativesRankingLoss


@dataclass(frozen=True)
class Suite:
    """A peer's tests, and the results that they should have on our classes."""

    commit: str
    source: str  # folder of the package in the checkout
    files: tuple[str, ...]
    passed: int
    not_passed: dict[str, int] = field(
        default_factory=dict
    )  # beginnings of the names of other tests, with their number
    skipped: int = 0


SUITES = {
    "open_clip": Suite(
        "89fb801f1e6087880e951fc8354b8a2077b79c6d",
        "src",
        (
            "tests/test_loss.py", "tests/test_siglip_chunked_loss.py", "tests/test_factory_task.py",
            "tests/test_task_base_unit.py", "tests/test_task_specific_unit.py", "tests/test_task_fsdp_unit.py",
            "tests/test_task_compile.py", "tests/test_task_checkpoint.py", "tests/test_clap_task.py",
        ),
        passed=92,
        # They call open_clip's private function of a block of logits, which our loss doesn't have.
        not_passed={"tests/test_siglip_chunked_loss.py::test_chunk": 12},
    ),
    "sentence_transformers": Suite(
        "cad211983f36ce458e9b3360f3e11b29fc54cbd8",
        ".",
        (
            "tests/sentence_transformer/losses/test_cmnrl.py", "tests/sentence_transformer/losses/test_gradcache.py",
            "tests/sentence_transformer/losses/test_merged_forward.py",
            "tests/sentence_transformer/losses/test_adaptive_layer.py",
        ),
        passed=89,
        skipped=2,
    ),
}  # fmt: skip


def run(peer: str, checkout: Path) -> list[str]:
    """Run the suite of a peer. Return the differences from the results that it should have."""
    suite = SUITES[peer]
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    if head.stdout.strip() != suite.commit:
        raise ValueError(f"{checkout} is at {head.stdout.strip()}: check out {suite.commit}")
    here = Path(__file__).resolve()
    paths = [str(checkout / suite.source), str(here.parent), str(here.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "BCLIP_PEER": peer, "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    options = ["-q", "-rA", "--tb=line", "-p", "peer_suites", "-p", "no:randomly", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(str(checkout / file) for file in suite.files)]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--rootdir", str(checkout)]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    if result.returncode > 1:
        return [f"pytest ended with status {result.returncode}"]
    return differences(suite, result.stdout)


def differences(suite: Suite, report: str) -> list[str]:
    """What a report of `pytest -rA` says otherwise than the suite."""
    lines = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (?:\[(\d+)\] )?(\S+)", report, re.MULTILINE)
    names = {kind: [name for each, _, name in lines if each == kind] for kind in ("PASSED", "FAILED", "ERROR")}
    skipped = sum(int(number or 1) for kind, number, _ in lines if kind == "SKIPPED")
    found = []
    if len(names["PASSED"]) != suite.passed:
        found.append(f"{len(names['PASSED'])} tests passed, not {suite.passed}")
    if skipped != suite.skipped:
        found.append(f"{skipped} tests were skipped, not {suite.skipped}")
    others = names["FAILED"] + names["ERROR"]
    for beginning, number in suite.not_passed.items():
        matching = [name for name in others if name.startswith(beginning)]
        others = [name for name in others if name not in matching]
        if len(matching) != number:
            found.append(f"{len(matching)} tests {beginning}... did not pass, not {number}")
    return found + [f"{name} did not pass" for name in others]


def pytest_load_initial_conftests() -> None:
    """Put our classes in the place of the peer's, before a test imports them."""
    peer = os.environ.get("BCLIP_PEER")
    if peer == "open_clip":
        peers.import_open_clip()
        open_clip.install()
    elif peer == "sentence_transformers":
        peers.import_torchvision()
        losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
        theirs = losses.MultipleNegativesRankingLoss
        for name, module in list(sys.modules.items()):
            if name.startswith("sentence_transformers.") and vars(module).get(theirs.__name__) is theirs:
                setattr(module, theirs.__name__, MultipleNegativesRankingLoss)
        for name in ("sentence-transformers-testing/stsb-bert-tiny-safetensors", "distilbert/distilbert-base-uncased"):
            tiny_bert(Path(name))


def tiny_bert(folder: Path) -> None:
    """Write a model with random weights at the path, relative to the test's folder, that the tests have on the hub."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, ".", "?", "!", ","]
    words += [f"##{letter}" for letter in string.ascii_lowercase]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=128, **special
    ).save_pretrained(folder)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=128, **sizes)
    transformers.BertModel(config).save_pretrained(folder)


def main(peer: str, checkout: str) -> int:
    """Print the differences. Return whether there are any."""
    found = run(peer, Path(checkout).resolve())
    print("\n".join(found) or f"{peer}: the results are those of docs/peers.md")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
