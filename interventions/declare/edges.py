"""One condition for each edge of a model: `EdgePatches`, as a frozen value. Knows no model and no tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from ...errors import DeclarationError
from .circuits import CORRUPTED, INPUT, Circuit, Edge, place_of
from .circuits import LOGITS as OUTPUT
from .components import Component
from .graph import Graph, HasShape
from .paths import LOGITS, PathPatch, check_source
from .sites import Head, Layer, Site


@dataclass(frozen=True, init=False)
class EdgePatches:
    """One condition for each edge of a model: the edge carries what its sender writes in the run `source`.

    Everything after the receiver is computed anew, and all other edges carry what follows from that. A condition is
    ``PathPatch(sender, receiver, source, through_mlps=False)``, see `edge_patch`: a receiver has its own norm over the
    stream that it reads. Where heads share keys and values, the key and the value of a key-value head are receivers,
    and all heads that read them change.

    Parameters
    ----------
    edges : Circuit or iterable of edges, optional
        Of a `Circuit` of all positions, its edges; all edges of the model when left out, see `Graph`.
    source : str
        Name of the run; ``"mean"`` for means over the reference draw of the task, one for each position.

    Raises
    ------
    DeclarationError
        Something is no edge, there is none, `source` is no name, or a circuit is one at some positions or has another
        source. Whether a model has the edges is seen when the
        model is known.

    Examples
    --------
    >>> hw.EdgePatches()
    EdgePatches(edges=None, source='corrupted')
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.measure(model, task, hw.EdgePatches(["m1->logits", "a0.h3->a1.h1<k>"]), hw.metrics.logit_diff)
    >>> ds["logit_diff"].dims, ds["sender"].values.tolist(), ds["receiver"].values.tolist()
    (('edge', 'example'), ['a0.h3', 'm1'], ['a1.h1<k>', 'logits'])
    """

    edges: Circuit | None = None
    source: str = "corrupted"

    def __init__(
        self, edges: Circuit | Iterable[Edge | tuple[str, str] | str] | None = None, source: str = "corrupted"
    ) -> None:
        some = None if edges is None else Circuit(edges)
        if some is not None and not len(some):
            raise DeclarationError("EdgePatches of no edge: leave edges out for all edges of the model")
        if isinstance(edges, Circuit) and (edges.positions is not None or edges.source not in (CORRUPTED, source)):
            raise DeclarationError(
                f"{edges!r}: edges are patched at all positions, with source={source!r}; for its edges alone give "
                "edges=circuit.edges"
            )
        object.__setattr__(self, "edges", some)
        object.__setattr__(self, "source", check_source(source))

    def of(self, model: HasShape) -> tuple[Edge, ...]:
        """The edges on a model, in forward order of their receivers, then of their senders.

        Raises
        ------
        DeclarationError
            The model has no edges, or not these.
        """
        graph = Graph.of(model)
        if self.edges is None:
            return graph.edges
        graph.check(self.edges)
        return self.edges.edges

    def patches(self, model: HasShape) -> list[PathPatch]:
        """The condition of each edge, in the order of `of`."""
        return [edge_patch(edge, self.source) for edge in self.of(model)]


def edge_patch(edge: Edge, source: str = "corrupted") -> PathPatch:
    """The path patch that an edge is: nothing between sender and receiver changes.

    Parameters
    ----------
    edge : Edge
    source : str
        Name of the run that the sender's value comes from.

    Returns
    -------
    PathPatch
    """
    return PathPatch.of_edge(_sender(edge.sender), _receiver(edge.receiver), source)


def edge_of(path: PathPatch) -> Edge:
    """The edge whose `edge_patch` a path is."""
    (end,), start = path.receivers, path.sender
    sender = INPUT
    if start.component is not Component.embed:
        sender = f"m{start.layer}" if start.component is Component.mlp_out else f"a{start.layer}.h{start.head}"
    receiver = OUTPUT
    if isinstance(end, Site):
        head = f"a{end.layer}.h{end.head}<{end.component}>"
        receiver = f"m{end.layer}" if end.component is Component.mlp_in else head
    return Edge(sender, receiver)


@lru_cache(maxsize=2**14)
def _sender(name: str) -> Site:
    if name == INPUT:
        return Layer(0).embed
    layer, is_mlp, _, head = place_of(name)
    return Layer(layer).mlp_out if is_mlp else Head(layer, head).z


@lru_cache(maxsize=2**14)
def _receiver(name: str) -> Site | str:
    if name == OUTPUT:
        return LOGITS
    layer, is_mlp, which, head = place_of(name)
    return Layer(layer).mlp_in if is_mlp else Head(layer, head).site("qkv"[which])
