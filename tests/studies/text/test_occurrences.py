"""Recurring pairs: a planted text where every count is known, and explicit loops on random tokens."""

from itertools import pairwise

import numpy as np
import pytest

from headwise.metrics.intervals import ratio_interval
from headwise.studies.text.occurrences import (
    bins_of,
    controlled,
    distance_weights,
    draw_replaced,
    find,
    mean_by_unit,
    successor_weights,
    units_of,
)

#          position:  0  1  2  3  4  5  6  7  8  9  10 11 12
PLANTED = np.array([[1, 2, 3, 4, 1, 2, 5, 1, 3, 1, 3, 7, 7]])
"""(1, 2) recurs at 5 (first at 1, one candidate); (1, 3) at 10 (first at 8, after 1 came 2 and 3); 7 7 is no pair."""


def test_a_planted_text():
    found = find(PLANTED)
    assert found.window.tolist() == [0, 0]
    assert found.first.tolist() == [1, 8]
    assert found.second.tolist() == [5, 10]
    assert found.candidates.tolist() == [1, 2]
    assert found.distance.tolist() == [4, 2]


def test_runs_and_third_occurrences_are_none():
    assert len(find(np.array([[7, 7, 7, 7], [1, 2, 3, 4]]))) == 0
    assert find(np.array([[1, 2, 0, 1, 2, 0, 1, 2]])).second.tolist() == [4, 5, 6]  # (1, 2) and (0, 1) once more


def _slow(row):
    """Every second occurrence of a window, by comparing all pairs with all."""
    found = []
    for t in range(1, len(row)):
        pairs = [j for j in range(1, t) if row[j - 1] == row[t - 1] and row[j] == row[t]]
        if len(pairs) == 1 and pairs[0] < t - 1:
            candidates = {row[i] for i in range(1, t) if row[i - 1] == row[t - 1]}
            found.append((pairs[0], t, len(candidates)))
    return found


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(0, 20, (24, 30)) % 12  # eight of twelve are twice as frequent


def test_random_tokens_against_loops(tokens):
    found = find(tokens)
    expected = [(window, *one) for window, row in enumerate(tokens) for one in _slow(row)]
    assert len(expected) > 40
    assert list(zip(found.window, found.first, found.second, found.candidates, strict=True)) == expected


def test_weights_sum_attention_to_the_successor_and_to_its_distance(tokens):
    pattern = np.tril(np.random.default_rng(0).random((24, 30, 30)))
    after, same = np.zeros(24), np.zeros(24)
    expected = []
    for window, row in enumerate(tokens):
        for j, t, candidates in _slow(row):
            if candidates > 1:
                continue
            back = t - 1 - j
            values = [
                pattern[window, q, q - back]
                for q in range(len(row))
                if q - back - 1 >= 0 and row[q - back - 1] != row[q] and q != t - 1
            ]
            if values:
                expected.append((window, j, t))
                after[window] += pattern[window, t - 1, j]
                same[window] += np.mean(values)
    assert np.allclose((successor_weights(tokens) * pattern).sum((1, 2)), after, atol=1e-5)
    assert np.allclose((distance_weights(tokens) * pattern).sum((1, 2)), same, atol=1e-5)
    one = controlled(tokens)
    assert list(zip(one.window, one.first, one.second, strict=True)) == expected


def test_replaced_pairs(tokens):
    others = np.random.default_rng(6).integers(0, 14, (4, 30))
    found = find(tokens)
    drawn = draw_replaced(tokens, others, found, 10, seed=0)
    own = found.where(drawn.occurrence)
    assert (own.candidates == 1).sum() == (own.candidates > 1).sum() == 10
    known = {(a, b) for row in others.tolist() for a, b in pairwise(row)}
    for at in range(20):
        row, j, t, m = tokens[own.window[at]], own.first[at], own.second[at], drawn.place[at]
        without, elsewhere = drawn.without[at], drawn.elsewhere[at]
        pair = tuple(without[[j - 1, j]].tolist())
        assert pair in known
        assert not {*pair} & {row[t - 1], row[t]}
        assert tuple(elsewhere[[m - 1, m]].tolist()) == pair
        assert {m - 1, m}.isdisjoint({j - 1, j, t - 1, t})
        assert {*np.flatnonzero(without != row)} <= {j - 1, j}
        assert {*np.flatnonzero(elsewhere != row)} <= {m - 1, m}
        if own.candidates[at] == 1:  # nothing is left to copy
            left = [i for i in range(1, t) if without[i - 1] == without[t - 1]]
            assert left == []
    again = draw_replaced(tokens, others, found, 10, seed=0)
    assert (drawn.without == again.without).all()
    assert (drawn.place == again.place).all()
    assert len(draw_replaced(tokens, others, found, 10**6, 0).occurrence) > 40
    assert len(draw_replaced(tokens, tokens[:0], found, 10, 0).occurrence) == 0  # no text to take a pair from


def test_means_over_units_are_ratios_of_sums():
    values, units = np.array([1.0, 2.0, 6.0, np.nan, 3.0, 4.0]), np.array(list("aabbcd"))
    mean, low, high = mean_by_unit(values, units)
    assert mean == pytest.approx(16 / 5)
    assert (low, high) == tuple(map(float, ratio_interval(np.array([3.0, 6, 3, 4]), np.array([2.0, 1, 1, 1]))))
    assert low < mean < high
    assert np.isnan(mean_by_unit(values[:2], units[:2])[1])
    assert np.isnan(mean_by_unit(values[3:4], units[3:4])).all()


def test_units_are_files_where_there_are_enough():
    window = np.array([0, 0, 1, 2, 3, 4])
    assert units_of(window, list("abcde"))[0] == "file"
    name, units = units_of(window, list("aaabb"))
    assert name == "window"
    assert (units == window).all()


def test_bins_cover_all_that_is_possible():
    assert bins_of("distance", 20) == [(2, 3), (4, 7), (8, 15), (16, 19)]
    assert bins_of("position", 16)[0] == (0, 1)
    assert bins_of("position", 16)[-1] == (14, 15)
    for name in ("distance", "candidates", "position"):
        flat = [value for low, high in bins_of(name, 100) for value in range(low, high + 1)]
        assert flat == list(range(flat[0], flat[-1] + 1))
