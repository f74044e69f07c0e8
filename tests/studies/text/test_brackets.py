"""Which brackets match and which lines are indented alike, against loops over characters and answers by hand."""

import re

import numpy as np
import pytest

from headwise.studies.text.brackets import relations, structure

SOURCE = '''import os  # not a bracket: (

def f(a, b=[1, (2)]):
    """A docstring ) over
        two lines (."""
    x = {"(": a[0],
         ")]": b}
    if x:

        # a comment between, further left
        return f(
            a)
    return x

y = f(1, ")")
'''


def by_loops(text):
    """Matches of brackets in code, and beginnings of lines with their indentation; only for sources like the above."""
    masked = list(text)
    for found in re.finditer(r'""".*?"""|"[^"\n]*"|#[^\n]*', text, re.DOTALL):
        for at in range(found.start(), found.end()):
            masked[at] = "_"
    matches, open_at = [], []
    for at, letter in enumerate(masked):
        if letter in "([{":
            open_at.append(at)
        if letter in ")]}":
            matches.append((open_at.pop(), at))
    lines, at = [], 0
    for line in text.split("\n"):
        first = at + len(line) - len(line.lstrip())
        in_bracket = any(start < at <= end for start, end in matches)
        in_string = at and masked[at - 1] == "_" and masked[first : first + 1] == ["_"] and masked[at] == "_"
        comment = line.lstrip().startswith("#")
        if line.strip() and not in_bracket and not in_string and not comment:
            lines.append((first, first - at))
        at += len(line) + 1
    return matches, lines


def words(text):
    """Tokens as GPT-2 cuts text: a word with the space before it, a mark by itself, a line break with its indent."""
    spans = [found.span() for found in re.finditer(r" ?\w+|\s+(?!\S)|\s+|[^\w\s]", text)]
    return np.array(spans).T


def letters(text):
    return np.arange(len(text)), np.arange(1, len(text) + 1)


def test_the_structure_of_a_source():
    matches, lines = by_loops(SOURCE)
    found = structure(SOURCE)
    assert found.brackets.tolist() == [list(pair) for pair in matches]
    assert found.lines.tolist() == [list(line) for line in lines]
    assert [SOURCE[at] for at, _ in lines] == list('id"xirry')
    assert [column for _, column in lines] == [0, 0, 4, 4, 4, 8, 4, 0]


def naive(text, starts, ends):
    """The pairs of each relation by loops over tokens, as sets."""
    matches, lines = by_loops(text)

    def token(at):
        return next((one for one in range(len(starts)) if starts[one] <= at < ends[one]), None)

    def nothing():
        return {name: set() for name in ("closing", "nested", "inside", "same", "block")}

    found = nothing()
    opening = {token(a) for a, _ in matches} - {None}
    closing = {token(b) for _, b in matches} - {None}
    for a, b in matches:
        if None not in (token(a), token(b)) and token(a) < token(b):
            found["closing"].add((token(b), token(a)))
    for query, key in found["closing"]:
        if (query, max(other for other in opening if other < query)) not in found["closing"]:
            found["nested"].add((query, key))
    for query in range(len(starts)):
        if query in opening | closing:
            continue
        around = [a for a, b in matches if a < starts[query] and b >= ends[query]]
        if around and token(max(around)) is not None:
            found["inside"].add((query, token(max(around))))
    seen = []
    for at, column in lines:
        if token(at) is None:
            continue
        for name, fits in (("same", lambda one, own=column: one == own), ("block", lambda one, own=column: one < own)):
            above = [key for key, one in seen if fits(one)]
            if above and above[-1] != token(at):
                found[name].add((token(at), above[-1]))
        seen.append((token(at), column))
    return found, opening


@pytest.mark.parametrize("cut", [letters, words])
@pytest.mark.parametrize(("first", "last"), [(0, None), (9, None), (21, -9), (40, 90)])
def test_relations_of_a_window_are_those_of_loops(cut, first, last):
    starts, ends = (side[first:last] for side in cut(SOURCE))
    expected, opening = naive(SOURCE, starts, ends)
    found = relations(structure(SOURCE), starts, ends)
    for name, pairs in expected.items():
        assert {tuple(pair) for pair in getattr(found, name).tolist()} == pairs, name
    assert set(found.openers.tolist()) == opening
    assert expected["closing"]


def test_by_hand():
    text = "if f(g(1), [2]):\n    x\n    y\nz\n"
    starts, ends = words(text)
    tokens = [text[a:b] for a, b in zip(starts, ends, strict=True)]
    assert tokens == ["if", " f", "(", "g", "(", "1", ")", ",", " ", "[", "2", "]", ")", ":", "\n   ", " x", "\n   ",
                      " y", "\n", "z", "\n"]  # fmt: skip
    found = relations(structure(text), starts, ends)
    assert found.closing.tolist() == [[6, 4], [11, 9], [12, 2]]
    assert found.nested.tolist() == [[12, 2]]
    assert found.inside.tolist() == [[3, 2], [5, 4], [7, 2], [8, 2], [10, 9]]
    assert found.openers.tolist() == [2, 4, 9]
    assert found.same.tolist() == [[17, 15], [19, 0]]
    assert found.block.tolist() == [[15, 0], [17, 0]]
    assert found.starts.tolist() == [[0, 0], [15, 4], [17, 4], [19, 0]]
    assert found.closes.tolist() == [6, 11, 12]
    assert found.breaks.tolist() == [14, 16, 18]


def test_a_bracket_that_was_opened_before_the_window_matches_nothing():
    text = "f(1, (2), 3)\n"
    starts, ends = letters(text)
    found = relations(structure(text), starts[3:], ends[3:])
    assert found.closing.tolist() == [[4, 2]]
    assert found.inside.tolist() == [[3, 2]]
    assert found.closes.tolist() == [4]


def test_two_brackets_in_one_token():
    text = "f(g((1)))\n"
    starts, ends = np.array([0, 1, 2, 3, 5, 6]), np.array([1, 2, 3, 5, 6, 9])
    assert [text[a:b] for a, b in zip(starts, ends, strict=True)] == ["f", "(", "g", "((", "1", ")))"]
    found = relations(structure(text), starts, ends)
    assert found.closing.tolist() == [[5, 1], [5, 3]]
    assert found.nested.tolist() == []
    assert found.inside.tolist() == [[2, 1], [4, 3]]


def test_an_f_string_is_a_string():
    text = 'f"{g(1)}" + h(2)\n'
    assert structure(text).brackets.tolist() == [[13, 15]]


@pytest.mark.parametrize("text", ["He said (to me", "two words\n", "f(1]\n", "x = '\n", "\0", "  x\ny\n"])
def test_what_is_no_python_has_no_structure(text):
    assert structure(text) is None


def test_a_source_with_nothing_in_it():
    found = structure("# only a comment\n")
    assert found.brackets.shape == found.lines.shape == (0, 2)
    empty = relations(found, np.array([0, 1]), np.array([1, 2]))
    assert [len(part) for part in empty] == [0] * 9


def test_a_form_feed_sets_the_column_back():
    text = "x = 1\n\x0cdef g():\n  y = (1)\n"
    assert structure(text).lines.tolist() == [[0, 0], [7, 0], [18, 2]]
