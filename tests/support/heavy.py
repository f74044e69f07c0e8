"""Which cases of a law run in `make test`, where it holds for every combination of several things."""

from itertools import product

import pytest


def heavy_but_few(*axes, often=None):
    """Parameters for every combination of some axes; most are marked heavy.

    Parameters
    ----------
    *axes : sequence
        The values of each.
    often : iterable of tuple, optional
        The combinations that are not heavy. Left out, as few as hold every value of every axis.
    """
    number = max(len(axis) for axis in axes)
    often = [tuple(axis[at % len(axis)] for axis in axes) for at in range(number)] if often is None else [*often]
    every = [*product(*axes)]
    assert all(one in every for one in often), "a combination that is not there would never run"
    return [pytest.param(*one, marks=() if one in often else pytest.mark.heavy) for one in every]
