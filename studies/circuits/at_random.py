"""Circuits that are drawn at random, to compare others with. Knows no model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
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
        Ways from the input to the logits, through edges that are drawn, until there are as many edges; what is too
        little for a long way is filled up with edges between parts that are there, or with ways through one part. So
        nothing is pruned, but where a circuit of ``input->logits`` alone grows by one edge. Or edges drawn one by one.

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
                more = len(way - self.edges)
                stuck = left - more == 1 and not self._inside(way, nodes)
                if edge in self.edges or more > left or stuck:
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

    def _inside(self, edges: Collection[Edge] = (), nodes: Collection[str] = ()) -> list[Edge]:
        """The edges that are free between nodes that are there, with these edges and nodes."""
        there, taken = self.nodes.union(nodes), self.edges.union(edges)
        return [
            edge
            for edge in self.graph.edges
            if edge not in taken and edge.sender in there and there.intersection(self.graph.nodes_of(edge.receiver))
        ]

    def _fill(self, left: int) -> None:
        """Add edges between nodes that are there; where they are too few, a way through one node, or any edge."""
        inside, new = self._inside(), [node for node in self.graph.senders if node not in self.nodes]
        if len(inside) >= left or left == 1:
            some = inside or [edge for edge in self.graph.edges if edge not in self.edges]
            self.edges |= {some[at] for at in self.random.permutation(len(some))[:left]}
            return
        node = self._one(new)
        self.nodes.add(node)
        self.edges |= {Edge(INPUT, self._one(self.inputs[node])), Edge(node, LOGITS)}

    def _one(self, several: Sequence[str]) -> str:
        return several[int(self.random.integers(len(several)))]
