"""Headless Chromium for tests of pages, controlled over its debugging pipe."""

from __future__ import annotations

import base64
import itertools
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
# Lists the elements that stick out of the window, and the words that stick out of a chart. Ignores scrollable frames.
_OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect(), chart = e.closest('svg');
  const frame = e.tagName == 'text' ? chart.getBoundingClientRect() : {left: 0, right: innerWidth};
  return box.width && !e.closest('.scroll') && (box.right > frame.right + 1 || box.left < frame.left - 1);
}).map(e => e.outerHTML.slice(0, 120))"""
_FOCUSABLE = "a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex]:not([tabindex='-1'])"


def find() -> str:
    """Return Chromium's path. Skips the test if Chromium is not installed."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium is installed")


class Browser:
    """A page of a new Chromium process. Use it in a `with` statement."""

    def __init__(self) -> None:
        path = find()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (chromium_in, self._out), (self._in, chromium_out) = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        command = f'exec 3<&{chromium_in} 4>&{chromium_out}; exec "$0" "$@"'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        flags.append(f"--user-data-dir={self._profile.name}")
        self._process = subprocess.Popen(
            ["bash", "-c", command, path, *flags, "about:blank"],
            pass_fds=(chromium_in, chromium_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(chromium_in)
        os.close(chromium_out)
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
        """Call a method of the DevTools protocol and return its result. Keeps the events in between in `events`."""
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
        """Return the parameters of the first such event after the last one that was returned."""
        while True:
            for i, candidate in enumerate(self.events):
                if candidate["method"] == event:
                    del self.events[: i + 1]
                    return candidate["params"]
            self.events.append(self._read())

    def open(self, address: str, *, width: int = 1000, height: int = 900, dark: bool = False) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=address)
        self.wait_for("Page.loadEventFired")

    def ask(self, expression: str, *, wait: bool = False) -> Any:
        """Return the JSON value of a JavaScript expression. wait: return the value of its promise."""
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
        """Save the whole page as a PNG."""
        data = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def tab_order(self) -> list[dict[str, Any]]:
        """Return the controls that Tab reaches, in this order: position among all controls, box and outline.

        Call it before anything else takes the focus.
        """
        self.ask(f"window.controls = [...document.querySelectorAll(`{_FOCUSABLE}`)], document.activeElement.blur()")
        reached: list[dict[str, Any]] = []
        for _ in range(self.ask("controls.length") + 1):
            self.press("Tab")
            control = self.ask(
                """(() => { const e = document.activeElement, r = e.getBoundingClientRect(), s = getComputedStyle(e);
                return {place: controls.indexOf(e), name: e.id || e.getAttribute('aria-label') || e.textContent.trim(),
                tag: e.tagName, top: r.top + scrollY, left: r.left, bottom: r.bottom + scrollY, width: r.width,
                inView: r.bottom > 0 && r.top < innerHeight,
                outline: s.outlineStyle == 'none' ? 0 : parseFloat(s.outlineWidth)} })()"""
            )
            if control["place"] < 0 or (reached and control["place"] == reached[0]["place"]):
                break
            if not reached or control["place"] != reached[-1]["place"]:  # Tab may stop at several parts of a field
                reached.append(control)
        return reached


def check_drawn(browser: Browser, address: str, folder: Path) -> list[np.ndarray]:
    """Check a page in a narrow and a wide window, light and dark: no errors, no overflow, no cut words in charts.

    Returns the pixels of the wide page, light and dark, as (H, W, 3) float.
    """
    shots = []
    for width in (400, 1400):
        for dark in (False, True):
            browser.open(address, width=width, dark=dark)
            errors = [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
            assert not errors
            assert browser.ask("document.documentElement.scrollWidth") == width
            assert browser.ask(_OUTSIDE) == []
            browser.shot(folder / "shot.png")
            with Image.open(folder / "shot.png") as image:
                shots.append(np.asarray(image.convert("RGB"), dtype=float))
    light_level, dark_level = (shot[5:20, 5:20].mean() for shot in shots[2:])
    assert dark_level < 60 and light_level > 200 and min(shot.std() for shot in shots) > 5
    return shots[2:]


def check_keyboard(browser: Browser) -> list[dict[str, Any]]:
    """Check that Tab reaches every visible control in reading order with a visible outline. Returns the controls."""
    order = browser.tab_order()
    hidden = browser.ask("controls.filter(e => !e.checkVisibility()).map(e => controls.indexOf(e))")
    assert sorted(one["place"] for one in order) == sorted(set(range(browser.ask("controls.length"))) - set(hidden))
    for control in order:
        assert control["outline"] >= 2 and control["inView"], f"the focus on {control} is invisible"
    for control, after in itertools.pairwise(order):
        # The same link in two neighbouring cards may be a line or two higher or lower.
        is_beside = after["left"] >= control["left"] + control["width"] - 1 and after["bottom"] > control["top"] - 40
        assert after["top"] >= control["bottom"] - 1 or is_beside, f"{after} comes after {control}"
    return order
