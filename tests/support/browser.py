"""Chromium without a window, driven over its debugging pipe: keys are pressed, and the page says what it is then."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39, "ArrowDown": 40}
# What leaves the window, but for what scrolls in a frame of its own, or the words of a chart that leave it.
_OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect(), chart = e.closest('svg');
  const frame = e.tagName == 'text' ? chart.getBoundingClientRect() : {left: 0, right: innerWidth};
  return box.width && !e.closest('.scroll') && (box.right > frame.right + 1 || box.left < frame.left - 1);
}).map(e => e.outerHTML.slice(0, 120))"""
_FOCUSABLE = "a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex]:not([tabindex='-1'])"


def find() -> str:
    """Chromium's path; the test is skipped where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium is installed")


class Browser:
    """A page. Use it in a `with`."""

    def __init__(self) -> None:
        path = find()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        command = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$0" "$@"'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        flags.append(f"--user-data-dir={self._profile.name}")
        self._process = subprocess.Popen(
            ["bash", "-c", command, path, *flags, "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._data, self._session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        pages = [target for target in self("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        self._session = self("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")
        self("Emulation.setFocusEmulationEnabled", enabled=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol; what happens meanwhile is kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(
            self._out, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _read(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self._data:
            assert select.select([self._in], [], [], seconds)[0], "Chromium doesn't answer"
            block = os.read(self._in, 1 << 20)
            assert block, "Chromium ended"
            self._data += block
        line, _, self._data = self._data.partition(b"\0")
        return json.loads(line)

    def wait_for(self, event: str) -> dict[str, Any]:
        """The parameters of the next such event, or of one that has come since the last was waited for."""
        while True:
            for i, one in enumerate(self.events):
                if one["method"] == event:
                    del self.events[: i + 1]
                    return one["params"]
            self.events.append(self._read())

    def open(self, address: str, *, width: int = 1000, height: int = 900, dark: bool = False) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=address)
        self.wait_for("Page.loadEventFired")

    def ask(self, expression: str, *, wait: bool = False) -> Any:
        """The JSON-ready value of a JavaScript expression, or with `wait` that of its promise."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=wait)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        common = {"key": key, "code": "Space" if key == " " else key, "modifiers": 8 * shift}
        common["windowsVirtualKeyCode"] = _KEYS[key]
        self("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self("Input.dispatchKeyEvent", type="keyUp", **common)

    def shot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def tab_order(self) -> list[dict[str, Any]]:
        """Of a page just opened, what Tab reaches one after another: its place among all controls, box and outline."""
        self.ask(f"window.controls = [...document.querySelectorAll(`{_FOCUSABLE}`)], document.activeElement.blur()")
        found: list[dict[str, Any]] = []
        for _ in range(self.ask("controls.length") + 1):
            self.press("Tab")
            one = self.ask(
                """(() => { const e = document.activeElement, r = e.getBoundingClientRect(), s = getComputedStyle(e);
                return {place: controls.indexOf(e), name: e.id || e.getAttribute('aria-label') || e.textContent.trim(),
                tag: e.tagName, top: r.top + scrollY, left: r.left, bottom: r.bottom + scrollY, width: r.width,
                inView: r.bottom > 0 && r.top < innerHeight,
                outline: s.outlineStyle == 'none' ? 0 : parseFloat(s.outlineWidth)} })()"""
            )
            if one["place"] < 0 or (found and one["place"] == found[0]["place"]):
                break
            if not found or one["place"] != found[-1]["place"]:  # a field may have parts of its own
                found.append(one)
        return found


def check_drawn(browser: Browser, address: str, folder: Path) -> list[np.ndarray]:
    """The page in a narrow and a wide window, light and dark: nothing sticks out, no word of a chart is cut, no error.

    Returns the wide pages' pixels, (H, W, 3) float of light and dark.
    """
    shots = []
    for width in (400, 1400):
        for dark in (False, True):
            browser.open(address, width=width, dark=dark)
            complaints = [
                one for one in browser.events if one["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
            ]
            assert not complaints
            assert browser.ask("document.documentElement.scrollWidth") == width
            assert browser.ask(_OUTSIDE) == []
            browser.shot(folder / "shot.png")
            with Image.open(folder / "shot.png") as picture:
                shots.append(np.asarray(picture.convert("RGB"), dtype=float))
    light, dark_ = (shot[5:20, 5:20].mean() for shot in shots[2:])
    assert dark_ < 60 and light > 200 and min(shot.std() for shot in shots) > 5
    return shots[2:]


def check_keyboard(browser: Browser) -> list[dict[str, Any]]:
    """Tab reaches every control, in the order in which they are seen, and shows where it is. Returns the controls."""
    order = browser.tab_order()
    hidden = browser.ask("controls.filter(e => !e.checkVisibility()).map(e => controls.indexOf(e))")
    assert sorted(one["place"] for one in order) == sorted(set(range(browser.ask("controls.length"))) - set(hidden))
    for one in order:
        assert one["outline"] >= 2 and one["inView"], f"focus on {one} is not seen"
    for one, two in zip(order, order[1:], strict=False):
        # In the cards of a row the same link may stand a line or two higher or lower.
        beside = two["left"] >= one["left"] + one["width"] - 1 and two["bottom"] > one["top"] - 40
        assert two["top"] >= one["bottom"] - 1 or beside, f"{two} comes after {one}"
    return order
