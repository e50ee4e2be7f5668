"""The report in Chromium: forms, head cards, two moments."""

import time

import numpy as np
import pytest

from gmar_lightning.show.report import write_report
from tests.helpers.browser import Page, changed
from tests.helpers.synthetic_history import FORMS, make_history

pytestmark = pytest.mark.browser


def choose(page: Page, selector: str, value: str) -> None:
    page.js(
        "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change', {bubbles: true}))",
        selector,
        value,
    )


def text(page: Page, selector: str) -> str:
    return page.js("return document.querySelector(arguments[0]).textContent", selector)


def colourfulness(page: Page, selector: str) -> float:
    """Mean distance of the pixels from grey: heat is colourful, a faded map is not."""
    return page.js(
        "const c = document.querySelector(arguments[0]), copy = new OffscreenCanvas(c.width, c.height);"
        "const pen = copy.getContext('2d', {willReadFrequently: true}); pen.drawImage(c, 0, 0);"
        "const d = pen.getImageData(0, 0, c.width, c.height).data; let sum = 0;"
        "for (let k = 0; k < d.length; k += 4)"
        "  sum += Math.max(d[k], d[k + 1], d[k + 2]) - Math.min(d[k], d[k + 1], d[k + 2]);"
        "return sum / (d.length / 4)",
        selector,
    )


def test_the_form_of_the_map_is_chosen_for_all_pictures(chromium, tmp_path):
    history = make_history(tmp_path, probes=6, forms=FORMS)
    page = Page(chromium, write_report(tmp_path))
    offered = page.js("return [...document.getElementById('form').options].map((o) => o.value)")
    assert offered == list(FORMS)
    assert "vs first" in text(page, "#photos")
    places = ("#photos canvas", "#swipes canvas")
    seen = {offered[0]: [page.pixels(place) for place in places]}
    for form in offered[1:]:
        choose(page, "#form", form)
        seen[form] = [page.pixels(place) for place in places]
        # drift of the record is that of the primary form
        assert "vs first" not in text(page, "#photos")
    for place in range(len(places)):
        for k, one in enumerate(offered):
            for other in offered[k + 1 :]:
                assert changed(seen[one][place], seen[other][place]), (place, one, other)
    assert len(history.records) == 6
    page.check_quiet()


def test_an_older_record_of_one_form_has_no_selector(chromium, tmp_path):
    make_history(tmp_path, probes=3)
    page = Page(chromium, write_report(tmp_path))
    assert page.js("return document.getElementById('form').hidden")
    assert "No maps of single heads" in text(page, "#cardmaps")
    page.check_quiet()


def test_contribution_comes_first_and_colours_grid_raster_and_curve(chromium, tmp_path):
    make_history(tmp_path, probes=6, signals=True)
    page = Page(chromium, write_report(tmp_path))
    offered = page.js("return [...document.getElementById('value').options].map((o) => o.value)")
    assert offered[:2] == ["contribution", "shares"]
    assert page.js("return document.getElementById('value').value") == "contribution"
    places = ("#grids canvas", "#rasters canvas", "#curve")
    before = [page.pixels(place) for place in places]
    choose(page, "#value", "shares")
    for place, old in zip(places, before, strict=True):
        assert changed(old, page.pixels(place)), place
    page.check_quiet()


