"""Search: the index is what the model says, queries find it, and the page gives away nothing it should not."""

from __future__ import annotations

import io
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from browser import Browser, check_drawn, check_keyboard
from test_eval import COLOURS, ColourModel, jitter, jpeg, preprocess, tokenizer
from test_pretrained import SMALL, shaken

from bclip_fast import pretrained
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.eval.datasets import open_dataset
from bclip_fast.eval.embed import Embedder
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.search import index as search
from bclip_fast.search import serve
from bclip_fast.search.index import EmbedConfig, OpenConfig, Searcher, embed

EVIL = "<script>alert(1)</script> a red square"


def model():
    torch.manual_seed(0)
    return ColourModel(), preprocess, tokenizer


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    facts = [
        {"licence": "CC BY", "licence_url": "https://creativecommons.org/licenses/by/4.0/", "pmcid": "PMC123"},
        {"licence": "CC0", "licence_url": "javascript:alert(1)", "doi": "10.1234/a b"},
        {"licence": "CC0", "licence_url": "", "doi": '10.1234/a"><b>'},
        {"licence": "", "pmcid": "PMC1/../../evil"},
    ]
    with ShardWriter(tmp_path / "shards") as writer:
        for i in range(40):
            name = list(COLOURS)[i % 4]
            caption = EVIL if i == 0 else f"a {name} square"
            writer.write(Sample(f"s{i:03d}", jpeg(jitter(COLOURS[name], i)), caption, facts[i % 4]), "val")
    return tmp_path / "shards"


@pytest.fixture
def index(shards: Path, tmp_path: Path) -> Path:
    return embed(EmbedConfig(model="colours", data=str(shards), out=str(tmp_path / "index"), progress=False), model())


@pytest.fixture
def searcher(index: Path) -> Searcher:
    return Searcher(OpenConfig(folder=str(index)), model())


def test_the_files_hold_the_models_embeddings_and_the_datas_facts(index: Path, shards: Path) -> None:
    data = open_dataset(str(shards), "val")
    expected = Embedder(*model()).images(data)
    table = pq.read_table(index / "embeddings.parquet")
    rows = np.stack(table["embedding"].to_numpy())
    np.testing.assert_allclose(rows, expected.numpy(), atol=1e-6)
    assert table["key"].to_pylist() == [data.key(i) for i in range(40)]
    assert table["caption"].to_pylist() == data.captions()
    assert table["licence"].to_pylist()[:4] == ["CC BY", "CC0", "CC0", ""]
    assert sorted(path.name for path in index.iterdir()) == ["embeddings.parquet", "index.faiss"]


@pytest.mark.parametrize("kind", ["faiss_flat", "hnsw", "ivf"])
def test_queries_find_what_brute_force_finds(kind: str, shards: Path, tmp_path: Path) -> None:
    config = EmbedConfig(model="colours", data=str(shards), out=str(tmp_path / "i"), index=kind, progress=False)  # type: ignore[arg-type]
    searcher = Searcher(OpenConfig(folder=str(embed(config, model()))), model())
    data = open_dataset(str(shards), "val")
    embedder = Embedder(*model())
    images = embedder.images(data)
    for colour in COLOURS:
        hits = searcher.text(f"some {colour} thing", 7)
        scores = (images @ embedder.texts([f"some {colour} thing"])[0]).sort(descending=True).values
        np.testing.assert_allclose([hit.score for hit in hits], scores[:7], atol=1e-5)
        assert all(colour in (hit.caption or "") for hit in hits[:3])
    hits = searcher.picture(data.image(17), 3)
    assert hits[0].score == pytest.approx(1, abs=1e-5) and 17 in {hit.row for hit in hits if hit.score > 1 - 1e-5}
    assert len(searcher.text("red", 200)) == 40


def test_another_model_data_or_half_an_index_is_refused(index: Path, shards: Path, tmp_path: Path) -> None:
    class Other(ColourModel):
        def encode_image(self, image, normalize=False):
            return super().encode_image(image.flip(1), normalize)

    with pytest.raises(UserError, match="made with another model"):
        Searcher(OpenConfig(folder=str(index)), (Other(), preprocess, tokenizer))
    with pytest.raises(UserError, match="not a whole index"):
        Searcher(OpenConfig(folder=str(tmp_path)), model())
    with ShardWriter(tmp_path / "fewer") as writer:
        writer.write(Sample("x", jpeg((1, 2, 3)), "one"), "val")
    moved = Searcher(OpenConfig(folder=str(index), data=str(tmp_path / "fewer")), model())
    with pytest.raises(UserError, match="has 1 pictures, .* 40: embed again"):
        moved.thumbnail(moved.text("red")[0])
    with ShardWriter(tmp_path / "renamed") as writer:
        for i in range(40):
            writer.write(Sample(f"other{i}", jpeg((1, 2, 3)), "one"), "val")
    moved = Searcher(OpenConfig(folder=str(index), data=str(tmp_path / "renamed")), model())
    assert "not s0" in search.page(moved, moved.text("red", 1)), "a picture under another key is not shown"
    content = (index / "index.faiss").read_bytes()
    for file, damage in (
        ("index.faiss", content[:-9]),
        ("index.faiss", content[:-1] + b"x"),
        ("embeddings.parquet", b"x"),
    ):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(index, tmp_path / "broken")
        (tmp_path / "broken" / file).write_bytes(damage)
        with pytest.raises(UserError, match="not a whole index") as caught:
            Searcher(OpenConfig(folder=str(tmp_path / "broken")), model())
        assert "\n" not in str(caught.value)


