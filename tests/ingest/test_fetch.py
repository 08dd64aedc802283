"""`bclip ingest fetch`: mirrored articles, rejects, updates, killed runs, options."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from articles import read_tree

from bclip_fast.errors import UserError
from bclip_fast.ingest.fetch import FetchConfig, fetch
from bclip_fast.ingest.object_store import Mirror


def rejects_of(mirror: Path) -> list[tuple[str, str, str, str]]:
    rows = map(json.loads, (mirror / "rejects.jsonl").read_text().splitlines())
    return [(row["article"], row["file"], row["kind"], row["reason"]) for row in rows]


def complete_files(mirror: Path) -> dict[str, bytes]:
    """Return the mirrored files, without partial files and the list of rejects."""
    return {name: data for name, data in read_tree(mirror).items() if not Path(name).name.startswith((".", "rejects"))}


def test_fetch_mirrors_allowed_articles_and_reports_others(bucket, tmp_path):
    for number in range(1, 8):
        bucket.put_article(number)
    bucket.put_article(2, 2, is_manuscript=True)
    bucket.put_article(3, is_retracted=True)
    bucket.put_article(4, license_code="CC BY-NC")
    bucket.put_article(5, license_code=None)  # its XML names no licence either
    del bucket.objects["PMC6.1/fig-1.jpg"]
    bucket.faults = {"PMC1.1/fig-0.jpg": [500, "truncated"], "PMC7.1/fig-0.jpg": [503] * 6}
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(f"PMC{number}" for number in range(1, 9)))
    mirror = tmp_path / "mirror"
    config = FetchConfig(mirror, source=bucket.address, ids=ids, license="commercial", connections=3)
    assert fetch(config) == 1
    assert rejects_of(mirror)[:-2] == [
        ("PMC2", "PMC2.2", "reject", "other version: PMC2.1 is used"),
        ("PMC3", "PMC3.1", "reject", "retracted"),
        ("PMC4", "PMC4.1", "reject", "licence not commercial: CC BY-NC"),
        ("PMC5", "PMC5.1", "reject", "licence not commercial: not stated"),
        ("PMC6", "PMC6.1/fig-1.jpg", "reject", "not found"),
    ]
    assert [row[:3] for row in rejects_of(mirror)[-2:]] == [("PMC7", "PMC7", "failure"), ("PMC8", "PMC8", "reject")]
    assert sorted(Mirror(mirror).keys("metadata/")) == [f"metadata/PMC{number}.1.json" for number in (1, 2, 6)]
    assert fetch(config) == 0  # fetches only the seventh article
    assert bucket.requests["PMC1.1/fig-1.jpg"] == 1
    folders = tuple(f"PMC{number}.1/" for number in (1, 2, 6, 7))
    expected = {key: data for key, data in bucket.objects.items() if key.startswith(folders) and "xlsx" not in key}
    expected |= {key: bucket.objects[key] for key in (f"metadata/{folder[:-1]}.json" for folder in folders)}
    assert complete_files(mirror) == expected
    # An update fetches only the changed files.
    bucket.put_article(1, citation="new")
    bucket.put_article(7, is_retracted=True)
    bucket.objects["PMC2.1/fig-0.jpg"] += b"more"
    requests = bucket.requests.copy()
    assert fetch(FetchConfig(mirror, source=bucket.address, ids=ids, license="commercial", update=True)) == 0
    assert json.loads((mirror / "metadata/PMC1.1.json").read_bytes())["citation"] == "new"
    assert bucket.requests["PMC1.1/fig-0.jpg"] == requests["PMC1.1/fig-0.jpg"]
    assert not (mirror / "metadata/PMC7.1.json").exists()
    assert (mirror / "metadata/PMC6.1.json").exists()


def test_fetch_killed_leaves_no_incomplete_file(bucket, tmp_path):
    for number in range(1, 9):
        bucket.put_article(number)
    mirror = tmp_path / "mirror"
    code = (
        "import sys; from pathlib import Path; from bclip_fast.ingest.fetch import FetchConfig, fetch;"
        "fetch(FetchConfig(Path(sys.argv[1]), source=sys.argv[2], prefix='PMC', connections=2))"
    )
    for attempt in range(4):
        slow_key = f"PMC{2 * attempt + 2}.1/fig-1.jpg"
        bucket.faults = {slow_key: ["trickle"] * 3}
        process = subprocess.Popen([sys.executable, "-c", code, str(mirror), bucket.address])
        deadline = time.monotonic() + 120
        while not bucket.requests[slow_key] and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert complete_files(mirror).items() <= bucket.objects.items()
    bucket.faults = {}
    assert fetch(FetchConfig(mirror, source=bucket.address, prefix="PMC")) == 0
    assert complete_files(mirror) == {key: data for key, data in bucket.objects.items() if "xlsx" not in key}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give exactly one of"),
        ({"prefix": "PMC", "inventory": "latest"}, "give exactly one of"),
        ({"prefix": "P", "source": "x"}, "is not an address"),
        ({"prefix": "P", "connections": 0}, "connections=0: must be at least 1"),
    ],
)
def test_fetch_config_invalid_options_are_refused(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        FetchConfig(tmp_path, **options)
