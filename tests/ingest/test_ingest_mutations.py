"""A changed byte in any input ends no build: each input gives a pair, or a reject with its reason in one line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from articles import article_xml, noise_image, reject_rows, write_files
from mutations import KINDS, image_files, mutate, unaccounted, write_mutated

from bclip_fast.cli import main
from bclip_fast.data.image_files import ImageError, open_image
from bclip_fast.ingest.sanitize import SanitizeError, sanitize


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


def assert_images_are_decoded_or_refused_in_one_line(count: int, seed: int) -> None:
    generator, files = random.Random(seed), image_files()
    reasons = []
    for _ in range(count):
        data = mutate(generator.choice(files), generator)
        for decode in (lambda data: open_image(data).rgb().size, lambda data: sanitize(data).data):
            try:
                assert decode(data)
            except (ImageError, SanitizeError) as error:
                reasons.append(str(error))
    assert count // 10 < len(reasons) < 2 * count
    assert [reason for reason in reasons if not 0 < len(reason) < 300 or "\n" in reason] == []


def test_image_with_a_changed_byte_is_decoded_or_refused_in_one_line():
    assert_images_are_decoded_or_refused_in_one_line(200, 0)


@pytest.mark.long
def test_2000_images_with_a_changed_byte_are_decoded_or_refused_in_one_line():
    assert_images_are_decoded_or_refused_in_one_line(2000, 1)
