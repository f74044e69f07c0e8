"""Figures of the formation study: what is drawn are the means over seeds, the phase change and the change points."""

import holoviews as hv
import numpy as np
import pytest

import headwise as hw
from headwise.errors import DeclarationError
from tests.support import formation


@pytest.fixture(scope="module")
def simulated():
    return formation.result()


def test_a_panel_shows_means_over_seeds_and_the_phase_change(simulated):
    drawn = hw.plots.formation(simulated, "repeat_loss")
    curves = {one.label: one for one in drawn if isinstance(one, hv.Curve) and one.label}
    assert [*curves] == [*formation.STUDY.trainings]
    wanted = simulated["curves"]["repeat_loss"].sel(training="main").mean(["seed", "example"])
    np.testing.assert_allclose(curves["main"].dimension_values("mean"), wanted, rtol=1e-5)
    changes = simulated["changes"].to_dataset().sel(training="main", curve="behind")
    (line,) = [one for one in drawn if isinstance(one, hv.VLine)]
    assert line.data == pytest.approx(float(changes["mean_step"]), rel=1e-6)  # the axis is that of steps here
    (span,) = [one for one in drawn if isinstance(one, hv.VSpan)]
    assert span.data[0] < line.data < span.data[1]
    look = hv.Store.lookup_options("bokeh", drawn, "plot").kwargs
    few = "\n95% intervals over 3 seeds say little"
    assert (look["title"], look["xlabel"]) == (f"Loss on repeated tokens{few}", "step of training")


def test_the_whole_figure_has_every_panel(simulated):
    drawn = hw.plots.formation(simulated)
    titles = [hv.Store.lookup_options("bokeh", one, "plot").kwargs["title"] for one in drawn]
    assert [title.partition("\n")[0] for title in titles[:2]] == [
        "Scores of the best heads",
        "Composition with the induction head",
    ]
    assert len(titles) == 6


def test_change_points_stand_where_they_are(simulated):
    drawn = hw.plots.change_points(simulated)
    points = [one for one in drawn if isinstance(one, hv.Points)]
    assert len(points) == 4  # three seeds, and their mean
    changes = simulated["changes"].to_dataset().sel(training="main")
    means = changes["mean_step"].values
    np.testing.assert_allclose(points[-1].dimension_values("place"), np.log10(means[np.isfinite(means)]), rtol=1e-9)


def test_what_cannot_be_drawn_is_refused(simulated):
    with pytest.raises(DeclarationError, match="there is no panel 'loss': possible are scores, composition"):
        hw.plots.formation(simulated, "loss")
    with pytest.raises(DeclarationError, match="no curve of the training 'one layer' has a change point"):
        hw.plots.change_points(simulated, "one layer")
    with pytest.raises(DeclarationError, match="there is no training 'two': possible are main"):
        hw.plots.change_points(simulated, "two")
    with pytest.raises(DeclarationError, match="result of a FormationStudy"):
        hw.plots.formation(simulated["curves"].to_dataset())
