"""Intervals that cover, p-values that are calibrated, controls that are what they say."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from headwise.errors import DeclarationError
from headwise.metrics import benjamini_hochberg, bootstrap_interval, control_sets, normalized, null_p_value
from headwise.metrics.intervals import few_prompts, interval_attrs, ratio_interval
from headwise.metrics.statistics import possible_control_sets, rank_correlation, sign_flip, strongest_shared, t_test
from tests.oracles import naive

DRAWN = {
    "normal": (lambda random, shape: random.normal(0.0, 1.0, shape), 0.0),
    "exponential": (lambda random, shape: random.exponential(1.0, shape), 1.0),
    "mostly 1": (lambda random, shape: (random.random(shape) < 0.9).astype(float), 0.9),
}


@pytest.mark.parametrize(
    ("kind", "examples", "least"),
    [
        *[("normal", examples, 0.93) for examples in (2, 3, 4, 5, 10, 32)],
        *[("exponential", examples, least) for examples, least in ((5, 0.91), (10, 0.93), (32, 0.935))],
        ("mostly 1", 32, 0.93),
    ],
)
def test_intervals_cover_the_mean_as_often_as_they_say(kind, examples, least):
    draw, mean = DRAWN[kind]
    low, high = bootstrap_interval(draw(np.random.default_rng(0), (8000, examples)), resamples=1000)
    coverage = np.mean((low <= mean) & (mean <= high))
    assert least <= coverage <= 0.965


def studentised(values, level, resamples, seed):
    """The same interval in plain loops."""
    n, mean, error = len(values), np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    found = []
    for count in counts:
        drawn = np.repeat(values, count)
        spread = max(np.std(drawn, ddof=1) / math.sqrt(n), error / 4)
        found.append((np.mean(drawn) - mean) / spread)
    lower, upper = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return mean - error * upper, mean - error * lower


@pytest.mark.parametrize("values", [[0.0, 1.0, 4.0, 9.0], [1.0] * 9 + [0.0], list(np.geomspace(1, 100, 12))], ids=str)
def test_bootstrap_interval_equals_the_loops(values):
    values = np.array(values)
    for level in (0.8, 0.95):
        wanted = studentised(values, level, 300, 4)
        np.testing.assert_allclose(bootstrap_interval(values, level, 300, 4), wanted, rtol=1e-9)
        both = bootstrap_interval(np.stack([values, -values])[None], level, 300, 4)
        np.testing.assert_allclose([end[0, 0] for end in both], wanted, rtol=1e-9)
        np.testing.assert_allclose([-end[0, 1] for end in both[::-1]], wanted, rtol=1e-9)


def test_bootstrap_interval_of_a_normal_mean_by_theory():
    values = np.random.default_rng(1).normal(3.0, 1.0, size=200)
    low, high = bootstrap_interval(values, resamples=4000)
    half = stats.t.ppf(0.975, 199) * values.std(ddof=1) / math.sqrt(200)
    assert float(low) == pytest.approx(values.mean() - half, abs=0.02)
    assert float(high) == pytest.approx(values.mean() + half, abs=0.02)


def test_of_two_or_three_values_the_interval_is_that_of_student():
    for values in (np.array([1.0, 2.0]), np.array([1.0, 2.0, 6.0])):
        wanted = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        np.testing.assert_allclose(bootstrap_interval(values), wanted)


@given(st.lists(st.sampled_from([0.0, 1.0, 0.1, 1 + 1e-9, -3.0]), min_size=2, max_size=12), st.floats(0.05, 0.99))
def test_intervals_are_finite_and_contain_the_mean(values, level):
    """Also where many values are equal or nearly so."""
    low, high = bootstrap_interval(np.array(values), level, 200)
    spread = np.std(values)
    assert low <= np.mean(values) + 1e-12
    assert high >= np.mean(values) - 1e-12
    assert high - low <= 40 * spread + 1e-12
    if len(set(values)) == 1:
        assert low == high == values[0]
    elif level > 0.5:
        assert low < high


def test_ends_are_cut_where_no_mean_can_lie():
    values = np.array([[1.0, 1.0, 0.9, 1.0, 0.4, 1.0], [1.0, 2.0, 3.0, 2.0, 1.0, 1.5]])
    low, high = bootstrap_interval(values)
    cut = bootstrap_interval(values, bounds=(0.0, 1.0))
    assert high[0] > 1
    np.testing.assert_allclose(cut, [[low[0], low[1]], [1.0, values[1].mean()]])


def test_bootstrap_of_equal_values_is_a_point_and_of_one_value_is_missing():
    low, high = bootstrap_interval(np.full((2, 5), 0.1))
    assert (np.array([low, high]) == 0.1).all()
    assert np.isnan(bootstrap_interval(np.array([[1.0]]))[0]).all()
    assert np.isnan(bootstrap_interval(np.array([1.0, np.nan, 2.0, 3.0]))).all()
    assert np.isnan(bootstrap_interval(np.array([1.0, np.inf, 2.0, 3.0]))).all()
    assert bootstrap_interval(np.zeros((0, 5)))[0].shape == (0,)


def ratio_in_loops(y, x, resamples, seed):
    n = len(y)

    def jackknifed(y, x):
        without = np.array([(y.sum() - one) / (x.sum() - other) for one, other in zip(y, x, strict=True)])
        return y.sum() / x.sum(), math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())

    ratio, error = jackknifed(y, x)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    drawn = [jackknifed(np.repeat(y, count), np.repeat(x, count)) for count in counts]
    lower, upper = np.quantile([(one - ratio) / max(off, error / 4) for one, off in drawn], [0.025, 0.975])
    return ratio - error * upper, ratio - error * lower


def test_ratio_interval_equals_the_loops_and_covers():
    random = np.random.default_rng(2)
    below = random.normal(5, 1, (1500, 10))
    above = 0.4 * below + random.normal(0, 0.5, below.shape)
    np.testing.assert_allclose(
        ratio_interval(above[0], below[0], resamples=200, seed=3), ratio_in_loops(above[0], below[0], 200, 3)
    )
    low, high = ratio_interval(above, below, resamples=600)
    assert 0.93 <= np.mean((low <= 0.4) & (high >= 0.4)) <= 0.965


def test_ratio_interval_knows_that_both_means_vary():
    """What divides varies with what is divided: their ratio does not vary at all."""
    below = np.array([4.0, 6.0, 5.0, 8.0, 3.0])
    np.testing.assert_allclose(ratio_interval(np.stack([0.5 * below, 0 * below]), below), [[0.5, 0.0], [0.5, 0.0]])
    assert np.isnan(ratio_interval(below, below - below.mean())).all()
    assert np.isnan(ratio_interval(below * [1, np.nan, 1, 1, 1], below)).all()
    assert np.isnan(ratio_interval(below[:1], below[:1])).all()


def test_intervals_of_few_prompts_are_marked():
    assert [bool(few_prompts(examples)) for examples in (1, 2, 4, 5, 32)] == [False, True, True, False, False]
    assert interval_attrs(3) == {
        "comment": "95% intervals over 3 prompts only: with fewer than 5, they say little; take more prompts"
    }
    assert interval_attrs(5) == {}


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


def test_normalized_is_a_ratio_of_means():
    clean, corrupted = np.array([4.0, 6.0, 5.0]), np.array([0.0, 1.0, -1.0])
    x = np.array([2.0, 3.0, 4.0])
    assert float(normalized(x, clean, corrupted)) == pytest.approx(naive.normalized(x, clean, corrupted))
    assert float(normalized(x, clean, corrupted)) == pytest.approx(3 / 5)
    assert float(np.mean((x - corrupted) / (clean - corrupted))) != pytest.approx(3 / 5)


def test_normalized_is_missing_where_clean_and_corrupted_do_not_differ():
    random = np.random.default_rng(0)
    clean = random.normal(size=30)
    assert np.isnan(normalized(clean, clean, clean))
    assert np.isnan(normalized(clean, clean, clean + random.normal(0, 5, size=30)))


def test_an_example_without_a_value_leaves_the_denominator_too():
    clean, corrupted = np.array([4.0, 6.0, 20.0, 5.0]), np.array([0.0, 1.0, 2.0, -1.0])
    x = np.array([[2.0, 3.0, np.nan, 4.0], [2.0, 3.0, 9.0, 4.0], [np.nan] * 4])
    kept = [0, 1, 3]
    wanted = [
        naive.normalized(x[0, kept], clean[kept], corrupted[kept]),
        naive.normalized(x[1], clean, corrupted),
        np.nan,
    ]
    np.testing.assert_allclose(normalized(x, clean, corrupted), wanted)
    assert wanted[0] == pytest.approx(9 / 15)
    holed = np.array([4.0, 6.0, np.nan, 5.0])
    assert float(normalized(x[1], holed, corrupted)) == pytest.approx(9 / 15)


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


def test_sign_flip_counts_every_way_to_flip_the_signs():
    values = np.array([[0.5, 1.0, -0.25, 0.75], [0.0, 0.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    ways = [np.array(signs) for signs in itertools.product((1, -1), repeat=4)]
    expected = [np.mean([(row * way).sum() >= row.sum() for way in ways]) for row in values]
    assert sign_flip(values).tolist() == expected == [2 / 16, 1.0, 1.0]


def test_sign_flip_of_many_is_a_sample_that_cannot_be_zero():
    values = np.random.default_rng(0).normal(0.4, 1.0, 30)
    ways = np.random.default_rng(1).choice([1.0, -1.0], (200_000, 30))
    share = (ways @ values >= values.sum()).mean()
    np.testing.assert_allclose(sign_flip(values), share, atol=0.004)
    assert sign_flip(np.ones(30)) == 1 / 20_001
    assert np.isnan(sign_flip(np.array([[1.0], [2.0]]))).all()
    assert np.isnan(sign_flip(np.array([1.0, np.nan, 2.0])))
