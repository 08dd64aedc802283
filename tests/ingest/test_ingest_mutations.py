"""A changed byte in any input ends no build: each input gives a pair, or a reject with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from articles import article_xml, noise_image, reject_rows, write_files
from mutations import KINDS, unaccounted, write_mutated

from bclip_fast.cli import main


def assert_build_accounts_for_all(tmp_path: Path, kind: str, count: int, seed: int, capfd) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_mutated(source, kind, count, seed)
    # A dataset needs a pair.
    write_files(source / "good", {"x.nxml": article_xml(("g", "Good."), number=10**6), "g.jpg": noise_image(0)})
    flags = ["--workers", "1", "--val_fraction", "0", "--test_fraction", "0", "--license", "all"]
    assert main(["ingest", "build", str(source), "-o", str(out), *flags]) == 0
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert not [row for row in reject_rows(out) if row[3].startswith("internal error")]
    assert unaccounted(out, count) == []


@pytest.mark.parametrize("kind", KINDS)
def test_build_accounts_for_inputs_with_a_changed_byte(tmp_path, capfd, kind):
    assert_build_accounts_for_all(tmp_path, kind, 25, 0, capfd)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_build_accounts_for_2000_inputs_with_a_changed_byte(tmp_path, capfd, kind, seed):
    assert_build_accounts_for_all(tmp_path, kind, 2000 // len(KINDS) // 2 + 1, seed, capfd)
