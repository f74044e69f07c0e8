"""Change points: simulated curves whose change point is known, and the definition in explicit loops."""

import numpy as np
import pytest

from headwise.errors import DeclarationError
from headwise.metrics.changepoints import change_interval, change_point

STEPS = np.array([0, *np.unique(np.geomspace(1, 2000, 40).round())])


def curve(step, width=0.15, before=0.05, after=0.8):
    """A logistic step, written out for each step of training."""
    values = []
    for at in STEPS:
        share = 0.0 if at == 0 else 1 / (1 + (step / at) ** (1 / width))
        values.append(before + (after - before) * share)
    return np.array(values)


@pytest.mark.parametrize("step", [40, 300, 900])
@pytest.mark.parametrize("width", [0.05, 0.15, 0.4])
def test_the_change_point_of_a_logistic_step_is_found(step, width):
    found = change_point(STEPS, curve(step, width))
    assert found.step == pytest.approx(step, rel=0.04)
    assert found.width == pytest.approx(width, rel=0.15, abs=0.03)
    assert found.explained > 0.999
    assert (found.before, found.after) == (pytest.approx(0.05, abs=0.02), pytest.approx(0.8, abs=0.03))
    low, high = found.span()
    assert low == pytest.approx(step / 9**width, rel=0.1)
    assert high == pytest.approx(step * 9**width, rel=0.1)


def test_a_fall_is_found_as_a_fall_and_not_as_a_rise():
    loss = 4.2 - 3 * curve(200, before=0, after=1)
    falls, rises = change_point(STEPS, loss, rising=False), change_point(STEPS, loss)
    assert falls.step == pytest.approx(200, rel=0.03)
    assert falls.after - falls.before == pytest.approx(-3, abs=0.05)
    assert np.isnan(rises.step) or rises.explained < 0.2


def test_it_is_the_least_squared_error_of_the_definition():
    random = np.random.default_rng(3)
    values = curve(150) + random.normal(0, 0.05, len(STEPS))
    found = change_point(STEPS, values)

    def error(step, width):
        share = [0.0 if at == 0 else 1 / (1 + np.exp(-(np.log(at) - np.log(step)) / width)) for at in STEPS]
        design = np.stack([np.ones(len(STEPS)), share], axis=1)
        weights = np.linalg.lstsq(design, values, rcond=None)[0]
        return float(((values - design @ weights) ** 2).sum())

    least = error(float(found.step), float(found.width))
    total = ((values - values.mean()) ** 2).sum()
    assert found.explained == pytest.approx(1 - least / total, abs=1e-9)
    for step in np.geomspace(20, 1500, 60):
        for width in (0.02, 0.1, 0.2, 0.5, 1.0):
            assert error(step, width) > least * 0.99


def test_the_interval_covers_a_known_change_point():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(40):
        true = random.uniform(100, 400)
        values = curve(true)[:, None] + random.normal(0, 0.15, (len(STEPS), 16))
        low, high = change_interval(STEPS, values, resamples=200)
        inside += bool(low <= true <= high)
        assert high / low < 1.3
    assert 33 <= inside <= 40


def test_a_curve_without_a_change_has_none_and_missing_values_are_nan():
    flat = change_point(STEPS, np.full((2, len(STEPS)), 0.3))
    assert np.isnan(flat.step).all()
    assert flat.step.shape == (2,)
    gap = curve(100)
    gap[3] = np.nan
    assert np.isnan(change_point(STEPS, gap).step)
    assert np.isnan(change_interval(STEPS, curve(100)[:, None])).all()


def test_too_few_steps_are_refused():
    with pytest.raises(DeclarationError, match="four ascending steps above 0"):
        change_point(np.array([0, 1, 2, 3]), np.zeros(4))
    with pytest.raises(DeclarationError, match="four ascending steps above 0"):
        change_point(np.array([1, 2, 4, 3, 8]), np.zeros(5))
