"""What is claimed of a head on text: where it looks from and at, and what that is compared with. Knows no model.

A claim is a set of pairs of positions, query and key. Its score is the attention from the query to its keys, mean over
the queries; a control is the attention that as many pairs get which are alike but for what is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...metrics.attention import after_repeats_of, repeats_of
from .brackets import Relations

Array = np.ndarray[Any, Any]
Mismatch = list[list[tuple[int, int, float]]]
CONTROLS = ("mismatch", "same distance")
"""What a claim is compared with: pairs of the same kind that do not match (see each claim), and the mean over all pairs
in the window at the same distance that do not match. Where a claim is about a distance, there is only the first."""


@dataclass(frozen=True)
class Claim:
    """What a head is called, where it does this.

    Attributes
    ----------
    name : str
    looks_from, looks_at : str
        Queries and their keys.
    mismatch : str
        What the first control is.
    place : str
        Next tokens that such a head may help to predict.
    resting : bool
        Whether a head that does something else besides is called by that: much attention rests where nothing is moved.
    """

    name: str
    looks_from: str
    looks_at: str
    mismatch: str
    place: str = "every token"
    resting: bool = False


CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            "closing bracket",
            "a token with a closing bracket",
            "the token with the bracket that opens it",
            "from the same token, the nearest other opening bracket before it",
            "closing brackets",
        ),
        Claim(
            "nested bracket",
            "a token with a closing bracket, where the last opening bracket before it is not the one that it closes",
            "the token with the bracket that opens it",
            "from the same token, the last opening bracket before it",
            "closing brackets around others",
        ),
        Claim(
            "inside bracket",
            "a token without a bracket, within brackets",
            "the token that opens the innermost of them",
            "from the same token, the nearest other opening bracket before it",
            "closing brackets",
        ),
        Claim(
            "last bracket",
            "a token within brackets or one that closes them, where others were opened and closed in between",
            "the last opening bracket before it, which is not the one around it",
            "from the same token, the bracket around it",
            "closing brackets around others",
        ),
        Claim(
            "same indentation",
            "the first token of a line",
            "the first token of the nearest line above with the same indentation",
            "from the same token, the nearest first token of a line above with another indentation that does not open "
            "the block",
            "ends of lines, with the indentation of the next line",
        ),
        Claim(
            "block opener",
            "the first token of a line",
            "the first token of the line that opens its block",
            "from the same token, the nearest first token of a line above that is indented as much or more",
            "ends of lines, with the indentation of the next line",
        ),
        Claim(
            "induction",
            "a token that occurred before",
            "the tokens after its earlier occurrences",
            "to the same keys, from the tokens beside the query, for which they are none",
            "tokens that followed an earlier occurrence of the token before them",
        ),
        Claim(
            "duplicate token",
            "a token that occurred before",
            "its earlier occurrences",
            "to the same keys, from the tokens beside the query, for which they are none",
        ),
        Claim("previous token", "any token", "the token before it", "from the same token, the one before that"),
        Claim("current token", "any token", "itself", "from the same token, the one before it", resting=True),
        Claim(
            "first token",
            "any token",
            "the first token of the window",
            "from the same token, the second token of the window",
            resting=True,
        ),
    )
}
"""All claims. Only the last one counts attention to the first token of a window. Brackets and indentation leave out
pairs that are those of induction or of a duplicate token as well."""
NONE = "none of these"


class Weights(NamedTuple):
    """Weights of the attention of a window, ``(query, key)``; each sums to the same number.

    Attributes
    ----------
    score : array (query, key)
        1 over the number of queries, for each pair.
    mismatch : array (query, key)
    same_distance : array (query, key) or None
    queries : int
    """

    score: Array
    mismatch: Array
    same_distance: Array | None
    queries: int


def weights(tokens: Array, related: Relations | None) -> dict[str, Weights]:
    """Weights of each claim on a window; of brackets and indentation only where `related` is known.

    Parameters
    ----------
    tokens : array (position,)
        Token ids.
    related : Relations or None
    """
    size = len(tokens)
    repeats, after = (of(tokens[None])[0] > 0 for of in (repeats_of, after_repeats_of))
    found: dict[str, Weights] = {}
    for name, matches in {"induction": after, "duplicate token": repeats}.items():
        pairs, mismatch = _seen_by_neighbours(matches)
        found[name] = _weights(pairs, mismatch, size, matches)
    every = np.arange(size)
    for name, first, back, other in (("previous token", 3, 1, 2), ("current token", 2, 0, 1)):
        queries = every[first:]
        pairs = np.stack([queries, queries - back], axis=1)
        found[name] = _weights(pairs, [[(query, query - other, 1.0)] for query in queries], size)
    pairs = np.stack([every[2:], np.zeros(len(every[2:]), dtype=int)], axis=1)
    found["first token"] = _weights(pairs, [[(query, 1, 1.0)] for query in every[2:]], size)
    if related is not None:
        known = repeats | after
        for name, (pairs, others) in _structural(related, size).items():
            matches = np.zeros((size, size), dtype=bool)
            matches[tuple(pairs.T)] = True
            kept = [pair for pair in pairs if pair[1] > 0 and not known[tuple(pair)]]
            mismatch = [_nearest(query, key, others[query], matches | known) for query, key in kept]
            found[name] = _weights(np.array(kept, dtype=int).reshape(-1, 2), mismatch, size, matches)
    return {name: found[name] for name in CLAIMS if name in found}


def places(tokens: Array, related: Relations | None) -> dict[str, Array]:
    """Positions whose next token is one that a claim may help to predict, ``(position,)`` of bool by claim."""
    size = len(tokens)
    every = np.arange(size) < size - 1
    after = after_repeats_of(tokens[None])[0] > 0
    following = np.append(tokens[1:], -1)
    found = {"induction": (after & (tokens[None] == following[:, None])).any(axis=1) & every}
    found |= dict.fromkeys(("duplicate token", "previous token", "current token", "first token"), every)
    if related is not None:
        before = {
            "closing bracket": related.closes,
            "nested bracket": related.nested[:, 0],
            "inside bracket": related.closes,
            "same indentation": related.breaks,
            "block opener": related.breaks,
        }
        for name, tokens_at in before.items():
            found[name] = np.isin(np.arange(size) + 1, tokens_at)
    return found


def _structural(related: Relations, size: int) -> dict[str, tuple[Array, Mapping[int, Array]]]:
    """Of each claim on brackets and lines its pairs, and for each query the keys that look alike but do not match."""
    openers = {query: related.openers[related.openers < query] for query in range(size)}
    matched: dict[int, list[int]] = {}
    for query, key in [*related.inside.tolist(), *related.closing.tolist()]:
        matched.setdefault(query, []).append(key)
    last = {query: openers[query][-1] for query, keys in matched.items() if openers[query][-1] not in keys}
    lines, columns = related.starts.T
    opens = dict(related.block.tolist())
    other, deeper = {}, {}
    for query, column in related.starts.tolist():
        above = lines < query
        other[query] = lines[above & (columns != column) & (lines != opens.get(query, -1))]
        deeper[query] = lines[above & (columns >= column)]
    return {
        "closing bracket": (related.closing, openers),
        "nested bracket": (related.nested, {query: before[-1:] for query, before in openers.items()}),
        "inside bracket": (related.inside, openers),
        "last bracket": (
            np.array(sorted(last.items()), dtype=int).reshape(-1, 2),
            {query: np.array(matched[query]) for query in last},
        ),
        "same indentation": (related.same, other),
        "block opener": (related.block, deeper),
    }


def _nearest(query: int, key: int, others: Array, matches: Array) -> list[tuple[int, int, float]]:
    """The key among `others` that is nearest to `key` and does not match; of two, the later one."""
    free = [other for other in others.tolist() if other > 0 and not matches[query, other]]
    return [(query, min(free, key=lambda other: (abs(other - key), -other)), 1.0)] if free else []


def _seen_by_neighbours(matches: Array) -> tuple[Array, Mismatch]:
    """Pairs, and for each the same key seen from the tokens beside the query, where it is no match and comes before."""
    size = len(matches)
    pairs = np.argwhere(matches)
    pairs = pairs[(pairs[:, 1] > 0) & (pairs[:, 1] < pairs[:, 0])]
    mismatch = []
    for query, key in pairs.tolist():
        beside = [other for other in (query - 1, query + 1) if key < other < size and not matches[other, key]]
        mismatch.append([(other, key, 1 / len(beside)) for other in beside])
    return pairs, mismatch


def _weights(pairs: Array, mismatch: Mismatch, size: int, matches: Array | None = None) -> Weights:
    """Weights of pairs and of their controls; pairs that lack a control are left out.

    Parameters
    ----------
    pairs : array (pair, 2)
    mismatch : list of list of (query, key, weight)
        For each pair, what the first control takes; nothing where there is none.
    size : int
        Tokens of the window.
    matches : array (query, key) of bool, optional
        What the second control leaves out, beside the first token of the window; no second control without it.
    """
    at = np.arange(size)
    away = np.maximum(at[:, None] - at, 0)
    kept = np.array([bool(one) for one in mismatch], dtype=bool)
    if matches is not None:
        free = (at[:, None] >= at) & (at > 0) & ~matches
        there = np.bincount(away[free], minlength=size)
        kept &= there[pairs[:, 0] - pairs[:, 1]] > 0
    pairs, mismatch = pairs[kept], [one for one, keeps in zip(mismatch, kept, strict=True) if keeps]
    queries = len(np.unique(pairs[:, 0]))
    score, other = np.zeros((size, size)), np.zeros((size, size))
    score[tuple(pairs.T)] = 1 / max(queries, 1)
    for query, key, weight in (one for several in mismatch for one in several):
        other[query, key] += weight / max(queries, 1)
    distance = None
    if matches is not None:
        share = np.bincount(pairs[:, 0] - pairs[:, 1], minlength=size) / np.maximum(there, 1) / max(queries, 1)
        distance = np.where(free, share[away], 0.0)
    return Weights(score, other, distance, queries)
