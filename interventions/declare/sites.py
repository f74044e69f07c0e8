"""Where: heads, neurons, layers and sites. Owns the words for a place in a transformer; imports components, errors."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ...errors import DeclarationError, MissingPartError, check_name, choices, whole
from .components import Component, as_component

_HEAD_TEXT = re.compile(r"\s*(?:[Ll](\d+)[Hh](\d+)|(\d+)\.(\d+))\s*")
_NEURON_TEXT = re.compile(r"\s*[Ll](\d+)[Nn](\d+)\s*")
_PLACE_TEXT = re.compile(
    r"\s*(?:[Ll]?(\d+)[Hh.](\d+)|[Ll](\d+)[Nn](\d+)|[Ll](\d+))(?:[. ]\s*([A-Za-z]\w*))?(?:\s+at\s+(\S.*?))?\s*"
)
LEFT_OUT = {"left_out": True}
"""Metadata of a field that is not written where it has its default: a declaration then reads as before it had it."""
Place = int | str
"""A position, or the label of one or several."""


class _HasSites:
    """What has sites as attributes."""

    def site(self, component: str) -> Site:
        """The site of `component` here."""
        raise NotImplementedError  # Layer, Head and Neuron say what it is

    def __getattr__(self, name: str) -> Site:
        if name.startswith("_"):
            raise AttributeError(name)
        known = [str(one) for one in Component if hasattr(type(self), one)]
        raise MissingPartError(f"{self!r} has no {name}: possible are {choices(known)}")


class _HasHeads(_HasSites):
    """The sites that a layer and a head both have."""

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


class _HasNeurons(_HasSites):
    """The sites that a layer and a neuron both have."""

    @property
    def mlp_pre(self) -> Site:
        """Neurons before the activation function."""
        return self.site("mlp_pre")

    @property
    def mlp_post(self) -> Site:
        """Neurons as the down projection reads them: after the activation function and the gate."""
        return self.site("mlp_post")


@dataclass(frozen=True, order=True)
class Layer(_HasHeads, _HasNeurons):
    """A layer of the model.

    Its attributes are sites: ``resid_pre resid_mid resid_post attn_in attn_out mlp_in mlp_out embed pos_embed`` of the
    whole layer, ``q k v q_rot k_rot pattern z head_out`` of all its heads, ``mlp_pre mlp_post`` of all its neurons.

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
        """The whole of `component` in this layer (every head or neuron of it, where it has any)."""
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
    def attn_in(self) -> Site:
        """The normed stream that q, k and v are made of."""
        return self.site("attn_in")

    @property
    def attn_out(self) -> Site:
        """What attention adds to the residual stream."""
        return self.site("attn_out")

    @property
    def mlp_in(self) -> Site:
        """The normed stream that the MLP reads."""
        return self.site("mlp_in")

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

    def at(self, positions: Place | Iterable[Place]) -> Site:
        """The head's ``z`` at `positions` only."""
        return self.z.at(positions)

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    def __repr__(self) -> str:
        return f"Head({self.layer}, {self.head})"


@dataclass(frozen=True, order=True)
class Neuron(_HasNeurons):
    """A neuron of an MLP.

    Its attributes are sites: ``mlp_pre mlp_post``. Where a site is expected, a neuron stands for its ``mlp_post`` (what
    the down projection reads of it), and so does the text ``"L0N17"``.

    Parameters
    ----------
    layer, neuron : int
        Counted from 0.

    Raises
    ------
    DeclarationError
        One of them is no whole number of 0 or more. Whether a model has the neuron is seen when the model is known.

    Examples
    --------
    >>> hw.Neuron(0, 17).mlp_pre
    Neuron(0, 17).mlp_pre
    >>> hw.Neuron.parse("L0N17") == hw.Neuron(0, 17)
    True

    Several neurons are several interventions in one pass:

    >>> some = hw.Compose(*(hw.ZeroAblate(hw.Neuron(0, neuron)) for neuron in range(16)))
    """

    layer: int
    neuron: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", whole(self.layer, "a layer"))
        object.__setattr__(self, "neuron", whole(self.neuron, "a neuron"))

    @classmethod
    def parse(cls, text: str) -> Neuron:
        """Read ``L0N17``."""
        match = _NEURON_TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise DeclarationError(f"cannot read {text!r} as a neuron: write L0N17 (layer 0, neuron 17)")
        return cls(int(match[1]), int(match[2]))

    def site(self, component: str) -> Site:
        """The neuron's part of `component` (``mlp_pre mlp_post``)."""
        return Site(as_component(component), self.layer, neuron=self.neuron)

    def at(self, positions: Place | Iterable[Place]) -> Site:
        """The neuron's ``mlp_post`` at `positions` only."""
        return self.mlp_post.at(positions)

    def __str__(self) -> str:
        return f"L{self.layer}N{self.neuron}"

    def __repr__(self) -> str:
        return f"Neuron({self.layer}, {self.neuron})"


