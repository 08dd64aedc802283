"""`bclip push`: what reaches a hub on this machine, and what stays here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, hub
from huggingface_hub import constants

from bclip_fast.cli import main


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", running.url, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported model beside files that must stay on this machine."""
    (tmp_path / "model" / "text").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("key")
    for name, content in {
        "README.md": b"# card", "model.safetensors": b"w" * 1000, "text/[1]*.json": b"{}", ".env": b"TOKEN=1",
    }.items():  # fmt: skip
        (tmp_path / "model" / name).write_bytes(content)
    (tmp_path / "model" / "link.txt").symlink_to(tmp_path / "secret.txt")
    return tmp_path / "model"


def test_push_without_yes_sends_nothing(server: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(folder), "group/model"]) == 0
    assert server.num_requests == 0
    shown = capsys.readouterr().out
    assert "1,000 bytes  model.safetensors" in shown
    assert f"1,008 bytes in 3 files, to {server.url}/group/model (a new repository is private)" in shown
    assert "Nothing was uploaded; add --yes" in shown
    assert "secret" not in shown and ".env" not in shown


def test_push_uploads_the_listed_files_with_the_token(
    server: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for message in ("first", "second"):  # the repository exists the second time
        assert main(["push", str(folder), "group/model", "--yes", "--message", message]) == 0
    assert server.repositories == {"group/model": {"name": "model", "organization": "group", "visibility": "private"}}
    names = ("README.md", "model.safetensors", "text/[1]*.json")
    assert server.files == {f"group/model/{name}": (folder / name).read_bytes() for name in names}
    assert server.messages == ["first", "second"]
    assert "Bearer hf_secret" in server.tokens
    assert f"uploaded: {server.url}/group/model/commit/" in capsys.readouterr().out


def test_push_says_what_to_do_when_the_hub_refuses(
    server: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for status, remedy in ((401, "log in with `hf auth login`"), (500, "run the command again")):
        server.status = status
        assert main(["push", str(folder), "group/model", "--yes"]) == 2
        assert remedy in capsys.readouterr().err


def test_push_without_a_connection_is_one_line(
    server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = "http://127.0.0.1:9"  # no server listens on the port
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", closed, raising=False)
    assert main(["push", str(folder), "group/model", "--yes"]) == 2
    error = capsys.readouterr().err
    assert f"bclip push: {closed}/group/model cannot be reached: " in error and "check the network" in error
    assert "Traceback" not in error


def test_push_refuses_what_is_not_an_exported_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("# card")
    for arguments, message in (
        (["nowhere", "group/model"], "nowhere is not a folder"),
        ([str(tmp_path / "empty"), "group/model"], "has no model card README.md"),
        ([str(tmp_path / "card"), "group/model"], "holds no weights"),
        ([str(tmp_path / "card"), "model"], "repository='model' must be ORG/NAME"),
        ([str(tmp_path / "card"), "group/../model"], "repository='group/../model'"),
    ):
        assert main(["push", *arguments]) == 2
        assert message in capsys.readouterr().err
