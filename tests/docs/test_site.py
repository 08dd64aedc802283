"""README's generated parts, the reference, and the sources of the docs site."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from browser import Browser
from snippets import ROOT, read

griffe = pytest.importorskip("griffe", reason="the extra docs is not installed")

from bclip_fast.cli import COMMANDS  # noqa: E402
from docs.generate import benchmarks, markdown, notebooks, readme, reference, results, site, source  # noqa: E402

README = ROOT / "README.md"
REMEDY = "run `make readme`, and commit the files"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the site, without plots, which take most of the time."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "figures", lambda rows: {})
        site.write(folder)
    return folder


# README.


def test_readme_numbers_are_those_of_the_results():
    text = README.read_text(encoding="utf-8")
    assert readme.filled(text, results.load()) == text, REMEDY


def test_readme_figure_shows_the_numbers_of_the_results():
    import matplotlib

    committed, drawn = readme.FIGURE.read_text(encoding="utf-8"), readme.figure(results.load())
    description = r"<dc:description>(.*?)</dc:description>"
    assert re.search(description, committed)[1] == re.search(description, drawn)[1], REMEDY  # type: ignore[index]
    # Another release of matplotlib writes other bytes.
    if f"matplotlib {matplotlib.__version__}" in committed:
        assert committed == drawn, REMEDY


def test_readme_other_result_changes_the_claims():
    rows = results.load().rows
    faster = [row | {"seconds": row["seconds"] / 2} if row.get("contender") == "ours:cpu" else row for row in rows]
    text = README.read_text(encoding="utf-8")
    assert readme.filled(text, results.Results(faster)) != text


def test_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1300


def test_notebook_is_that_of_the_tutorial():
    tutorial = notebooks.TUTORIALS / f"{notebooks.EXAMPLE.stem}.py"
    assert notebooks.EXAMPLE.read_text(encoding="utf-8") == notebooks.notebook(tutorial), REMEDY
    content = json.loads(notebooks.notebook(notebooks.TUTORIALS / "pmc_to_shards.py"))
    commands = [cell for cell in content["cells"] if "".join(cell["source"]).startswith("%%bash\n")]
    assert len(commands) == 3
    assert commands[0]["outputs"][0]["text"][0].startswith("article.nxml: PMC1")


# Reference.


def test_python_reference_entries_have_descriptions():
    for names in reference.PYTHON.values():
        for name in names.split():
            entry = reference.described(source.member(name), name.replace(":", "."))
            assert len(entry.splitlines()) >= 3, f"{name} has no docstring"


# Pages.


def test_site_pages_are_all_in_the_sidebar(pages):
    toctrees = re.findall(r"```\{toctree\}\n(?::.*\n)+\n((?:\S+\n)+)```", (pages / "index.md").read_text())
    listed = {page for block in toctrees for page in block.split()}
    nested = re.compile(r"index|tutorials/(?!index)|reference/commands/")
    paths = [path.relative_to(pages).with_suffix("").as_posix() for path in pages.rglob("*.md")]
    assert sorted(path for path in paths if not nested.match(path)) == sorted(listed)
    assert (pages / "reference/commands/train.md").is_file()
    assert (pages / "tutorials/pretrain.ipynb").is_file()


def test_site_links_lead_to_files(pages):
    for path in pages.rglob("*.md"):
        for target in re.findall(r"\]\(([^()\s#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.relative_to(pages)} links to {target}"


def test_navigation_unlisted_pages_follow_the_guides():
    sections = [{"title": "Guides", "pages": ["losses"]}, {"title": "Help", "pages": ["faq"]}]
    pages = {"losses.md", "faq.md", "data.md", "index.md", "tutorials/x.md"}
    assert site.navigation(pages, sections) == [{"title": "Guides", "pages": ["losses", "data"]}, sections[1]]
    with pytest.raises(site.SiteError, match=r"lists faq.md, which doesn't exist"):
        site.navigation({"losses.md"}, sections)


def test_linked_missing_target_is_an_error():
    page = ROOT / "docs/losses.md"
    assert site.linked("[a](../CONTRIBUTING.md#code) [b](peers.md)", page, "x/y.md") == (
        "[a](../contributing.md#code) [b](../peers.md)"
    )
    assert site.linked("[a](../pyproject.toml)", page, "losses.md") == "[a](files/pyproject.toml)"
    with pytest.raises(site.SiteError, match=r"docs/losses.md links to lost.md"):
        site.linked("[a](lost.md)", page, "losses.md")


def test_bad_urls_reports_hosts_and_characters():
    text = "<https://arxiv.org/abs/2303.00915>, http://localhost:8000, [x](https://example/a) https://a.org/{b}"
    assert markdown.bad_urls(text) == ["https://example/a", "https://a.org/{b}"]


def test_from_docstring_lists_arguments():
    text = (
        "Do it.\n\nArgs:\n    x: a number.\n        It goes on.\n\nReturns:\n    One.\n\nRaises:\n    ValueError: no."
    )
    assert markdown.from_docstring(text).split("\n") == [
        "Do it.", "", "", "**Arguments**", "", "- `x`: a number.", "  It goes on.", "  ", "", "**Returns**", "",
        "One.", "", "", "**Raises**", "", "- `ValueError`: no.", "",
    ]  # fmt: skip


def test_from_docstring_keeps_the_lines_of_a_table():
    text = "Files.\n\nconfig.toml   the settings\nmodel/        the weights\n\nThe end.  Two spaces."
    assert markdown.from_docstring(text) == (
        "Files.\n\n    config.toml   the settings\n    model/        the weights\n\nThe end.  Two spaces.\n"
    )


def test_troubleshooting_messages_are_in_the_source():
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "bclip_fast").rglob("*.py"))]
    # Strings that go over several lines, as one.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))
    code = re.sub(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}", "...", code)
    headings = re.findall(r"(?m)^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"))
    assert len(headings) >= 20
    missing = [head for head in headings if not all(part in code for part in head.split("...") if part.strip())]
    assert missing == []


def commands_of(path: Path) -> list[str]:
    """The commands of `bclip` in the code blocks of a page or of a tutorial, without comments and optional parts."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = re.sub(r"(?m)^# ?", "", text)
    text = re.sub(r"torchrun .* bclip_fast\.cli ", "bclip ", text.replace("\\\n", " "))
    lines = re.findall(r"(?m)^ {0,8}(bclip .*)$", text)
    # In a|b, both are possible. Another command may follow a semicolon.
    lines = [re.sub(r"\[[^\]]*\]|\s{2,}#.*|;.*|\s\.\.\.(?=\s|$)|(?<=\w)\|\S+", "", line).strip() for line in lines]
    return [line for line in lines if re.match(r"bclip [a-z]", line)]


_PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/tutorials").glob("*.py"))]


def test_commands_in_pages_are_accepted(tmp_path, monkeypatch):
    """Every command in a code block has flags and values that the parser accepts. Nothing runs."""
    from bclip_fast import config
    from bclip_fast.errors import UserError

    monkeypatch.chdir(tmp_path)
    for name in ("tiny.toml", "CONFIG.toml"):
        Path(name).write_text("")
    commands = [(page, line) for page in _PAGES for line in commands_of(page)]
    assert len(commands) > 30
    wrong = []
    for page, line in commands:
        words = shlex.split(line)[1:]
        name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), "")
        try:
            module, class_name = COMMANDS[name].config.split(":")
            config.parse(getattr(importlib.import_module(module), class_name), words[len(name.split()) :], prog=name)
        except (UserError, KeyError, SystemExit) as error:
            wrong.append(f"{page.relative_to(ROOT)}: {line}: {error}")
    assert wrong == []


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site. It takes 13 s of CPU time. Warnings are errors."""
    folder = tmp_path_factory.mktemp("docs")
    site.write(folder / "source")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs"]
    run = subprocess.run([*command, folder / "source", folder / "html"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "html"


@pytest.mark.long
def test_site_builds_without_warnings(html):
    """The workflow's docs job builds the site for every commit, so this test is long."""
    assert (html / "index.html").is_file()
    assert "only-dark" in (html / "benchmarks.html").read_text(encoding="utf-8")


@pytest.mark.long
def test_site_pages_fit_a_phone_and_a_screen(html):
    """No page scrolls sideways, and none loads anything from another host. It takes 30 s for all pages in a browser."""
    pages = [path for path in sorted(html.rglob("*.html")) if "_static" not in path.parts]
    with Browser() as browser:
        for page, width in itertools.product(pages, (390, 1280)):
            browser.open(page.as_uri(), width=width, dark=width == 390)
            assert browser.ask("document.documentElement.scrollWidth") == width, f"{page.name} is wider than {width}"
            assert [event for event in browser.events if event["method"] == "Log.entryAdded"] == []
    for page in pages:
        loaded = re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", page.read_text(encoding="utf-8")
        )
        assert loaded == []


def test_cells_markdown_and_outputs_belong_together():
    cells = read(README)
    kinds = [cell.kind for cell in cells if cell.kind != "markdown"]
    assert kinds == ["python", "python", "bash"]
    assert all(cell.output for cell in cells if cell.kind != "markdown")