def test_what_cannot_be_asked(searcher: Searcher) -> None:
    for ask, message in (
        (lambda: searcher.text(" "), "a query has 1 to"),
        (lambda: searcher.text("x" * 4001), "a query has 1 to"),
        (lambda: searcher.text("red", 0), "k is 0"),
        (lambda: searcher.picture(b"GIF89a", 3, "upload"), "image upload cannot be decoded"),
    ):
        with pytest.raises(UserError, match=message):
            ask()


def test_links_are_made_of_numbers_alone(searcher: Searcher) -> None:
    hits = {hit.row % 4: hit for hit in searcher.text("red", 40)}
    assert hits[0].article == "https://pmc.ncbi.nlm.nih.gov/articles/PMC123/"
    assert hits[0].licence_url == "https://creativecommons.org/licenses/by/4.0/"
    assert hits[1].article is None and hits[1].licence_url is None
    assert hits[2].article == "https://doi.org/10.1234/a%22%3E%3Cb%3E"
    assert hits[3].article is None


@pytest.fixture
def start(tmp_path: Path) -> Path:
    words = Tokenizer.train(["a red square", "a blue square"] * 3, 60, context_length=20)
    torch.manual_seed(1)
    pretrained.save(tmp_path / "start", shaken(BiomedClip(SMALL)), Preprocess(PreprocessConfig(size=32)), words)
    return tmp_path / "start"


