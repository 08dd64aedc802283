"""Selection of articles in a bucket or mirror (ids, versions, rules), and datasets built from them."""

from __future__ import annotations

import gzip
import json
import urllib.parse
from pathlib import Path

import pytest
from articles import manifest_rows, noise_image, read_tree, reject_rows

from bclip_fast.data.shards.verify import verify
from bclip_fast.errors import UserError
from bclip_fast.ingest.articles import SourceError
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.ingest.fetch import FetchConfig, fetch
from bclip_fast.ingest.object_store import HttpStore
from bclip_fast.ingest.pmc import Rules, choose_version, select
from bclip_fast.io.hashing import md5_of


def write_ids(folder: Path, *ids: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "ids.txt"
    path.write_text("\n".join(ids))
    return path


def test_select_by_ids_prefix_and_inventory(bucket, tmp_path):
    for number, version in ((7, 1), (7, 2), (71, 1), (8, 1), (1000, 3)):
        bucket.put_article(number, version, figures=0)
    store = HttpStore(bucket.address)

    def selected(**options) -> list[str]:
        return list(select(store, **{"ids": None, "inventory": "", "prefix": "", **options}))

    assert selected() == ["PMC7.1,2", "PMC8.1", "PMC71.1", "PMC1000.3"]  # two pages of the list
    assert selected(prefix="PMC7") == ["PMC7.1,2", "PMC71.1"]
    assert selected(ids=write_ids(tmp_path, "PMC8", "7.2", "PMC8")) == ["PMC8", "PMC7.2"]
    rows = [f'"pmc-oa-opendata","{urllib.parse.quote(key)}","2026-10-01","0"\n' for key in bucket.objects]
    (tmp_path / "inventory.csv.gz").write_bytes(gzip.compress("".join(rows).encode()))
    assert selected(inventory=str(tmp_path / "inventory.csv.gz")) == selected()
    base = "inventory-reports/pmc-oa-opendata/metadata"
    for date, lines in (("2026-10-01", rows[:3]), ("2026-10-02", rows)):
        data = gzip.compress("".join(lines).encode())
        manifest = {"files": [{"key": f"{base}/data/{date}.csv.gz", "MD5checksum": md5_of(data)}]}
        bucket.objects[f"{base}/data/{date}.csv.gz"] = data
        bucket.objects[f"{base}/{date}/manifest.json"] = json.dumps(manifest).encode()
    assert selected(inventory="latest") == selected()
    with pytest.raises(SourceError, match=r"ids.txt, line 2: 'https://example.org' is not the id"):
        selected(ids=write_ids(tmp_path, "PMC1", "https://example.org"))
    for content, message in (
        (b"b,metadata/PMC1.1.json\n\nb\n", "i.csv, line 3: no key"),
        (gzip.compress(b"b,metadata/PMC1.1.json\n" * 999)[:40], "line 1: not an inventory in CSV: Compressed file"),
        (b"b,metadata/PMC1.1.json\nb,\xe9\n", "not an inventory in CSV"),
    ):
        (tmp_path / "i.csv").write_bytes(content)
        with pytest.raises(SourceError, match=message):
            selected(inventory=str(tmp_path / "i.csv"))
    with pytest.raises(SourceError, match="cannot be read"):
        selected(inventory=str(tmp_path / "nowhere.csv"))


def test_choose_version_and_rules(bucket):
    bucket.put_article(1, 1)
    bucket.put_article(1, 2)
    bucket.put_article(1, 3, is_manuscript=True)
    bucket.put_article(2, 1, is_manuscript=True, license_code="TDM")
    bucket.put_article(3, 1, is_retracted=True)
    bucket.put_article(4, 1, license_code="CC BY-NC-ND")
    bucket.put_article(5, 1, license_code=None)
    bucket.put_article(6, 1, is_pmc_openaccess=False)
    store = HttpStore(bucket.address)

    def problem(item: str, rules: Rules) -> str:
        return choose_version(store, item)[0].problem(rules)

    version, others = choose_version(store, "PMC1")
    assert version.name == "PMC1.2"
    assert [name for _, name, _ in others] == ["PMC1.3", "PMC1.1"]
    assert choose_version(store, "PMC1.1,3")[0].name == "PMC1.1"
    assert choose_version(store, "PMC1.3")[0].name == "PMC1.3"
    assert sorted(version.media) == ["PMC1.2/fig-0.jpg", "PMC1.2/fig-1.jpg"]
    all_licences = Rules()
    assert problem("PMC2", all_licences) == "author manuscript without Creative Commons licence"
    assert problem("PMC3", all_licences) == "retracted"
    assert problem("PMC3", Rules(keep_retracted=True)) == ""
    assert problem("PMC6", all_licences) == "not open access"
    for license, reason in (("all", ""), ("noncommercial", ""), ("commercial", "licence not commercial: CC BY-NC-ND")):
        assert problem("PMC4", Rules(license)) == reason
    assert problem("PMC5", Rules("commercial")) == ""  # the XML must name the licence
    with pytest.raises(SourceError, match="no such article"):
        choose_version(store, "PMC99")


@pytest.mark.parametrize(
    "change",
    [
        {"xml_url": "s3://b/PMC2.1/PMC2.1.xml?md5=" + "0" * 32},
        {"xml_url": "s3://b/PMC1.1/..%2f..%2fetc?md5=" + "0" * 32},
        {"media_urls": 5},
        {"pmcid": "PMC2"},
        {"is_retracted": "no"},
    ],
    ids=str,
)
def test_choose_version_invalid_metadata_are_refused(bucket, change):
    bucket.put_article(1, 1, **change)
    with pytest.raises(SourceError, match="broken metadata"):
        choose_version(HttpStore(bucket.address), "PMC1")


def test_odd_addresses_of_media_lose_only_their_file(bucket, tmp_path):
    bucket.put_article(1)
    metadata = json.loads(bucket.objects["metadata/PMC1.1.json"])
    md5 = "?md5=" + "0" * 32
    others = ["data#1.csv" + md5, "what?.xlsx" + md5, "notes 50%.doc" + md5, "movie.mp4", "../x.pdf" + md5]
    images = ["", "../x.jpg" + md5, ".hidden.png" + md5, "y.tif"]
    metadata["media_urls"] += [f"s3://b/PMC1.1/{name}" for name in others + images] + [None, 5]
    # A file of the article whose name has both marks.
    bucket.objects["PMC1.1/a#b?c.jpg"] = noise_image(77)
    metadata["media_urls"].append(f"s3://b/PMC1.1/a#b?c.jpg?md5={md5_of(noise_image(77))}")
    bucket.objects["metadata/PMC1.1.json"] = json.dumps(metadata).encode()
    version, _ = choose_version(HttpStore(bucket.address), "PMC1")
    assert sorted(version.media) == ["PMC1.1/a#b?c.jpg", "PMC1.1/fig-0.jpg", "PMC1.1/fig-1.jpg"]
    expected = [f"s3://b/PMC1.1/{name}" for name in images] + ["None", "5"]
    assert [name for name, _ in version.refused] == expected
    assert fetch(FetchConfig(tmp_path / "mirror", source=bucket.address, prefix="PMC")) == 0
    for name, source in (("a", bucket.address), ("b", str(tmp_path / "mirror"))):
        build(IngestConfig(source, tmp_path / name, prefix="PMC", workers=1))
        assert sorted(manifest_rows(tmp_path / name)) == ["PMC1_f1", "PMC1_f2"]
        rejects = reject_rows(tmp_path / name)
        assert [row[2:] for row in rejects] == [(file, "invalid address in the metadata") for file in expected]


def test_licence_of_the_xml_counts_beside_that_of_the_metadata(bucket, tmp_path):
    words = b"<license><license-p>Creative Commons Attribution-NonCommercial License</license-p></license>"
    bucket.put_article(1)
    bucket.put_article(2)
    xml = bucket.objects["PMC2.1/PMC2.1.xml"].replace(
        b"</article-meta>", b"<permissions>" + words + b"</permissions></article-meta>"
    )
    metadata = json.loads(bucket.objects["metadata/PMC2.1.json"])
    metadata["xml_url"] = f"s3://b/PMC2.1/PMC2.1.xml?md5={md5_of(xml)}"
    bucket.objects |= {"PMC2.1/PMC2.1.xml": xml, "metadata/PMC2.1.json": json.dumps(metadata).encode()}
    reason = "licence not commercial: CC BY-NC (metadata: CC BY; article: CC BY-NC)"
    build(IngestConfig(bucket.address, tmp_path / "a", prefix="PMC", workers=1, license="commercial"))
    assert [row[3] for row in reject_rows(tmp_path / "a")] == [reason]
    mirror = tmp_path / "mirror"
    assert fetch(FetchConfig(mirror, source=bucket.address, prefix="PMC", license="commercial")) == 0
    assert [json.loads(line)["reason"] for line in (mirror / "rejects.jsonl").read_text().splitlines()] == [reason]
    assert sorted(path.name for path in mirror.glob("metadata/*")) == ["PMC1.1.json"]


def test_build_from_mirror_and_bucket_gives_same_dataset(bucket, tmp_path):
    for number in range(1, 20):
        bucket.put_article(number)
    bucket.put_article(3, is_retracted=True)
    bucket.put_article(4, license_code="CC BY-NC")
    bucket.put_article(5, 2)
    ids = write_ids(tmp_path / "ids", *(f"PMC{number}.1" for number in range(6, 20)), "PMC3", "PMC4", "PMC5")
    assert fetch(FetchConfig(tmp_path / "mirror", source=bucket.address, prefix="PMC")) == 0
    options = {"workers": 1, "test_fraction": 0.3, "license": "commercial"}
    build(IngestConfig(str(tmp_path / "mirror"), tmp_path / "a", **options))
    build(IngestConfig(bucket.address, tmp_path / "b", prefix="PMC", **options))
    assert verify(tmp_path / "a") == []
    names = [name for name in read_tree(tmp_path / "a") if name.endswith((".tar", ".index.json"))]
    assert len(names) >= 4
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    row = manifest_rows(tmp_path / "b")["PMC5_f1"]
    values = [row[name] for name in ("version", "retracted", "citation", "licence", "caption")]
    assert values == ["PMC5.2", False, "J. 5", "CC BY", "Text 0 of PMC5.2"]
    assert sorted(reject_rows(tmp_path / "b")) == [
        ("PMC3", "", "PMC3.1", "retracted"),
        ("PMC4", "", "PMC4.1", "licence not commercial: CC BY-NC"),
        ("PMC5", "", "PMC5.1", "other version: PMC5.2 is used"),
    ]
    for name, source in (("c", bucket.address), ("d", str(tmp_path / "mirror"))):
        build(IngestConfig(source, tmp_path / name, ids=ids, **options))
        articles = {row["article"] for row in manifest_rows(tmp_path / name).values()}
        assert articles == {f"PMC{number}" for number in range(5, 20)}


def test_build_from_failing_bucket_resumes(bucket, tmp_path):
    for number in range(1, 40):
        bucket.put_article(number, figures=1)
    config = IngestConfig(bucket.address, tmp_path / "out", prefix="PMC", workers=1, test_fraction=0.2)
    bucket.faults = {"PMC20.1/fig-0.jpg": [500] * 6}
    with pytest.raises(UserError, match=r"1 of 3 packages could not be fetched.*run it again"):
        build(config)
    assert not (tmp_path / "out").exists()
    requests = bucket.requests["PMC1.1/fig-0.jpg"]
    build(config)
    assert bucket.requests["PMC1.1/fig-0.jpg"] == requests
    build(IngestConfig(bucket.address, tmp_path / "other", prefix="PMC", workers=1, test_fraction=0.2))
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "other")


def test_build_damaged_mirror_gives_rejects(bucket, tmp_path):
    bucket.put_article(1)
    bucket.put_article(2)
    mirror = tmp_path / "mirror"
    assert fetch(FetchConfig(mirror, source=bucket.address, prefix="PMC")) == 0
    (mirror / "PMC1.1/fig-0.jpg").write_bytes(noise_image(5))
    (mirror / "PMC2.1/PMC2.1.xml").write_bytes(b"<article/>")
    build(IngestConfig(str(mirror), tmp_path / "out", workers=1, test_fraction=0.0))
    assert reject_rows(tmp_path / "out") == [
        ("PMC1", "F1", "fig-0.jpg", "wrong MD5"),
        ("PMC2", "", "PMC2.1/PMC2.1.xml", "wrong MD5"),
    ]
