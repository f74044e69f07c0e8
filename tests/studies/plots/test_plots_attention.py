"""Attention: any pattern as cells, as blocks where it is long, under a strip of tokens, and side by side."""

from __future__ import annotations

import json

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

from headwise.errors import UnknownNameError
from headwise.interventions import Head, Layer
from headwise.studies import Prompts, RepeatedTokens, capture, plots
from headwise.studies.plots.attention_viewer import TINTS
from headwise.studies.plots.parts.patterns import coarse, read_pattern, visible
from tests.support import browser
from tests.support.elements import option


def parts(element, kind):
    return [part for part in element if isinstance(part, kind)]


def weights_of(element):
    (grid,) = parts(element, hv.HeatMap)
    return {(int(q), int(k)): w for q, k, w in zip(grid["query"], grid["key"], grid["weight"], strict=True)}


@pytest.fixture
def three():
    """Token 1 looks at 0; token 2 at 0 by a quarter, at 1 by three quarters."""
    weights = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.25, 0.75, 0.0]])
    tokens = ("position", [" sun", " moon and stars everywhere", "\n"])
    return xr.Dataset({"pattern": (("query", "key"), weights)}, coords={"token": tokens})


def test_a_prompt_shorter_than_the_longest_is_drawn_without_what_is_missing(words_model):
    prompts = Prompts(["sun moon star", "sun moon star sun moon"])
    captured = capture(words_model, prompts, [Head(0, 1).pattern, Layer(1).pattern])
    assert len(weights_of(plots.attention(captured, "L0H1", example=0))) == 9
    assert len(weights_of(plots.attention(captured, "L0H1", example=1))) == 25
    wanted = captured["L1_pattern"].isel(example=1, head=3).values
    drawn = weights_of(plots.attention(captured, "L1H3", example=1))
    assert drawn[4, 2] == pytest.approx(wanted[4, 2])
    (grid,) = parts(plots.attention(captured, "L1H3", example=1), hv.HeatMap)
    assert list(grid["to_token"][:3]) == ["sun", "moon", "star"]
    with pytest.raises(UnknownNameError, match="there are L0H1, L1H0, L1H1"):
        plots.attention(captured, "L0H2")
    with pytest.raises(UnknownNameError, match="draws one head: name it"):
        plots.attention(captured)


def test_some_queries_of_a_pattern(words_model):
    captured = capture(words_model, RepeatedTokens(n=1, length=4), [Head(1, 2).pattern.at([5, 7])])
    drawn = weights_of(plots.attention(captured, "L1H2"))
    assert {query for query, _ in drawn} == {5, 7}
    name = next(iter(captured.data_vars))
    assert drawn[7, 2] == pytest.approx(float(captured[name][0, 1, 2]))


def test_what_looks_ahead_is_not_hidden():
    both = xr.DataArray(np.full((2, 2), 0.5), dims=("query", "key"))
    assert weights_of(plots.attention(both))[0, 1] == 0.5
    causal = xr.DataArray(np.array([[1.0, 0.0], [0.5, 0.5]]), dims=("query", "key"))
    assert np.isnan(weights_of(plots.attention(causal))[0, 1])