def test_the_commands_on_a_folder_of_pictures(start: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    from bclip_fast import cli

    monkeypatch.setattr(cli.log, "configure", lambda *args, **options: None)
    pictures, out, page = tmp_path / "pictures", tmp_path / "out", tmp_path / "hits.html"
    (pictures / "deep").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(6):
        noise = generator.integers(0, 256, 3)
        (pictures / ("deep" if i % 2 else ".") / f"p{i}.jpg").write_bytes(jpeg(tuple(noise.tolist()), 40))
    (pictures / "notes.md").write_text("not a picture")
    assert cli.main(["embed", str(start), "--data", str(pictures), "--out", str(out), "--no-progress"]) == 0
    assert cli.main(["search", str(out), str(pictures / "deep" / "p3.jpg"), "-k", "2", "--gallery", str(page)]) == 0
    assert "p3.jpg" in capsys.readouterr().out
    html = page.read_text()
    assert html.count("<img ") == 2 and "<form" not in html and "<script" not in html
    assert cli.main(["search", str(out), "a red square"]) == 0
    assert capsys.readouterr().out.count(".jpg") == 6
    for args, words in (
        (["search", str(out), "nowhere.png"], "picture nowhere.png cannot be read"),
        (["search", str(tmp_path), "red"], "is not a whole index of bclip embed"),
        (["serve", str(out), "--k", "0"], "must be 1 to"),
        (["embed", str(start), "--data", str(tmp_path / "start")], "holds no image"),
    ):
        assert cli.main(args) == 2
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error


# The page


@pytest.fixture
def client(searcher: Searcher):
    from werkzeug.test import Client

    return Client(serve.App(searcher, 5))


def test_the_page_answers_words_and_pictures(client) -> None:
    first = client.get("/")
    assert first.status_code == 200 and "<img" not in first.text and 'for="q"' in first.text
    found = client.get("/", query_string={"q": "a red square", "k": "12"})
    assert found.status_code == 200 and found.text.count('<img src="data:image/jpeg;base64,') == 12
    assert 'value="a red square"' in found.text
    assert 'href="https://pmc.ncbi.nlm.nih.gov/articles/PMC123/"' in found.text
    similar = client.post("/", data={"image": (io.BytesIO(jpeg(COLOURS["blue"])), "mine.jpg"), "k": "3"})
    assert similar.status_code == 200 and similar.text.count("<img ") == 3 and "a blue square" in similar.text


def test_nothing_foreign_reaches_the_page_or_the_disk(client, tmp_path: Path) -> None:
    found = client.get("/", query_string={"q": EVIL, "k": "40"})
    assert found.status_code == 200 and "<script" not in found.text and "javascript:" not in found.text
    assert "&lt;script&gt;alert(1)" in found.text
    named = client.post("/", data={"image": (io.BytesIO(jpeg((9, 9, 9))), '../"><script>x</script>.jpg')})
    assert named.status_code == 200 and "<script" not in named.text
    policy = found.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script" not in policy and found.headers["Cache-Control"] == "no-store"
    for path in ("/etc/passwd", "/../../etc/passwd", "/%2e%2e/x", "/picture/0", "/static/"):
        assert client.get(path).status_code == 404
    assert client.put("/").status_code == 405
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"Host": "localhost:8000"}).status_code == 200
    image = {"image": (io.BytesIO(jpeg((9, 9, 9))), "x.jpg")}
    assert client.post("/", data=image, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    for asked, words in (
        (lambda: client.get("/?q=red&k=100000"), "the number of hits must be"),
        (lambda: client.get("/?q=red&k=-1"), "the number of hits must be"),
        (lambda: client.get("/", query_string={"q": "x" * 5000}), "a query has 1 to"),
        (lambda: client.post("/", data={"image": (io.BytesIO(b"MZ" * 99), "x.jpg")}), "image x.jpg cannot be decoded"),
        (lambda: client.post("/"), "choose a picture first"),
    ):
        answer = asked()
        assert answer.status_code == 400 and words in answer.text and 'role="alert"' in answer.text
    assert client.post("/", data={"image": (io.BytesIO(bytes(33 << 20)), "x.jpg")}).status_code == 413


@pytest.fixture
def address(searcher: Searcher) -> Iterator[str]:
    server = serve.make(serve.ServeConfig(folder="unused", port=0, k=8), searcher)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_server_listens_on_the_loopback_alone(address: str, searcher: Searcher) -> None:
    with urllib.request.urlopen(address + "?q=red") as answer:
        assert answer.status == 200 and b"8 nearest" in answer.read()
    port = int(address.rsplit(":", 1)[1][:-1])
    with pytest.raises(UserError, match="cannot listen on 127.0.0.1"):
        serve.make(serve.ServeConfig(folder="unused", port=port), searcher)
    assert serve.ServeConfig(folder="unused").host == "127.0.0.1"


def test_the_page_in_a_browser(address: str, tmp_path: Path) -> None:
    """Chromium draws the hits out, in light and dark, and its policy stops nothing that the page needs."""
    with Browser() as browser:
        for shot in check_drawn(browser, address + "?q=a+red+square", tmp_path):
            red = (shot[..., 0] > 170) & (shot[..., 1] < 80) & (shot[..., 2] < 80)
            assert red.mean() > 0.05, "the red squares are drawn"
        check_drawn(browser, address, tmp_path)
        browser.open(address + "?q=a+red+square")
        dom = browser.ask("document.documentElement.outerHTML")
    # Every field has a label, every picture a text, the page a language, a title and one main heading.
    from lxml import html

    tree = html.fromstring(dom)
    labels = set(tree.xpath("//label/@for"))
    assert {e.get("id") for e in tree.xpath("//input[@type!='hidden']")} == labels == {"q", "k", "image"}
    assert len(tree.xpath("//img")) == 8 and all(tree.xpath("//img/@alt"))
    assert tree.get("lang") == "en" and len(tree.xpath("//h1")) == 1 and tree.xpath("//title/text()")


def test_the_page_without_a_mouse(address: str) -> None:
    """Tab meets every control as the eye does; words and a picture are asked for, and a link is followed, by key."""
    with Browser() as browser:
        for width in (400, 1400):
            browser.open(address + "?q=a+red+square", width=width)
            names = [one["name"] for one in check_keyboard(browser)]
            assert names[:5] == ["q", "k", "Search", "image", "Find similar"]
            assert "article" in names[5:] and "CC BY" in names[5:]
        browser.open(address)
        assert len(check_keyboard(browser)) == 5
        browser.open(address)
        browser.press("Tab")
        browser("Input.insertText", text="a blue square")
        browser.events.clear()
        browser.press("Enter")
        browser.wait_for("Page.loadEventFired")
        assert browser.ask("[document.title, document.querySelectorAll('img').length]") == [
            "a blue square · bclip_fast search", 8,
        ]  # fmt: skip
        browser("Page.setInterceptFileChooserDialog", enabled=True)
        for _ in range(4):
            browser.press("Tab")
        browser.press(" ")
        assert browser.wait_for("Page.fileChooserOpened")["mode"] == "selectSingle"
        # The first link of a hit, by Enter: that it leads out is seen by where it would go.
        browser.ask("addEventListener('click', e => { window.followed = e.target.href; e.preventDefault() })")
        for _ in range(2):
            browser.press("Tab")
        browser.press("Enter")
        assert browser.ask("window.followed == document.querySelector('.found a').href")


def test_the_colours_of_the_pages_have_contrast() -> None:
    """WCAG 2.1 AA: 4.5 to 1 for every pair of text and ground that the search page uses, in light and dark."""
    import re
    from importlib.resources import files

    css = (files("bclip_fast.html") / "templates" / "report.css").read_text()

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)]
    assert len(schemes) == 2
    for scheme in schemes:
        for pair in (
            "text page",
            "text surface",
            "muted page",
            "muted surface",
            "accent surface",
            "bad page",
            "text track",
        ):
            text, ground = pair.split()
            high, low = sorted((luminance(scheme[text]), luminance(scheme[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
