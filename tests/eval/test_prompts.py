"""Prompt sets: the paper's prompts and users' prompt files."""

from __future__ import annotations

from pathlib import Path

import pytest

from bclip_fast.errors import UserError
from bclip_fast.eval import prompts
from bclip_fast.eval.datasets import open_dataset


def test_named_gives_the_papers_prompts() -> None:
    assert prompts.named("pcam").prompts("1") == [
        "this is an image of lymph node metastasis",
        "lymph node metastasis presented in image",
    ]
    lung, table = prompts.named("lc25000_lung"), prompts.named("lc25000_lung_table_s10")
    assert lung.templates[0] == "a photo of {}"
    assert table.templates[0] == "this is an image of {}"
    assert lung.classes == table.classes


def test_named_classes_are_the_folders_of_lc25000(shared_data: Path) -> None:
    data = open_dataset(str(shared_data / "classification" / "lc25000_lung"), "test")
    assert set(data.labels("class")) == set(prompts.named("lc25000_lung").classes)
    assert len(data) >= 300


def test_named_reads_prompt_files_and_refuses_invalid_ones(tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match=r"unknown prompt set 'nope'.*pcam"):
        prompts.named("nope")
