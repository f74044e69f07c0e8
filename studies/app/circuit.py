"""The circuit of a result, where it holds one: what circuits of growing size keep, its graph, and what was found."""

from __future__ import annotations

import panel as pn
import xarray as xr

from .. import plots
from ..report.circuit import by_edges, circuit_of, graph_of
from ..storage.attributes import json_in
from . import text as sentences
from .figures import drawn
from .widgets import PARTS, framed, html, picture

NEEDED = {"circuit", "curve", "numbers", "random"}
"""Groups of a result of `CircuitStudy`."""
GRAPH, CURVE = 640, 540
"""Pixels that the pictures are wide at most."""
CARD = """
:host { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem;
  margin-bottom: 1rem; }
"""


class CircuitView:
    """The part of the page that shows a circuit; it is not there where a result holds none.

    Attributes
    ----------
    view : panel.Column
    """

    def __init__(self) -> None:
        self.found = html()
        self.graph, self.curve = picture(wide=True), picture(wide=True)
        row = pn.FlexBox(
            framed(self.graph, width=GRAPH),
            framed(self.curve, width=CURVE),
            sizing_mode="stretch_width",
            gap=".8rem",
            margin=0,
        )
        self.view = pn.Column(
            self.found, row, sizing_mode="stretch_width", margin=0, visible=False, stylesheets=[PARTS, CARD]
        )

    def open(self, tree: xr.DataTree | None) -> None:
        """Show the circuit of a result.

        Raises
        ------
        HeadwiseError
            Its parts are not those of a circuit.
        """
        self.graph.object = self.curve.object = None
        self.view.visible = False
        if tree is None or not {*tree.children} >= NEEDED:
            return
        held = tree["circuit"].to_dataset()
        circuit = circuit_of(held)
        if circuit:
            self.graph.object = drawn(plots.circuit_graph(circuit, held["score"], graph=graph_of(tree)), wide=True)
        random = by_edges(tree["random"].to_dataset().sel(kind="connected edges"))
        self.curve.object = drawn(
            plots.circuit_curve(tree["numbers"].to_dataset(), random, title="by number of edges"), wide=True
        )
        told = [one for one in json_in(tree.attrs, "conclusion", list) if isinstance(one, dict)]
        said = [str(one.get("text", "")) for one in told if one.get("group") == "summary"]
        self.found.object = sentences.circuit(said)
        self.view.visible = True
