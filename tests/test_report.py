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
from tests.helpers.browser import Page, changed
from tests.helpers.synthetic_history import FORMS, make_history

HOSTILE = ["</script><script>window.hurt = 1</script>", '<b>bold</b> & "quoted"', "größe 猫 \u2028 {{data}}"]


def embedded(path: Path) -> dict:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S
    )
    assert found is not None
    return json.loads(found[1])


def numbers(text: str, top: int) -> np.ndarray:
    """Bytes of the page as parts of `top`."""
    return np.frombuffer(base64.b64decode(text), np.uint8) / top


def nibbles(text: str) -> np.ndarray:
    packed = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.stack([packed >> 4, packed & 15], axis=1).ravel() / 14


def test_numbers_on_the_page_are_those_of_the_record(tmp_path):
    history = make_history(
        tmp_path, probes=6, layers=3, heads=5, images=2, grid=(6, 9), signals=True, forms=FORMS
    )
    run = embedded(write_report(tmp_path))["runs"][0]
    assert [probe["step"] for probe in run["probes"]] == history.steps.tolist()
    assert run["forms"] == list(FORMS)
    assert "sink_token" not in run["signals"]
    for probe in run["probes"]:
        shares = np.frombuffer(base64.b64decode(probe["shares"]), "<u2").reshape(3, 5) / 65534
        np.testing.assert_allclose(shares, history.shares(probe["step"]), atol=1e-5)
        for form in FORMS:
            maps = history.heatmaps(probe["step"], form)
            read = nibbles if form != FORMS[0] else lambda text: numbers(text, 254)
            heat = read(probe["maps"]["forms"][form]).reshape(2, 6, 9)
            low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
            atol = 3e-3 if form == FORMS[0] else 0.5 / 14 + 3e-3
            np.testing.assert_allclose(heat, (maps - low) / (high - low), atol=atol)
        for name, scale in run["signals"].items():
            unit = numbers(probe["signals"][name], 254).reshape(3, 5)
            value = scale["low"] + (unit**2 if scale["root"] else unit) * (scale["high"] - scale["low"])
            truth = history.values(name, probe["step"])
            if name == "contribution_signed":
                truth = truth / history.values("contribution", probe["step"])
            atol = (2 if scale["root"] else 1) * (scale["high"] - scale["low"]) / 500
            np.testing.assert_allclose(value, truth.clip(scale["low"]), atol=atol, err_msg=name)
    photo = Image.open(io.BytesIO(base64.b64decode(run["images"]["0"][0]["data"])))
    assert photo.size == (64, 64)


def test_maps_of_heads_on_the_page_are_those_of_the_record(tmp_path):
    history = make_history(
        tmp_path, probes=9, layers=2, heads=3, images=2, grid=(5, 3), dead={(1, 2): 4}, head_maps_at=(0, 3)
    )
    shown = embedded(write_report(tmp_path))["runs"][0]["head_maps"]
    # all heads at each kept probe; the flagged head also by itself, before and at its flag
    assert [(entry["step"], entry["cells"]) for entry in shown["entries"]] == [
        (0, None), (149, [5]), (149, None), (299, [5]), (299, None), (399, None),
    ]  # fmt: skip
    by_step = {record.step: history.head_maps_of(record) for record in history.records}
    for entry in shown["entries"]:
        # (images, cells, grid): every map as part of its own peak
        maps = by_step[entry["step"]].reshape(2, 6, 5, 3)[:, entry["cells"] or slice(None)]
        heat = nibbles(entry["data"]).reshape(maps.shape[1], 2, 16)[..., :15].reshape(-1, 2, 5, 3)
        truth = (maps / maps.max(axis=(2, 3), keepdims=True)).swapaxes(0, 1)
        np.testing.assert_allclose(heat, truth, atol=0.5 / 14 + 0.01)
        peaks = by_step[entry["step"]].max(axis=(3, 4))
        strength = (peaks / peaks.max(axis=2, keepdims=True)).reshape(2, 6)[:, entry["cells"] or slice(None)]
        decades = 1 + np.log10(strength).T / 4
        np.testing.assert_allclose(
            numbers(entry["peaks"], 254).reshape(decades.shape), decades.clip(0), atol=0.01
        )


def test_a_full_run_fits_into_two_megabytes(tmp_path):
    make_history(
        tmp_path,
        probes=100,
        layers=12,
        heads=12,
        images=8,
        grid=(14, 14),
        size=224,
        signals=True,
        forms=FORMS,
        dead={(1, 2): 6, (4, 5): 20, (7, 0): 60},
        head_maps_at=tuple(range(0, 100, 7)),
    )
    path = write_report(tmp_path)
    assert path.stat().st_size < 2_000_000
    run = embedded(path)["runs"][0]
    assert len(run["probes"]) == run["total"] == 100
    assert run["head_maps"]["images"] == 8
    whole = [entry["step"] for entry in run["head_maps"]["entries"] if entry["cells"] is None]
    assert {0, 4949} <= set(whole)
    # what each dead head looked like before it died
    alone = {(entry["step"], cell) for entry in run["head_maps"]["entries"] for cell in entry["cells"] or ()}
    assert {(0, 14), (699, 53), (2799, 84)} <= alone


@pytest.mark.slow
def test_a_long_run_of_a_large_model_is_reported_in_seconds(tmp_path):
    make_history(
        tmp_path, probes=5000, layers=24, heads=16, images=8, grid=(16, 16), signals=True, forms=FORMS,
        dead={(1, 2): 600}, head_maps_at=(0, 500, 2000), every=10,
    )  # fmt: skip
    started = time.monotonic()
    path = write_report(tmp_path)
    assert time.monotonic() - started < 20
    assert path.stat().st_size < 3_000_000


def test_a_long_run_is_thinned_evenly_and_keeps_its_ends(tmp_path):
    history = make_history(
        tmp_path, probes=300, layers=12, heads=12, images=8, grid=(24, 24), dead={(1, 1): 150}
    )
    path = write_report(tmp_path)
    assert 1_200_000 < path.stat().st_size <= 2_000_000
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
    heat = embedded(write_report(tmp_path))["runs"][0]["probes"][1]["maps"]["forms"]["paper"]
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
        ::3
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