@dataclass(frozen=True)
class Site:
    """A component of a layer, of one head or neuron or all, at some positions or all.

    Parameters
    ----------
    component : Component or str
    layer : int
    head : int, optional
        Only for components that are split by head; all heads when left out.
    positions : tuple of int or str, optional
        0-based; negative ones count from the end of the prompt; text is a label that the task gives positions; all when
        left out.
    neuron : int, optional
        Only for components that are split by neuron; all neurons when left out.

    Raises
    ------
    UnknownNameError
        There is no such component.
    DeclarationError
        The component has no heads or neurons or is not in this layer, or a number is not possible.

    Examples
    --------
    Sites are mostly written as attributes of a head or a layer:

    >>> hw.Head(1, 2).k == hw.Site("k", layer=1, head=2)
    True
    >>> hw.Head(1, 2).k.at([3, 4])
    Head(1, 2).k.at(range(3, 5))

    Wherever a site is taken, text stands for it:

    >>> hw.ZeroAblate("L1H2.k") == hw.ZeroAblate(hw.Head(1, 2).k)
    True
    """

    component: Component
    layer: int
    head: int | None = None
    positions: tuple[Place, ...] | None = None
    neuron: int | None = field(default=None, metadata=LEFT_OUT)

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
        if self.neuron is not None:
            object.__setattr__(self, "neuron", whole(self.neuron, "a neuron"))
            if not self.component.per_neuron:
                known = choices(component for component in Component if component.per_neuron)
                raise DeclarationError(f"{self.component} has no neurons ({self.neuron} given): neurons have {known}")
        if self.positions is not None:
            object.__setattr__(self, "positions", _positions(self.positions))

    def at(self, positions: Place | Iterable[Place]) -> Site:
        """The same site at `positions` only: one, several such as ``range(25, 50)``, or labels such as ``"S2"``."""
        return replace(self, positions=several_places(positions))

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels among its positions."""
        return tuple(one for one in self.positions or () if isinstance(one, str))

    @property
    def part(self) -> int | None:
        """Its head or neuron; None for all, and where the component has neither."""
        return self.head if self.neuron is None else self.neuron

    @property
    def place(self) -> Layer | Head | Neuron:
        """What it is a component of."""
        if self.neuron is not None:
            return Neuron(self.layer, self.neuron)
        return Layer(self.layer) if self.head is None else Head(self.layer, self.head)

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts sites in forward order (layer, component, head or neuron)."""
        return (self.layer, self.component.order, -1 if self.part is None else self.part)

    def overlaps(self, other: Site) -> bool:
        """Whether the two name a common part. Positions are compared as they are: count them from one end first."""
        if (self.layer, self.component) != (other.layer, other.component):
            return False
        if None not in (self.part, other.part) and self.part != other.part:
            return False
        return self.positions is None or other.positions is None or bool({*self.positions} & {*other.positions})

    def __str__(self) -> str:
        at = "" if self.positions is None else f" at {', '.join(map(str, self.positions))}"
        return f"{self.place} {self.component}{at}"

    def __repr__(self) -> str:
        at = "" if self.positions is None else f".at({positions_repr(self.positions)})"
        return f"{self.place!r}.{self.component}{at}"


