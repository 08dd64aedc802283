"""Tests of the command line: help, mistakes, missing packages, `bclip doctor`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from ranks import fork_server

from bclip_fast import __version__, cli
from bclip_fast.ops.dispatch import MISSING


def bclip(*args, missing=()):
    """Run the command in a process of the fork server, which has already imported torch.

    missing: packages that the process cannot import.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = fork_server().Process(target=_main, args=(args, folder, missing))
        process.start()
        process.join()
        texts = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(args, process.exitcode, *texts)


def _main(args, folder, missing):
    sys.modules.update(dict.fromkeys(missing))
    # The end of the process closes the files, after a traceback.
    sys.stdout, sys.stderr = (open(Path(folder) / name, "w") for name in ("stdout", "stderr"))  # noqa: SIM115
    sys.exit(cli.main(args))


def test_version_and_usage_are_printed():
    done = subprocess.run([sys.executable, "-m", "bclip_fast.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"bclip_fast {__version__}"
    assert all(name in bclip().stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_every_command_shows_usage(name):
    done = bclip(*name.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: bclip " + name in done.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["foo"], "unknown command 'foo'"),
        (["trian"], "did you mean train?"),
        (["ingest"], "the commands are ingest build, ingest fetch"),
        (["train", "--batch_siz", "3"], "unknown flag --batch_siz; did you mean --batch_size"),
        (["train", "--lr", "3"], "unknown flag --lr; did you mean --optim.lr?"),
        (["train", "--batch_size", "many"], "--batch_size: 'many' is not a whole number"),
        (["train", "--run"], "the command line: --run needs a value (see"),
        (["train", "--dry_run=no"], "--dry_run=no takes no value; write --dry_run or --no_dry_run"),
        (["train", "--data.augment=true"], "write --data.augment or --data.no_augment"),
        (["train", "--seed", "1", "x.toml"], "unknown argument 'x.toml'; files come first, then flags"),
        (["completion", "csh"], "shell: 'csh' must be one of 'bash', 'zsh', 'fish'"),
        (["train", "quickstrat.toml"], "did you mean quickstart.toml?"),
        (["train", "--preset", "biomedclp_b16"], "did you mean biomedclip_b16"),
        (["eval", "model", "--task", "pcm"], "unknown task 'pcm'; did you mean pcam?"),
        (["train", "--help", "dta"], "did you mean data"),
        (["doctor", "--verbose"], "--verbose"),
        (["train", "nowhere.toml"], "nowhere.toml does not exist"),
        (["train", "--no_such_key", "1"], "no_such_key"),
        (["ingest", "build", "/nowhere/at/all", "-o", "/tmp/unused"], "/nowhere/at/all"),
        (["eval", "/nowhere/at/all"], "/nowhere/at/all does not exist; give a run"),
        (["search"], "bclip search: the command line: FOLDER and QUERY are missing (see bclip search --help)"),
        (["search", "index"], "the command line: QUERY is missing"),
        (["finetune", "--epochs", "1"], "the command line: MODEL and --data are missing"),
        (["export", "run"], "the command line: --out is missing"),
    ],
)
def test_user_error_prints_one_line_and_exits_with_2(args, words):
    done = bclip(*args)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr


def test_unknown_backend_variable_prints_one_line_and_exits_with_2(monkeypatch):
    monkeypatch.setenv("BCLIP_BACKEND", "none_such")
    done = subprocess.run(
        [sys.executable, "-m", "bclip_fast.cli", "doctor"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("bclip doctor: BCLIP_BACKEND names the unknown backend 'none_such'")
    assert len(done.stderr.splitlines()) == 1


def test_missing_package_error_names_its_extra():
    done = bclip("doctor", missing=["tyro"])
    assert done.returncode == 2
    assert done.stderr.strip() == "bclip doctor needs the package tyro: pip install 'bclip_fast[model]'"


def test_doctor_names_every_backend_and_refusal():
    out = bclip("doctor").stdout
    for name in ("cuda", "triton", "cpu", "torch", "reference"):
        assert f"\n  {name}" in out
    assert "Backends of the next call on cpu\n  by the package's " in out
    linear = out.partition("\n  linear ")[2].partition("\n  pooled_attention")[0]
    assert ("not cpu: " in linear) == ("cpu" in MISSING)
    # The reason why a GPU kernel refuses tensors of the CPU.
    assert "not triton: " in out.partition("\n  gelu ")[2].partition("\n  image")[0]
    assert "no device: " in out or "device 0: " in out or "_cuda: not built" in out
