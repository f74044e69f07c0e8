"""Circuits that are drawn at random, to compare others with. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...interventions.declare.circuits import INPUT, LOGITS, Circuit, Edge
from ...interventions.declare.graph import Graph

ANY, CONNECTED = "any edges", "connected edges"
KINDS = (ANY, CONNECTED)
"""Edges drawn one by one, of which little is left once the circuit is pruned; and ways from the input to the logits."""
TRIES = 50
"""Ways that are too long, until edges between nodes that are there are taken."""


def random_circuits(
    graph: Graph, sizes: Sequence[int], draws: int, seed: int, kind: str = CONNECTED
) -> list[list[Circuit]]:
    """Random circuits of growing size; of a draw, each holds the ones before it.

    Parameters
    ----------
    graph : Graph
    sizes : sequence of int
        Numbers of edges, which do not fall.
    draws : int
    seed : int
        The same seed draws the same circuits.
    kind : {"connected edges", "any edges"}
        Ways from the input to the logits, through edges that are drawn, until there are as many edges; an edge beside
        them fills up what is too little for a way. Or edges drawn one by one.

    Returns
    -------
    list of list of Circuit
        For each draw, one circuit of each size.
    """
    drawn = []
    for draw in range(draws):
        random = np.random.default_rng((seed, KINDS.index(kind), draw))
        if kind == ANY:
            order = random.permutation(len(graph.edges))
            drawn.append([Circuit(graph.edges[at] for at in order[:size]) for size in sizes])
        else:
            drawn.append([Circuit(edges) for edges in _Growing(graph, random).to(sizes)])
    return drawn


class _Growing:
    """A circuit that grows by ways from the input to the logits."""

    def __init__(self, graph: Graph, random: Any) -> None:
        self.graph, self.random = graph, random
        self.inputs: dict[str, list[str]] = {}
        self.readers: dict[str, list[str]] = {}
        for receiver in graph.receivers:
            for node in graph.nodes_of(receiver):
                self.inputs.setdefault(node, []).append(receiver)
            for sender in graph.senders_of(receiver):
                self.readers.setdefault(sender, []).append(receiver)
        self.edges: set[Edge] = set()
        self.nodes = {INPUT, LOGITS}

    def to(self, sizes: Sequence[int]) -> Iterator[set[Edge]]:
        """The edges at each size."""
        for size in sizes:
            if size >= len(self.graph.edges):
                self.edges = set(self.graph.edges)
            tries = 0
            while (left := size - len(self.edges)) > 0:
                edge = self.graph.edges[self.random.integers(len(self.graph.edges))]
                way, nodes = self._way(edge)
                if edge in self.edges or len(way - self.edges) > left:
                    tries += 1
                    if tries > TRIES:
                        self._fill(left)
                    continue
                tries = 0
                self.edges |= way
                self.nodes |= nodes
            yield set(self.edges)

    def _way(self, edge: Edge) -> tuple[set[Edge], set[str]]:
        """A way through an edge, from the input or a node that is there to another one or the logits."""
        way, nodes, node = {edge}, set(), edge.sender
        while node not in self.nodes:
            nodes.add(node)
            receiver = self._one(self.inputs[node])
            way.add(Edge(self._one(self.graph.senders_of(receiver)), receiver))
            node = next(one.sender for one in way if one.receiver == receiver)
        node = self._one(self.graph.nodes_of(edge.receiver))
        while node not in self.nodes:
            nodes.add(node)
            receiver = self._one(self.readers[node])
            way.add(Edge(node, receiver))
            node = self._one(self.graph.nodes_of(receiver))
        return way, nodes

    def _fill(self, left: int) -> None:
        """Add edges between nodes that are there; any, where there are too few."""
        free = [edge for edge in self.graph.edges if edge not in self.edges]
        inside = [
            edge
            for edge in free
            if edge.sender in self.nodes and self.nodes.intersection(self.graph.nodes_of(edge.receiver))
        ]
        some = inside if len(inside) >= left else free
        self.edges |= {some[at] for at in self.random.permutation(len(some))[:left]}

    def _one(self, several: Sequence[str]) -> str:
        return several[int(self.random.integers(len(several)))]
