"""Where: heads, layers and sites. Owns the words for a place in a transformer; imports components and errors."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...errors import DeclarationError, MissingPartError, choices, whole
from .components import Component, as_component

_HEAD_TEXT = re.compile(r"\s*(?:[Ll](\d+)[Hh](\d+)|(\d+)\.(\d+))\s*")


class _HasHeads:
    """The sites that a layer and a head both have."""

    def site(self, component: str) -> Site:
        """The site of `component` here."""
        raise NotImplementedError  # Layer and Head say what it is

    def __getattr__(self, name: str) -> Site:
        if name.startswith("_"):
            raise AttributeError(name)
        known = [str(one) for one in Component if hasattr(type(self), one)]
        raise MissingPartError(f"{self!r} has no {name}: possible are {choices(known)}")

    @property
    def q(self) -> Site:
        """Query vectors."""
        return self.site("q")

    @property
    def k(self) -> Site:
        """Key vectors."""
        return self.site("k")

    @property
    def v(self) -> Site:
        """Value vectors."""
        return self.site("v")

    @property
    def q_rot(self) -> Site:
        """Query vectors after rotary embedding (and after their norm, where they have one)."""
        return self.site("q_rot")

    @property
    def k_rot(self) -> Site:
        """Key vectors after rotary embedding (and after their norm, where they have one)."""
        return self.site("k_rot")

    @property
    def pattern(self) -> Site:
        """Attention weights."""
        return self.site("pattern")

    @property
    def z(self) -> Site:
        """Head output before ``W_O``."""
        return self.site("z")

    @property
    def head_out(self) -> Site:
        """What a head writes into the residual stream."""
        return self.site("head_out")


@dataclass(frozen=True, order=True)
class Layer(_HasHeads):
    """A layer of the model.

    Its attributes are sites: ``resid_pre resid_mid resid_post attn_out mlp_out embed pos_embed`` of the whole layer,
    ``q k v q_rot k_rot pattern z head_out`` of all its heads.

    Parameters
    ----------
    layer : int
        Counted from 0.

    Raises
    ------
    DeclarationError
        It is no whole number of 0 or more. Whether a model has the layer is seen when the model is known.

    Examples
    --------
    >>> hw.Layer(1).resid_pre
    Layer(1).resid_pre
    >>> hw.Layer(1).resid_pre.at(-1)
    Layer(1).resid_pre.at(-1)
    """

    layer: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", whole(self.layer, "a layer"))

    def site(self, component: str) -> Site:
        """The whole of `component` in this layer (every head of it, where it has heads)."""
        return Site(as_component(component), self.layer)

    @property
    def resid_pre(self) -> Site:
        """The residual stream that enters the layer."""
        return self.site("resid_pre")

    @property
    def resid_mid(self) -> Site:
        """The residual stream between attention and MLP."""
        return self.site("resid_mid")

    @property
    def resid_post(self) -> Site:
        """The residual stream that leaves the layer."""
        return self.site("resid_post")

    @property
    def attn_out(self) -> Site:
        """What attention adds to the residual stream."""
        return self.site("attn_out")

    @property
    def mlp_out(self) -> Site:
        """What the MLP adds to the residual stream."""
        return self.site("mlp_out")

    @property
    def embed(self) -> Site:
        """The token embedding (of layer 0: it enters there)."""
        return self.site("embed")

    @property
    def pos_embed(self) -> Site:
        """The position embedding (of layer 0: it enters there)."""
        return self.site("pos_embed")

    def __str__(self) -> str:
        return f"L{self.layer}"

    def __repr__(self) -> str:
        return f"Layer({self.layer})"


@dataclass(frozen=True, order=True)
class Head(_HasHeads):
    """An attention head.

    Its attributes are sites: ``q k v q_rot k_rot pattern z head_out``. Where a site is expected, a head stands for its
    ``z`` (its output before ``W_O``), and so does the text ``"5.1"``. In a model whose heads share keys and values,
    ``Head(5, 1).k`` is key-value head 1 (see `Component`), and ``model.read_by(Head(5, 1), "k")`` the one that head 1
    reads.

    Parameters
    ----------
    layer, head : int
        Counted from 0.

    Raises
    ------
    DeclarationError
        One of them is no whole number of 0 or more. Whether a model has the head is seen when the model is known.

    Examples
    --------
    >>> hw.Head(1, 2).pattern
    Head(1, 2).pattern
    >>> str(hw.Head(1, 2))
    'L1H2'
    >>> hw.Head.parse("L1H2") == hw.Head.parse("1.2") == hw.Head(1, 2)
    True
    """

    layer: int
    head: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", whole(self.layer, "a layer"))
        object.__setattr__(self, "head", whole(self.head, "a head"))

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read ``L5H1`` or ``5.1``."""
        match = _HEAD_TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise DeclarationError(f"cannot read {text!r} as a head: write L5H1 or 5.1 (layer 5, head 1)")
        layer, head = (int(group) for group in match.groups() if group is not None)
        return cls(layer, head)

    def site(self, component: str) -> Site:
        """The head's part of `component` (``q k v q_rot k_rot pattern z head_out``)."""
        return Site(as_component(component), self.layer, self.head)

    def at(self, positions: int | Iterable[int]) -> Site:
        """The head's ``z`` at `positions` only."""
        return self.z.at(positions)

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    def __repr__(self) -> str:
        return f"Head({self.layer}, {self.head})"


