"""How sure: nulls, multiplicity, control sets. Plain NumPy and SciPy; imports errors and `intervals` only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import Any

import numpy as np
from scipy import stats

from ..errors import MOST_DRAWS, whole
from .intervals import within_noise

Array = np.ndarray[Any, Any]
HeadSet = tuple[tuple[int, int], ...]
SETS_AT_ONCE = 500
"""Sets of `jaccard_overlap` whose overlap is worked out together."""
SHARP = 0.25
"""Standard error of means, as a share of what they differ by, up to which their order is taken for known."""


def null_p_value(observed: float, null: Array) -> float:
    """One-sided p-value of a value against draws of a null, ``(1 + #{null >= observed}) / (1 + n)``.

    NaN without draws. It cannot be smaller than ``1 / (1 + n)``.

    References
    ----------
    Phipson and Smyth 2010, Permutation p-values should never be zero.
    """
    null = np.asarray(null, dtype=np.float64)
    null = null[~np.isnan(null)]
    if null.size == 0 or np.isnan(observed):
        return float("nan")
    return float((1 + np.count_nonzero(null >= observed)) / (1 + null.size))


def benjamini_hochberg(p: Array) -> Array:
    """Adjusted p-values (q) that control the false discovery rate over all tests in `p`; NaN stays NaN.

    References
    ----------
    Benjamini and Hochberg 1995, Controlling the false discovery rate.
    """
    p = np.asarray(p, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = ~np.isnan(p)
    if known.any():
        adjusted[known] = stats.false_discovery_control(p[known], method="bh")
    return adjusted


def t_test(values: Array) -> Array:
    """Two-sided p that the mean over the last axis (examples) is 0; 1 where every value is exactly 0.

    No smaller than that of a sign-flip test, ``2 ** (1 - n)``, also where all values are the same. NaN where there are
    fewer than two examples.
    """
    values = np.asarray(values)
    if values.shape[-1] < 2:
        return np.full(values.shape[:-1], np.nan)
    spread = values.std(axis=-1, ddof=1)
    flat = spread == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = values.mean(axis=-1) / (spread / np.sqrt(values.shape[-1]))
    p = 2 * stats.t.sf(np.abs(t), values.shape[-1] - 1)
    result: Array = np.where(
        flat & (values.mean(axis=-1) == 0), 1.0, np.maximum(np.where(flat, 0.0, p), 2.0 ** (1 - values.shape[-1]))
    )
    return result


def sign_flip(values: Array, draws: int = 20_000, seed: int = 0, *, largest: bool = False) -> Array:
    """One-sided p that the mean over the last axis (examples) is above 0, by flipping the signs of whole examples.

    Exact where there are no more than `draws` ways to flip them, and otherwise
    ``(1 + #{mean of a flipped sample >= mean}) / (1 + draws)``: no smaller than ``2 ** -n`` and ``1 / (1 + draws)``.
    The test assumes that a difference of no effect is as likely to be above 0 as below it. NaN where a value is missing
    or there are fewer than two examples.

    Parameters
    ----------
    values : array (..., example)
    draws : int
    seed : int
    largest : bool
        Compare each mean with the largest one of a flipped sample, which corrects p for the choice of a row among all
        (Westfall and Young 1993).

    Returns
    -------
    array (...)
    """
    values = np.asarray(values, dtype=np.float64)
    examples = values.shape[-1]
    if examples < 2:
        return np.full(values.shape[:-1], np.nan)
    exact = examples < 63 and 2**examples <= draws
    count = 2**examples if exact else draws
    random = np.random.default_rng(seed)
    rows = values.reshape(-1, examples)
    sums, slack = rows.sum(axis=-1), 1e-12 * np.abs(rows).sum(axis=-1)
    above = np.zeros(len(rows))
    for start in range(0, count, 1000):
        some = np.arange(start, min(start + 1000, count))
        flipped = some[:, None] >> np.arange(examples) & 1 if exact else random.integers(0, 2, (len(some), examples))
        drawn = (1.0 - 2.0 * flipped) @ rows.T
        above += ((drawn.max(axis=-1, keepdims=True) if largest else drawn) >= sums - slack).sum(axis=0)
    p = above / count if exact else (1 + above) / (1 + count)
    result: Array = np.where(np.isnan(sums), np.nan, p).reshape(values.shape[:-1])
    return result


def over_looks(p: Array, count: int) -> Array:
    """p-values of a test that is looked at `count` times, whichever look is the last: times `count`, at most 1.

    The probability that any of the looks is below ``alpha / count`` is at most ``alpha`` (Bonferroni), whatever decides
    when to stop.
    """
    allowed: Array = np.minimum(1.0, count * np.asarray(p, dtype=np.float64))
    return allowed


def ranking_settled(values: Array, margin: float, level: float = 0.95) -> bool:
    """Whether the order of several means would change little with more examples.

    It would where all means are known to within `margin`, or their standard errors are a quarter of what the means
    differ by. Both are taken of the differences from the mean over all rows, since rows share their examples. The rule
    treats all rows alike: where no row is special, each place in the order is as likely for it as any other whenever
    one stops by this rule, so that a p-value from the order stays exact.

    Parameters
    ----------
    values : array (row, example)
    margin : float
    level : float
        Coverage of the intervals that are held against `margin`.

    Returns
    -------
    bool
        True for a single row, False for a single example.
    """
    rows, examples = values.shape
    if rows < 2 or examples < 2:
        return bool(rows < 2)
    apart = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    errors = apart.std(axis=-1, ddof=1) / np.sqrt(examples)
    widest = stats.t.ppf((1 + level) / 2, examples - 1) * errors.max()
    spread = apart.mean(axis=-1).std(ddof=1)
    return bool(widest <= margin or np.sqrt((errors**2).mean()) <= SHARP * spread)


def rank_correlation(one: Array, other: Array) -> float:
    """Spearman's rank correlation of two arrays of one shape, over the places where neither is missing.

    NaN where one of them is constant, or fewer than two places are left.
    """
    pair = np.stack([np.ravel(one), np.ravel(other)]).astype(np.float64)
    pair = pair[:, ~np.isnan(pair).any(axis=0)]
    if pair.shape[1] < 2 or (np.ptp(pair, axis=1) == 0).any():
        return float("nan")
    return float(stats.spearmanr(*pair).statistic)


def strongest_shared(one: Array, other: Array, most: int = 5) -> float:
    """Of the `most` values of `one` that are farthest from 0, the share that is also among those of `other`.

    What is 0 is not among them. NaN where all of `one` is 0, or a value is missing.
    """
    sizes = [np.abs(np.ravel(values)) for values in (one, other)]
    if any(np.isnan(values).any() for values in sizes):
        return float("nan")
    first, second = (
        {int(at) for at in np.argsort(-values, kind="stable")[:most] if values[at] > 0} for values in sizes
    )
    return len(first & second) / len(first) if first else float("nan")


def normalized(x: Array, clean: Array, corrupted: Array) -> Array:
    """``(mean x - mean corrupted) / (mean clean - mean corrupted)`` over the last axis (examples).

    0 is as bad as the corrupted run, 1 as good as the clean one. All means are over the examples of which all three
    values are known. NaN where the denominator is within two standard errors of 0 (paired over examples), and where no
    example is left. Per-example ratios are not averaged.

    Parameters
    ----------
    x : array (..., example)
    clean, corrupted : array (example,) or (..., example)
    """
    x, clean, corrupted = (np.asarray(part, dtype=np.float64) for part in (x, clean, corrupted))
    change, gap = np.broadcast_arrays(x - corrupted, clean - corrupted)
    known = ~(np.isnan(change) | np.isnan(gap))
    safe = known.any(axis=-1) & ~within_noise(np.where(known, gap, np.nan))
    count = np.maximum(known.sum(axis=-1), 1)
    above, below = (np.where(known, part, 0.0).sum(axis=-1) / count for part in (change, gap))
    ratio: Array = np.where(safe, above / np.where(safe, below, 1.0), np.nan)
    return ratio


def control_sets(
    chosen: Collection[tuple[int, int]],
    layers: int,
    heads: int,
    draws: int = 50,
    seed: int = 0,
    matched: bool = True,
    excluded: Collection[tuple[int, int]] = (),
) -> list[HeadSet]:
    """Random sets of heads to compare a chosen set with: as many heads, none of them chosen, no set twice.

    Parameters
    ----------
    chosen : collection of (layer, head)
    layers, heads : int
        Counts of the model.
    draws : int
        How many sets; all distinct sets where there are no more than that (see `possible_control_sets`).
    seed : int
    matched : bool
        The same number of heads in the same layers (default), or drawn over all layers.
    excluded : collection of (layer, head)
        Heads that are left out as well.

    Returns
    -------
    list of sets
        Empty where the model has not enough other heads.
    """
    whole(draws, "draws", high=MOST_DRAWS)
    pools = _pools(chosen, layers, heads, matched, excluded)
    possible = math.prod(math.comb(len(free), count) for free, count in pools)
    if not chosen or possible == 0:
        return []
    if possible <= draws:
        parts = itertools.product(*(itertools.combinations(free, count) for free, count in pools))
        return [tuple(itertools.chain.from_iterable(part)) for part in parts]
    random = np.random.RandomState(seed)  # a frozen stream: a seed means the same everywhere
    found: dict[HeadSet, None] = {}
    while len(found) < draws:
        picks = ([free[i] for i in sorted(random.permutation(len(free))[:count])] for free, count in pools)
        found[tuple(itertools.chain.from_iterable(picks))] = None
    return list(found)


def possible_control_sets(
    chosen: Collection[tuple[int, int]],
    layers: int,
    heads: int,
    matched: bool = True,
    excluded: Collection[tuple[int, int]] = (),
) -> int:
    """How many distinct sets `control_sets` can draw from.

    Parameters
    ----------
    chosen, layers, heads, matched, excluded
        As for `control_sets`.

    Returns
    -------
    int
        0 where no head is chosen.
    """
    if not chosen:
        return 0
    return math.prod(math.comb(len(free), count) for free, count in _pools(chosen, layers, heads, matched, excluded))


def _pools(
    chosen: Collection[tuple[int, int]], layers: int, heads: int, matched: bool, excluded: Collection[tuple[int, int]]
) -> list[tuple[list[tuple[int, int]], int]]:
    """For each layer of the chosen set (or for all together): the heads to draw from, and how many."""
    taken = {*chosen, *excluded}
    free = [place for place in itertools.product(range(layers), range(heads)) if place not in taken]
    if not matched:
        return [(free, len(set(chosen)))]
    return [
        ([place for place in free if place[0] == layer], sum(place[0] == layer for place in set(chosen)))
        for layer in sorted({layer for layer, _ in chosen})
    ]


def jaccard_overlap(member: Array) -> float:
    """Mean over pairs of sets of how many elements are in both over how many are in either; 1 for two empty sets.

    Parameters
    ----------
    member : array (set, element) of bool
        Two sets or more.
    """
    rows = np.asarray(member, dtype=bool)
    count, sizes, total = len(rows), rows.sum(axis=-1, dtype=np.float64), 0.0
    for at in range(0, count, SETS_AT_ONCE):
        some = rows[at : at + SETS_AT_ONCE].astype(np.float32)  # counts up to 2**24 are exact
        for other in range(0, count, SETS_AT_ONCE):
            both = (some @ rows[other : other + SETS_AT_ONCE].T.astype(np.float32)).astype(np.float64)
            either = sizes[at : at + SETS_AT_ONCE, None] + sizes[None, other : other + SETS_AT_ONCE] - both
            total += float(np.where(either == 0, 1.0, both / np.where(either == 0, 1.0, either)).sum())
    return (total - count) / (count * (count - 1))  # without those of each set with itself
