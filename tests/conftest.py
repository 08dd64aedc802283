from __future__ import annotations

import collections
import os
import sys
from pathlib import Path

import pytest
import torch

# Where tests that say nothing of a device make their tensors: "cuda" for the kernels' tests on a GPU (`make gpu`).
if "BCLIP_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["BCLIP_TEST_DEVICE"])

# No test depends on what somebody measured on this machine; processes that tests start inherit it.
os.environ.setdefault("BCLIP_TUNE", "off")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts files that hold slow tests first, so that no core waits at the end for a long file."""
    if config.pluginmanager.hasplugin("randomly"):
        return
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says why tests were skipped: a line for each reason, with the number of tests."""
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
    """The folder of real data; the test is skipped, with the reason, where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BCLIP_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not found: BCLIP_SHARED_DATA is {folder}, which is not a folder")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 samples to train on and 32 for validation (support/synthetic.py). Copy before you change files."""
    from synthetic import write_shards

    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    """Starts the fork server of the tests that use one before any test has changed the environment.

    It imports its modules while the first tests run.
    """
    ranks = sys.modules.get("ranks")
    if ranks is not None:
        ranks.fork_server()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _restored_state():
    """No test leaves the process in another state: a later one would depend on the order of tests."""
    threads, dtype, folder = torch.get_num_threads(), torch.get_default_dtype(), os.getcwd()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    left = {
        "torch.set_num_threads": threads != torch.get_num_threads(),
        "torch.set_default_dtype": dtype != torch.get_default_dtype(),
        "torch.use_deterministic_algorithms": deterministic != torch.are_deterministic_algorithms_enabled(),
        "os.chdir": folder != os.getcwd(),
    }
    if any(left.values()):
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)
        os.chdir(folder)
    assert not any(left.values()), f"the test has left the process changed: {[name for name in left if left[name]]}"


@pytest.fixture(autouse=True)
def _own_cache(
    _restored_state: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test reads or writes the embeddings of the person who runs it."""
    monkeypatch.setenv("BCLIP_CACHE", str(tmp_path_factory.mktemp("embeddings")))


@pytest.fixture
def unmeasured():
    """No record says which backend is the fastest on the CPU, nor do the defaults of the package."""
    from bclip_fast.ops import tuning

    with tuning.in_force({"cpu": tuning.unmeasured("cpu")}):
        yield


@pytest.fixture
def nan_filled():
    """Memory from torch.empty comes filled with NaN, so that an output which a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def pytest_report_header() -> str:
    from oracle import absent_backends

    return f"kernels without tests in this process: {absent_backends() or 'none'}"