@dataclass(frozen=True)
class Site:
    """A component of a layer, of one head or all, at some positions or all.

    Parameters
    ----------
    component : Component or str
    layer : int
    head : int, optional
        Only for components that are split by head; all heads when left out.
    positions : tuple of int, optional
        0-based; negative ones count from the end of the prompt; all when left out.

    Raises
    ------
    UnknownNameError
        There is no such component.
    DeclarationError
        The component has no heads or is not in this layer, or a number is not possible.

    Examples
    --------
    Sites are mostly written as attributes of a head or a layer:

    >>> hw.Head(1, 2).k == hw.Site("k", layer=1, head=2)
    True
    >>> hw.Head(1, 2).k.at([3, 4])
    Head(1, 2).k.at(range(3, 5))
    """

    component: Component
    layer: int
    head: int | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "component", as_component(self.component))
        object.__setattr__(self, "layer", whole(self.layer, "a layer"))
        if self.component.embedding and self.layer:
            raise DeclarationError(
                f"{self.component} enters before layer 0, not layer {self.layer}: write Layer(0).{self.component}"
            )
        if self.head is not None:
            object.__setattr__(self, "head", whole(self.head, "a head"))
            if not self.component.per_head:
                per_head = choices(component for component in Component if component.per_head)
                raise DeclarationError(f"{self.component} has no heads (head {self.head} given): heads have {per_head}")
        if self.positions is not None:
            object.__setattr__(self, "positions", _positions(self.positions))

    def at(self, positions: int | Iterable[int]) -> Site:
        """The same site at `positions` only (one, or several, such as ``range(25, 50)``)."""
        several = positions if isinstance(positions, Iterable) else (positions,)
        return replace(self, positions=tuple(several))

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts sites in forward order (layer, component, head)."""
        return (self.layer, self.component.order, -1 if self.head is None else self.head)

    def overlaps(self, other: Site) -> bool:
        """Whether the two name a common part. Positions must count from the same end to be compared."""
        if (self.layer, self.component) != (other.layer, other.component):
            return False
        if None not in (self.head, other.head) and self.head != other.head:
            return False
        return self.positions is None or other.positions is None or bool({*self.positions} & {*other.positions})

    def __str__(self) -> str:
        where = f"L{self.layer}" if self.head is None else f"L{self.layer}H{self.head}"
        at = "" if self.positions is None else f" at {', '.join(map(str, self.positions))}"
        return f"{where} {self.component}{at}"

    def __repr__(self) -> str:
        whole = f"Layer({self.layer})" if self.head is None else f"Head({self.layer}, {self.head})"
        at = "" if self.positions is None else f".at({_positions_repr(self.positions)})"
        return f"{whole}.{self.component}{at}"


def _positions(given: Iterable[int]) -> tuple[int, ...]:
    try:
        positions = tuple(operator.index(position) for position in given)
    except TypeError:
        raise DeclarationError(f"positions must be whole numbers, such as range(25, 50), got {given!r}") from None
    if not positions:
        raise DeclarationError("positions must name at least one position; leave them out for all")
    if len(set(positions)) < len(positions):
        raise DeclarationError(f"positions must differ, got {positions}")
    return tuple(sorted(positions))


def _positions_repr(positions: tuple[int, ...]) -> str:
    if len(positions) == 1:
        return str(positions[0])
    span = range(positions[0], positions[-1] + 1)
    return repr(span) if tuple(span) == positions else repr(positions)


def as_site(target: Site | Head | str) -> Site:
    """`target` as a site: a head (or ``"5.1"``) stands for its ``z``."""
    if isinstance(target, str):
        target = Head.parse(target)
    if isinstance(target, Head):
        return target.z
    if not isinstance(target, Site):
        raise DeclarationError(
            f"expected a site or a head, got {target!r}: write Head(5, 1), Head(5, 1).k or Layer(3).mlp_out"
        )
    return target
