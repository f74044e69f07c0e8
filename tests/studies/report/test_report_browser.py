"""Reports in a real browser: nothing leaves the machine, nothing scrolls sideways, dark is dark, keys reach all."""

from __future__ import annotations

import re

import numpy as np
import pytest
import xarray as xr

from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import induction, loss
from headwise.studies import RepeatedTokens, capture, measure
from headwise.studies.report.report import write_report
from tests.support.browser import Browser, found
from tests.support.pages import EVIL

pytestmark = pytest.mark.skipif(found() is None, reason="Chromium is not installed: reports are not seen in a browser")
IDLE = "document.readyState == 'complete' && Bokeh.documents.length && Bokeh.documents.every(one => one.is_idle)"


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def study(words_study, folder):
    return write_report(words_study, folder / "study.html")


@pytest.fixture(scope="module")
def measured(words_model):
    heads = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(8))
    return measure(words_model, RepeatedTokens(n=4, length=8), heads, [loss, induction])


def opened(browser, path, **look):
    tab = browser.tab(**look)
    tab.open(path.as_uri())
    tab.wait(IDLE, "figures to be drawn")
    return tab


def check_quiet(tab, path):
    """No error, and no request but for the page itself."""
    assert tab.errors == []
    assert {url for url in tab.requests if not url.startswith("data:")} == {path.as_uri()}


CANVASES = """[...document.querySelectorAll(".panel > *")].filter(one => one.firstElementChild &&
  one.firstElementChild.getBoundingClientRect().height > 50).length"""
LINES = """[...Bokeh.documents[0]._all_models.values()].find(one => one.type == "Segment" && one.line_color.transform)
  .line_color.transform.palette"""
HOVERED = """(() => { const found = []; const walk = node => { if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.children || []) { if (child.classList.contains("bk-Tooltip")) found.push(
    (child.shadowRoot || child).textContent); walk(child); } }; walk(document.body); return found.join(" "); })()"""
PLACE = """(() => { document.documentElement.style.scrollBehavior = "auto"; const panel = document.querySelector(
  "#heads .panel"); panel.scrollIntoView({block: "center"}); const box = panel.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + 50]; })()"""


CUT = """[...document.querySelectorAll(".panel")].filter(one => one.getBoundingClientRect().right >
  one.parentElement.getBoundingClientRect().right).length"""
LEFT = "document.querySelector('{}').getBoundingClientRect().left"
SHADE = "getComputedStyle(document.querySelector('#heads .scroll')).backgroundImage.match(/gradient/g).length"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_study_is_shown_whole_and_quietly(browser, study, width):
    tab = opened(browser, study, width=width, touch=width < 600)
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.evaluate("innerWidth") == width
    tab.wait(f"{CUT} == 0", "no figure to be cut")
    assert (tab.evaluate(LEFT.format(".not")) > width / 2) == (width > 600)  # beside the answer, or below it
    assert (tab.evaluate(LEFT.format("#ablation figure:last-of-type figcaption")) > width / 3) == (width > 600)
    assert tab.evaluate("document.querySelector('#heads .scroll').scrollWidth") > 400
    assert tab.evaluate(SHADE) == 4  # shadows where a table scrolls, and what hides them at its ends
    assert tab.evaluate("document.querySelectorAll('.panel').length") == tab.evaluate(CANVASES) > 10
    check_quiet(tab, study)
    tab.close()


def test_tooltips_say_head_value_and_unit(browser, study):
    tab = opened(browser, study)
    x, y = tab.evaluate(PLACE)
    for shift in (4, 2, 0):
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + shift, y=y)
    tab.wait(f"{HOVERED}.includes('unit')", "a tooltip")
    told = tab.evaluate(HOVERED)
    assert re.search(r"head:\s*L1H\d", told)
    assert re.search(r"layer:\s*1", told)
    assert re.search(r"induction score:\s*[01]\.\d+", told)
    assert re.search(r"unit:\s*pure number", told)
    check_quiet(tab, study)
    tab.close()


