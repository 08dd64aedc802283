from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Where tests that say nothing of a device make their tensors: "cuda" for the kernels' tests on a GPU (`make gpu`).
if "BCLIP_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["BCLIP_TEST_DEVICE"])


# No test depends on what somebody measured on this machine; processes that tests start inherit it.
os.environ.setdefault("BCLIP_TUNE", "off")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; the test is skipped, with the reason, where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BCLIP_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not found: BCLIP_SHARED_DATA is {folder}, which is not a folder")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the embeddings of the person who runs it."""
    monkeypatch.setenv("BCLIP_CACHE", str(tmp_path_factory.mktemp("embeddings")))


@pytest.fixture
def nan_filled():
    """Memory from torch.empty comes filled with NaN, so that an output which a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
