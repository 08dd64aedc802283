"""Fixtures and settings of all tests."""

from __future__ import annotations

import collections
import logging
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

# torch and transformers read CI. Tests behave as for a user, who has not set it, except that torch's warning of
# operators that return their inputs is an error. Processes that tests start inherit both settings.
os.environ.pop("CI", None)
os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] = "1"

# They read both variables.
import aliases
import torch

# The default device of tensors: "cuda" for the kernels' tests on a GPU (`make gpu`).
if "BCLIP_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["BCLIP_TEST_DEVICE"])

# torch checks this only in compiled functions.
aliases.check_every_operator()

# Tests ignore the tuning records of this machine. Processes that they start inherit the variable.
os.environ.setdefault("BCLIP_TUNE", "off")

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import replace_builtins_faster

    replace_builtins_faster()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Move files with slow tests to the front, so that no core waits at the end for a long file."""
    if config.pluginmanager.hasplugin("randomly"):
        return
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print why tests were skipped: each reason, with its number of tests."""
    reasons: collections.Counter[str] = collections.Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("skipped tests by reason")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5} {reason}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data. Without it, the test is skipped with the reason."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BCLIP_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not found: BCLIP_SHARED_DATA is {folder}, which is not a folder")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with 96 training and 32 validation samples (support/synthetic.py). Copy them before you change files."""
    from synthetic import write_shards

    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    """Start the fork server of support/ranks.py before any test changes the environment.

    It imports its modules while the first tests run.
    """
    ranks = sys.modules.get("ranks")
    if ranks is not None:
        ranks.fork_server()


@pytest.fixture(scope="module", autouse=True)
def _restored_log() -> Iterator[None]:
    """Restore the log after each file, because commands and some packages change its level for the whole process."""
    root, ours = logging.getLogger(), logging.getLogger("bclip_fast")
    before = root.level, ours.level, ours.handlers[:], ours.propagate
    yield
    root.setLevel(before[0])
    ours.setLevel(before[1])
    ours.handlers[:], ours.propagate = before[2:]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _restored_state():
    """Fail a test that changes the state of the process, because later tests would depend on their order."""
    threads, dtype, folder = torch.get_num_threads(), torch.get_default_dtype(), os.getcwd()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    changes = {
        "torch.set_num_threads": threads != torch.get_num_threads(),
        "torch.set_default_dtype": dtype != torch.get_default_dtype(),
        "torch.use_deterministic_algorithms": deterministic != torch.are_deterministic_algorithms_enabled(),
        "os.chdir": folder != os.getcwd(),
    }
    if any(changes.values()):
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)
        os.chdir(folder)
    changed = [name for name, differs in changes.items() if differs]
    assert changed == [], "the test must restore these settings"


@pytest.fixture(autouse=True)
def _own_cache(
    _restored_state: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give each test an empty cache of embeddings, so that it does not touch the user's."""
    monkeypatch.setenv("BCLIP_CACHE", str(tmp_path_factory.mktemp("embeddings")))


@pytest.fixture
def unmeasured():
    """Ignore all tuning records and the package's defaults for the CPU."""
    from bclip_fast.ops import tuning

    with tuning.in_force({"cpu": tuning.unmeasured("cpu")}):
        yield


@pytest.fixture
def nan_filled():
    """Make torch.empty fill its memory with NaN, so that elements that a kernel does not write show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    # torch.use_deterministic_algorithms also imports Inductor, in three seconds.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch._C._set_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def fresh_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Start with an empty cache of tuning records and without the package's defaults. Forget all records at the end."""
    from bclip_fast.ops import tuning

    monkeypatch.delenv("BCLIP_TUNE")
    monkeypatch.setenv("BCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "DEFAULTS", tmp_path / "defaults")
    tuning.reset()
    yield
    tuning.reset()


@pytest.fixture
def triton_gelu(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A Triton backend for gelu on the CPU.

    calls: number of forward calls. forward, factor: the forward function and a factor on the gradient. Change them to
    make the kernel wrong.
    """
    from bclip_fast.ops import dispatch, pointwise

    kernel = types.SimpleNamespace(calls=0, forward=torch.nn.functional.gelu, factor=1.0)

    def forward(x: torch.Tensor) -> torch.Tensor:
        kernel.calls += 1
        return kernel.forward(x)

    def backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_backward(grad, x) * kernel.factor

    module = types.SimpleNamespace(gelu=forward, gelu_backward=backward)
    load_backend = pointwise.load_backend
    monkeypatch.setattr(
        pointwise, "load_backend", lambda name, backend: module if backend == "triton" else load_backend(name, backend)
    )
    monkeypatch.setitem(pointwise.LIMITS, "triton", lambda *inputs: None)
    monkeypatch.delitem(dispatch.MISSING, "triton", raising=False)
    return kernel


def pytest_report_header() -> str:
    """Name the backends without tests here, with the reasons."""
    from oracle import absent_backends

    return f"kernels without tests in this process: {absent_backends() or 'none'}"
