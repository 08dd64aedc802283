"""Task files: those of the package, and users' files."""

from __future__ import annotations

from pathlib import Path

import pytest

from bclip_fast.errors import UserError
from bclip_fast.eval import tasks


def test_load_every_task_of_the_package_is_complete() -> None:
    for name in tasks.names():
        task = tasks.load(name)
        if name in tasks.protocols():
            continue
        assert all((task.download_url, task.metric, task.split == "test")), name
        assert task.num_samples or task.row  # the benchmark's authors did not publish the sizes of all rows
        assert task.prompts is not None or task.protocol in ("retrieval", "vqa") or task.dataset == "microbench"
        assert all(row.model and row.source and 0 < row.value <= 100 for row in task.published)


def test_load_tasks_hold_the_papers_scores() -> None:
    golden = {"pcam": 73.41, "lc25000_lung": 65.23, "lc25000_colon": 92.98, "tcga_til": 67.04, "rsna_pneumonia": 78.95}
    for name, value in golden.items():
        first = tasks.load(name).published[0]
        assert (first.model, first.value, first.metric) == ("BiomedCLIP", value, tasks.load(name).metric)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('title = "x"', "protocol is None"),
        ('title = "x"\nprotocol = "zero_shot"\ncolour = 1', "key 'colour'"),
        ('title = "x"\nprotocol = "zero_shot"\nnum_samples = "3"', "key 'num_samples'"),
        ('protocol = "zero_shot"', "title"),
        (
            'title = "x"\nprotocol = "zero_shot"\n[[published]]\nmodel = "m"',
            "needs the keys model, figure, value and source",
        ),
        ('title = "x"\nprotocol = "zero_shot"\n[prompts]\ntemplates = ["a"]', "must hold a table"),
        ("title = ", "not valid TOML"),
    ],
)
def test_load_invalid_task_file_raises(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        tasks.load(str(tmp_path / "t.toml"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"unknown task 'pcma'.*pcam"):
        tasks.load("pcma")
