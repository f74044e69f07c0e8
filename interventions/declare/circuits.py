"""Which edges: `Edge`, and `Circuit`, a set of edges as an intervention. Knows no model and no tensor.

An edge says that what one part of a model writes is read by another, along the residual stream. Names are those of MIB,
the Mechanistic Interpretability Benchmark. Senders are ``input`` (the token embedding), heads such as ``a0.h3`` and
MLPs such as ``m1``; receivers are ``a1.h1<q>``, ``a1.h1<k>`` and ``a1.h1<v>``, MLPs and ``logits``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ...errors import DeclarationError, choices, whole
from ..base.shape import Shape
from .changes import Change, How, from_source
from .components import Component
from .edits import Edit
from .sites import LEFT_OUT, Place, Site, positions_repr, several_places

INPUT, LOGITS = "input", "logits"
SIGNED, ABS = "signed", "abs"
SHOWN = 3
"""Edges that the repr of a circuit and errors show."""
_NAME = re.compile(r"a(0|[1-9]\d{0,5})\.h(0|[1-9]\d{0,5})(?:<([qkv])>)?|m(0|[1-9]\d{0,5})")
_ELSEWHERE = re.compile(r"^L?(\d{1,6})(?:H|\.)(\d{1,6})(?:\.([qkv]))?$")
"""A head, as sites are written."""
_AFTER_ALL = 2**31
CORRUPTED = "corrupted"
BETTER = ("higher", "lower")
Order = tuple[int, int, int, int]
"""Where a name stands in forward order: layer, 0 for attention and 1 for its MLP, q, k or v (0, 1, 2), head."""


class Edge(NamedTuple):
    """An edge of a model: what `sender` writes, as `receiver` reads it."""

    sender: str
    receiver: str

    def __str__(self) -> str:
        return f"{self.sender}->{self.receiver}"


@dataclass(frozen=True, init=False)
class Circuit(Edit):
    """A set of edges of a model, as an intervention: all other edges carry what another run has.

    Each receiver reads the sum of what the senders of its kept edges write now, and of what the senders of its other
    edges wrote in the run `source`. Position embeddings, and output biases of attention, belong to no sender: they
    stay. The empty circuit gives the run `source`, and the circuit of all edges the run that is intervened on. An edge
    of a circuit can be kept and still carry nothing new, where nothing reaches its sender: see `Graph.prune`.

    Edges are in forward order whatever the order they were given in. ``a | b``, ``a & b``, ``a - b`` and ``a ^ b`` are
    circuits of the edges in either, in both, in the first only and in one only; ``a <= b`` says whether `b` has all
    edges of `a`. ``len(circuit)``, ``edge in circuit`` and iteration are those of the edges. Whether a model has an
    edge is seen when the model is known: see `Graph`.

    Beside a circuit, what heads and MLPs read and write can be changed too: sites in attention from ``q`` to ``z``, and
    ``mlp_in`` to ``mlp_out``. Two circuits at different positions compose: ``Circuit(early, positions=[0, 1]) +
    Circuit(late, positions=[2])``.

    Parameters
    ----------
    edges : Circuit, or iterable of (sender, receiver), or of text such as ``"a0.h3->a1.h1<k>"``
        Of a circuit, only its edges count. Senders are ``input``, heads ``a<layer>.h<head>`` and MLPs ``m<layer>``.
        Receivers are ``a<layer>.h<head><q>``, ``<k>`` and ``<v>`` (of a key-value head, where heads share them),
        ``m<layer>`` and ``logits``.
    source : str
        The run that all other edges carry the values of; ``"mean"`` for means over the reference draw of the task, one
        for each position.
    positions : int, str or iterable of these, optional
        Of the receivers, counted from 0, from the end (-1) or by label. At all others every edge is kept. By default
        all positions.

    Raises
    ------
    DeclarationError
        Something is no edge, or a sender does not come before its receiver, or `source` or `positions` is not possible.

    Examples
    --------
    >>> circuit = hw.Circuit(["input->a0.h3<v>", "a0.h3->a1.h1<k>", "a1.h1->logits"])
    >>> circuit
    Circuit(3 edges: input->a0.h3<v>, a0.h3->a1.h1<k>, a1.h1->logits)
    >>> ("a0.h3", "a1.h1<k>") in circuit, "m0->logits" in circuit
    (True, False)
    >>> circuit - hw.Circuit(["a1.h1->logits"])
    Circuit(2 edges: input->a0.h3<v>, a0.h3->a1.h1<k>)
    >>> hw.from_json(hw.to_json(circuit)) == circuit
    True

    The empty circuit is the corrupted run:

    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.measure(model, task, hw.Circuit(), "logit_diff")
    >>> bool((ds["logit_diff"] == ds["baseline_logit_diff"].sel(run="corrupted")).all())
    True
    """

    edges: tuple[Edge, ...]
    source: str = field(default=CORRUPTED, metadata=LEFT_OUT)
    positions: tuple[Place, ...] | None = field(default=None, metadata=LEFT_OUT)

    def __init__(
        self,
        edges: Iterable[Edge | tuple[str, str] | str] = (),
        source: str = CORRUPTED,
        positions: Place | Iterable[Place] | None = None,
    ) -> None:
        if isinstance(edges, str) or not isinstance(edges, Iterable):
            raise DeclarationError(f"Circuit takes a list of edges, got {edges!r}; one edge is {EXAMPLE}")
        if not isinstance(source, str):
            raise DeclarationError(f"source={source!r}: give the name of a run, such as 'corrupted', or 'mean'")
        if isinstance(edges, Circuit):  # they are checked and in order
            ordered, found = edges.edges, edges._set  # type: ignore[attr-defined]
        else:
            found = frozenset(map(as_edge, edges))
            ordered = tuple(sorted(found, key=edge_order))
        places = None if positions is None else several_places(positions)
        object.__setattr__(self, "edges", ordered)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "positions", Site(Component.resid_pre, 0, positions=places).positions)
        object.__setattr__(self, "_set", found)

    @property
    def site(self) -> Site:
        """The stream that enters the first layer, at its positions: from there on nothing is as in the base run."""
        return Site(Component.resid_pre, 0, positions=self.positions)

    def change(self) -> Change:
        """The values of the source, for the edges outside."""
        return Change(How.SET, from_source(self.source))

    def taken(self, shape: Shape) -> tuple[Site, ...]:
        """What senders write and receivers read."""
        parts = [Component.resid_pre, Component.z, Component.mlp_out]
        parts += [] if shape.parallel else [Component.resid_mid]
        sites = [Site(part, layer) for layer in range(shape.layers) for part in parts]
        return (Site(Component.embed, 0), *sites, Site(Component.resid_post, shape.layers - 1))

    @classmethod
    def top(cls, scores: Any, n: int, by: str = ABS, better: str | None = None, source: str | None = None) -> Circuit:
        """The `n` edges with the largest scores.

        Of equal scores, the edge whose receiver comes first in a forward pass wins, then the one whose sender does.
        The circuit is not pruned: see `Graph.prune`.

        Parameters
        ----------
        scores : DataArray (edge), or Dataset with one such variable
            What the metric changes by where the edge carries the value of another run: `clean` is taken away. Has the
            coordinates ``sender`` and ``receiver`` along ``edge``.
        n : int
            How many; 0 gives the empty circuit.
        by : {"abs", "signed"}
            The edges that change the metric most, or those that make it worse: the most negative scores first, or the
            most positive where lower is better, as of a loss.
        better : {"higher", "lower"}, optional
            Which way the metric is better; the attribute ``better`` of the scores where left out.
        source : str, optional
            That of the circuit; where left out, the attribute ``source`` of the scores, so that the circuit carries
            what they were measured with, or ``"corrupted"`` where they have none.

        Returns
        -------
        Circuit

        Raises
        ------
        DeclarationError
            The scores have other dims, no names of edges, or one is NaN; `n`, `by` or `better` is not possible; or
            `by` is ``"signed"`` and nothing says which way the metric is better.

        Examples
        --------
        >>> import xarray as xr
        >>> names = {"sender": ("edge", ["input", "m0"]), "receiver": ("edge", ["logits", "logits"])}
        >>> scores = xr.DataArray([0.5, -0.25], coords=names, dims="edge")
        >>> hw.Circuit.top(scores, 1), hw.Circuit.top(scores, 1, by="signed", better="higher")
        (Circuit(1 edge: input->logits), Circuit(1 edge: m0->logits))
        """
        array = one_score(scores)
        sign = sign_of(array, by, better)
        edges, values = _named(array)
        carried = array.attrs.get("source", CORRUPTED) if source is None else source
        count = whole(n, "n, the number of edges,")
        if count > len(edges):
            raise DeclarationError(f"n={count}: these are scores of {len(edges)} edges, so n can be 0 to {len(edges)}")
        first = -np.abs(values) if by == ABS else sign * values
        ranked = sorted(zip(first, map(edge_order, edges), edges, strict=True))
        return cls([edge for *_, edge in ranked[:count]], carried)

    def __contains__(self, edge: object) -> bool:
        return isinstance(edge, str | tuple) and as_edge(edge) in self._set  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[Edge]:
        return iter(self.edges)

    def __len__(self) -> int:
        return len(self.edges)

    def __or__(self, other: Circuit) -> Circuit:
        return self._with(other, frozenset.union)

    def __and__(self, other: Circuit) -> Circuit:
        return self._with(other, frozenset.intersection)

    def __sub__(self, other: Circuit) -> Circuit:
        return self._with(other, frozenset.difference)

    def __xor__(self, other: Circuit) -> Circuit:
        return self._with(other, frozenset.symmetric_difference)

    def __le__(self, other: Circuit) -> bool:
        return len(self - other) == 0 if isinstance(other, Circuit) else NotImplemented

    def _with(self, other: Circuit, combine: Callable[..., frozenset[Edge]]) -> Circuit:
        if not isinstance(other, Circuit):
            return NotImplemented
        if (self.source, self.positions) != (other.source, other.positions):
            raise DeclarationError(f"{self!r} and {other!r} differ in their source or their positions")
        edges = combine(self._set, other._set)  # type: ignore[attr-defined]
        return Circuit(edges, self.source, self.positions)

    def __repr__(self) -> str:
        source = "" if self.source == CORRUPTED else f", source={self.source!r}"
        places = "" if self.positions is None else f", positions={positions_repr(self.positions)}"
        return f"Circuit({_counted(self.edges)}{source}{places})"


EXAMPLE = "'a0.h3->a1.h1<k>' or ('a0.h3', 'a1.h1<k>')"


def as_edge(given: object) -> Edge:
    """An edge from text or a pair of names, or an error that says what is possible."""
    if type(given) is Edge:
        return _checked(*given)
    if isinstance(given, str):
        pair: tuple[Any, ...] = tuple(name.strip() for name in given.split("->"))
    else:
        pair = tuple(given) if isinstance(given, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(name, str) for name in pair):
        raise DeclarationError(f"{given!r} is no edge: possible are a sender and a receiver, such as {EXAMPLE}")
    return _checked(str(pair[0]), str(pair[1]))


def _named_here(found: re.Match[str]) -> str:
    """``L1H2.k`` or ``1.2.k``, as sites are written, in the names of edges."""
    layer, head, which = found.groups()
    return f"a{layer}.h{head}{f'<{which}>' if which else ''}"


@lru_cache(maxsize=2**17)
def _checked(sender: str, receiver: str) -> Edge:
    edge = Edge(sender, receiver)
    if (meant := Edge(_ELSEWHERE.sub(_named_here, sender), _ELSEWHERE.sub(_named_here, receiver))) != edge:
        raise DeclarationError(f"{edge}: edges name parts otherwise than sites: is {str(meant)!r} meant?")
    if place_of(edge.sender) is None or edge.sender == LOGITS or edge.sender.endswith(">"):
        raise DeclarationError(
            f"{edge}: {edge.sender!r} cannot send; possible are {INPUT}, heads such as a0.h3 and MLPs such as m1"
        )
    if place_of(edge.receiver) is None or edge.receiver == INPUT or _is_head(edge.receiver):
        raise DeclarationError(
            f"{edge}: {edge.receiver!r} cannot receive; possible are q, k or v of a head such as a1.h1<k>, MLPs such "
            f"as m1, and {LOGITS}"
        )
    if not _before(edge):
        raise DeclarationError(f"{edge}: {edge.sender} does not come before {edge.receiver}")
    return edge


@lru_cache(maxsize=2**17)
def edge_order(edge: Edge) -> tuple[Order, Order]:
    """What edges are sorted by: the receiver in forward order, then the sender."""
    return place_of(edge.receiver), place_of(edge.sender)


@lru_cache(maxsize=2**16)
def place_of(name: str) -> Any:
    """The `Order` of a part or of what it reads; None for other text."""
    if name in (INPUT, LOGITS):
        return (-1, 0, 0, 0) if name == INPUT else (_AFTER_ALL, 0, 0, 0)
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    layer, head, which, mlp = found.groups()
    return (int(mlp), 1, 0, 0) if mlp else (int(layer), 0, "qkv".index(which or "q"), int(head))


def node_of(name: str) -> str:
    """The part that a receiver belongs to, where no heads share keys and values: of ``a1.h0<q>`` the head."""
    return name[:-3] if name.endswith(">") else name


def _is_head(name: str) -> bool:
    return name.startswith("a") and not name.endswith(">")


def _before(edge: Edge) -> bool:
    """Whether the sender comes before the receiver in a block whose MLP follows its attention."""
    sent, read = place_of(edge.sender), place_of(edge.receiver)
    return bool(sent[0] < read[0] or (sent[0] == read[0] and sent[1] < read[1]))


def sign_of(scores: Any, by: str, better: str | None = None) -> int:
    """1 where edges with the most negative scores come first, -1 where those with the most positive do.

    Parameters
    ----------
    scores : DataArray
    by : {"abs", "signed"}
    better : {"higher", "lower"}, optional
        The attribute of the scores where left out.

    Returns
    -------
    int

    Raises
    ------
    DeclarationError
        `by` or `better` is none of these, or nothing says which way a metric is better that edges are signed by.
    """
    if by not in (ABS, SIGNED):
        raise DeclarationError(f"by={by!r}: possible are {ABS!r} and {SIGNED!r}")
    way = scores.attrs.get("better") if better is None else better
    if way not in BETTER and (by == SIGNED or better is not None):
        said = f"better={way!r}" if way else "these scores do not say which way their metric is better"
        raise DeclarationError(f"{said}: give better='higher' or better='lower'")
    return -1 if way == BETTER[1] else 1


def _counted(edges: tuple[Edge, ...]) -> str:
    """How many, and the first of them."""
    shown = [*map(str, edges[:SHOWN]), *(["..."] if len(edges) > SHOWN else [])]
    return f"{len(edges)} edge{'s' * (len(edges) != 1)}{': ' * bool(edges)}{', '.join(shown)}"


def one_score(scores: Any, what: str = "Circuit.top") -> Any:
    """The DataArray of scores; that of a Dataset with one variable along ``edge``."""
    if hasattr(scores, "data_vars"):
        along = [name for name, array in scores.data_vars.items() if "edge" in array.dims]
        if len(along) != 1:
            found = f"{choices(along)}; give one, such as ds[{str(along[0])!r}]" if along else "none along the dim edge"
            raise DeclarationError(f"{what} takes one score of each edge: this Dataset has {found}")
        scores = scores[along[0]]
    if not hasattr(scores, "dims") or not hasattr(scores, "coords"):
        raise DeclarationError(f"{what} takes a DataArray of scores with the dim edge, got {type(scores).__name__}")
    return scores


def _named(array: Any) -> tuple[tuple[Edge, ...], np.ndarray[Any, Any]]:
    """The edges that scores are of, and the numbers, checked."""
    dims = tuple(map(str, array.dims))
    if "edge" not in dims or not {"sender", "receiver"} <= {*map(str, array.coords)}:
        raise DeclarationError(
            "Circuit.top takes scores along the dim edge, with the coordinates sender and receiver; these have the "
            f"dims {choices(dims) or 'none'} and the coordinates {choices(array.coords) or 'none'}"
        )
    if left := [dim for dim in dims if dim != "edge"]:
        raise DeclarationError(
            f"Circuit.top takes one score of each edge: these have the dim {choices(left)} too; take "
            f"scores.mean({left[0]!r}) or one of them"
        )
    edges = tuple(map(as_edge, zip(map(str, array.sender.values), map(str, array.receiver.values), strict=True)))
    if len(set(edges)) < len(edges):
        twice = [edge for edge in dict.fromkeys(edges) if edges.count(edge) > 1][:SHOWN]
        raise DeclarationError(f"Circuit.top takes one score of each edge: {choices(twice)} come more than once")
    if array.dtype.kind not in "iuf":
        raise DeclarationError(f"Circuit.top takes numbers as scores: these are of the type {array.dtype}")
    values = np.asarray(array.values, dtype=np.float64)
    missing = tuple(edge for edge, value in zip(edges, values, strict=True) if np.isnan(value))
    if missing:
        raise DeclarationError(
            f"of {len(edges)} scores are NaN those of {_counted(missing)}; where they should not count, fill them, as "
            "in scores.fillna(0)"
        )
    return edges, values
