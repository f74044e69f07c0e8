"""Token pairs that recur in a window: where, how far apart, among how many candidates, and what takes a pair's place.

Plain NumPy on token ids; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ...metrics.card import PromptFacts
from ...metrics.intervals import FEW, ratio_interval

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Occurrences:
    """Second occurrences of token pairs. All arrays ``(occurrence,)``, in the order of windows and positions.

    At a second occurrence ``t`` of a window ``x``, the pair ``(x[t-1], x[t])`` stood in the window exactly once
    before, as ``(x[j-1], x[j])``, with ``j < t - 1``.

    Attributes
    ----------
    window : array of int
    first, second : array of int
        ``j`` and ``t``: positions of the pair's later token.
    candidates : array of int
        How many different tokens have followed a copy of ``x[t-1]`` before: 1 where ``x[t]`` is the only one.
    """

    window: Array
    first: Array
    second: Array
    candidates: Array

    def __len__(self) -> int:
        return len(self.window)

    @property
    def distance(self) -> Array:
        """Tokens from the first occurrence to the second, ``t - j``."""
        return self.second - self.first

    def where(self, chosen: Array) -> Occurrences:
        """Some of them, by a mask or by their numbers."""
        names = ("window", "first", "second", "candidates")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})


def find(tokens: Array) -> Occurrences:
    """Find the second occurrences in windows.

    Parameters
    ----------
    tokens : array (window, position)

    Returns
    -------
    Occurrences
    """
    found = []
    for window, row in enumerate(tokens.tolist()):
        followers: dict[int, dict[int, list[int]]] = {}
        for t in range(1, len(row)):
            before = followers.setdefault(row[t - 1], {})
            places = before.setdefault(row[t], [])
            if len(places) == 1 and places[0] < t - 1:
                found.append((window, places[0], t, len(before)))
            places.append(t)
    return Occurrences(*np.array(found, dtype=np.int64).reshape(-1, 4).T)


def successor_weights(tokens: Array) -> Array:
    """Sums attention from ``t - 1`` to ``j`` over second occurrences with one candidate, ``(window, query, key)``.

    Those without a place to compare with are left out: see `distance_weights`.
    """
    weights = np.zeros((*tokens.shape, tokens.shape[1]), dtype=np.float32)
    one = controlled(tokens)
    weights[one.window, one.second - 1, one.first] = 1
    return weights


def distance_weights(tokens: Array) -> Array:
    """The same sum at places of the same distances that follow no copy of the query, ``(window, query, key)``.

    For an occurrence with ``d = t - 1 - j``: the mean of ``A[q, q-d]`` over the queries ``q`` of the window, other than
    ``t - 1``, with ``x[q-d-1] != x[q]``.
    """
    size = tokens.shape[1]
    weights = np.zeros((*tokens.shape, size), dtype=np.float32)
    one = controlled(tokens)
    for window, j, t in zip(one.window, one.first, one.second, strict=True):
        queries = _other_queries(tokens[window], j, t)
        weights[window, queries, queries - (t - 1 - j)] += np.float32(1 / len(queries))
    return weights


def controlled(tokens: Array) -> Occurrences:
    """Second occurrences with one candidate, and elsewhere in the window a place of the same distance to compare."""
    found = find(tokens)
    one = found.where(found.candidates == 1)
    places = zip(one.window, one.first, one.second, strict=True)
    return one.where(np.array([len(_other_queries(tokens[window], j, t)) > 0 for window, j, t in places], dtype=bool))


def _other_queries(row: Array, j: int, t: int) -> Array:
    queries: Array = np.arange(t - j, len(row))
    others: Array = queries[(row[queries - (t - j)] != row[queries]) & (queries != t - 1)]
    return others


def weights_of(function: Callable[[Array], Array]) -> Callable[[PromptFacts], dict[str, Array]]:
    """What a metric of patterns needs of its prompts."""
    return lambda run: {"weights": np.ascontiguousarray(function(run.tokens))}


@dataclass(frozen=True, eq=False)
class Replaced:
    """Windows in which the first occurrence of a pair is replaced, and as many in which another place is.

    Attributes
    ----------
    occurrence : array (row,)
        Numbers of the occurrences.
    without, elsewhere : array (row, position)
        Token ids: the window with the pair at ``j - 1, j`` replaced, and with that at ``m - 1, m``.
    place : array (row,)
        ``m``.
    """

    occurrence: Array
    without: Array
    elsewhere: Array
    place: Array


def draw_replaced(tokens: Array, others: Array, found: Occurrences, most: int, seed: int) -> Replaced:
    """Replace the first occurrences of some pairs by a pair of another text.

    Drawn are up to `most` occurrences with one candidate, and up to `most` with several. The new pair is one that
    stands in `others`; it has neither token of the old one. Another place is one pair of tokens before ``t - 1``, drawn
    from those that do not touch the first occurrence; it is replaced by the same new pair.

    Parameters
    ----------
    tokens : array (window, position)
    others : array (window', position)
    found : Occurrences
    most : int
    seed : int

    Returns
    -------
    Replaced
        Without the occurrences that have no other place before them, or no pair in `others` to replace theirs.
    """
    random = np.random.default_rng((seed, 1))
    able = np.flatnonzero([len(_other_places(j, t)) > 0 for j, t in zip(found.first, found.second, strict=True)])
    single = found.candidates[able] == 1
    drawn = [random.permutation(part)[:most] for part in (able[single], able[~single])]
    pairs = np.unique(np.stack([others[:, :-1].ravel(), others[:, 1:].ravel()], axis=-1), axis=0)
    rows: list[tuple[int, Array, Array, int]] = []
    for number in np.sort(np.concatenate(drawn)):
        row, j, t = tokens[found.window[number]], found.first[number], found.second[number]
        free = np.flatnonzero(~np.isin(pairs, row[[t - 1, t]]).any(axis=-1))
        if not len(free):
            continue
        pair, place = pairs[random.choice(free)], random.choice(_other_places(j, t))
        rows.append((int(number), _with(row, j, pair), _with(row, place, pair), int(place)))
    shape = (-1, tokens.shape[1])
    numbers, without, elsewhere, places = (list(part) for part in zip(*rows, strict=True)) if rows else ([],) * 4
    return Replaced(
        np.array(numbers, dtype=np.int64),
        np.array(without, dtype=np.int64).reshape(shape),
        np.array(elsewhere, dtype=np.int64).reshape(shape),
        np.array(places, dtype=np.int64),
    )


def _other_places(j: int, t: int) -> Array:
    """Later positions ``m`` of pairs ``m - 1, m`` before ``t - 1`` that do not touch ``j - 1, j``."""
    places: Array = np.arange(1, t - 1)
    free: Array = places[np.abs(places - j) > 1]
    return free


def _with(row: Array, at: int, pair: Array) -> Array:
    changed = row.copy()
    changed[at - 1 : at + 1] = pair
    return changed


def mean_by_unit(values: Array, units: Sequence[Any] | Array, level: float = 0.95) -> tuple[float, float, float]:
    """Mean over occurrences, and an interval that takes units (files or windows), not occurrences, for independent.

    The ratio of the sums of `values` and of their number over units, with `intervals.ratio_interval`.

    Parameters
    ----------
    values : array (occurrence,)
        NaN are left out.
    units : sequence (occurrence,)
    level : float

    Returns
    -------
    mean, low, high : float
        NaN where there is no value; no interval where fewer than two units have one.
    """
    values = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(values)
    if not known.any():
        return (np.nan,) * 3
    _, number = np.unique(np.asarray(units)[known], return_inverse=True)
    sums, counts = np.bincount(number, values[known]), np.bincount(number).astype(np.float64)
    low, high = ratio_interval(sums, counts, level)
    return float(values[known].mean()), float(low), float(high)


def units_of(window: Array, files: Sequence[str]) -> tuple[str, Array]:
    """What is taken for independent, and that of each occurrence: files where they are five or more, else windows."""
    of = np.asarray(files, dtype=object)[window]
    return ("file", of.astype(str)) if len({*of}) >= FEW else ("window", window)


def bins_of(name: str, context: int) -> list[tuple[int, int]]:
    """Bins of ``distance`` (doubling), ``candidates`` or ``position`` (eighths of a window), ends included."""
    if name == "candidates":
        return [(1, 1), (2, 2), (3, 4), (5, 8), (9, context)]
    if name == "position":
        edges = [round(context * part / 8) for part in range(9)]
        return [(low, high - 1) for low, high in pairwise(edges) if high > low]
    low, found = 2, []
    while low < context:
        found.append((low, min(2 * low, context) - 1))
        low *= 2
    return found