def test_long_patterns_are_drawn_in_blocks_that_keep_the_largest_weight():
    weights = np.zeros((1024, 1024))
    weights[700, 13] = 0.9
    pattern = read_pattern(xr.DataArray(weights, dims=("query", "key")))
    small = coarse(pattern, 96)
    assert small.block == 11
    assert small.weights.shape == (94, 94)
    assert small.weights[700 // 11, 13 // 11] == 0.9
    assert (small.peak_queries[63, 1], small.peak_keys[63, 1]) == (700, 13)
    drawn = plots.attention(xr.DataArray(weights, dims=("query", "key")))
    (grid,) = parts(drawn, hv.HeatMap)
    assert len(grid) == 94 * 94
    at = int(np.nanargmax(grid["weight"]))
    assert (grid["from_position"][at], grid["to_position"][at]) == (700, 13)
    assert "blocks of 11 by 11" in option(drawn, "title")
    assert coarse(pattern, 1024) is pattern


@pytest.mark.parametrize(("count", "labels"), [(30, 30), (60, 30), (96, 20)])
def test_tick_labels_never_stand_on_top_of_each_other(count, labels):
    values = xr.DataArray(np.eye(count), dims=("query", "key"))
    drawn = plots.attention(values)
    assert len(option(drawn, "xticks")) == labels
    assert option(drawn, "frame_width") / labels >= 11
    hv.render(drawn, backend="bokeh")
    hv.render(plots.attention_viewer(values), backend="bokeh")


def test_tokens_that_cannot_be_seen_get_signs(three):
    assert (visible(" a\nb"), visible("\n"), visible("  "), visible("\tx\ty")) == ("a↵b", r"'\n'", "'  '", "x⇥y")
    drawn = plots.attention(three)
    assert [label for _, label in option(drawn, "xticks")] == ["sun", "moon and st…", r"'\n'"]
    (grid,) = parts(drawn, hv.HeatMap)
    assert "moon and stars everywhere" in grid["to_token"]


def test_the_strip_holds_every_token_and_where_it_looks(three):
    drawn = plots.attention_viewer(three, title="mine")
    *_, strip = parts(drawn, hv.Rectangles)
    assert list(strip["token"]) == ["sun", "moon and stars everywhere", r"'\n'"]
    assert list(strip["weight"]) == [0.25, 0.75, 0.0]  # of the last token, until another is chosen
    assert list(strip["looks"]) == [
        "sun (0) 1.00",
        "sun (0) 1.00",
        "moon and stars everywhere (1) 0.75, sun (0) 0.25",
    ]
    assert (strip["bottom"] < -0.5).all()  # above the pattern, whose first row is at 0
    assert (strip["right"][:-1] <= strip["left"][1:]).all()
    (labels,) = parts(drawn, hv.Labels)
    assert list(labels["text"]) == ["sun", "moon and st…", r"'\n'"]
    assert option(drawn, "title") == "mine"


def test_boxes_of_the_strip_do_not_overlap_and_stay_inside():
    texts = ("position", [f"word{'y' * (at % 7)}" for at in range(60)])
    ds = xr.Dataset({"pattern": (("query", "key"), np.eye(60))}, coords={"token": texts})
    drawn = plots.attention_viewer(ds)
    *_, strip = parts(drawn, hv.Rectangles)
    left, right = option(drawn, "xlim")
    assert strip["left"].min() >= left
    assert strip["right"].max() <= right + 1e-9
    boxes = list(zip(*(strip[name] for name in ("left", "bottom", "right", "top")), strict=True))
    for at, (a, b, c, d) in enumerate(boxes):
        assert all(c <= e or g <= a or d <= f or h <= b for e, f, g, h in boxes[at + 1 :])
    assert strip["bottom"].min() >= option(drawn, "ylim")[0]


def test_patterns_side_by_side_are_ranked_and_linked():
    stacked = np.stack([np.eye(3)] * 3)
    ds = xr.Dataset({"pattern": (("shown", "query", "key"), stacked)}, coords={"shown": ["L0H0", "L0H1", "L1H0"]})
    score = xr.DataArray([[0.1, 0.9], [0.5, 0.0]], dims=("layer", "head"))
    row = plots.attention_row(ds, by=score, top=2)
    assert [option(panel, "title") for panel in row] == ["L0H1", "L1H0"]
    assert [option(panel, "title") for panel in plots.attention_row(ds, ["L1H0"])] == ["L1H0"]
    figures = [hv.render(panel, backend="bokeh") for panel in row]
    for axis in ("x_range", "y_range"):
        assert getattr(figures[0], axis) is getattr(figures[1], axis)
    again = [hv.render(panel, backend="bokeh") for panel in row]
    assert again[0].x_range is again[1].x_range is not figures[0].x_range
    hv.render(row, backend="bokeh")
    hv.render(row, backend="bokeh")


@pytest.fixture
def chromium():
    if browser.found() is None:
        pytest.skip("Chromium is not installed: what pictures do in a browser is not checked")
    with browser.Browser() as one:
        yield one


VIEW = "Bokeh.index.roots[0]"
STRIP = """(() => { for (const model of Bokeh.documents[0].roots()[0].references())
  if (model.data && model.data.looks) return model })()"""
PLACE = """((model, at) => { const view = %s, box = view.el.getBoundingClientRect();
  const frame = view.frame, d = model.data;
  return [box.x + frame.x_scale.compute((d[%s][at] + d[%s][at]) / 2),
          box.y + frame.y_scale.compute((d[%s][at] + d[%s][at]) / 2)] })(%s, %d)"""


def test_hovering_on_a_token_shows_where_it_looks(three, chromium, tmp_path):
    path = plots.save(plots.attention_viewer(three), tmp_path / "viewer.html")
    tab = chromium.tab()
    tab.open(path.as_uri())
    tab.wait("window.Bokeh && Bokeh.documents.length && Bokeh.documents.every(d => d.is_idle)")
    weights = f"[...({STRIP}).data.weight].map(one => Number.isNaN(one) ? null : one)"
    assert tab.evaluate(weights) == [0.25, 0.75, 0]
    model = json.dumps([*parts(plots.attention_viewer(three), hv.Rectangles)[-1].dimensions("key", label=True)])
    left, bottom, right, top = (json.dumps(name) for name in json.loads(model))
    x, y = tab.evaluate(PLACE % (VIEW, left, right, bottom, top, STRIP, 0))
    for shift in (3, 0):
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + shift, y=y)
    tab.wait(f"{weights}[0] == 1", "the strip to show what the first token looks at")
    assert tab.evaluate(weights) == [1.0, None, None]
    assert tab.evaluate(f"[...({STRIP}).data.thick]") == [2.5, 1, 1]
    tab.wait("document.body.innerHTML.length > 0")
    assert not tab.errors
    assert [url for url in tab.requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]


def test_zooming_in_one_pattern_zooms_in_all(chromium, tmp_path):
    ds = xr.Dataset({"pattern": (("shown", "query", "key"), np.stack([np.eye(5)] * 3))})
    path = plots.save(plots.attention_row(ds), tmp_path / "row.html")
    tab = chromium.tab()
    tab.open(path.as_uri())
    tab.wait("window.Bokeh && Bokeh.documents.length && Bokeh.documents.every(d => d.is_idle)")
    ranges = "Bokeh.documents[0].roots().map(one => [one.x_range.start, one.x_range.end, one.y_range.end])"
    assert tab.evaluate(ranges) == [[-0.5, 4.5, -0.5]] * 3
    tab.evaluate("(() => { Bokeh.documents[0].roots()[1].x_range.setv({start: 1, end: 3}); return 1 })()")
    assert (
        tab.wait(f"(found => found.every(one => one[0] == 1 && one[1] == 3) && found)({ranges})") == [[1, 3, -0.5]] * 3
    )
    assert not tab.errors


def test_tints_of_the_strip_keep_black_text_readable():
    def light(colour):
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert min((light(colour) + 0.05) / 0.05 for colour in TINTS) > 4.5
