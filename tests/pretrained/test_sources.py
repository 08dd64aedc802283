"""Checkpoints of the Hugging Face hub, which a folder replaces here: the tests never reach the network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from checkpoints import CONFIG, edit_json, in_section
from huggingface_hub.errors import LocalEntryNotFoundError
from towers import SMALL

from bclip_fast import load
from bclip_fast.errors import UserError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    """A folder that replaces the hub: ORG/NAME/REVISION/FILE."""

    def download(repo_id: str, filename: str, *, revision: str | None = None) -> str:
        path = tmp_path / "hub" / repo_id / (revision or "main") / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(f"no {filename} in the cache and no connection\nmore")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path / "hub"


def test_load_hub_revision_equals_checkpoint(hub: Path, checkpoint: Path) -> None:
    (hub / "org" / "name").mkdir(parents=True)
    checkpoint.rename(hub / "org" / "name" / "v2")
    assert load("hf-hub:org/name@v2")[0].config == SMALL
    with pytest.raises(UserError, match=r"hf-hub:org/name gave no open_clip_config.json: .*no connection$"):
        load("hf-hub:org/name")


def test_load_missing_tokenizer_is_downloaded_or_raises(hub: Path, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="save the tokenizer next to the weights"):
        load(checkpoint)
    edit_json(checkpoint / CONFIG, in_section("text_cfg", "hf_tokenizer_name", "org/words"))
    with pytest.raises(UserError, match=r"hf-hub:org/words gave no tokenizer.json or vocab.txt"):
        load(checkpoint)
    (hub / "org" / "words" / "main").mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "brain"]
    (hub / "org" / "words" / "main" / "vocab.txt").write_text("\n".join(words) + "\n")
    assert load(checkpoint)[2](["brain"], 4).tolist() == [[2, 4, 3, 0]]


def test_load_text_tower_size_comes_from_the_hub(hub: Path, checkpoint: Path) -> None:
    edit_json(checkpoint / CONFIG, in_section("text_cfg", "hf_model_name", "org/bert"))
    with pytest.raises(UserError, match=r"hf-hub:org/bert gave no config.json"):
        load(checkpoint)
    (hub / "org" / "bert").mkdir(parents=True)
    (checkpoint / "text").rename(hub / "org" / "bert" / "main")
    assert load(checkpoint)[0].config == SMALL


def test_load_offline_hub_raises_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, message in [("org/absent", "org/absent gave no"), ("a b/c/d", "not a repository id")]:
        with pytest.raises(UserError, match=message) as error:
            load(f"hf-hub:{name}")
        assert "\n" not in str(error.value)