def test_a_head_that_is_clicked_shows_its_card(chromium, tmp_path):
    from selenium.webdriver import ActionChains

    make_history(tmp_path, probes=14, dead={(1, 2): 5}, signals=True, head_maps_at=(0, 3, 4, 9))
    page = Page(chromium, write_report(tmp_path))
    # the page opens on the first collapsed head, at the last probe
    assert "blocks.1.attn head 2" in text(page, "#cardname")
    words = text(page, "#cardtext")
    assert "collapsed at step 349 (since step 249)" in words
    assert "number 24 of 24 heads" in words
    assert float(words.split("Importance: ")[1].split()[0].rstrip("\u00d7")) < 0.05
    rows = page.js("return [...document.querySelectorAll('#cardmaps h3')].map((row) => row.textContent)")
    assert rows[0].startswith("now step 649 · almost nothing")
    assert rows[1].startswith("before it collapsed (last healthy picture) step 199 · peak")
    assert "of the same layer, now step 649" in rows[2]
    dead, alive, sibling = (
        colourfulness(page, f"#cardmaps .cardrow:nth-child({row}) canvas") for row in (1, 2, 3)
    )
    assert dead < alive / 3
    assert dead < sibling / 3
    # another head, by mouse, has another card and was never flagged
    grid = page.browser.find_element("css selector", "#grids canvas")
    corner = (46 + 3 - grid.size["width"] // 2, 8 - grid.size["height"] // 2)
    ActionChains(page.browser).move_to_element_with_offset(grid, *corner).click().perform()
    assert "blocks.0.attn head 0" in text(page, "#cardname")
    assert "Never flagged" in text(page, "#cardtext")
    rows = page.js("return [...document.querySelectorAll('#cardmaps h3')].map((row) => row.textContent)")
    assert rows[1].startswith("at the first probe step 0")
    page.press("ARROW_DOWN", "#grids canvas")
    assert "blocks.1.attn head 0" in text(page, "#cardname")
    # a sibling of one's own choice
    old = page.pixels("#cardmaps .cardrow:nth-child(3) canvas")
    choose(page, "#sibling", "5")
    assert "head 5 of the same layer" in text(page, "#cardmaps .cardrow:nth-child(3) h3")
    assert changed(old, page.pixels("#cardmaps .cardrow:nth-child(3) canvas"))
    page.check_quiet()


def test_an_event_leads_to_the_card_of_its_head(chromium, tmp_path):
    dead = {(1, 2): 5, (3, 4): 8}
    make_history(
        tmp_path,
        probes=14,
        dead=dead,
        head_maps_at=(0, 3),
        explanation={
            "ablation_logit": 0.02,
            "control_logit": 0.31,
            "cause": "output_projection",
            "evidence": "output norm 1, gradient norm 0.002 of what it was",
        },
    )
    page = Page(chromium, write_report(tmp_path))
    page.browser.find_elements("css selector", "ol.flags button")[1].click()
    assert page.where.startswith("step 499 ")
    assert "blocks.3.attn head 4" in text(page, "#cardname")
    assert "Zeroing it changes the logit by 0.02; zeroing an unflagged head of its layer by 0.31" in text(
        page, "#cardtext"
    )
    assert "cause: output projection (output norm 1, gradient norm 0.002 of what it was)" in text(
        page, "#cardtext"
    )
    time.sleep(0.2)
    top, bottom = page.js(
        "const box = document.getElementById('card').getBoundingClientRect(); return [box.top, box.bottom]"
    )
    assert top < page.js("return innerHeight")
    assert bottom > 0
    page.check_quiet()


def test_the_divider_lies_between_two_moments(chromium, tmp_path):
    from selenium.webdriver import ActionChains

    make_history(tmp_path, probes=8, forms=FORMS)
    page = Page(chromium, write_report(tmp_path))
    assert "step 0, before training" in text(page, "#lefttitle")
    assert "step 349" in text(page, "#righttitle")
    drift = float(text(page, "#momentsdrift").split(": ")[1].split()[0])
    assert -1 <= drift < 0.6
    swipe = page.browser.find_element("css selector", "#swipes canvas")
    half = page.pixels("#swipes canvas")
    ActionChains(page.browser).drag_and_drop_by_offset(swipe, swipe.size["width"] // 4, 0).perform()
    now = page.js(
        "return [...document.querySelectorAll('#swipes canvas')].map((c) => c.getAttribute('aria-valuenow'))"
    )
    assert set(now) == {now[0]}
    assert 65 <= int(now[0]) <= 85
    assert changed(half, page.pixels("#swipes canvas"))
    page.press("ARROW_LEFT", "#swipes canvas")
    assert int(swipe.get_attribute("aria-valuenow")) == int(now[0]) - 5
    assert page.where.startswith("step 349 ")
    # at its ends, one moment alone is seen: beside the divider itself it is the picture above
    inner = (
        "const c = document.querySelector(arguments[0]), copy = new OffscreenCanvas(c.width, c.height);"
        "const pen = copy.getContext('2d', {willReadFrequently: true}); pen.drawImage(c, 0, 0);"
        "return Array.from(pen.getImageData(12, 0, c.width - 24, c.height).data)"
    )
    page.press("HOME", "#swipes canvas")
    assert np.abs(np.subtract(page.js(inner, "#swipes canvas"), page.js(inner, "#photos canvas"))).max() <= 1
    page.press("END", "#swipes canvas")
    left = page.js(inner, "#swipes canvas")
    page.slide(0)
    assert np.abs(np.subtract(left, page.js(inner, "#photos canvas"))).max() <= 1
    # any two probes
    page.slide(7)
    choose(page, "#leftstep", "149")
    choose(page, "#rightstep", "199")
    assert text(page, "#lefttitle") == "left: step 149"
    near = float(text(page, "#momentsdrift").split(": ")[1].split()[0])
    assert near > drift
    page.js("document.getElementById('tofirst').click()")
    assert "step 0, before training" in text(page, "#lefttitle")
    assert "step 349" in text(page, "#righttitle")
    page.check_quiet()


def test_two_runs_lie_under_one_divider(chromium, tmp_path):
    make_history(tmp_path / "a", probes=6, forms=FORMS, head_maps_at=(0,))
    make_history(tmp_path / "b", probes=6, forms=FORMS, head_maps_at=(0,), dead={(2, 4): 2}, wander=-1.0)
    page = Page(chromium, write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html"))
    assert text(page, "#lefttitle") == "left: a, step 249"
    assert text(page, "#righttitle") == "right: b, step 249"
    page.press("HOME", "#swipes canvas")
    right = page.pixels("#swipes canvas")
    page.press("END", "#swipes canvas")
    assert changed(right, page.pixels("#swipes canvas"))
    page.slide(2)
    assert text(page, "#righttitle") == "right: b, step 99"
    assert page.js("return document.getElementById('cardname').textContent").startswith(
        "b · blocks.2.attn head 4"
    )
    page.check_quiet()
    make_history(tmp_path / "c", probes=6, forms=FORMS, fingerprint="other images")
    page = Page(chromium, write_report([tmp_path / "a", tmp_path / "c"], tmp_path / "both.html"))
    assert "different photographs" in text(page, "#momentsnote")
    assert page.js("return document.querySelectorAll('#swipes canvas').length") == 0
    page.check_quiet()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_fits_360_pixels(chromium, tmp_path, theme):
    make_history(
        tmp_path, probes=9, dead={(1, 2): 3}, forms=FORMS, signals=True, head_maps_at=(0, 1), images=8
    )
    page = Page(chromium, write_report(tmp_path))
    try:
        chromium.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
        )
        if page.js("return document.documentElement.dataset.theme") != theme:
            page.js("document.getElementById('theme').click()")
        page.slide(0)
        page.slide(8)
        assert page.js("return document.documentElement.scrollWidth") == 360
        wide = page.js(
            "return [...document.querySelectorAll('body *')].filter((n) => n.getClientRects().length)"
            ".filter((n) => n.getBoundingClientRect().right > 361).map((n) => n.tagName + '#' + n.id)"
        )
        assert wide == []
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.check_quiet()
