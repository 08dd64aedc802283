"""Tests of docs/check_prose.py: which sentences it flags, and where it looks for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs/check_prose.py"
sys.path.insert(0, str(SCRIPT.parent))
import check_prose  # noqa: E402

FLAGGED = {
    "archaic": ["All tensors are fp32 but for the ids.", "Fits a model to pairs of one's own."],
    "alone": ["The buffers are on rank 0 alone."],
    "is no": ["The folder is no dataset of ours.", "A rank whose answer is none is lost."],
    "have not": ["It needs GPUs, which the planned ranks have not."],
    "opening": ["What was added to the batch.", "Of the split and the order.", "cost: of a dataset index."],
    "noun clause": ["The size of what is lost in a step.", "Returns what it has of a tensor."],
    "passive": ["The rank that was told is asked for it when it is given a name."],
    "picture": ["Decodes the pictures of an article."],
    "glue": ["The tiles wait in shared memory; the next ones overwrite all of them."],
    "long": ["The loss " + "and the next loss " * 7 + "are finite."],
}
GOOD = [
    "The fp32 trainable weights whose EMA this rank stores.",
    "Which backend does the next call take?",
    "It is no longer than 350 lines.",
    "A stand-alone program needs only a compiler.",
    "Write `what is lost` or *told* only in quotes.",
    "Interval in steps; 0 turns this off.",
    "Radford et al. 2021 define it.",
]


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in FLAGGED.items() for text in texts])
def test_problems_bad_sentence_names_rule(rule: str, text: str):
    assert rule in check_prose.Sentence(Path("x.py"), 1, text).problems()


@pytest.mark.parametrize("text", GOOD)
def test_problems_good_sentence_is_empty(text: str):
    assert check_prose.Sentence(Path("x.py"), 1, text).problems() == []


SOURCES = {
    "a.py": (
        '"""A module about the loss.\n\n    layout of its file\n\nIt stays on rank 0 alone."""\n\n'
        "# This comment goes on\n# over two lines.\n"
        'raise ValueError(f"{x} is no folder of ours; give another one")\nKEY = "alone"\n'
    ),
    "b.cu": '/* A block of the comment. */\nint x;  // The queries wait\n    // in registers alone.\n#include "a.h"\n',
    "c.md": "# The title of it\n\nA line that\nruns on alone. Another sentence here.\n\n    code alone in here\n",
    "e.py": "# %% [markdown]\n# # A tutorial\n#\n# It reads all data.\n\n# %% [bash]\n# bclip data alone in here\n",
    "d.toml": '# A comment about this\n# overlay.\nabout = "what is not read in here"\n',
}


def test_sentences_every_language_finds_prose_at_its_line(tmp_path: Path):
    lines = {}
    for name, source in SOURCES.items():
        (tmp_path / name).write_text(source)
        lines[name] = [(sentence.line, sentence.text) for sentence in check_prose.sentences(tmp_path / name)]
    assert lines == {
        "a.py": [
            (1, "A module about the loss."),
            (5, "It stays on rank 0 alone."),
            (7, "This comment goes on over two lines."),
            (9, "x is no folder of ours; give another one"),
        ],
        "b.cu": [(1, "A block of the comment."), (2, "The queries wait in registers alone.")],
        "c.md": [(1, "The title of it"), (3, "A line that runs on alone."), (4, "Another sentence here.")],
        "e.py": [(4, "It reads all data.")],
        "d.toml": [(1, "A comment about this overlay.")],
    }


def test_command_warnings_exit_status_is_0(tmp_path: Path):
    (tmp_path / "bclip_fast/data").mkdir(parents=True)
    (tmp_path / "bclip_fast/data/x.py").write_text("# It is read on rank 0 alone.\n# The others wait for it.\n")
    run = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0
    first, summary = run.stdout.splitlines()
    assert first == "bclip_fast/data/x.py:1: [alone] It is read on rank 0 alone."
    assert summary.endswith("bclip_fast/data 1/2")
    sample = subprocess.run([sys.executable, SCRIPT, "--sample", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert "bclip_fast/data/x.py:2: [ok] The others wait for it." in sample.stdout
