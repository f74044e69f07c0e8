"""Pictures over the steps of training: what they draw, where they put it, and a slider that needs no network."""

import re

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

from headwise.errors import DeclarationError
from headwise.metrics.intervals import bootstrap_interval
from headwise.studies import plots

STEPS = [0, 1, 10, 100, 1000]
RANDOM = np.random.default_rng(0)


def scores(heads=3):
    values = RANDOM.random((5, 2, heads, 6)) * np.array([1.0, 5.0])[:, None, None]
    coords = {"step": STEPS, "layer": [0, 1], "head": range(heads)}
    return xr.DataArray(values, coords, ("step", "layer", "head", "example"), "induction", {"long_name": "score"})


def curves(drawn):
    return {one.label: one for one in drawn if type(one) is hv.Curve}


def test_the_largest_heads_have_a_name_and_an_interval_and_the_others_are_there():
    values = scores()
    drawn = plots.over_steps(values, top=2)
    mean = values.mean("example")
    best = [f"L1H{head}" for head in np.argsort(-mean.max("step").values[1])[:2]]
    named = {name: curve for name, curve in curves(drawn).items() if name}
    assert {*named} == {*best}
    assert sum(type(one) is hv.Curve for one in drawn) == 6
    for name, curve in named.items():
        here = values.isel(layer=1, head=int(name[-1]))
        low, high = bootstrap_interval(here.values)
        np.testing.assert_allclose(curve.dimension_values("mean"), here.mean("example"))
        np.testing.assert_allclose(curve.dimension_values("low"), low)
        np.testing.assert_allclose(curve.dimension_values("high"), high)
        assert [*curve.dimension_values("step")] == [str(step) for step in STEPS]


def test_steps_that_are_spaced_by_their_logarithm_are_drawn_so_and_step_0_is_shown():
    (curve,) = curves(plots.over_steps(scores().isel(layer=0, head=0))).values()
    np.testing.assert_allclose(curve.dimension_values("place"), [-0.3, 0, 1, 2, 3])
    even = scores().isel(layer=0, head=0).assign_coords(step=[0, 100, 200, 300, 400])
    (curve,) = curves(plots.over_steps(even)).values()
    np.testing.assert_allclose(curve.dimension_values("place"), [0, 100, 200, 300, 400])


def test_steps_in_any_order_and_a_missing_value():
    values = scores().isel(layer=0, head=0)
    values[2] = np.nan
    (curve,) = curves(plots.over_steps(values.isel(step=[3, 0, 4, 2, 1]))).values()
    np.testing.assert_allclose(curve.dimension_values("mean"), values.mean("example").values[[0, 1, 3, 4]])


def test_conditions_and_several_variables():
    values = scores().isel(layer=0).rename(head="condition").assign_coords(condition=["a", "b", "c"])
    assert {*curves(plots.over_steps(values))} == {"a", "b", "c"}
    both = xr.Dataset({"one": values, "other": values + 1})
    layout = plots.over_steps(both, ["one", "other"])
    assert isinstance(layout, hv.Layout)
    assert len(layout) == 2


def test_picture_chooses_it():
    values = scores()
    assert len(curves(plots.picture(values))) == 5  # four with a name, the grey ones have none
    assert [*curves(plots.picture(values.isel(layer=0, head=0)))] == [""]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (scores().isel(step=0), "over_steps draws what has a dim step, and induction has layer, head and example"),
        (scores().expand_dims(run=["clean", "corrupted"]), "select one run first, clean or corrupted"),
    ],
)
def test_what_cannot_be_drawn_is_refused(values, message):
    with pytest.raises(DeclarationError, match=message):
        plots.over_steps(values)
    with pytest.raises(DeclarationError, match=r"head_grid_over_steps draws|head_grid draws"):
        plots.head_grid_over_steps(values)


def test_a_head_grid_for_each_step_on_one_scale(tmp_path):
    values = scores()
    drawn = plots.head_grid_over_steps(values, title="score")
    mean = values.mean("example")
    for step in STEPS:
        grid = drawn[step]
        np.testing.assert_allclose(grid.dimension_values("value"), mean.sel(step=step).values.ravel())
        limits = hv.Store.lookup_options("bokeh", grid, "plot").kwargs["clim"]
        assert limits == (0.0, pytest.approx(float(mean.max())))
    page = plots.save(drawn, tmp_path / "a.html").read_text()
    assert re.findall(r'class="frame" data-at="(\d+)"( hidden)?', page) == [
        *((str(step), " hidden") for step in STEPS[:-1]),
        ("1000", ""),
    ]
    assert '<input type="range" min="0" max="4" value="4" aria-label="step of training">' in page
    assert "unsafe-eval" not in page.split("</head>")[0].split("Content-Security-Policy")[1][:300]
    with pytest.raises(DeclarationError, match=r"a\.png: a picture with a slider is saved as \.html"):
        plots.save(drawn, tmp_path / "a.png")
