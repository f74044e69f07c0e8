"""Which edges a model has: `Graph`, from counts of its layers and heads. Knows no tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

from ...errors import DeclarationError, UnknownNameError, choices, whole
from ..base.shape import Shape
from .circuits import INPUT, LOGITS, Circuit, Edge, as_edge, place_of

WRITTEN, READ = ("embed", "z", "mlp_out"), ("q", "k", "v")
"""Components that senders write, and receivers of heads."""


class HasShape(Protocol):
    """A model."""

    @property
    def shape(self) -> Shape:
        """Its counts."""


@dataclass(frozen=True)
class Graph:
    """All edges of a model, as MIB draws them.

    A receiver reads the residual stream, the sum of what all senders before it wrote: ``input``, each head and each
    MLP. Position embeddings, and the output biases of attention, belong to no sender. The layer norm over the stream
    belongs to the receiver. In GPT-2 small there are 32,491 edges.

    Where heads share keys and values (``kv_heads`` below ``heads``), ``a1.h0<k>`` is the key of key-value head 0, which
    several heads read: there are fewer edges than in MIB's own graph of such a model, which gives each head a key and a
    value. Where attention and MLP of a layer both read its input (`parallel`), no head sends to the MLP of its layer.

    Parameters
    ----------
    layers, heads : int
    kv_heads : int
        Key-value heads of a layer, a divisor of `heads`; as many as heads where left out.
    parallel : bool

    Raises
    ------
    DeclarationError
        A count is not possible.

    Examples
    --------
    >>> graph = hw.Graph.of(hw.load("words-2l"))
    >>> graph, len(graph)
    (Graph(layers=2, heads=8, kv_heads=8, parallel=False), 310)
    >>> len(hw.Graph(layers=12, heads=12))
    32491
    >>> graph.senders_of("m0")[:3]
    ('input', 'a0.h0', 'a0.h1')
    >>> graph.prune(hw.Circuit(["input->a0.h3<v>", "input->m1", "a0.h3->logits"]))
    Circuit(2 edges: input->a0.h3<v>, a0.h3->logits)
    """

    layers: int
    heads: int
    kv_heads: int = 0
    parallel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", whole(self.layers, "layers", low=1))
        object.__setattr__(self, "heads", whole(self.heads, "heads", low=1))
        object.__setattr__(self, "kv_heads", whole(self.kv_heads, "kv_heads") or self.heads)
        object.__setattr__(self, "parallel", bool(self.parallel))
        if self.heads % self.kv_heads:
            raise DeclarationError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")

    @classmethod
    def of(cls, model: HasShape | Shape) -> Graph:
        """The graph of a model, or of one with these counts.

        Raises
        ------
        DeclarationError
            This is no model, or its stream is no sum of what heads and MLPs write: a norm stands between, or where they
            write is not known.
        """
        shape = model if isinstance(model, Shape) else getattr(model, "shape", None)
        if not isinstance(shape, Shape):
            raise DeclarationError(f"Graph.of takes a model, such as load('words-2l'), got {type(model).__name__}")
        lacking = dict(shape.lacks)
        why = [f"has no {part}: {lacking[part]}" for part in (*WRITTEN, *READ) if part in lacking]
        if shape.normed_after:
            why.append("has a norm between what heads write and the stream, so no head sends by itself")
        if why:
            raise DeclarationError(f"edges are not defined for a model that {why[0]}")
        return cls(shape.layers, shape.heads, shape.kv_heads, shape.parallel)

    @cached_property
    def senders(self) -> tuple[str, ...]:
        """All senders, in forward order."""
        found = [INPUT]
        for layer in range(self.layers):
            found += [*self._heads(layer), f"m{layer}"]
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """All receivers, in forward order: of a layer q of each head, then k, then v, then the MLP."""
        found = []
        for layer in range(self.layers):
            for which, count in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                found += [f"a{layer}.h{head}<{which}>" for head in range(count)]
            found.append(f"m{layer}")
        return (*found, LOGITS)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, receiver by receiver in forward order."""
        return tuple(Edge(sender, receiver) for receiver in self.receivers for sender in self.senders_of(receiver))

    def senders_of(self, receiver: str) -> tuple[str, ...]:
        """The senders that a receiver reads, in forward order.

        Raises
        ------
        UnknownNameError
            There is no such receiver.
        """
        if receiver not in self._receivers:
            raise UnknownNameError(f"no receiver {receiver!r}: {self._possible()}")
        layer, is_mlp, *_ = place_of(receiver)
        own = self.heads if is_mlp and not self.parallel else 0
        return self.senders[: 1 + min(layer, self.layers) * (self.heads + 1) + own]

    def nodes_of(self, receiver: str) -> tuple[str, ...]:
        """The parts whose output depends on a receiver: for k and v those heads that share them."""
        if not receiver.endswith(">"):
            return (receiver,)
        layer, _, which, head = place_of(receiver)
        group = self.heads // self.kv_heads if which else 1
        return self._heads(layer)[head * group : (head + 1) * group]

    def nodes(self, circuit: Circuit) -> tuple[str, ...]:
        """The parts that the edges of a circuit join, in forward order: ``input``, heads, MLPs, ``logits``."""
        self.check(circuit)
        found = {edge.sender for edge in circuit}.union(*(self.nodes_of(edge.receiver) for edge in circuit))
        return tuple(name for name in (*self.senders, LOGITS) if name in found)

    def prune(self, circuit: Circuit) -> Circuit:
        """The circuit without edges that nothing flows through: of nodes without inputs or without outputs.

        ``input`` counts as fed, and ``logits`` as present. Nodes go until nothing changes. Where edges outside carry
        another run, the pruned circuit computes the same; where they carry means, it is another circuit, since a part
        that reads only means does not write the mean of what it writes. Benchmarks prune both.

        Parameters
        ----------
        circuit : Circuit
            Of all positions.

        Returns
        -------
        Circuit

        Raises
        ------
        DeclarationError
            An edge is not one of this graph, or the circuit is one at some positions: at all others every edge is kept,
            so that something reaches every node.
        """
        self.check(circuit)
        if circuit.positions is not None:
            raise DeclarationError(
                f"{circuit!r} cannot be pruned: at all other positions every edge is kept, so something reaches every "
                "node; prune a circuit of all positions first"
            )
        feeds = {receiver: frozenset(self.nodes_of(receiver)) for _, receiver in circuit}
        edges = set(circuit)
        while True:
            fed = {INPUT}.union(*(feeds[receiver] for _, receiver in edges))
            alive = ({sender for sender, _ in edges} & fed) | {LOGITS}
            kept = {edge for edge in edges if edge.sender in alive and feeds[edge.receiver] & alive}
            if kept == edges:
                return Circuit(kept, circuit.source)
            edges = kept

    def between(self, nodes: Iterable[str]) -> Circuit:
        """The circuit of all edges between some heads and MLPs, ``input`` and ``logits``.

        Parameters
        ----------
        nodes : iterable of str
            Such as ``["a0.h3", "m1"]``; ``input`` and ``logits`` need not be named.

        Returns
        -------
        Circuit

        Raises
        ------
        UnknownNameError
            One is no node of this graph.
        """
        names = (nodes,) if isinstance(nodes, str) else tuple(nodes)
        if unknown := [name for name in names if name not in {*self.senders, LOGITS}]:
            raise UnknownNameError(f"no node {choices(unknown)}: {self._possible('')}")
        kept = {*names, INPUT, LOGITS}
        reading = [receiver for receiver in self.receivers if kept & {*self.nodes_of(receiver)}]
        return Circuit((s, receiver) for receiver in reading for s in self.senders_of(receiver) if s in kept)

    def check(self, circuit: Circuit) -> None:
        """Refuse a circuit that has an edge which this graph has not."""
        if not isinstance(circuit, Circuit):
            raise DeclarationError(f"{circuit!r} is no Circuit; of edges, Circuit([...]) makes one")
        known = _edges_of(self)
        if not known.issuperset(circuit.edges):
            unknown = [edge for edge in circuit if edge not in known]
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise DeclarationError(f"no edge {choices(unknown[:3])}{more} in {self!r}: {self._possible()}")

    def __contains__(self, edge: object) -> bool:
        return isinstance(edge, str | tuple) and as_edge(edge) in _edges_of(self)

    def __len__(self) -> int:
        return sum(len(self.senders_of(receiver)) for receiver in self.receivers)

    def kept(self, circuit: Circuit) -> tuple[tuple[int, int], ...]:
        """The places of each edge of a circuit among `receivers` and `senders`."""
        readers, writers = ({name: at for at, name in enumerate(some)} for some in (self.receivers, self.senders))
        return tuple((readers[edge.receiver], writers[edge.sender]) for edge in circuit)

    @cached_property
    def _receivers(self) -> frozenset[str]:
        return frozenset(self.receivers)

    def _heads(self, layer: int) -> tuple[str, ...]:
        return tuple(f"a{layer}.h{head}" for head in range(self.heads))

    def _possible(self, parts: str = "<q>") -> str:
        """What names there are, in a line."""
        last, most = self.layers - 1, self.heads - 1
        heads = f"a0.h0{parts} to a{last}.h{most}{parts}"
        if parts:
            heads += f", <k> and <v> to h{self.kv_heads - 1}"
        wired = ", and heads do not send to the MLP of their layer" if self.parallel and parts else ""
        return f"possible are {heads}, m0 to m{last}, {LOGITS}{wired}"


@lru_cache(maxsize=16)
def _edges_of(graph: Graph) -> frozenset[Edge]:
    """The edges of a graph, to be looked up."""
    return frozenset(graph.edges)
