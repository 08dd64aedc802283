"""The sources of the docs site: the hand-written pages, the generated ones, and the files that they link to."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from . import benchmarks, cells, notebooks, reference
from .markdown import bad_urls, with_links
from .results import ROOT, load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = ROOT / "docs"
# Pages that lie outside docs/, by their path in the repository.
ELSEWHERE = {
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "RELEASING.md": "releasing.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "benchmarks/results/bounds.md": "bounds.md",
    "benchmarks/results/cuda_resources.md": "cuda-resources.md",
}
# Folders that a link may name, and their pages.
FOLDERS = {"docs/tutorials": "tutorials/index.md", "examples": "examples.md", "benchmarks/results": "benchmarks.md"}
TUTORIALS = ["loss_in_open_clip", "loss_in_ddp", "loss_in_sentence_transformers", "zero_shot", "pmc_to_shards"]
TUTORIALS += ["pretrain", "finetune_on_a_csv", "evaluate_and_compare", "search_your_figures"]


class SiteError(Exception):
    """A link without a target, a URL that can't be right, or a page in nav.toml that doesn't exist."""


def write(folder: Path) -> int:
    """Write the sources of the site to an empty or missing folder, and return the number of pages.

    Raises:
        SiteError: a link has no target, a URL can't be right, or nav.toml lists a page that doesn't exist.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pages = written_pages() | dict(reference.pages()) | tutorial_pages() | {"not-verified.md": not_verified()}
    figures = benchmarks.figures(load())
    pages["benchmarks.md"] = benchmarks.page(load())
    sections = tomllib.loads((DOCS / "nav.toml").read_text(encoding="utf-8"))["section"]
    for section in navigation(set(pages), sections):
        pages["index.md"] += _toctree(section["title"], section["pages"])
    if bad := [f"{name}: {url}" for name, text in pages.items() for url in bad_urls(text)]:
        raise SiteError(f"URLs that can't be right: {', '.join(bad)}")
    for name, text in pages.items():
        _write(folder / name, text)
    for name, svg in figures.items():
        _write(folder / name, svg)
    for name in TUTORIALS:
        path = notebooks.TUTORIALS / f"{name}.py"
        _write(folder / f"tutorials/{name}.ipynb", notebooks.notebook(path))
        shutil.copy(path, folder / f"tutorials/{name}.py")
    shutil.copytree(DOCS / "figures", folder / "figures", dirs_exist_ok=True)
    _copy_linked(folder)
    return len(pages)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def written_pages() -> dict[str, str]:
    """Return the pages that people wrote, with their links changed to places in the site."""
    sources = {path: path.relative_to(DOCS).as_posix() for path in DOCS.glob("*.md")}
    sources |= {ROOT / name: page for name, page in ELSEWHERE.items() if page != "index.md"}
    pages = {page: linked(path.read_text(encoding="utf-8"), path, page) for path, page in sorted(sources.items())}
    for script in sorted((ROOT / "examples").glob("*.py")):
        pages["examples.md"] += f"\n## {script.name}\n\n```python\n{script.read_text(encoding='utf-8')}```\n"
    return pages


def linked(text: str, source: Path, page: str) -> str:
    """Return a page with its links changed to places in the site.

    source: the file in the repository, from whose folder the links lead.
    """

    def place(target: str) -> str:
        path = (source.parent / target).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            raise SiteError(f"{source.relative_to(ROOT)} links to {target}, which does not exist")
        return place_of(path.relative_to(ROOT).as_posix())

    return with_links(text, page, place)


def place_of(name: str) -> str:
    """Return the place in the site of a file of the repository: a page, or a copy below files/."""
    if name in ELSEWHERE or name in FOLDERS:
        return ELSEWHERE.get(name) or FOLDERS[name]
    if name.startswith("docs/tutorials/"):
        return name.removeprefix("docs/").replace(".py", ".md")
    if name.startswith("docs/") and name.endswith((".md", ".svg")):
        return name.removeprefix("docs/")
    if (ROOT / name).is_dir():
        raise SiteError(f"no page shows the folder {name}; link to a file, or add it to FOLDERS")
    return f"files/{name}"


def _copy_linked(folder: Path) -> None:
    """Copy the files that pages link to below files/."""
    for path in folder.rglob("*.md"):
        for target in re.findall(r"\]\((?:\.\./)*files/([^)#]+)", path.read_text(encoding="utf-8")):
            copy = folder / "files" / target
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / target, copy)


# Generated pages.


def tutorial_pages() -> dict[str, str]:
    """Return the pages of the tutorials, and their list."""
    if sorted(path.stem for path in notebooks.TUTORIALS.glob("*.py")) != sorted(TUTORIALS):
        raise SiteError("docs/tutorials and TUTORIALS of docs/generate/site.py differ")
    pages, rows = {}, []
    for name in TUTORIALS:
        text = cells.markdown(cells.read(notebooks.TUTORIALS / f"{name}.py"))
        title, _, body = text.partition("\n")
        downloads = f"[Script]({name}.py) · [Notebook]({name}.ipynb)"
        pages[f"tutorials/{name}.md"] = f"{title}\n\n{downloads}\n{body}"
        rows.append(f"- [{title.removeprefix('# ')}]({name}.md)")
    listed = "\n".join(TUTORIALS)
    pages["tutorials/index.md"] = (
        "# Tutorials\n\nEach tutorial is a script that the tests run, and a notebook. The pages show what the scripts\n"
        "print. `...` stands for output that differs from machine to machine. The last five build on one another.\n\n"
        + "\n".join(rows)
        + f"\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    )
    return pages


def not_verified() -> str:
    """Return the page of all that was never run: the last section of results.md."""
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    section = text.partition("## Not measured\n")[2].partition("\n## ")[0]
    if not section:
        raise SiteError("docs/results.md has no section 'Not measured'")
    return "# Not verified\n\n" + linked(section, DOCS / "results.md", "not-verified.md").lstrip()


# Navigation.


def navigation(pages: set[str], sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sections of the sidebar. Pages that nav.toml doesn't list are at the end of the section Guides.

    Raises:
        SiteError: nav.toml lists a page that doesn't exist, or one twice.
    """
    listed = [f"{page}.md" for section in sections for page in section["pages"]]
    if wrong := sorted({page for page in listed if page not in pages or listed.count(page) > 1}):
        raise SiteError(f"docs/nav.toml lists {', '.join(wrong)}, which doesn't exist or is there twice")
    nested = {page for page in pages if page.startswith(("reference/commands/", "tutorials/"))}
    further = [page.removesuffix(".md") for page in sorted(pages - set(listed) - nested - {"index.md"})]
    return [
        section | {"pages": [*section["pages"], *further]} if section["title"] == "Guides" else section
        for section in sections
    ]


def _toctree(title: str, pages: list[str]) -> str:
    listed = "\n".join(pages)
    return f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{listed}\n```\n"
