"""Composition as a graph: heads by layer, an edge for each pair that composes beyond what random weights do."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ...errors import UnknownNameError, choices
from .heads import names_of_heads
from .parts.dots import dots, shift
from .parts.inputs import Array, labels_of, part_of, per_head
from .parts.pairs import PAIR, Pairs, pairs_of
from .parts.style import INK, WEIGHTS, bar, by_role, head_name, hover, overlay, styled

ALL, TOP = 48, 24
"""Up to so many heads all are drawn, else those with an edge; how many edges are drawn."""
BEYOND = 2.0
"""Deviations from the random floor from which a pair is drawn."""
THINNEST, THICKEST = 1.0, 7.0
EDGES = list(WEIGHTS[60:])
WIDTH, STOREY, ASIDE = 620, 130, 0.02
"""Pixels: width of the figure, and height of a layer; and how far layers are moved sideways, as a share of it."""


def composition_graph(
    ds: xr.Dataset | xr.DataArray,
    kind: str | None = "k",
    *,
    variant: str = "folded",
    roles: xr.DataArray | None = None,
    senders: Collection[str] = (),
    receivers: Collection[str] = (),
    top: int = TOP,
    title: str = "",
) -> Any:
    """Heads by layer, layer 0 at the bottom, and the strongest pairs between them.

    An edge is as wide and dark as its score is far above the floor of random weights; where the floor is known, only
    pairs more than two deviations above it are drawn.

    Parameters
    ----------
    ds : Dataset or DataArray
        As for `composition_matrix`.
    kind : {"q", "k", "v"}, optional
    variant : {"folded", "raw"}
    roles : DataArray (layer, head) of text, optional
        Role of each head, such as ``tree["heads"]["role"]``: gives heads their colour and marker.
    senders, receivers : collections of str
        Draw only pairs from and into these heads, such as from the previous-token to the induction heads; by default
        all.
    top : int
        How many edges at most, the strongest.
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Segments`` (one for each edge, weakest first; ``value``, ``sender``, ``receiver``, ``score``, ``width``),
        ``Points`` for each role (``at``, ``layer``; name, role), ``Labels`` with the names.

    Raises
    ------
    UnknownNameError
        For a kind or a variant that is not there, and for senders or receivers that no pair has.
    DeclarationError
        For other dims, and where no pair has a score.
    """
    ds = part_of(ds, "composition_graph", "composition")
    composed = ds["composition"] if isinstance(ds, xr.Dataset) and "composition" in ds else ds
    if isinstance(composed, xr.DataArray) and "kind" not in composed.dims:
        kind = None
    found = pairs_of(ds, kind, variant=variant, deviations=None, what="composition_graph")
    table = found.table
    sent, received = (np.asarray(table[side], dtype=object) for side in ("sender", "receiver"))
    for given, known in ((senders, sent), (receivers, received)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise UnknownNameError(f"composition_graph: no pair has {choices(unknown)} on that side")
    keep = np.ones(len(sent), dtype=bool)
    for given, known in ((senders, sent), (receivers, received)):
        if given:
            keep &= np.isin(known.astype(str), list(given))
    if found.above:
        keep &= table["value"] > BEYOND
    order = np.flatnonzero(keep)
    order = order[np.argsort(table["value"][order], kind="stable")][-top:]
    role = _roles(roles)
    nodes = _nodes(found, composed, {*sent[order], *received[order], *senders, *receivers})
    parts = [_edges(found, order, nodes), *_dots(nodes, role), *_names(nodes)]
    layers = sorted({layer for _, layer, _ in nodes.values()})
    if not len(order):
        title = f"{title}{': ' if title else ''}no pair is above random weights"
    return overlay(
        parts,
        title=title,
        width=WIDTH,
        height=140 + len(layers) * (STOREY if len(layers) < 4 else STOREY // 2),
        xaxis=None,
        ylabel="layer",
        yticks=[(place, str(label)) for label, place in {label: at for _, at, label in nodes.values()}.items()],
        xlim=(-0.06, 1.06),
        ylim=(layers[0] - 0.45, layers[-1] + 0.45),
        show_legend=roles is not None,
        legend_cols=2,
    )


def _roles(roles: xr.DataArray | None) -> dict[str, str]:
    if roles is None:
        return {}
    text = roles.transpose("layer", "head") if set(roles.dims) == {"layer", "head"} else per_head(roles, "roles")
    return dict(zip(names_of_heads(text), map(str, text.values.ravel()), strict=True))


def _nodes(found: Pairs, composed: Any, shown: Collection[str]) -> dict[str, tuple[float, float, Any]]:
    """Place of each head that is drawn, across (0 to 1) and up, and the label of its layer."""
    scores = composed if isinstance(composed, xr.DataArray) else composed[next(iter(composed.data_vars))]
    heads: dict[str, tuple[Any, Any]] = {}
    for layer_dim, head_dim in (PAIR[:2], PAIR[2:]):
        for layer in labels_of(scores, layer_dim):
            heads |= {head_name(layer, head): (layer, head) for head in labels_of(scores, head_dim)}
    paired = {*found.table["sender"], *found.table["receiver"]}
    drawn = [name for name in heads if name in (paired if len(heads) <= ALL else shown)] or sorted(paired)[:ALL]
    layers = list(dict.fromkeys(heads[name][0] for name in heads if name in set(drawn)))
    nodes: dict[str, tuple[float, float, Any]] = {}
    for place, layer in enumerate(layers):
        here = [name for name in drawn if heads[name][0] == layer]
        whole = [name for name in heads if heads[name][0] == layer]
        aside = ASIDE * (place % 3 - 1) if len(layers) > 2 else 0.0  # an edge past a layer is seen beside its heads
        across = {name: at / (len(whole) - 1) if len(whole) > 1 else 0.5 for at, name in enumerate(whole)}
        nodes |= {name: (across[name] + aside, float(place), layer) for name in here}
    return nodes


def _edges(found: Pairs, order: Array, nodes: dict[str, tuple[float, float, Any]]) -> Any:
    value = found.table["value"][order]
    high = float(value.max()) if len(value) else 1.0
    low = BEYOND if found.above else min(0.0, float(value.min()) if len(value) else 0.0)
    share = (value - low) / (high - low or 1.0)
    columns: dict[str, Any] = {
        side: np.asarray(found.table[side], dtype=object)[order] for side in ("sender", "receiver")
    }
    ends = {name: np.array([nodes[one][:2] for one in columns[name]]).reshape(-1, 2) for name in columns}
    table = {"x0": ends["sender"][:, 0], "y0": ends["sender"][:, 1]}
    table |= {"x1": ends["receiver"][:, 0], "y1": ends["receiver"][:, 1]}
    table |= {"value": value, **columns, "score": found.table["score"][order]}
    table |= {"width": THINNEST + (THICKEST - THINNEST) * share}
    edges = hv.Segments(table, ["x0", "y0", "x1", "y1"], [found.shown, "sender", "receiver", "score", "width"])
    digits = "0.0" if found.above else "0.000"
    tips = hover(found.shown, f"@value{{{digits}}}", ("from", "@sender"), ("into", "@receiver"), ("score", "@score"))
    look = {
        "color": "value",
        "cmap": EDGES,
        "clim": (low, high if high > low else low + 1.0),
        "colorbar": bool(len(order)),
    }
    return styled(edges, line_width=hv.dim("width"), **look, **bar(found.shown.pprint_label), **tips)


def _dots(nodes: dict[str, tuple[float, float, Any]], role: dict[str, str]) -> list[Any]:
    """The heads, for each role those that have it."""
    names, parts = list(nodes), []
    for kind, look, places in by_role([role.get(name, "other") for name in names]):
        here = [names[at] for at in places]
        table: dict[str, Any] = {"at": [nodes[name][0] for name in here], "layer": [nodes[name][1] for name in here]}
        table |= {"name": here, "role": [kind] * len(here)}
        tips = {"tools": ["hover"], "hover_tooltips": [("head", "@name"), *([("role", "@role")] if role else [])]}
        parts.append(dots(table, ["at", "layer"], kind, look, 13, **tips))
    return parts


def _names(nodes: dict[str, tuple[float, float, Any]]) -> list[Any]:
    """Names, below the heads of the lowest layer and above all others."""
    low = min(place for _, place, _ in nodes.values())
    parts = []
    for below in (True, False):
        here = [name for name in nodes if (nodes[name][1] == low) == below]
        table = ([nodes[name][0] for name in here], [nodes[name][1] for name in here], here)
        labels = hv.Labels(table, ["x", "y"], "name")
        look = {"text_font_size": "11px", "text_color": INK, "text_baseline": "top" if below else "bottom"}
        parts.append(styled(labels, **look, hooks=[shift(0, 10 if below else -10)]))
    return parts
