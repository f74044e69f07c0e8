"""A circuit as a graph: its heads and MLPs by layer, an edge for each of its edges."""

from __future__ import annotations

from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ....errors import DeclarationError, whole
from ....interventions.declare.circuits import INPUT, LOGITS, Circuit, Edge, as_edge, node_of, one_score, place_of
from ....interventions.declare.graph import Graph
from ..parts.dots import dots, shift
from ..parts.inputs import array_of
from ..parts.style import BLUE, INK, ORANGE, PURPLE, dimension, hover, overlay, styled
from .bends import others_of, way

MOST = 100
"""How many edges are drawn."""
THINNEST, THICKEST = 1.0, 7.0
PARTS = {"q": ("read as query", BLUE), "k": ("read as key", ORANGE), "v": ("read as value", PURPLE)}
AGAINST, ABOVE = "dashed: against the behaviour", "dashed: score above 0"
OTHERS = ("by MLP or logits", "#5f5f5f")
PORTS = {"q": -0.006, "k": 0.0, "v": 0.006}
"""Where within a head an edge into its q, k or v ends, as a share of the width."""
Nodes = dict[str, tuple[float, int, str]]
"""Place of each node, across (0 to 1) and up, and the label of its row."""
WIDTH, ROW, AT_ONCE, NODE = 620, 62, 12, 11
"""Pixels: width of the figure, height of a row; nodes of a row whose names stand side by side; pixels of a node."""
KEY = {"margin": 0, "padding": 10, "spacing": 6, "border_line_alpha": 0, "background_fill_alpha": 0}
"""How the legend looks: below the frame and clear of it."""


def circuit_graph(
    circuit: Circuit,
    scores: xr.DataArray | xr.Dataset | None = None,
    *,
    graph: Graph | None = None,
    most: int = MOST,
    title: str = "",
) -> Any:
    """The edges of a circuit between its heads and MLPs, from the input at the bottom to the logits at the top.

    Each edge runs upwards, and bends past nodes that it does not touch. It is as wide as its score is far from 0,
    dashed where it works against the behaviour, and coloured by what reads it: q, k or v of a head, or anything else.
    It works against the behaviour where its score is above 0, or below 0 where the
    attribute ``better`` of the scores is ``"lower"``, as that of a loss is. Of more than `most` edges, those with the
    largest scores are drawn, and the title says how many are not.

    Parameters
    ----------
    circuit : Circuit
        Pruned, as `Graph.prune` does, to see what is connected.
    scores : DataArray (edge[, example]), or Dataset with one variable along ``edge``, optional
        With the coordinates ``sender`` and ``receiver``; edges without a score are the thinnest. As `Circuit.top` does,
        it takes the result of `headwise.edge_scores` as it is.
    graph : Graph, optional
        Of the model. Needed where heads share keys and values: an edge into k or v then ends at each head that shares
        it, and else at the head of that number.
    most : int
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Path`` for each kind of reader and each sign (a line for each edge; ``value``, ``edge``, ``width``), a
        ``Curve`` for each entry of the legend on them, ``Points`` for the nodes (``at``, ``row``; name) and ``Labels``.

    Raises
    ------
    DeclarationError
        There is no edge to draw, the scores have other dims, or `most` is not 1 or more.
    """
    if not isinstance(circuit, Circuit):
        raise DeclarationError(f"circuit_graph draws a Circuit, got {type(circuit).__name__}")
    if not circuit:
        raise DeclarationError("circuit_graph draws edges: this circuit has none")
    values, shown, better = _scores(scores)
    most = whole(most, "most, the number of edges that are drawn,", low=1)
    size = {edge: abs(values.get(edge, 0.0)) for edge in circuit}
    drawn = sorted(circuit, key=lambda edge: -size[edge])[:most]
    if len(drawn) < len(circuit):
        title = f"{title}{': ' if title else ''}the {len(drawn)} strongest of {len(circuit)} edges"
    if graph is not None:
        graph.check(circuit)
    ends = {edge: (node_of(edge.receiver),) if graph is None else graph.nodes_of(edge.receiver) for edge in circuit}
    nodes = _nodes({name for edge in drawn for name in (edge.sender, *ends[edge])})
    parts = [*_edges(drawn, values, nodes, ends, (shown, better)), *_boxes(nodes, ends), *_names(nodes)]
    rows = {row: label for _, row, label in nodes.values()}
    return overlay(
        parts,
        title=title,
        width=WIDTH,
        height=130 + ROW * len(rows),
        xaxis=None,
        ylabel="layers: each edge runs upwards \N{RIGHTWARDS ARROW}",
        yticks=[(row, label) for row, label in rows.items()],
        xlim=(-0.06, 1.06),
        ylim=(-0.5, len(rows) - 0.5),
        legend_cols=2,
        legend_opts=KEY | {"label_text_font_size": "12px"},
    )


