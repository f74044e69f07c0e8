"""Faithfulness and the areas under it: from arithmetic, from loops, and how often their intervals hold."""

import math

import numpy as np
import pytest

from headwise.errors import DeclarationError
from headwise.metrics.faithfulness import SHARES, cmd, cpr, even_sizes, faithfulness, mib_sizes
from headwise.metrics.intervals import area_interval, ratio_interval
from headwise.metrics.statistics import jaccard_overlap
from tests.oracles import raw_edges


def test_nothing_until_the_whole_model_and_everything_at_once():
    nothing = np.array([0.0] * 9 + [1.0])
    assert cpr(nothing, SHARES) == pytest.approx(0.5 * 0.5)  # the last trapezoid, from .5 to 1
    assert cmd(nothing, SHARES) == pytest.approx(0.5 - 0.001 + 0.25)
    assert cpr(np.ones(10), SHARES) == pytest.approx(0.999)
    assert cmd(np.ones(10), SHARES) == 0
    assert cpr(nothing, SHARES, log=True) == pytest.approx(0.5 * math.log(2) / math.log(1000))
    assert cmd(nothing, SHARES, log=True) == pytest.approx(1 - 0.5 * math.log(2) / math.log(1000))
    assert cpr(np.ones(10), SHARES, log=True) == pytest.approx(1)


def test_areas_are_sums_of_trapezoids():
    random = np.random.default_rng(0)
    curves = random.normal(0.8, 0.5, (3, 4, 10))
    assert tuple(raw_edges.SHARES) == SHARES
    for at in np.ndindex(3, 4):
        wanted = raw_edges.areas(SHARES, curves[at].tolist())
        assert (cpr(curves, SHARES)[at], cmd(curves, SHARES)[at]) == pytest.approx(wanted)


def test_faithfulness_is_a_ratio_of_means():
    empty, model = np.array([1.0, 3.0]), np.array([5.0, 9.0])
    values = faithfulness([[1.0, 3.0], [5.0, 9.0], [2.0, 3.0], [7.0, 12.0]], empty, model)
    assert values == pytest.approx([0, 1, 0.1, 1.5])
    falling = faithfulness([2.0, 2.0], model, empty)  # of a loss: the whole model has the lower one
    assert falling == pytest.approx((2 - 7) / (2 - 7))
    with pytest.raises(DeclarationError, match="both have a mean of 2, so there is nothing for a circuit to keep"):
        faithfulness(values, np.array([1.0, 3.0]), np.array([3.0, 1.0]))


def test_sizes():
    assert mib_sizes(310) == (0, 0, 1, 3, 6, 15, 31, 62, 155, 310)
    assert mib_sizes(32491) == (32, 64, 162, 324, 649, 1624, 3249, 6498, 16245, 32491)
    assert even_sizes(310) == (1, 2, 5, 10, 20, 50, 100, 200, 310)
    assert even_sizes(20) == (1, 2, 5, 10, 20)
    assert even_sizes(1) == (1,)


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.1), (0.0, 1.0)])
def test_areas_refuse_shares_that_do_not_rise(shares):
    with pytest.raises(DeclarationError, match="two or more shares that rise, the first above 0"):
        cpr(np.ones(len(shares)), shares, log=True)


def test_the_interval_of_one_ratio_is_that_of_ratio_interval():
    random = np.random.default_rng(1)
    below = random.normal(5, 1, 12)
    above = 0.4 * below + random.normal(0, 0.5, 12)
    assert area_interval(above[None], below, lambda f: f[..., 0]) == pytest.approx(
        [float(end) for end in ratio_interval(above, below)]
    )
    assert area_interval(below[None] * 0.5, below, lambda f: f[..., 0]) == pytest.approx((0.5, 0.5))
    assert np.isnan(area_interval(above[None, :1], below[:1], lambda f: f[..., 0])).all()
    assert np.isnan(area_interval(above[None], below - below.mean(), lambda f: f[..., 0])).all()


def test_a_jackknife_of_an_area_is_that_of_leaving_each_example_out(monkeypatch):
    random = np.random.default_rng(2)
    below, above = random.normal(5, 1, 6), random.normal(3, 2, (10, 6))
    left_out = []
    for without in range(6):
        kept = [at for at in range(6) if at != without]
        left_out.append(raw_edges.areas(SHARES, (above[:, kept].sum(1) / below[kept].sum()).tolist())[1])
    error = math.sqrt(5 / 6 * sum((one - sum(left_out) / 6) ** 2 for one in left_out))
    whole = raw_edges.areas(SHARES, (above.sum(1) / below.sum()).tolist())[1]
    seen = {}

    def ends(centre, spread, statistics, level, examples):
        seen["centre"], seen["error"] = centre, spread
        return centre, centre

    monkeypatch.setattr("headwise.metrics.intervals._ends", ends)
    area_interval(above, below, lambda f: cmd(f, SHARES), resamples=10)
    assert seen["centre"] == pytest.approx(whole)
    assert seen["error"] == pytest.approx(error)


def test_intervals_of_areas_hold_about_as_often_as_they_say():
    random, held, tries = np.random.default_rng(3), 0, 200
    means = np.array([0, 0, 0.1, 0.2, 0.2, 0.4, 0.6, 0.7, 0.9, 1.0])
    truth = raw_edges.areas(SHARES, means.tolist())[0]
    for _ in range(tries):
        below = random.normal(5, 1, 20)
        above = means[:, None] * below + random.normal(0, 1, (10, 20)) * (means * (1 - means))[:, None]
        low, high = area_interval(above, below, lambda f: cpr(f, SHARES), resamples=300)
        held += low <= truth <= high
    assert 0.9 < held / tries < 0.99


def test_jaccard_overlap():
    member = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]], dtype=bool)
    assert jaccard_overlap(member) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert jaccard_overlap(np.zeros((2, 4), dtype=bool)) == 1


def test_the_overlap_of_many_sets_is_that_of_their_pairs():
    member = np.random.default_rng(0).random((1203, 40)) < 0.3
    member[:5] = False
    sizes, both = member.sum(-1), member.astype(int) @ member.T.astype(int)
    either = sizes[:, None] + sizes[None] - both
    ratio = np.where(either == 0, 1.0, both / np.maximum(either, 1))
    assert jaccard_overlap(member) == pytest.approx(ratio[np.triu_indices(1203, 1)].mean(), abs=1e-12)
