"""A report in a real browser."""

import shutil
import time
from pathlib import Path

import pytest


def start_chromium(profile: Path):
    """A headless browser; skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its driver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
        "disable-background-networking", "disable-component-update", "window-size=1300,900",
        f"user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


class Page:
    """A report in the browser."""

    def __init__(self, browser, path: Path):
        self.browser = browser
        browser.get(path.as_uri())
        until = time.monotonic() + 20
        while not self.js("return document.body.dataset.ready"):
            assert time.monotonic() < until, browser.get_log("browser")
            time.sleep(0.05)

    def js(self, script: str, *arguments):
        return self.browser.execute_script(script, *arguments)

    def pixels(self, selector: str) -> list[int]:
        """A thinned copy of a canvas: of four bytes three apart, each pixel holds at least one."""
        return self.js(
            "const from = document.querySelector(arguments[0]);"
            "const copy = new OffscreenCanvas(from.width, from.height);"
            "const pen = copy.getContext('2d', {willReadFrequently: true}); pen.drawImage(from, 0, 0);"
            "const data = pen.getImageData(0, 0, copy.width, copy.height).data;"
            "return Array.from(data).filter((_, k) => k % 3 === 0)",
            selector,
        )

    def slide(self, index: int) -> None:
        self.js(
            "const s = document.getElementById('slider'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('input', {bubbles: true}))",
            index,
        )

    def press(self, key: str, selector: str = "body") -> None:
        from selenium.webdriver import Keys

        self.browser.find_element("css selector", selector).send_keys(getattr(Keys, key, key))

    @property
    def where(self) -> str:
        return self.js("return document.getElementById('where').textContent")

    def check_quiet(self) -> None:
        assert self.browser.get_log("browser") == []


def changed(before: list[int], after: list[int]) -> bool:
    return len(before) != len(after) or sum(abs(a - b) > 8 for a, b in zip(before, after, strict=True)) > 3