def _scores(scores: Any) -> tuple[dict[Edge, float], Any, str | None]:
    """The score of each edge, what scores are, and which way their metric is better."""
    if scores is None:
        return {}, hv.Dimension("value", label="score"), None
    if isinstance(scores, xr.Dataset) and any("edge" in one.dims for one in scores.values()):
        scores = one_score(scores, "circuit_graph")
    array = array_of(scores, "circuit_graph", ("edge",))
    if not {"sender", "receiver"} <= {*array.coords} or not {*array.dims} <= {"edge", "example"}:
        raise DeclarationError(
            "circuit_graph takes scores (edge[, example]) with the coordinates sender and receiver: these have "
            f"({', '.join(map(str, array.dims))})"
        )
    mean = array.mean("example", keep_attrs=True) if "example" in array.dims else array
    names = (map(str, mean[side].values) for side in ("sender", "receiver"))
    edges = [as_edge(pair) for pair in zip(*names, strict=True)]
    better = str(array.attrs.get("better", "")) or None
    return dict(zip(edges, map(float, mean.values), strict=True)), dimension("value", array, None), better


def _nodes(names: set[str]) -> Nodes:
    """Place of each node, across (0 to 1) and up, and the label of its row."""
    places = {name: place_of(name)[:2] for name in (*names, INPUT, LOGITS)}
    nodes: Nodes = {}
    for row, place in enumerate(sorted(set(places.values()))):
        here = sorted((name for name in places if places[name] == place), key=place_of)
        ends = place[0] in (place_of(INPUT)[0], place_of(LOGITS)[0])
        label = here[0] if ends else f"{'MLP' if place[1] else 'heads'} {place[0]}"
        aside = 0.03 * (row % 3 - 1) if len(here) > 1 else 0.06 * (row % 3 - 1)  # an edge past a node is seen beside it
        for number, name in enumerate(here):
            nodes[name] = (0.05 + 0.9 * (number + 0.5) / len(here) + aside, row, label)
    return nodes


