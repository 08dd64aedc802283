"""The web page of an index: its answers, the requests that it rejects, and its look in Chromium."""

from __future__ import annotations

import io
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import pytest
from browser import Browser, check_drawn, check_keyboard
from colours import COLOURS, colour_model, jpeg
from lxml import html
from werkzeug.test import Client

from bclip_fast.errors import UserError
from bclip_fast.html import page as html_page
from bclip_fast.search import serve
from bclip_fast.search.cache import BoundedCache
from bclip_fast.search.searcher import OpenConfig, Searcher, page


@pytest.fixture
def client(searcher: Searcher):
    return Client(serve.App(searcher, 5))


def test_app_answers_words_and_images(client) -> None:
    first = client.get("/")
    assert first.status_code == 200
    assert "<img" not in first.text
    assert 'for="q"' in first.text
    response = client.get("/", query_string={"q": "a red square", "k": "12"})
    assert response.status_code == 200
    assert response.text.count('<img src="data:image/jpeg;base64,') == 12
    assert 'value="a red square"' in response.text
    assert 'href="https://pmc.ncbi.nlm.nih.gov/articles/PMC123/"' in response.text
    similar = client.post("/", data={"image": (io.BytesIO(jpeg(COLOURS["blue"])), "mine.jpg"), "k": "3"})
    assert similar.status_code == 200
    assert similar.text.count("<img ") == 3
    assert "a blue square" in similar.text


