"""Pairs of heads with their composition: from a study, or from an array made by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ....errors import DeclarationError, UnknownNameError, choices
from .inputs import array_of, dataset_of, labels_of, listed, names_of, need
from .style import dimension, head_name

PAIR = ("sender_layer", "sender_head", "receiver_layer", "receiver_head")


@dataclass(frozen=True)
class Pairs:
    """Every pair with a score.

    Attributes
    ----------
    table : dict
        Columns ``sender``, ``receiver`` (names), ``sender_layer``, ``receiver_layer``, ``score``, and ``value``: what
        is drawn.
    shown : holoviews.Dimension
        What `value` is.
    kind : str
        ``"q"``, ``"k"``, ``"v"`` or nothing.
    above : bool
        Whether `value` is the distance from the floor of random weights, in deviations.
    """

    table: dict[str, Any]
    shown: Any
    kind: str
    above: bool


def pairs_of(ds: Any, kind: str | None, *, variant: str, deviations: bool | None, what: str) -> Pairs:
    """The pairs of one kind of composition, see `composition_matrix` for the arguments.

    Parameters
    ----------
    ds, kind, variant, deviations
        As for `composition_matrix`.
    what : str
        Name of the picture, for messages.

    Returns
    -------
    Pairs

    Raises
    ------
    UnknownNameError
        For a kind or a variant that is not there.
    DeclarationError
        For other dims, and where no pair has a score.
    """
    ds, name = dataset_of(ds, what, None if isinstance(ds, xr.DataArray) else "composition")
    scores = array_of(ds[name], what, PAIR)
    wanted = {"kind": kind, "variant": variant if "variant" in scores.dims else None}
    for dim, label in wanted.items():
        if dim not in scores.dims:
            continue
        known = names_of(scores, dim)
        if label is None and len(known) == 1:
            label = known[0]
        if label not in known:
            asked = f"no {label!r}-composition is here" if label is not None else f"{what} draws one {dim}: name it"
            raise UnknownNameError(f"{asked}: there are {choices(known)}")
        scores, ds = scores.isel({dim: known.index(label)}), ds.isel({dim: known.index(label)})
    if set(scores.dims) != set(PAIR):
        has = listed(scores.dims) or "no dims"
        extra = [str(dim) for dim in scores.dims if dim not in PAIR]
        advice = f": select one {extra[0]} first" if extra and set(scores.dims) > set(PAIR) else ""
        raise DeclarationError(f"{what} draws ({', '.join(PAIR)}), and this has {has}{advice}")
    kind = kind or (str(ds["kind"].item()) if "kind" in ds.coords and ds["kind"].ndim == 0 else "")
    scores = scores.transpose(*PAIR)
    at = np.nonzero(np.isfinite(scores.values))
    if not at[0].size:
        raise DeclarationError(f"{what}: no pair of heads has a score")
    places = [labels_of(scores, dim)[index] for dim, index in zip(PAIR, at, strict=True)]
    table: dict[str, Any] = {
        "sender": [head_name(*one) for one in zip(places[0], places[1], strict=True)],
        "receiver": [head_name(*one) for one in zip(places[2], places[3], strict=True)],
        "sender_layer": places[0],
        "receiver_layer": places[2],
        "score": np.asarray(scores.values[at], dtype=float),
    }
    words = f"{kind.upper()}-" if kind else ""
    above = {"floor_mean", "floor_sd"} <= set(ds) if deviations is None else deviations
    if not above:
        title = f"{words}{scores.attrs.get('long_name', 'composition score')}"
        return Pairs(table | {"value": table["score"]}, dimension("value", scores, title), kind, False)
    need(ds, f"{what} in deviations", "floor_mean", "floor_sd")
    table["value"] = (table["score"] - float(ds["floor_mean"])) / float(ds["floor_sd"])
    words = f"{words}composition above random weights" if words else "composition above random weights"
    return Pairs(table, hv.Dimension(("value", words), unit="deviations"), kind, True)
