"""Intervals that cover, p-values that are calibrated, controls that are what they say."""

import math

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from headwise import DeclarationError
from headwise.metrics import benjamini_hochberg, bootstrap_interval, control_sets, normalised, null_p_value
from headwise.metrics.statistics import possible_control_sets, rank_correlation, strongest_shared, t_test


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    low, high = bootstrap_interval(random.exponential(2.0, size=(400, 40)), level=0.9, resamples=500)
    coverage = np.mean((low <= 2.0) & (high >= 2.0))
    assert 0.82 <= coverage <= 0.94  # percentile intervals of 40 skewed values cover a little too little


def test_bootstrap_interval_of_a_normal_mean_by_theory():
    values = np.random.default_rng(1).normal(3.0, 1.0, size=200)
    low, high = bootstrap_interval(values, resamples=4000)
    half = 1.96 * values.std() / math.sqrt(200)
    assert float(low) == pytest.approx(values.mean() - half, abs=0.02)
    assert float(high) == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_of_equal_values_is_a_point_and_of_one_value_is_missing():
    low, high = bootstrap_interval(np.full((2, 5), 7.0))
    np.testing.assert_allclose([low, high], 7.0)
    assert np.isnan(bootstrap_interval(np.array([[1.0]]))[0]).all()


def test_level_must_be_a_share():
    with pytest.raises(DeclarationError, match="level=95: a coverage lies between 0 and 1"):
        bootstrap_interval(np.zeros(3), level=95)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(-5, 5))
def test_null_p_value_equals_the_count(null, observed):
    assert null_p_value(observed, np.array(null)) == pytest.approx(naive.null_p_value(observed, np.array(null)))


def test_null_p_value_by_hand():
    assert null_p_value(3.0, np.array([1.0, 2.0, 4.0])) == pytest.approx(0.5)
    assert null_p_value(9.0, np.arange(99)) == pytest.approx(0.91)
    assert math.isnan(null_p_value(1.0, np.array([])))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_benjamini_hochberg_equals_the_loops(p):
    np.testing.assert_allclose(benjamini_hochberg(np.array(p)), naive.benjamini_hochberg(np.array(p)), atol=1e-12)


def test_benjamini_hochberg_keeps_shape_and_missing_values():
    p = np.array([[0.01, np.nan], [0.04, 0.03]])
    np.testing.assert_allclose(benjamini_hochberg(p), [[0.03, np.nan], [0.04, 0.04]])


def test_benjamini_hochberg_holds_its_rate():
    random = np.random.default_rng(3)
    flagged = [(benjamini_hochberg(random.uniform(size=50)) <= 0.05).any() for _ in range(400)]
    assert np.mean(flagged) <= 0.08


def test_normalised_is_a_ratio_of_means():
    clean, corrupted = np.array([4.0, 6.0, 5.0]), np.array([0.0, 1.0, -1.0])
    x = np.array([2.0, 3.0, 4.0])
    assert float(normalised(x, clean, corrupted)) == pytest.approx(naive.normalised(x, clean, corrupted))
    assert float(normalised(x, clean, corrupted)) == pytest.approx(3 / 5)
    assert float(np.mean((x - corrupted) / (clean - corrupted))) != pytest.approx(3 / 5)


def test_normalised_is_missing_where_clean_and_corrupted_do_not_differ():
    random = np.random.default_rng(0)
    clean = random.normal(size=30)
    assert np.isnan(normalised(clean, clean, clean))
    assert np.isnan(normalised(clean, clean, clean + random.normal(0, 5, size=30)))


def free_of(chosen, layers, heads):
    return [(layer, head) for layer in range(layers) for head in range(heads) if (layer, head) not in chosen]


@given(
    st.sets(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=8), st.integers(0, 50), st.booleans()
)
def test_control_sets_are_what_they_say(chosen, seed, matched):
    found = control_sets(chosen, 3, 6, draws=20, seed=seed, matched=matched)
    counts = {layer: sum(place[0] == layer for place in chosen) for layer in range(3)}
    if matched:
        possible = math.prod(math.comb(6 - count, count) for count in counts.values())
    else:
        possible = math.comb(18 - len(chosen), len(chosen))
    assert len(found) == min(20, possible)
    assert len({frozenset(one) for one in found}) == len(found)
    for one in found:
        assert len(one) == len(chosen)
        assert not set(one) & set(chosen)
        if matched:
            assert {layer: sum(place[0] == layer for place in one) for layer in range(3)} == counts
    assert found == control_sets(chosen, 3, 6, draws=20, seed=seed, matched=matched)


def test_control_sets_differ_by_seed_and_cover_the_free_heads():
    chosen = {(1, 0), (1, 1)}
    one, two = (control_sets(chosen, 2, 30, draws=50, seed=seed) for seed in (0, 1))
    assert one != two
    assert {place for found in one for place in found} >= set(free_of(chosen | {(0, h) for h in range(30)}, 2, 30)[:5])


@given(
    st.sets(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=4),
    st.sets(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=6),
    st.booleans(),
)
def test_excluded_heads_are_never_drawn_and_the_rest_is_counted(chosen, excluded, matched):
    found = control_sets(chosen, 3, 5, draws=10**6, matched=matched, excluded=excluded)
    assert len(found) == possible_control_sets(chosen, 3, 5, matched, excluded)
    assert not {place for one in found for place in one} & (chosen | excluded)


def test_no_control_where_there_are_not_enough_heads():
    assert control_sets({(0, 0), (0, 1), (0, 2)}, 1, 4) == []
    assert control_sets(set(), 2, 4) == []


def test_t_test_equals_scipy_down_to_the_floor_of_a_sign_flip_test():
    values = np.random.default_rng(0).normal(0.3, 1.0, size=(5, 12))
    np.testing.assert_allclose(t_test(values), stats.ttest_1samp(values, 0, axis=-1).pvalue)
    np.testing.assert_allclose(t_test(np.array([[1.0] * 6, [0.0] * 6])), [2.0**-5, 1.0])
    assert np.isnan(t_test(np.array([[1.0]]))).all()


def test_rank_correlation_equals_scipy_and_leaves_out_what_is_missing():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(3, 4)), random.normal(size=(3, 4))
    other[0, 0] = other[0, 1]  # a tie
    assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other, axis=None).statistic)
    holed = one.copy()
    holed[2, 3] = np.nan
    kept = ~np.isnan(holed)
    assert rank_correlation(holed, other) == pytest.approx(stats.spearmanr(one[kept], other[kept]).statistic)
    assert rank_correlation(one, one**3) == pytest.approx(1.0)
    assert rank_correlation(np.array([1.0, 2.0]), np.array([5.0, 3.0])) == pytest.approx(-1.0)
    assert math.isnan(rank_correlation(one, np.zeros((3, 4))))
    assert math.isnan(rank_correlation(np.array(1.0), np.array(2.0)))


def test_strongest_shared_by_hand():
    one = np.array([[5.0, -4.0], [0.1, 3.0]])
    assert strongest_shared(one, np.array([[-9.0, 0.0], [2.0, 3.0]]), 2) == 0.5
    assert strongest_shared(one, -one, 3) == 1.0
    assert strongest_shared(one, np.zeros((2, 2)), 3) == 0.0
    assert math.isnan(strongest_shared(np.zeros((2, 2)), one, 3))
    assert math.isnan(strongest_shared(one, one * np.nan, 3))