def _edges(
    drawn: list[Edge],
    values: dict[Edge, float],
    nodes: Nodes,
    readers: dict[Edge, tuple[str, ...]],
    what: tuple[Any, str | None],
) -> list[Any]:
    """For each kind of reader and each sign its edges, weakest first; one into several heads as often.

    Parameters
    ----------
    drawn : list of Edge
    values : dict of Edge to float
    nodes : dict of str to tuple
    readers : dict of Edge to tuple of str
        The nodes that each edge ends at.
    what : Dimension and str
        What scores are, and which way their metric is better.

    Returns
    -------
    list of Path and Curve
        The curves, which are nowhere, are entries of the legend: a solid line for each kind of reader, and at last what
        a dashed line says, if there is any.
    """
    shown, better = what
    sign, dashes = -1 if better == "lower" else 1, False
    largest = max((abs(values.get(edge, 0.0)) for edge in drawn), default=0.0) or 1.0
    parts, said = [], []
    for kind in (*PARTS, ""):
        name, colour = PARTS.get(kind, OTHERS)
        of_kind = [edge for edge in reversed(drawn) if (edge.receiver[-2] if edge.receiver[-1] == ">" else "") == kind]
        for against in (False, True):
            lines = []
            for edge in (edge for edge in of_kind if (sign * values.get(edge, 0.0) > 0) == against):
                score = values.get(edge, float("nan"))
                width = THINNEST + (THICKEST - THINNEST) * float(np.nan_to_num(abs(score))) / largest
                table = {"value": score, "edge": str(edge), "width": width}
                for reader in readers[edge]:
                    start, end = nodes[edge.sender], nodes[reader]
                    ends = ((start[0], float(start[1])), (end[0] + PORTS.get(kind, 0.0), float(end[1])))
                    x, y = way(*ends, others_of(nodes, (edge.sender, reader)), width)
                    lines.append({"x": x, "y": y, **table})
            if lines:
                dashes = dashes or against
                look = {"color": colour, "alpha": 0.75, "line_dash": "dashed" if against else "solid"}
                tips = hover(shown, "@value{+0.0000}", ("edge", "@edge"))
                paths = hv.Path(lines, ["x", "y"], [shown, "edge", "width"])
                parts.append(styled(paths, line_width=hv.dim("width"), **look, **tips))
        if of_kind:
            said.append(_entry(name, color=colour, line_width=5))
    if dashes:
        said.append(_entry(AGAINST if better else ABOVE, color=INK, line_dash="dashed", line_width=2))
    return [*parts, *said]


def _entry(label: str, **look: Any) -> Any:
    """An entry of the legend: a line that is nowhere."""
    nowhere = ([float("nan")], [float("nan")])
    return styled(hv.Curve(nowhere, "x", "y", label=label), **look)


def _boxes(nodes: Nodes, readers: dict[Edge, tuple[str, ...]]) -> list[Any]:
    """The nodes; hover tells how many edges of the circuit each reads and sends."""
    reads, sends = ({name: 0 for name in nodes} for _ in range(2))
    for edge, ends in readers.items():
        for count, name in ((sends, edge.sender), *((reads, end) for end in ends)):
            if name in count:
                count[name] += 1
    parts = []
    for label, look, here in (
        ("head", (INK, "circle"), [name for name in nodes if name.startswith("a")]),
        ("MLP", (INK, "square"), [name for name in nodes if name.startswith("m")]),
        ("input, logits", (INK, "diamond"), [INPUT, LOGITS]),
    ):
        table: dict[str, Any] = {"at": [nodes[name][0] for name in here], "row": [nodes[name][1] for name in here]}
        table |= {"name": here, "reads": [reads[name] for name in here], "sends": [sends[name] for name in here]}
        tips = [("node", "@name"), ("edges read", "@reads"), ("edges sent", "@sends")]
        if here:
            parts.append(dots(table, ["at", "row"], label, look, NODE, tools=["hover"], hover_tooltips=tips))
    return parts


def _names(nodes: Nodes) -> list[Any]:
    """The name of each node beside it; where a row is full, every second one below."""
    rows: dict[int, int] = {}
    sides: dict[bool, list[str]] = {False: [], True: []}
    for name, (_, row, _) in nodes.items():
        rows[row] = rows.get(row, -1) + 1
        count = sum(place[1] == row for place in nodes.values())
        sides[name == INPUT or (count > AT_ONCE and rows[row] % 2 == 1)].append(name)
    parts = []
    for below, here in sides.items():
        if here:
            table = ([nodes[name][0] for name in here], [nodes[name][1] for name in here], here)
            labels = hv.Labels(table, ["x", "y"], "name")
            look = {"text_align": "left", "text_font_size": "11px", "text_color": INK}
            look |= {"text_baseline": "top" if below else "bottom"}
            parts.append(styled(labels, **look, hooks=[shift(6, 5 if below else -3)]))
    return parts