@pytest.mark.heavy
def test_a_dark_page_has_dark_figures_and_turns_back(browser, study):
    tab = opened(browser, study, dark=True)
    tab.wait("document.querySelectorAll('.plots.dark').length == document.querySelectorAll('.plots').length")
    figures = "[...Bokeh.documents[0]._all_models.values()].filter(one => one.type == 'Figure')"
    axes = "[...Bokeh.documents[0]._all_models.values()].filter(one => one.type == 'LinearAxis')"
    assert tab.evaluate(f"[...new Set({figures}.map(one => one.border_fill_color))]") == ["#1b1d20"]
    dark = tab.evaluate(f"[...new Set({axes}.map(one => one.major_label_text_color))]")
    brighter = tab.evaluate(LINES)
    assert lightness(brighter[-1]) > lightness(brighter[0]) + 50  # more is brighter
    assert all(lightness(colour) > 150 for colour in dark)
    assert lightness(tab.evaluate("getComputedStyle(document.body).backgroundColor")) < 40
    assert lightness(tab.evaluate("getComputedStyle(document.body).color")) > 200
    tab.scheme(False)
    tab.wait("document.querySelectorAll('.plots.dark').length == 0")
    assert tab.evaluate(f"[...new Set({figures}.map(one => one.border_fill_color))]") == ["#ffffff"]
    assert tab.evaluate(LINES) == brighter[::-1]
    light = tab.evaluate(f"[...new Set({axes}.map(one => one.major_label_text_color))]")
    assert all(lightness(colour) < 100 for colour in light)
    check_quiet(tab, study)
    tab.close()


def test_text_on_coloured_cells_stays_dark_on_a_dark_page(browser, words_model, folder):
    captured = capture(words_model, RepeatedTokens(n=2, length=4), Head(1, 2).pattern)
    path = write_report(captured, folder / "captured.html")
    tab = opened(browser, path, dark=True)
    tab.wait("document.querySelectorAll('.plots.dark').length == document.querySelectorAll('.plots').length")
    texts = "[...Bokeh.documents[0]._all_models.values()].filter(one => one.type == 'Text')"
    colours = tab.evaluate(f"{texts}.map(one => one.text_color && one.text_color.value).filter(Boolean)")
    assert colours
    assert all(lightness(colour) < 60 for colour in colours)
    check_quiet(tab, path)
    tab.close()


def lightness(colour):
    """Mean of red, green and blue of ``#rrggbb`` or ``rgb(r, g, b)``."""
    if colour.startswith("#"):
        return np.mean([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return np.mean([float(part) for part in re.findall(r"[\d.]+", colour)[:3]])


def test_the_keyboard_reaches_everything(browser, study):
    tab = opened(browser, study)
    tab.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.press("Enter")
    tab.wait("location.hash == '#content'")
    tab.press("Tab")
    tab.wait("document.activeElement.closest('main') !== null", "the focus to be in the content")
    places = tab.evaluate("document.querySelectorAll('main .scroll, main .plots, main pre, main summary').length")
    assert places > 10
    assert places == tab.evaluate(
        "[...document.querySelectorAll('main .scroll, main .plots, main pre, main summary')]"
        ".filter(one => one.tabIndex == 0).length"
    )
    tab.evaluate("document.querySelector('main summary').focus()")
    tab.press("Enter")
    tab.wait("document.querySelector('main details').open")
    tab.close()


def test_paper_shows_what_is_folded_and_no_navigation(browser, study):
    tab = opened(browser, study)
    tab.call("Emulation.setEmulatedMedia", media="print")
    folded = "document.querySelector('#heads details .scroll').getBoundingClientRect().height"
    assert tab.evaluate(folded) > 100
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    tab.close()


@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.heavy), 375])
def test_a_measurement_is_shown_whole_and_quietly(browser, measured, folder, width):
    path = write_report(measured, folder / f"measured{width}.html")
    tab = opened(browser, path, width=width, touch=width < 600, dark=width < 600)
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.evaluate("innerWidth") == width
    assert tab.evaluate("document.querySelectorAll('.panel').length") == tab.evaluate(CANVASES) >= 2
    check_quiet(tab, path)
    tab.close()


def test_hostile_text_does_nothing(browser, measured, folder):
    evil = measured.assign_coords(layer=[EVIL, "1"])
    for name in ("loss", "baseline_loss"):
        evil[name].attrs |= {"long_name": EVIL, "units": EVIL}
    evil.attrs |= {"model": EVIL, "task": EVIL, "base": "clean", "platform": EVIL, "estimator": EVIL, "title": EVIL}
    path = write_report(evil, folder / "evil.html")
    other = xr.DataTree.from_dict({"/": xr.Dataset(attrs={"title": EVIL}), "/a": evil[["loss"]].rename(loss=EVIL[2:8])})
    for one in (path, write_report(other, folder / "other.html")):
        tab = opened(browser, one)
        assert tab.evaluate("window.pwned === undefined && document.querySelectorAll('img').length == 0")
        check_quiet(tab, one)
        tab.close()
