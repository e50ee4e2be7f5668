import base64
import io
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmar_lightning.monitor.history import History
from gmar_lightning.show.report import run_names, write_report
from tests.helpers.synthetic_history import make_history

HOSTILE = ["</script><script>window.hurt = 1</script>", '<b>bold</b> & "quoted"', "größe 猫 \u2028 {{data}}"]


def embedded(path: Path) -> dict:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S
    )
    assert found is not None
    return json.loads(found[1])


def test_numbers_on_the_page_are_those_of_the_record(tmp_path):
    history = make_history(tmp_path, probes=6, layers=3, heads=5, images=2, grid=(6, 9), signals=True)
    run = embedded(write_report(tmp_path))["runs"][0]
    assert [probe["step"] for probe in run["probes"]] == history.steps.tolist()
    for probe in run["probes"]:
        shares = np.frombuffer(base64.b64decode(probe["shares"]), "<u2").reshape(3, 5) / 65534
        np.testing.assert_allclose(shares, history.shares(probe["step"]), atol=1e-5)
        maps = history.heatmaps(probe["step"])
        heat = np.frombuffer(base64.b64decode(probe["maps"]["data"]), np.uint8).reshape(2, 6, 9) / 254
        low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(heat, (maps - low) / (high - low), atol=3e-3)
        entropy = np.frombuffer(base64.b64decode(probe["entropy"]), np.uint8) / 254
        np.testing.assert_allclose(entropy, 0.5, atol=3e-3)
    photo = Image.open(io.BytesIO(base64.b64decode(run["images"]["0"][0]["data"])))
    assert photo.size == (64, 64)


def test_a_full_run_fits_into_a_megabyte(tmp_path):
    make_history(tmp_path, probes=100, layers=12, heads=12, images=8, grid=(14, 14), size=224, signals=True)
    path = write_report(tmp_path)
    assert path.stat().st_size <= 1_000_000
    run = embedded(path)["runs"][0]
    assert len(run["probes"]) == run["total"] == 100


def test_a_long_run_is_thinned_evenly_and_keeps_its_ends(tmp_path):
    history = make_history(
        tmp_path, probes=300, layers=12, heads=12, images=8, grid=(24, 24), dead={(1, 1): 150}
    )
    path = write_report(tmp_path)
    assert 600_000 < path.stat().st_size <= 1_000_000
    run = embedded(path)["runs"][0]
    steps = [probe["step"] for probe in run["probes"]]
    assert run["total"] == 300
    assert steps[0] == history.steps[0]
    assert steps[-1] == history.steps[-1]
    gaps = np.diff(steps)
    assert gaps.max() - gaps.min() <= 51
    assert run["events"] == history.events


def test_the_page_asks_nobody_for_anything(tmp_path):
    make_history(tmp_path, probes=2)
    text = write_report(tmp_path).read_text("utf-8")
    assert "default-src 'none'" in text
    for forbidden in (
        "http://",
        "https://",
        "localStorage",
        "sessionStorage",
        "fetch(",
        "XMLHttpRequest",
        "import(",
    ):
        assert forbidden not in text


