"""Prompts from text whose end recurs: a task with a clean and a corrupted run, for circuits and patching."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import LARGEST_SEED, MOST_PROMPTS, DeclarationError, whole
from ..tasks.prompts import Prompts
from .occurrences import draw_replaced, find
from .own_prompts import FORMAT, parse, read_lines, replaced
from .windows import windows

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]
MOST_WINDOWS, OTHERS = 1024, 64
"""Windows that are looked through, and those that other pairs come from."""


def recurring_prompts(
    model: Model,
    text: str | os.PathLike[str] | None = None,
    *,
    n: int = 32,
    context: int = 64,
    distance: int = 4,
    seed: int = 0,
    first: int = 0,
) -> Prompts:
    """Prompts from text, each of which ends where a pair of tokens recurs; corrupted, the first pair is another one.

    A prompt ends with the first token of a pair that stood in it exactly once before, and the answer is the pair's
    second token, the only one that had followed the first. In the corrupted run another pair of the text stands where
    the pair first stood, and the distractor is its second token, so that copying what followed before favours the
    answer in the clean run and nothing in particular in the corrupted one. All prompts have the same length.

    Parameters
    ----------
    model : Model
    text : str or path, optional
        A file or folder of text that the model has not read; left out, its own folder ``held_out``.
    n : int
        Prompts, of windows of their own.
    context : int
        Tokens of a prompt.
    distance : int
        Tokens at least from the first pair to the end.
    seed : int
        The same seed draws the same prompts.
    first : int
        Leaves out the first so many of the prompts that the seed draws: with ``first=n`` one gets as many others.

    Returns
    -------
    Prompts
        With ``answers``, ``distractors`` and ``corrupted``, as token ids.

    Raises
    ------
    DeclarationError
        There is no text, it has too few pairs that recur, or a value is not possible.

    Examples
    --------
    >>> task = hw.recurring_prompts(hw.load("code-4l"), n=2, context=24)
    >>> [len(tokens) for tokens in task.prompts], len(task.corrupted)
    ([24, 24], 2)
    """
    n = whole(n, "n, the number of prompts,", low=1, high=MOST_PROMPTS)
    context = whole(context, "context, the tokens of a prompt,", low=4)
    distance = whole(distance, "distance, the tokens between the pairs,", low=2, high=context)
    if context >= model.shape.context:
        raise DeclarationError(
            f"context={context}: {model.name} reads at most {model.shape.context} tokens, the answer among them"
        )
    seed, first = whole(seed, "a seed", high=LARGEST_SEED), whole(first, "first", high=MOST_PROMPTS)
    cut = windows(model, text, min(max(4 * context, context + 1), model.shape.context), MOST_WINDOWS, seed)
    found = find(cut.tokens)
    start = found.second - context
    able = (found.candidates == 1) & (found.distance >= distance) & (start >= 0) & (found.first > start)
    random = np.random.default_rng((seed, 3))
    rows: list[tuple[Array, Array, int, int]] = []
    taken: set[int] = set()
    for number in random.permutation(np.flatnonzero(able)):
        one = found.where(np.array([number]))
        window, t, j = (int(part[0]) for part in (one.window, one.second, one.first))
        if window in taken:
            continue
        changed = draw_replaced(cut.tokens, cut.others[:OTHERS], one, 1, int(random.integers(LARGEST_SEED))).without
        if not len(changed):
            continue
        taken.add(window)
        shown = slice(t - context, t)
        rows.append((cut.tokens[window][shown], changed[0][shown], int(cut.tokens[window, t]), int(changed[0][j])))
        if len(rows) == first + n:
            break
    if len(rows) < first + n:
        raise DeclarationError(
            f"{len(rows)} windows of the text have a pair that recurs within {context} tokens, and {first + n} are "
            "needed: give more text, longer prompts (context=) or fewer (n=)"
        )
    return _task(rows[first:])


def line_prompts(model: Model, path: str | Path, seed: int = 0) -> Prompts:
    """Prompts of a file, whose last word stood before, as a task: what followed that word is the answer.

    In the corrupted run the first word and what followed it are tokens of other prompts.

    Parameters
    ----------
    model : Model
    path : str or Path
        One prompt in a line, as ``headwise text --prompts`` takes them.
    seed : int
        Of the tokens that replace the first occurrence.

    Returns
    -------
    Prompts

    Raises
    ------
    DeclarationError
        The file cannot be read, a prompt cannot be used, or no other prompt has tokens to replace its own by.
    """
    lines = [parse(model, one) for one in read_lines(path)]
    rows = []
    for line, other in zip(lines, replaced(lines, seed), strict=True):
        if other is None:
            raise DeclarationError(f"prompt {line.text!r} has no other prompt to take other tokens from; give {FORMAT}")
        rows.append((line.tokens[:-1], other[: len(line.tokens) - 1], line.tokens[-1], other[line.first]))
    return _task(rows)


def _task(rows: list[Any]) -> Prompts:
    clean, corrupted, answers, distractors = zip(*rows, strict=True)
    return Prompts(
        tuple(tuple(map(int, row)) for row in clean),
        tuple((one,) for one in answers),
        tuple((one,) for one in distractors),
        tuple(tuple(map(int, row)) for row in corrupted),
    )