@dataclass(frozen=True)
class Logits:
    """The logits, at some positions or all, of some tokens or the whole vocabulary.

    They can be captured; they are no part of a layer, and nothing is written there.

    Parameters
    ----------
    tokens : sequence of int or str, int or str, optional
        Token ids, or text that is one token; the whole vocabulary when left out.
    positions : tuple of int or str, optional
        As of a `Site`; the logits at a position are of the token after it.

    Raises
    ------
    DeclarationError
        Tokens are named twice or are none, or positions are not possible. Whether text is one token is seen when the
        model is known.

    Examples
    --------
    >>> hw.Logits([" apple", 17]).at(-1)
    Logits([' apple', 17]).at(-1)
    >>> model = hw.load("words-2l")
    >>> ds = hw.capture(model, hw.Prompts(["apple banana apple"]), hw.Logits(["banana", "apple"]).at(-1))
    >>> ds["logits_at_m1"].dims
    ('example', 'logits_at_m1_position', 'logits_at_m1_token')
    """

    tokens: tuple[int | str, ...] | None = None
    positions: tuple[Place, ...] | None = None

    def __post_init__(self) -> None:
        if self.positions is not None:
            object.__setattr__(self, "positions", _positions(self.positions))
        if self.tokens is None:
            return
        given = several_places(self.tokens)
        if not given or any(isinstance(one, bool) or not isinstance(one, int | str) for one in given):
            raise DeclarationError(f"tokens={self.tokens!r}: give token ids or text, such as ' apple' or [17, 4]")
        if len(set(given)) < len(given):
            raise DeclarationError(f"tokens must differ, got {given}")
        object.__setattr__(self, "tokens", given)

    def at(self, positions: Place | Iterable[Place]) -> Logits:
        """The logits at `positions` only: one, several such as ``range(25, 50)``, or labels such as ``"S2"``."""
        return replace(self, positions=several_places(positions))

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels among its positions."""
        return tuple(one for one in self.positions or () if isinstance(one, str))

    def __str__(self) -> str:
        return "logits" if self.positions is None else f"logits at {', '.join(map(str, self.positions))}"

    def __repr__(self) -> str:
        at = "" if self.positions is None else f".at({positions_repr(self.positions)})"
        return f"Logits({'' if self.tokens is None else list(self.tokens)}){at}"


def several_places(given: object) -> tuple[Place, ...]:
    """One position or label, or several, as a tuple."""
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)  # type: ignore


def check_places(given: Iterable[object], what: str) -> tuple[Place, ...]:
    """Positions and labels of positions, sorted, or an error that says what they can be."""
    given = tuple(given)
    try:
        places = tuple(check_label(one) if isinstance(one, str) else operator.index(one) for one in given)  # type: ignore
    except TypeError:
        raise DeclarationError(
            f"{what} must be whole numbers, such as range(25, 50), or labels of positions, got {given!r}"
        ) from None
    if len(set(places)) < len(places):
        raise DeclarationError(f"{what} must differ, got {places}")
    return tuple(sorted(places, key=lambda one: (isinstance(one, str), one)))


def check_label(label: str) -> str:
    """`label`, or an error that says what is wrong with it as the label of a position."""
    check_name(label, "the label of a position")
    if "," in label or re.fullmatch(r"[\d.]+", label):
        raise DeclarationError(f"the label of a position is text without commas, and no number, got {label!r}")
    return str(label)


def _positions(given: Iterable[object]) -> tuple[Place, ...]:
    positions = check_places(given, "positions")
    if not positions:
        raise DeclarationError("positions must name at least one position; leave them out for all")
    return positions


def positions_repr(positions: tuple[Place, ...]) -> str:
    """Positions as they would be written: those that follow each other as a range."""
    first, last = positions[0], positions[-1]
    if len(positions) == 1:
        return repr(first)
    if isinstance(first, str) or isinstance(last, str):
        return repr(positions)
    span = range(first, last + 1)
    return repr(span) if tuple(span) == positions else repr(positions)


def as_place(text: str) -> Site | Head | Neuron | Layer:
    """Read a head, neuron, layer or site: ``L5H1``, ``5.1``, ``L3N17``, ``L3``, ``L5H1.k``, ``L3.mlp_out at -1``."""
    match = _PLACE_TEXT.fullmatch(text)
    if match is None:
        raise DeclarationError(
            f"cannot read {text!r} as a site: write L5H1 or 5.1 (layer 5, head 1), L3N17 (layer 3, neuron 17), L5H1.k, "
            "L3.mlp_out, or L5H1.k at 7"
        )
    layer, head, mlp, neuron, alone, component, at = match.groups()
    place: Head | Neuron | Layer = Layer(int(alone or 0))
    if alone is None:
        place = Head(int(layer), int(head)) if neuron is None else Neuron(int(mlp), int(neuron))
    if component is None and at is None:
        return place
    if component is None and isinstance(place, Layer):
        raise DeclarationError(f"cannot read {text!r} as a site: say which component of layer {alone}, {_OF_A_LAYER}")
    site = place.site(component) if component else as_site(str(place))
    if at is None:
        return site
    return site.at(_places_of(at))


_OF_A_LAYER = f"such as L3.mlp_out: possible are {choices(Component)}"


def as_site(target: Site | Head | Neuron | str) -> Site:
    """`target` as a site: text is read (see `as_place`), a head stands for its ``z``, a neuron for its ``mlp_post``."""
    given = target
    if isinstance(target, str):
        found = as_place(target)
        if isinstance(found, Layer):
            raise DeclarationError(f"{given!r} is a whole layer: name a component of it, {_OF_A_LAYER}")
        target = found
    if isinstance(target, Head):
        return target.z
    if isinstance(target, Neuron):
        return target.mlp_post
    if not isinstance(target, Site):
        raise DeclarationError(
            f"expected a site, a head or a neuron, got {target!r}: write Head(5, 1), Neuron(3, 17), Head(5, 1).k or "
            "Layer(3).mlp_out, or the same as text, 'L5H1', 'L3N17', 'L5H1.k' or 'L3.mlp_out'"
        )
    return target


def as_read(target: Site | Head | Neuron | Logits | str) -> Site | Logits:
    """`target` as what can be captured: as `as_site`, and the logits, also as text (``logits``, ``logits at -1``)."""
    if isinstance(target, Logits):
        return target
    match = re.fullmatch(r"\s*logits(?:\s+at\s+(\S.*?))?\s*", target) if isinstance(target, str) else None
    if match is None:
        return as_site(target)
    return Logits() if match[1] is None else Logits().at(_places_of(match[1]))


def _places_of(text: str) -> list[Place]:
    """Positions and labels in text, with commas between them."""
    return [int(one) if re.fullmatch(r"-?\d+", one) else one for one in re.split(r"\s*,\s*", text)]