def test_names_cannot_become_markup(tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    make_history(folder, probes=2, class_names=HOSTILE)
    path = write_report(folder, tmp_path / "report.html")
    text = path.read_text("utf-8")
    assert "window.hurt" in text
    assert "</script><script>window" not in text
    assert "<img" not in text
    assert embedded(path)["runs"][0]["classes"] == HOSTILE


def test_constant_and_broken_maps_are_not_stretched(tmp_path):
    history = make_history(tmp_path, probes=1, images=3)
    maps = np.random.default_rng(0).random((3, 8, 8))
    maps[0], maps[1, 2, 3] = 0.25 * (1 + 1e-5 * maps[0]), np.nan
    history.append(replace(history.records[0], step=49, global_step=50, maps={"paper": maps}))
    heat = embedded(write_report(tmp_path))["runs"][0]["probes"][1]["maps"]["data"]
    shown = np.frombuffer(base64.b64decode(heat), np.uint8).reshape(3, 8, 8)
    assert (shown[0] == 0).all()
    assert (shown[1] == 255).sum() == 1
    assert shown[2].max() == 254


def test_names_of_runs_are_as_short_as_they_can_be():
    assert run_names([Path("/a/one/gmar"), Path("/a/two/gmar")]) == ["one", "two"]
    assert run_names([Path("/a/v0/gmar"), Path("/b/v0/gmar")]) == ["a/v0", "b/v0"]
    assert len(set(run_names([Path("/a/gmar"), Path("/a/gmar")]))) == 2


def test_a_folder_without_a_record_is_said_plainly(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GMAR record"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        write_report([])


# ------------------------------------------------------------------ in a real browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its driver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
        "disable-background-networking", "disable-component-update", "window-size=1300,900",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


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
        """A thinned copy of a canvas."""
        return self.js(
            "const from = document.querySelector(arguments[0]);"
            "const copy = new OffscreenCanvas(from.width, from.height);"
            "const pen = copy.getContext('2d', {willReadFrequently: true}); pen.drawImage(from, 0, 0);"
            "const data = pen.getImageData(0, 0, copy.width, copy.height).data;"
            "return Array.from(data).filter((_, k) => k % 13 === 0)",
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


@pytest.mark.browser
def test_slider_and_keys_drive_every_picture(chromium, tmp_path):
    make_history(tmp_path, probes=12, dead={(1, 2): 3}, class_names=HOSTILE, signals=True)
    page = Page(chromium, write_report(tmp_path))
    assert page.where.endswith("12 of 12")
    assert page.js("return window.hurt") is None
    assert "猫" in page.js("return document.getElementById('photos').textContent")
    canvases = ["#photos canvas", "#grids canvas", "#curve", "#rasters canvas", "#timeline", "#charts canvas"]
    before = [page.pixels(canvas) for canvas in canvases]
    page.slide(0)
    assert page.where.startswith("step 0 ")
    for name, old in zip(canvases, before, strict=True):
        assert changed(old, page.pixels(name)), name
    page.press("ARROW_RIGHT")
    assert page.where.startswith("step 49 ")
    page.press("END")
    assert page.where.endswith("12 of 12")
    page.press("HOME")
    page.press(" ")
    time.sleep(1.0)
    page.press(" ")
    assert int(page.where.split()[-3]) > 1
    page.check_quiet()


@pytest.mark.browser
def test_flags_jump_and_heads_are_chosen_by_mouse_and_keyboard(chromium, tmp_path):
    from selenium.webdriver import ActionChains

    make_history(tmp_path, probes=12, dead={(1, 2): 3})
    page = Page(chromium, write_report(tmp_path))
    page.browser.find_element("css selector", "ol.flags button").click()
    assert page.where.startswith("step 249 ")
    detail = "return document.getElementById('detail').textContent"
    assert "blocks.1.attn head 2" in page.js(detail)
    assert "collapsed at step 249" in page.js(detail)
    page.press("ARROW_DOWN", "#grids canvas")
    page.press("ARROW_LEFT", "#grids canvas")
    assert "blocks.2.attn head 1" in page.js(detail)
    assert page.where.startswith("step 249 ")
    grid = page.browser.find_element("css selector", "#grids canvas")
    corner = (46 + 3 - grid.size["width"] // 2, 8 - grid.size["height"] // 2)
    ActionChains(page.browser).move_to_element_with_offset(grid, *corner).click().perform()
    assert "blocks.0.attn head 0" in page.js(detail)
    page.check_quiet()


@pytest.mark.browser
def test_opacity_and_colours_change_what_is_seen(chromium, tmp_path):
    make_history(tmp_path, probes=3, signals=True)
    page = Page(chromium, write_report(tmp_path))
    warm, grid = page.pixels("#photos canvas"), page.pixels("#grids canvas")
    page.js("const o = document.getElementById('opacity'); o.value = 0; o.dispatchEvent(new Event('input'))")
    plain = page.pixels("#photos canvas")
    assert changed(warm, plain)
    photo = np.asarray(Image.open(sorted((tmp_path / "inputs").glob("*.jpg"))[0]).convert("RGBA")).ravel()[
        ::13
    ]
    assert np.abs(np.array(plain) - photo).mean() < 6  # the clean photograph, twice through JPEG
    page.js(
        "const v = document.getElementById('value'); v.value = 'entropy'; v.dispatchEvent(new Event('change'))"
    )
    assert changed(grid, page.pixels("#grids canvas"))
    paper = page.js("return getComputedStyle(document.body).backgroundColor")
    page.js("document.getElementById('theme').click()")
    assert page.js("return getComputedStyle(document.body).backgroundColor") != paper
    page.check_quiet()


@pytest.mark.browser
def test_two_runs_share_the_slider_and_show_a_difference_grid(chromium, tmp_path):
    make_history(tmp_path / "a", probes=10)
    make_history(tmp_path / "b", probes=10, dead={(2, 4): 3})
    page = Page(chromium, write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html"))
    assert page.js("return document.querySelectorAll('#grids canvas').length") == 2
    assert page.js("return !document.getElementById('difference').hidden")
    assert page.js("return document.querySelector('#dlist .kind').textContent") == "head 4"
    assert page.js("return document.querySelector('#dlist .text').textContent") == "blocks.2.attn"
    late = page.pixels("#dgrid canvas")
    page.slide(0)
    assert changed(late, page.pixels("#dgrid canvas"))
    assert page.js("return document.querySelector('#dlist .value').textContent") == "+0.00"
    page.check_quiet()


@pytest.mark.browser
def test_runs_of_different_shape_say_that_they_cannot_be_subtracted(chromium, tmp_path):
    make_history(tmp_path / "a", probes=3)
    make_history(tmp_path / "b", probes=5, layers=2, heads=3)
    page = Page(chromium, write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html"))
    assert "different layers or heads" in page.js("return document.getElementById('dtext').textContent")
    page.check_quiet()


@pytest.mark.browser
def test_gaps_and_empty_states_are_said_in_words(chromium, tmp_path):
    text = "return document.body.innerText"
    make_history(tmp_path / "gap", probes=4, failed=(2,))
    page = Page(chromium, write_report(tmp_path / "gap"))
    assert "No flags in this run" in page.js(text)
    page.slide(2)
    assert "The probe at step 99 failed: CUDA out of memory" in page.js(text)
    page.check_quiet()
    make_history(tmp_path / "one", probes=1, images=1)
    page = Page(chromium, write_report(tmp_path / "one"))
    assert page.js("return document.getElementById('slider').disabled")
    page.check_quiet()
    bare = make_history(tmp_path / "bare", probes=2)
    shutil.rmtree(tmp_path / "bare" / "maps")
    page = Page(chromium, write_report(bare.dir))
    assert "No heatmaps were recorded" in page.js(text)
    page.check_quiet()
    History.create(tmp_path / "empty", {"layers": [], "heads": []})
    page = Page(chromium, write_report(tmp_path / "empty"))
    assert "No probe has been recorded yet." in page.js(text)
    page.check_quiet()


@pytest.mark.browser
def test_it_runs_in_a_sandboxed_frame_and_fits_a_phone(chromium, tmp_path):
    make_history(tmp_path, probes=3)
    report = write_report(tmp_path)
    (tmp_path / "frame.html").write_text(
        f'<iframe sandbox="allow-scripts" width="390" height="800" src="{report.name}"></iframe>'
    )
    chromium.get((tmp_path / "frame.html").as_uri())
    chromium.switch_to.frame(0)
    until = time.monotonic() + 20
    while not chromium.execute_script("return document.body.dataset.ready") and time.monotonic() < until:
        time.sleep(0.05)
    assert chromium.execute_script("return document.body.dataset.ready") == "true"
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= 390
    chromium.switch_to.default_content()
    assert chromium.get_log("browser") == []
