"""Random sets of other heads beside what was asked for: which are drawn, and how often they do as much damage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError
from ...interventions.base.shape import Shape
from ...interventions.declare.components import Component
from ...interventions.declare.edits import Edit, SiteEdit
from ...interventions.declare.sites import Head
from ...metrics.card import Metric
from ...metrics.statistics import control_sets, null_p_value

Array = np.ndarray[Any, Any]
CONTROLS = {"same layers": True, "all layers": False}
"""Random sets in the same layers as the set, and over all layers."""
WORSE = {"lower": 1, "higher": -1}
"""Sign that turns a change of a metric into damage, by which way a model does better."""


@dataclass(frozen=True, eq=False)
class Controls:
    """Random sets of heads of a measurement, and where they stand among the conditions of its plan.

    Attributes
    ----------
    draws, seed : int
    rows : array (condition, control, draw)
        The condition of the plan; -1 beyond the sets that exist.
    heads : array (condition, control, draw)
        As text, such as ``L0H1 L1H2``; empty beyond the sets that exist.
    """

    draws: int
    seed: int
    rows: Array
    heads: Array


def random_sets(heads: Collection[Head], shape: Shape, draws: int, seed: int) -> dict[str, list[tuple[Head, ...]]]:
    """Draw random sets of as many other heads.

    Parameters
    ----------
    heads : collection of Head
    shape : Shape
    draws : int
        Sets of each control; all distinct ones where there are fewer.
    seed : int

    Returns
    -------
    dict of control to list of tuples of Head
        See `headwise.metrics.control_sets`.
    """
    places = [(head.layer, head.head) for head in heads]
    return {
        control: [
            tuple(sorted(Head(*place) for place in one))
            for one in control_sets(places, shape.layers, shape.heads, draws, seed, matched)
        ]
        for control, matched in CONTROLS.items()
    }


def with_controls(
    conditions: Sequence[Sequence[Edit]], metrics: Sequence[Metric], model: str, shape: Shape, draws: int, seed: int
) -> tuple[Controls, list[Sequence[Edit]]]:
    """Draw random sets for each condition.

    Parameters
    ----------
    conditions : sequence of sequences of Edit
    metrics : sequence of Metric
    model : str
        Name, for messages.
    shape : Shape
    draws : int
        Sets of each control; all distinct ones where there are fewer.
    seed : int

    Returns
    -------
    tuple of Controls and list of sequences of Edit
        The conditions that were given come first; a set that several conditions draw stands there once.

    Raises
    ------
    DeclarationError
        Random sets of heads have no meaning for a condition or a metric, or there are none.
    """
    said = f"controls={draws}: "
    for metric in metrics:
        if metric.card.better not in WORSE:
            raise DeclarationError(f"{said}{metric.name} does not say which way a model does better")
    if not conditions:
        raise DeclarationError(f"{said}they are random sets of heads, and nothing is intervened on")
    numbers = {tuple(edits): number for number, edits in enumerate(conditions)}
    whole: list[Sequence[Edit]] = list(conditions)
    drawn: list[list[list[tuple[Head, ...]]]] = []
    rows: list[list[list[int]]] = []
    for edits in conditions:
        first, heads = _of_one_kind(edits, said)
        drawn.append(list(random_sets(heads, shape, draws, seed).values()))
        rows.append([])
        for sets in drawn[-1]:
            found = [tuple(replace(first, site=head.z) for head in one) for one in sets]
            for one in found:
                if one not in numbers:
                    numbers[one] = len(whole)
                    whole.append(one)
            rows[-1].append([numbers[one] for one in found])
    most = max(len(sets) for of_one in drawn for sets in of_one)
    if not most:
        raise DeclarationError(f"{said}{model} has not enough other heads to draw a set from")
    places = np.full((len(conditions), len(CONTROLS), most), -1)
    texts = np.full(places.shape, "", dtype=object)
    for row, column in np.ndindex(places.shape[:2]):
        count = len(rows[row][column])
        places[row, column, :count] = rows[row][column]
        texts[row, column, :count] = [" ".join(map(str, heads)) for heads in drawn[row][column]]
    return Controls(draws, seed, places, texts), whole


def _of_one_kind(edits: Sequence[Edit], said: str) -> tuple[SiteEdit, list[Head]]:
    """The first of the edits of a condition, and the whole heads that they change, all in one way."""
    if not edits:
        raise DeclarationError(f"{said}they are random sets of heads, and a condition changes nothing")
    found: list[SiteEdit] = []
    heads = []
    for edit in edits:
        site = edit.site
        if not isinstance(edit, SiteEdit):
            raise DeclarationError(f"{said}they replace whole heads, and {edit} is none")
        if site.component is not Component.z or site.head is None or site.positions is not None:
            raise DeclarationError(f"{said}they replace whole heads, and {site} is none")
        found.append(edit)
        heads.append(Head(site.layer, site.head))
    if any(replace(edit, site=found[0].site) != found[0] for edit in found):
        raise DeclarationError(f"{said}what is done to the heads of one condition must be of one kind, got {edits}")
    return found[0], heads


def control_p(own: xr.DataArray, control: xr.DataArray, base: xr.DataArray, sign: int) -> xr.DataArray:
    """How often random sets do at least as much damage, by means over examples.

    Parameters
    ----------
    own : DataArray (axes..., example)
    control : DataArray (axes..., control, draw, example)
        NaN beyond the sets that exist.
    base : DataArray (example)
        The run without intervention.
    sign : int
        Turns a change into damage.

    Returns
    -------
    DataArray (axes..., control)
    """
    mine, random = (sign * (part - base).mean("example") for part in (own, control))
    p: xr.DataArray = xr.apply_ufunc(
        null_p_value, mine, random, input_core_dims=[[], ["draw"]], vectorize=True, join="exact"
    )
    least = 1 / (1 + control.sizes["draw"])
    words = f"p: (1 + random sets that do at least as much damage) / (1 + sets), at least {least:.2g}"
    return p.assign_attrs(long_name=words, units="1")
