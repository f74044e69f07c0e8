"""Pictures in a notebook show themselves with no network, and step back where somebody has said how they are shown."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from tests.support.browser import Browser, found

pytestmark = pytest.mark.skipif(importlib.util.find_spec("IPython") is None, reason="IPython (extra dev) is not there")

CELLS = """
import json, sys, warnings
warnings.simplefilter("error")
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
parent = {"metadata": {}}
shell.get_parent = lambda: parent
import headwise as hw
before = sorted({"bokeh", "holoviews"} & set(sys.modules))
import numpy as np, xarray as xr
values = xr.DataArray(np.arange(8.0).reshape(2, 4) / 8, dims=("layer", "head"), name="score")

def shown(element, cell=None, deleted=()):
    parent["metadata"] = {"cellId": cell, "deletedCells": list(deleted)}
    return shell.display_formatter.format(element)[0]

grid = hw.plots.head_grid(values, title="one")
import holoviews as hv
words = xr.Dataset({name: ("example", ["<a>"]) for name in ("prompt", "answer")} | {"prob": ("example", [0.25])})
told = {
    "before": before,
    "type": type(grid).__name__,
    "first": shown(grid, "a"),
    "second": shown(grid + hv.Curve([1, 2]), "b"),
    "again": shown(grid, "a"),
    "after": shown(grid, "b"),
    "deleted": shown(grid, "b", ["a"]),
    "table": shown(hw.plots.words_table(words), "c"),
    "moving": shown(hv.HoloMap({1: hv.Curve([1]), 2: hv.Curve([2])}), "c"),
}
hv.Store.current_backend = "matplotlib"
told["of another backend"] = shown(grid, "a")
hv.Store.current_backend = "bokeh"
shell.display_formatter.active_types = ["text/plain"]
told["in a terminal"] = shown(grid, "a")
shell.display_formatter.active_types = ["text/plain", "text/html"]
warnings.simplefilter("ignore")
assert shell.run_cell('import holoviews as hv; hv.extension("bokeh", inline=True)').success
from headwise.studies.plots.export.notebook import show_in_notebooks
show_in_notebooks()  # as the first use of hw.plots does
told["with an extension"] = shown(grid, "a")
print("TOLD" + json.dumps(told))
"""
LIBRARY = "Bokeh[bokeh.version] = bokeh"


@pytest.fixture(scope="module")
def told():
    done = subprocess.run([sys.executable, "-c", CELLS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout.split("TOLD")[1])


@pytest.mark.heavy
def test_importing_headwise_loads_no_picture(told):
    assert told["before"] == []
    assert told["type"] == "HeatMap"


def test_the_first_picture_brings_the_script_and_the_others_their_data(told):
    first, second = (told[name]["text/html"] for name in ("first", "second"))
    assert LIBRARY in first
    assert LIBRARY not in second
    assert len(second) < 40_000
    assert told["first"]["text/plain"].startswith(":HeatMap")
    assert second.count("data-root-id") == 2
    for html in (first.split("</script>", 1)[1], second):
        assert not re.search(r"(?:src|href)=.https?:", html)
        (docs,) = re.findall(r"const docs_json = '(.*?)';\n", html)
        held = json.loads(docs.encode().decode("unicode_escape"))
        texts = json.dumps(held)
        assert "L1H3" in texts
        assert '"one"' in texts


def test_the_script_is_written_again_where_the_picture_that_had_it_is_replaced(told):
    assert [LIBRARY in told[name]["text/html"] for name in ("again", "after", "deleted")] == [True, False, True]


def test_a_table_is_shown_as_one_and_its_text_stays_text(told):
    assert "<td>&lt;a&gt;</td>" in told["table"]["text/html"]
    assert "0.25" in told["table"]["text/html"]


@pytest.mark.parametrize("name", ["moving", "of another backend", "in a terminal"])
def test_what_it_cannot_or_shall_not_show_is_left_to_others(told, name):
    assert set(told[name]) == {"text/plain"}


def test_who_says_how_pictures_are_shown_is_heard_before_and_after(told):
    assert "headwise-" in told["after"]["text/html"]
    assert "headwise-" not in told["with an extension"]["text/html"]
    assert "data-root-id" in told["with an extension"]["text/html"]


@pytest.mark.skipif(found() is None, reason="Chromium is not installed: pictures are not seen in a browser")
def test_it_draws_in_a_browser_whichever_output_comes_first(told, tmp_path):
    """As a notebook does, the outputs are put into the page one by one, and their scripts run then."""
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><meta charset='utf-8'><body></body>")
    put = """(html => { const at = document.createElement("div"); at.innerHTML = html;
      for (const old of at.querySelectorAll("script")) { const one = document.createElement("script");
        one.textContent = old.textContent; old.replaceWith(one); } document.body.append(at); return true; })"""
    drawn = "window.Bokeh && Bokeh.documents.length == %d && Bokeh.documents.every(one => one.is_idle)"
    with Browser() as browser:
        tab = browser.tab(width=390)
        tab.open(page.as_uri())
        tab.wait("!!document.body")
        tab.evaluate(f"{put}({json.dumps(told['second']['text/html'])})")
        assert "once the notebook is trusted" in tab.evaluate("document.body.innerText")
        tab.evaluate(f"{put}({json.dumps(told['first']['text/html'])})")
        tab.wait(drawn % 2, "both outputs to be drawn")
        assert "trusted" not in tab.evaluate("document.body.innerText")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.errors == []
        assert {url for url in tab.requests if not url.startswith(("data:", "blob:"))} == {page.as_uri()}
