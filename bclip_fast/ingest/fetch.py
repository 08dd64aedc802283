"""`bclip ingest fetch -o DIR`: mirror articles of PubMed Central's bucket, in the bucket's own layout.

Each file is written atomically, after a check of its MD5. An article's metadata come last, so DIR/metadata lists the
complete articles, and a killed run resumes. DIR/rejects.jsonl lists everything that was not mirrored, with the reason:
a rule, or a fault.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bclip_fast.data.shards.format import to_json
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing, write_bytes
from bclip_fast.io.file_names import printable
from bclip_fast.io.hashing import md5_of
from bclip_fast.io.progress import track

from .articles import FetchError, SourceError
from .jats import JatsError, parse
from .licences import with_metadata
from .object_store import HttpStore, Store, is_address
from .pmc import PMC, Rules, Version, choose_version, select

log = logging.getLogger(__name__)

_ARTICLES_AHEAD = 4


@dataclass(frozen=True)
class FetchConfig:
    """Mirror articles of PubMed Central's bucket and check every object."""

    out: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Folder of the mirror. It may hold an unfinished mirror."""
    source: str = PMC
    """Address of the bucket, `https://...` or `s3://...`."""
    ids: Path | None = None
    """File that lists the articles to fetch, one id a line, PMC123 or PMC123.2."""
    inventory: str = ""
    """Inventory of the bucket: a `.csv` or `.csv.gz` file, or `latest`."""
    prefix: str = ""
    """Fetch the articles whose id starts with this prefix, such as PMC100."""
    license: Literal["commercial", "noncommercial", "all"] = "all"
    """Licences to accept. commercial: CC0, CC BY, -SA, -ND. noncommercial: also CC BY-NC, -SA, -ND. all: any."""
    keep_retracted: bool = False
    """Also fetch retracted articles."""
    connections: int = 8
    """Number of requests at the same time."""
    update: bool = False
    """Compare the articles in the mirror with the bucket, and fetch the files that have changed."""

    def __post_init__(self) -> None:
        if self.connections < 1:
            raise UserError(f"connections={self.connections}: must be at least 1")
        if (self.ids is not None) + bool(self.inventory) + bool(self.prefix) != 1:
            raise UserError("give exactly one of ids (a file), inventory (a file, or `latest`) and prefix (PMC...)")
        if not is_address(self.source):
            raise UserError(f"source={self.source}: is not an address; give https://... or s3://...")


@dataclass
class _Outcome:
    """The result for one article. `rejects` and `failures`: (article, file, reason) rows."""

    fetched: int = 0
    rejects: list[tuple[str, str, str]] | None = None
    failures: list[tuple[str, str, str]] | None = None


def fetch(config: FetchConfig) -> int:
    """Mirror the selected articles. Return 1 if a fault prevented some (run it again), else 0. Raises UserError."""
    store = HttpStore(config.source, config.connections)
    (config.out / "metadata").mkdir(parents=True, exist_ok=True)
    kinds: Counter[str] = Counter()
    num_fetched = num_unchanged = num_failed = 0
    try:
        with (
            replacing(config.out / "rejects.jsonl") as partial,
            partial.open("w", encoding="utf-8") as rejects,
            track("articles", transient=True) as advance,
        ):
            for outcome in _outcomes(config, store):
                num_fetched += outcome.fetched
                for kind, rows in (("reject", outcome.rejects or []), ("failure", outcome.failures or [])):
                    for article, name, reason in rows:
                        row = {"article": article, "file": name, "kind": kind, "reason": reason}
                        rejects.write(to_json(row) + "\n")
                        kinds[reason.partition(":")[0] if kind == "reject" else kind] += 1
                num_failed += len(outcome.failures or ())
                num_unchanged += not (outcome.fetched or outcome.rejects or outcome.failures)
                advance()
    except SourceError as error:
        raise UserError(str(error)) from None
    except FetchError as error:
        raise UserError(f"{error}; run it again") from None
    counts = "; ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
    log.info("fetched %s articles; the mirror already had %s articles; rejects: %s", num_fetched, num_unchanged, counts)
    if num_failed:
        log.error("%s articles could not be fetched; run it again (reasons: %s/rejects.jsonl)", num_failed, config.out)
    return int(num_failed > 0)


def _outcomes(config: FetchConfig, store: Store) -> Iterator[_Outcome]:
    """Yield the outcome for every article, in order. Only a few articles are in progress at a time."""
    running: deque[Future[_Outcome]] = deque()
    with ThreadPoolExecutor(config.connections) as pool:
        try:
            for item in select(store, ids=config.ids, inventory=config.inventory, prefix=config.prefix):
                if len(running) >= _ARTICLES_AHEAD * config.connections:
                    yield running.popleft().result()
                running.append(pool.submit(_fetch_article, config, store, item))
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _fetch_article(config: FetchConfig, store: Store, item: str) -> _Outcome:
    article, _, numbers = item.partition(".")
    names = [f"{article}.{number}" for number in numbers.split(",")] if numbers else []
    if not config.update and any((config.out / f"metadata/{name}.json").exists() for name in names):
        return _Outcome()
    rules = Rules(config.license, config.keep_retracted)
    try:
        version, others = choose_version(store, item)
        if not config.update and (config.out / f"metadata/{version.name}.json").exists():
            return _Outcome()
        if problem := version.problem(rules):
            # The article may have been retracted since the last run. The mirror must no longer offer it.
            (config.out / f"metadata/{version.name}.json").unlink(missing_ok=True)
            return _Outcome(rejects=[*others, (article, version.name, problem)])
        return _fetch_version(config.out, store, version, rules, others)
    except SourceError as error:
        return _Outcome(rejects=[(article, item, str(error))])
    except FetchError as error:
        return _Outcome(failures=[(article, item, str(error))])


def _fetch_version(
    out: Path, store: Store, version: Version, rules: Rules, rejects: list[tuple[str, str, str]]
) -> _Outcome:
    article = version.name.partition(".")[0]
    xml, has_changed = _mirror_object(out, store, version.xml_key, version.xml_md5)
    if rules.license != "all" or not version.values["licence"]:
        stated = version.values["licence"]
        try:
            terms = with_metadata(parse(xml).terms, stated)
            problem = rules.licence_problem(terms.code, terms.problem)
        except JatsError as error:
            problem = rules.licence_problem(stated, f"not stated: {error}")
        if problem:
            (out / version.xml_key).unlink()
            return _Outcome(rejects=[*rejects, (article, version.name, problem)])
    rejects += [(article, printable(name), reason) for name, reason in version.refused]
    for key, md5 in version.media.items():
        is_new, problem = _mirror_image(out, store, key, md5)
        has_changed |= is_new
        if problem:
            rejects.append((article, printable(key), problem))
    metadata = out / f"metadata/{version.name}.json"
    if has_changed or not metadata.exists() or metadata.read_bytes() != version.raw:
        write_bytes(metadata, version.raw, sync=True)
        return _Outcome(fetched=1, rejects=rejects)
    return _Outcome(rejects=rejects)


def _mirror_image(out: Path, store: Store, key: str, md5: str) -> tuple[bool, str]:
    """Mirror an image. Return whether it had to be fetched, and why it is unusable (usually empty)."""
    try:
        return _mirror_object(out, store, key, md5)[1], ""
    except SourceError as error:
        return False, str(error)


def _mirror_object(out: Path, store: Store, key: str, md5: str) -> tuple[bytes, bool]:
    """Return an object, and whether it had to be fetched. Fetch it unless the mirror has it with this MD5."""
    path = out / key
    if path.is_file() and md5_of(data := path.read_bytes()) == md5:
        return data, False
    data = store.read(key, md5)
    write_bytes(path, data, sync=True)
    return data, True