def test_app_rejects_paths_hosts_forms_and_scripts(client, tmp_path: Path) -> None:
    response = client.get("/", query_string={"q": "<script>alert(1)</script> a red square", "k": "40"})
    assert response.status_code == 200
    assert "<script" not in response.text
    assert "javascript:" not in response.text
    assert "&lt;script&gt;alert(1)" in response.text
    named = client.post("/", data={"image": (io.BytesIO(jpeg((9, 9, 9))), '../"><script>x</script>.jpg')})
    assert named.status_code == 200
    assert "<script" not in named.text
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script" not in policy
    assert response.headers["Cache-Control"] == "no-store"
    for path in ("/etc/passwd", "/../../etc/passwd", "/%2e%2e/x", "/picture/0", "/static/"):
        assert client.get(path).status_code == 404
    assert client.put("/").status_code == 405
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"Host": "localhost:8000"}).status_code == 200
    image = {"image": (io.BytesIO(jpeg((9, 9, 9))), "x.jpg")}
    assert client.post("/", data=image, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    for request, words in (
        (lambda: client.get("/?q=red&k=100000"), "the number of hits must be"),
        (lambda: client.get("/?q=red&k=-1"), "the number of hits must be"),
        (lambda: client.get("/", query_string={"q": "x" * 5000}), "a query must have 1 to"),
        (lambda: client.post("/", data={"image": (io.BytesIO(b"MZ" * 99), "x.jpg")}), "image x.jpg cannot be decoded"),
        (lambda: client.post("/"), "choose an image first"),
    ):
        answer = request()
        assert answer.status_code == 400
        assert words in answer.text
        assert 'role="alert"' in answer.text
    assert client.post("/", data={"image": (io.BytesIO(bytes(33 << 20)), "x.jpg")}).status_code == 413


@pytest.fixture
def address(searcher: Searcher) -> Iterator[str]:
    server = serve.start_server(serve.ServeConfig(folder="unused", port=0, k=8), searcher)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_server_listens_on_the_loopback_by_default(address: str, searcher: Searcher) -> None:
    with urllib.request.urlopen(address + "?q=red") as answer:
        assert answer.status == 200
        assert b"8 nearest" in answer.read()
    port = int(address.rsplit(":", 1)[1][:-1])
    with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1"):
        serve.start_server(serve.ServeConfig(folder="unused", port=port), searcher)
    assert serve.ServeConfig(folder="unused").host == "127.0.0.1"


def test_page_in_chromium_is_drawn_with_labels_and_texts(address: str, tmp_path: Path) -> None:
    """Chromium draws the hits in light and dark, and the content security policy blocks nothing that the page needs."""
    with Browser() as browser:
        for shot in check_drawn(browser, address + "?q=a+red+square", tmp_path):
            red = (shot[..., 0] > 170) & (shot[..., 1] < 80) & (shot[..., 2] < 80)
            assert red.mean() > 0.05, "the red squares are drawn"
        check_drawn(browser, address, tmp_path)
        browser.open(address + "?q=a+red+square")
        dom = browser.ask("document.documentElement.outerHTML")
    # Every field has a label, and every image has a text. The page has a language, a title and one main heading.
    tree = html.fromstring(dom)
    labels = set(tree.xpath("//label/@for"))
    assert {e.get("id") for e in tree.xpath("//input[@type!='hidden']")} == labels == {"q", "k", "image"}
    assert len(tree.xpath("//img")) == 8
    assert all(tree.xpath("//img/@alt"))
    assert tree.get("lang") == "en"
    assert len(tree.xpath("//h1")) == 1
    assert tree.xpath("//title/text()")


def test_page_keyboard_reaches_and_operates_all_controls(address: str) -> None:
    """Tab reaches every control in visual order. Keys search for words and images, and follow a link."""
    with Browser() as browser:
        for width in (400, 1400):
            browser.open(address + "?q=a+red+square", width=width)
            names = [one["name"] for one in check_keyboard(browser)]
            assert names[:5] == ["q", "k", "Search", "image", "Find similar"]
            assert "article" in names[5:]
            assert "CC BY" in names[5:]
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
        # Enter follows the first link of a hit. The listener records the target instead of loading it.
        browser.ask("addEventListener('click', e => { window.followed = e.target.href; e.preventDefault() })")
        for _ in range(2):
            browser.press("Tab")
        browser.press("Enter")
        assert browser.ask("window.followed == document.querySelector('.results a').href")


def test_page_colours_meet_wcag_contrast() -> None:
    """WCAG 2.1 AA asks for 4.5 to 1 between text and background, in light and dark."""
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
            text, background = pair.split()
            high, low = sorted((luminance(scheme[text]), luminance(scheme[background])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, background)


def test_api_gives_the_hits_of_the_page_as_json(client, searcher: Searcher) -> None:
    answer = client.get("/api/search", query_string={"q": "a red square", "k": "3"})
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    expected = [hit.as_json() for hit in searcher.text("a red square", 3)]
    assert answer.json == {"query": "a red square", "k": 3, "hits": expected}
    assert {"row", "score", "key", "caption", "fields", "article"} == set(expected[0])
    body = jpeg(COLOURS["blue"])
    raw = client.post("/api/search?k=2&thumbnails=1", data=body, content_type="image/jpeg")
    form = client.post("/api/search?thumbnails=1", data={"image": (io.BytesIO(body), "mine.jpg"), "k": "2"})
    assert raw.json["hits"] == form.json["hits"]
    assert (raw.json["query"], form.json["query"]) == ("image", "mine.jpg")
    assert all(hit["thumbnail"].startswith("data:image/jpeg;base64,") for hit in raw.json["hits"])
    assert "blue" in raw.json["hits"][0]["caption"]


def test_api_rejects_hostile_requests_as_json(client) -> None:
    for answer, status, words in (
        (client.get("/api/search"), 400, "a query must have 1 to"),
        (client.get("/api/search", query_string={"q": "x" * 5000}), 400, "a query must have 1 to"),
        (client.get("/api/search?q=red&k=0"), 400, "the number of hits must be"),
        (client.get("/api/search?q=red&k=1e9"), 400, "the number of hits must be"),
        (client.get("/api/search?q=red&k=99999999999999999999"), 400, "the number of hits must be"),
        (client.post("/api/search"), 400, "send an image as the body"),
        (client.post("/api/search", data=b"MZ" * 99), 400, "cannot be decoded"),
        (client.post("/api/search", data=bytes(33 << 20)), 413, "413"),
        (client.delete("/api/search"), 405, "405"),
        (client.get("/api/search?q=red", headers={"Host": "evil.example"}), 400, "400"),
        (client.post("/api/search", data=b"x", headers={"Sec-Fetch-Site": "cross-site"}), 403, "403"),
    ):
        assert (answer.status_code, answer.mimetype) == (status, "application/json")
        assert words in answer.json["error"]
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    for path in ("/api", "/api/", "/api/search/", "/api/search/..%2f..%2fetc/passwd", "/api/thumbnail"):
        assert client.get(path).status_code == 404


def test_requests_beyond_the_limit_wait_and_are_then_refused(searcher: Searcher, monkeypatch) -> None:
    monkeypatch.setattr(serve, "MAX_ACTIVE", 1)
    monkeypatch.setattr(serve, "WAIT_S", 0.01)
    app = serve.App(searcher, 5)
    answers = []
    nested = Client(app)
    text = searcher.text

    def slow(query: str, k: int) -> list:
        answers.append(nested.get("/api/search?q=blue").status_code)
        return text(query, k)

    monkeypatch.setattr(searcher, "text", slow)
    assert Client(app).get("/?q=red").status_code == 200
    assert answers == [503]
    monkeypatch.setattr(searcher, "text", text)
    assert nested.get("/api/search?q=blue").status_code == 200, "the slot is free again"


def test_second_answer_decodes_and_embeds_nothing(client, searcher: Searcher, monkeypatch) -> None:
    first = client.get("/?q=a+red+square&k=9")
    calls = []
    monkeypatch.setattr(html_page, "thumbnail", lambda *args: calls.append("image"))
    monkeypatch.setattr(searcher.embedder, "texts", lambda texts: calls.append("text"))
    assert client.get("/?q=a+red+square&k=9").data == first.data
    assert client.get("/?q=a+red+square&k=5").text.count("<img ") == 5
    assert not calls
    small = Searcher(OpenConfig(folder=str(searcher.folder)), colour_model(), thumbnail_bytes=0)
    monkeypatch.undo()
    assert page(small, small.text("a red square", 9)).count("<img ") == 9


def test_bounded_cache_keeps_the_last_values_and_computes_once() -> None:
    cache = BoundedCache[str](10, len)
    made: list[str] = []

    def value(key: str, size: int = 4) -> str:
        def make() -> str:
            made.append(key)
            return key * size

        return cache.get(key, make)

    assert [value("a"), value("b"), value("a"), value("c"), value("a")] == ["aaaa", "bbbb", "aaaa", "cccc", "aaaa"]
    assert made == ["a", "b", "c"]
    assert cache.weight == 8
    assert value("b") == "bbbb" and made[-1] == "b", "the least recently used one was dropped"
    assert len(value("x", 11)) == 11
    assert cache.weight == 8
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.get("bad", lambda: str(1 / 0))
    with ThreadPoolExecutor(8) as pool:
        gate = threading.Barrier(8)

        def ask(_: int) -> str:
            gate.wait()
            return cache.get("slow", lambda: (time.sleep(0.05), made.append("slow"), "slow")[2])

        assert list(pool.map(ask, range(8))) == ["slow"] * 8
    assert made.count("slow") == 1
