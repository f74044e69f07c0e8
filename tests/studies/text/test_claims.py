"""What each claim weighs, and what it is compared with, against loops over queries and keys."""

import numpy as np
import pytest

from headwise.studies.text.brackets import relations, structure
from headwise.studies.text.claims import CLAIMS, places, weights

from .test_brackets import SOURCE, words


def window(text, first=0, last=None):
    """Token ids, texts and relations of a source cut into words."""
    starts, ends = (side[first:last] for side in words(text))
    texts = [text[a:b] for a, b in zip(starts, ends, strict=True)]
    ids = {one: number for number, one in enumerate(dict.fromkeys(texts))}
    return np.array([ids[one] for one in texts]), texts, relations(structure(text), starts, ends)


def random_pattern(size, seed=0):
    pattern = np.tril(np.random.default_rng(seed).random((size, size)))
    return pattern / pattern.sum(axis=1, keepdims=True)


def matched(name, tokens, related):
    """All pairs that match, by loops."""
    size = len(tokens)
    repeats = {(i, j) for i in range(size) for j in range(i) if tokens[i] == tokens[j]}
    after = {(i, j) for i in range(size) for j in range(1, i + 1) if tokens[i] == tokens[j - 1]}
    if name == "induction":
        return after, set()
    if name == "duplicate token":
        return repeats, set()
    if name == "last bracket":
        right = [*related.inside.tolist(), *related.closing.tolist()]
        last = [(query, max(k for k in related.openers.tolist() if k < query)) for query, _ in right]
        return {pair for pair in last if list(pair) not in right}, repeats | after
    part = {"closing bracket": "closing", "nested bracket": "nested", "inside bracket": "inside",
            "same indentation": "same", "block opener": "block"}[name]  # fmt: skip
    return {tuple(pair) for pair in getattr(related, part).tolist()}, repeats | after


def wrong_pairs(name, query, key, tokens, related, pairs, other):
    """The pairs of the first control of a pair, by loops."""
    if name in ("induction", "duplicate token"):
        return [(q, key) for q in (query - 1, query + 1) if key < q < len(tokens) and (q, key) not in pairs]
    keys = [k for k in related.openers.tolist() if k < query]
    if name == "last bracket":
        keys = [k for q, k in [*related.inside.tolist(), *related.closing.tolist()] if q == query]
    if name in ("same indentation", "block opener"):
        indent = dict(related.starts.tolist())
        header = dict(related.block.tolist()).get(query)
        lines = [k for k in indent if k < query]
        if name == "same indentation":
            keys = [k for k in lines if indent[k] != indent[query] and k != header]
        else:
            keys = [k for k in lines if indent[k] >= indent[query]]
    keys = [k for k in keys if k > 0 and (query, k) not in pairs | other]
    if not keys:
        return []
    nearest = min(keys, key=lambda k: (abs(k - key), -k))
    return [(query, max(keys) if name == "nested bracket" else nearest)]


@pytest.mark.parametrize("name", [name for name in CLAIMS if "token" not in name or name == "duplicate token"])
@pytest.mark.parametrize(("first", "last"), [(0, None), (5, None)])
def test_scores_and_controls_are_those_of_loops(name, first, last):
    tokens, _, related = window(SOURCE, first, last)
    size = len(tokens)
    pattern = random_pattern(size)
    pairs, other = matched(name, tokens, related)
    score, mismatch, distance, queries, along = 0.0, 0.0, 0.0, set(), {}
    for query, key in ((q, k) for q in range(size) for k in range(1, q + 1) if (q, k) not in pairs):
        along.setdefault(query - key, []).append(pattern[query, key])
    for query, key in sorted(pairs):
        if key == 0 or key == query or (query, key) in other:
            continue
        wrong = wrong_pairs(name, query, key, tokens, related, pairs, other)
        if not wrong or query - key not in along:
            continue
        queries.add(query)
        score += pattern[query, key]
        mismatch += np.mean([pattern[pair] for pair in wrong])
        distance += np.mean(along[query - key])
    found = weights(tokens, related)[name]
    assert found.queries == len(queries) > 0
    for weight, total in zip(found[:3], (score, mismatch, distance), strict=True):
        np.testing.assert_allclose((pattern * weight).sum(), total / len(queries))


@pytest.mark.parametrize(("name", "first", "key", "wrong"), [
    ("previous token", 3, lambda q: q - 1, lambda q: q - 2),
    ("current token", 2, lambda q: q, lambda q: q - 1),
    ("first token", 2, lambda q: 0, lambda q: 1),
])  # fmt: skip
def test_claims_about_a_place(name, first, key, wrong):
    tokens = np.array([3, 1, 4, 1, 5, 9, 2])
    pattern = random_pattern(7)
    found = weights(tokens, None)[name]
    assert (found.queries, found.same_distance) == (7 - first, None)
    for weight, of in ((found.score, key), (found.mismatch, wrong)):
        np.testing.assert_allclose((pattern * weight).sum(), np.mean([pattern[q, of(q)] for q in range(first, 7)]))


def test_without_structure_brackets_and_lines_are_left_out():
    assert list(weights(np.arange(9), None)) == [
        "induction", "duplicate token", "previous token", "current token", "first token"]  # fmt: skip


def test_by_hand():
    tokens, texts, related = window("x = f(a, (b), [1], c)\n")
    assert texts == [
        "x",
        " ",
        "=",
        " f",
        "(",
        "a",
        ",",
        " ",
        "(",
        "b",
        ")",
        ",",
        " ",
        "[",
        "1",
        "]",
        ",",
        " c",
        ")",
        "\n",
    ]
    found = weights(tokens, related)["closing bracket"]
    assert np.argwhere(found.score).tolist() == [[10, 8], [15, 13], [18, 4]]
    assert np.argwhere(found.mismatch).tolist() == [[10, 4], [15, 8], [18, 8]]
    nested = weights(tokens, related)["nested bracket"]
    assert (nested.queries, np.argwhere(nested.score).tolist()) == (1, [[18, 4]])
    assert np.argwhere(nested.mismatch).tolist() == [[18, 13]]
    assert places(tokens, related)["closing bracket"].nonzero()[0].tolist() == [9, 14, 17]
    assert places(tokens, related)["nested bracket"].nonzero()[0].tolist() == [17]


def test_places_of_induction_and_of_lines():
    tokens, texts, related = window("if a:\n    b\n    c\na\n")
    assert [texts[at + 1] for at in places(tokens, related)["same indentation"].nonzero()[0]] == [
        "\n   ",
        "\n   ",
        "\n",
    ]
    tokens = np.array([1, 2, 3, 1, 2, 4, 1, 4])  # after 1 came 2; after 1, 2 came 3; 1 had not been followed by 4
    assert places(tokens, None)["induction"].nonzero()[0].tolist() == [3]
    assert places(tokens, None)["previous token"].nonzero()[0].tolist() == list(range(7))
