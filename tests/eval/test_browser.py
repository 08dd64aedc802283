"""The checks of pages in `browser` fail for pages with the faults that they look for."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Browser, check_drawn, check_keyboard

HEAD = "<style>:root{color-scheme:light dark} :focus-visible{outline:2px solid red}</style><h1>x</h1>"


def write_page(folder: Path, body: str) -> str:
    (folder / "write_page.html").write_text(f"<!DOCTYPE html><html lang=en><title>t</title>{HEAD}{body}")
    return (folder / "write_page.html").as_uri()


def test_check_keyboard_unreachable_controls_fail(tmp_path: Path) -> None:
    with Browser() as browser:
        browser.open(write_page(tmp_path, "<input><p><button>a</button> <a href=x>b</a>"))
        assert len(check_keyboard(browser)) == 3
        for body in (
            "<input><p><button tabindex=1>before what stands above it</button>",
            "<div style='display:flex;flex-direction:row-reverse'><button>a</button><button>b</button></div>",
            "<button style='outline:none'>unseen</button>",
            "<div onkeydown='event.preventDefault()'><input><button>a trap</button></div>",
        ):
            browser.open(write_page(tmp_path, body))
            with pytest.raises(AssertionError):
                check_keyboard(browser)


def test_check_drawn_overflow_and_errors_fail(tmp_path: Path) -> None:
    with Browser() as browser:
        check_drawn(browser, write_page(tmp_path, "<h1>" + "words " * 50), tmp_path)
        for body in (
            "<div style='width:500px'>wide</div>",
            "<svg viewBox='0 0 100 20' width=300><text x=60 y=15>longer than its chart</text></svg>",
            "<script>throw 'x'</script>",
            "<style>body{background:#fff}</style>the same in the dark",
        ):
            with pytest.raises(AssertionError):
                check_drawn(browser, write_page(tmp_path, body), tmp_path)
