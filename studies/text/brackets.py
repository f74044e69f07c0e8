"""Where brackets match and where lines begin in Python source, in characters and then in the tokens of a window.

Python's own tokenizer reads the source, so that brackets in strings and comments are none. Imports no model.
"""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
OPENING, CLOSING = "([{", ")]}"
STRING_DEPTH = {
    getattr(tokenize, f"{kind}STRING_{end}", None): step for kind in "FT" for end, step in (("START", 1), ("END", -1))
}
"""Kinds of tokens that begin and end an f-string or t-string, where Python splits these, and what they add to depth."""


NO_LINE = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
"""Kinds of tokens with which no line begins."""


class Structure(NamedTuple):
    """The brackets and the lines of a source text.

    Attributes
    ----------
    brackets : array (pair, 2)
        Characters at which a bracket opens and its match closes, in the order of the closing ones.
    lines : array (line, 2)
        Of each logical line, one statement or clause: where its first character that is no space stands, and how many
        characters it is indented by. Comments, empty lines and lines inside brackets or strings are none.
    """

    brackets: Array
    lines: Array


class Relations(NamedTuple):
    """What matches what in a window: pairs of positions ``(pair, 2)``, the later one (the query) first.

    Attributes
    ----------
    closing : array (pair, 2)
        A token with a closing bracket, and the one with the bracket that opens it.
    nested : array (pair, 2)
        Those of `closing` of tokens for which the last token with an opening bracket before it is the wrong one.
    inside : array (pair, 2)
        A token without a bracket, and the one that opens the innermost bracket around it.
    same : array (pair, 2)
        The first token of a line, and that of the nearest line above with the same indentation.
    block : array (pair, 2)
        The first token of a line, and that of the nearest line above with less indentation: the line that opens the
        block.
    openers : array (place,)
        Tokens with an opening bracket.
    starts : array (line, 2)
        First token of each line, and by how many characters the line is indented.
    closes, breaks : array (place,)
        Tokens with a closing bracket whose opening one is in the window; tokens that write the end of a line and the
        indentation of the next one. Their loss says how well these are predicted.
    """

    closing: Array
    nested: Array
    inside: Array
    same: Array
    block: Array
    openers: Array
    starts: Array
    closes: Array
    breaks: Array


def structure(text: str) -> Structure | None:
    """Brackets and lines of Python source; None for a text that is no Python.

    Examples
    --------
    >>> from headwise.studies.text.brackets import structure
    >>> structure("f(')', [1])").brackets.tolist()
    [[7, 9], [1, 10]]
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the source, such as of an escape sequence
            ast.parse(text)
        tokens = [*tokenize.generate_tokens(io.StringIO(text).readline)]
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    line_at = np.cumsum([0, *map(len, io.StringIO(text))])
    open_at: list[int] = []
    brackets, lines = [], []
    depth, begins = 0, True
    for token in tokens:
        (row, column), kind = token.start, token.type
        depth += STRING_DEPTH.get(kind, 0)
        if kind == tokenize.OP and depth == 0 and token.string in OPENING:
            open_at.append(int(line_at[row - 1]) + column)
        elif kind == tokenize.OP and depth == 0 and token.string in CLOSING:
            brackets.append((open_at.pop(), int(line_at[row - 1]) + column))
        if begins and kind not in NO_LINE:
            blank = token.line[:column]  # a form feed sets the column back to 0
            lines.append((int(line_at[row - 1]) + column, len(blank) - 1 - blank.rfind("\f")))
        begins = kind == tokenize.NEWLINE or (begins and kind in NO_LINE)
    return Structure(_pairs(brackets), _pairs(lines))


def relations(found: Structure, starts: Array, ends: Array) -> Relations:
    """What matches what in a window of tokens. What begins before the window, or ends after it, matches nothing.

    Parameters
    ----------
    found : Structure
        Of the whole text, so that a bracket that was opened before the window is known to be none of the window's.
    starts, ends : array (position,)
        Characters of the text at which each token begins and after which it ends.

    Returns
    -------
    Relations
    """
    first, last = int(starts[0]), int(ends[-1])
    opens, closes = found.brackets[:, 0], found.brackets[:, 1]
    openers = _tokens_of(opens, starts, ends)
    whole = found.brackets[(opens >= first) & (closes < last)]
    pairs = np.searchsorted(ends, whole[:, ::-1], side="right")
    closing = np.unique(pairs[pairs[:, 0] > pairs[:, 1]], axis=0)
    matched = {*map(tuple, closing.tolist())}
    bracketed = {*openers.tolist(), *_tokens_of(closes, starts, ends).tolist()}
    inside = []
    for query in range(len(starts)):
        around = opens[(opens < starts[query]) & (closes >= ends[query])]
        if query not in bracketed and len(around) and around.max() >= first:
            inside.append((query, int(np.searchsorted(ends, around.max(), side="right"))))
    begin, columns = found.lines[(found.lines[:, 0] >= first) & (found.lines[:, 0] < last)].T
    begun = np.searchsorted(ends, begin, side="right")
    same: list[tuple[int, int]] = []
    block: list[tuple[int, int]] = []
    for line, query in enumerate(begun):
        for into, fits in ((same, columns[:line] == columns[line]), (block, columns[:line] < columns[line])):
            if fits.any() and (key := begun[:line][fits][-1]) < query:
                into.append((query, key))
    breaks = [np.flatnonzero((ends >= at - column) & (ends <= at)) for at, column in zip(begin, columns, strict=True)]
    return Relations(
        closing,
        _pairs([pair for pair in closing if (pair[0], openers[openers < pair[0]][-1]) not in matched]),
        _pairs(inside),
        _pairs(same),
        _pairs(block),
        openers,
        np.stack([begun, columns], axis=1),
        np.unique(closing[:, 0]),
        np.unique(np.concatenate([np.empty(0, dtype=int), *breaks])),
    )


def _tokens_of(characters: Array, starts: Array, ends: Array) -> Array:
    """The tokens of a window that hold these characters of the text."""
    here = characters[(characters >= starts[0]) & (characters < ends[-1])]
    tokens: Array = np.unique(np.searchsorted(ends, here, side="right"))
    return tokens


def _pairs(found: Sequence[Any]) -> Array:
    return np.array(found, dtype=int).reshape(-1, 2)
