"""Ingest of a folder of JATS articles: python -m bclip_fast.benchmarks.ingest parse|build|memory ARTICLES

parse   time and correct figures of our parser and of pubmed_parser 0.5.1 (the published pipeline's) on the same files
build   articles/s and pairs/s of `bclip ingest build` on one core, and the core hours of 7 million articles
memory  peak memory of the build for 1, 10 and 100 copies of the same small articles under new ids
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import Any

ROUNDS = 3
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
_PMCID = re.compile(rb'(<article-id pub-id-type="pmc(?:id)?">)(?:PMC)?\d+(</article-id>)')


def parse(folder: Path) -> None:
    """Print the speed and the correct figures of both parsers."""
    from bclip_fast.ingest import jats

    paths = sorted(folder.glob("*/*/*.nxml"))
    truth = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    ours = {path.parent: {figure.id: figure for figure in jats.parse(path.read_bytes()).figures} for path in paths}
    # pairs.jsonl comes from an independent extraction. The tests list the figures for which a person read the XML and
    # found our caption correct and that one wrong.
    expected = {}
    for pair in truth:
        article = (folder / pair["image"]).parent
        our_caption = ours[article][pair["figure_id"]].caption
        by_eye = f"{pair['pmcid']}/{pair['figure_id']}" in _checked_by_eye()
        expected[article, pair["figure_id"]] = squeeze(our_caption if by_eye else pair["caption"]), pair["graphic"]

    def num_correct(figures: dict[tuple[Path, str], tuple[str, str]]) -> int:
        return sum(
            key in figures and squeeze(figures[key][0]) == caption and stem(figures[key][1]) == stem(graphic)
            for key, (caption, graphic) in expected.items()
        )

    def stem(name: str) -> str:
        return re.sub(r"\.(jpe?g|png|tiff?|gif)$", "", name.rpartition("/")[2], flags=re.IGNORECASE)

    our_figures = {
        (article, name): (figure.caption, figure.graphics[0].hrefs[0] if figure.graphics else "")
        for article, figures in ours.items()
        for name, figure in figures.items()
    }
    seconds = best(lambda: [jats.parse(path.read_bytes()) for path in paths])
    print(f"ours: {len(paths) / seconds:.0f} articles/s, {num_correct(our_figures)} of {len(expected)} figures right")
    from pubmed_parser import parse_pubmed_caption

    theirs: dict[tuple[Path, str], tuple[str, str]] = {}
    failed = 0

    def run() -> None:
        nonlocal failed
        failed = 0
        for path in paths:
            try:
                for row in parse_pubmed_caption(str(path)) or ():
                    theirs[path.parent, row["fig_id"]] = row["fig_caption"], row["graphic_ref"] or ""
            except Exception:  # pubmed_parser documents no exceptions
                failed += 1

    seconds = best(run)
    outcome = f"{num_correct(theirs)} of {len(expected)} figures right, {failed} articles lost to an exception"
    print(f"pubmed_parser: {len(paths) / seconds:.0f} articles/s, {outcome}")


def squeeze(text: str) -> str:
    """Return the text in NFC without white space and invisible characters."""
    return "".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def _checked_by_eye() -> set[str]:
    tests = Path(__file__).parents[1] / "tests/ingest/test_jats_real.py"
    table = tests.read_text().partition("CHECKED_BY_EYE = {")[2].partition("}")[0]
    return set(re.findall(r'"([^"]+)":', table))


def best(function: Any) -> float:
    """Return the smallest CPU seconds of a few rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


_BUILD = """
import json, sys, time
from pathlib import Path
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
start, used = time.perf_counter(), time.process_time()
build(IngestConfig(sys.argv[1], Path(sys.argv[2]), workers=1, val_fraction=0, test_fraction=0))
counts = json.loads((Path(sys.argv[2]) / "dataset.json").read_text())["ingest"]
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
seconds = time.perf_counter() - start
print(json.dumps([counts["articles"], counts["pairs"], seconds, time.process_time() - used, int(peak)]))
"""


def build_once(articles: Path, out: Path) -> tuple[int, int, float, float, int]:
    """Build in a new process. Returns articles, pairs, seconds, CPU seconds and peak memory in KiB."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", _BUILD, str(articles), str(out)]
    done = subprocess.run(line, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    articles_read, pairs, seconds, used, peak = json.loads(done.stdout)
    return articles_read, pairs, seconds, used, peak


def build(folder: Path) -> None:
    """Print the speed and the peak memory of the fastest of a few builds."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = [build_once(folder, Path(scratch, str(number))) for number in range(ROUNDS)]
    articles, pairs, seconds, used, peak = min(runs, key=lambda run: run[3])
    print(f"{articles} articles, {pairs} pairs: {seconds:.1f} s, {used:.1f} CPU s, peak {peak / 1024:.0f} MiB")
    hours = 7e6 * used / articles / 3600
    rates = f"{articles / used:.1f} articles/s, {pairs / used:.1f} pairs/s"
    print(f"a core: {rates}; 7 million articles: {hours:.0f} core hours")


def memory(folder: Path) -> None:
    """Print the peak memory of builds of more and more articles."""
    sizes = {
        path: sum(other.stat().st_size for other in path.parent.iterdir()) for path in folder.glob("rendered/*/*.nxml")
    }
    small = sorted(sizes, key=lambda path: (sizes[path], path))[:12]
    with tempfile.TemporaryDirectory() as scratch:
        for times in (1, 10, 100):
            root = Path(scratch, f"in{times}")
            for copy in range(times):
                for number, path in enumerate(small):
                    article = root / f"{copy:04d}-{number}"
                    article.mkdir(parents=True)
                    identity = rb"\g<1>%d\g<2>" % (10_000_000 + 100 * copy + number)
                    (article / path.name).write_bytes(_PMCID.sub(identity, path.read_bytes(), count=1))
                    for image in path.parent.iterdir():
                        if image != path:
                            shutil.copyfile(image, article / image.name)
            articles, pairs, seconds, _, peak = build_once(root, Path(scratch, f"out{times}"))
            print(f"{times}x: {articles} articles, {pairs} pairs, {seconds:.0f} s, peak {peak / 1024:.0f} MiB")


if __name__ == "__main__":
    {"parse": parse, "build": build, "memory": memory}[sys.argv[1]](Path(sys.argv[2]).resolve())
