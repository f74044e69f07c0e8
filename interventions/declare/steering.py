"""What: additions, projections, scalings and knocked-out attention, as frozen values. Knows no model and no tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from ...errors import DeclarationError, check_text
from .changes import Change, How
from .components import Component
from .edits import Edit, SiteEdit
from .sites import LEFT_OUT, Head, Layer, Neuron, Place, Site, as_place, as_site, check_places, several_places

SHOWN = 8
"""Numbers of a vector that its repr writes out."""


@dataclass(frozen=True, init=False, repr=False)
class VectorEdit(SiteEdit):
    """An edit that does something with a vector at each position of its site."""

    vector: tuple[float, ...]
    origin: str = field(default="", metadata=LEFT_OUT, compare=False)

    def __init__(self, site: Site | Head | Neuron | str, vector: Iterable[float] | float, origin: str = "") -> None:
        super().__init__(site)
        name, component = type(self).__name__, self.site.component
        if component is Component.pattern:
            raise DeclarationError(f"{self.site}: {name} takes no pattern; Patch, Scale and Knockout do")
        if component.per_head and self.site.head is None:
            raise DeclarationError(f"{self.site}: {name} takes one head; compose several for several")
        check_text(origin, f"{self.site}: the origin of a vector")
        if hasattr(vector, "dims") and hasattr(vector, "coords"):
            origin, vector = origin or origin_of(vector), self._labelled(vector)
        try:
            given = (vector,) if self.site.neuron is not None and isinstance(vector, Real) else vector
            values = tuple(float(value) for value in given)  # type: ignore[union-attr]
        except (TypeError, ValueError):
            raise DeclarationError(f"{self.site}: a vector is a flat sequence of numbers, got {vector!r}") from None
        if not values or not all(map(math.isfinite, values)):
            raise DeclarationError(f"{self.site}: a vector has at least one number and all are finite")
        object.__setattr__(self, "vector", values)
        object.__setattr__(self, "origin", origin)

    def _labelled(self, vector: Any) -> Any:
        """The numbers of a DataArray that has the dim of the site, and no other."""
        component = self.site.component
        wide = () if self.site.neuron is not None else ("neuron",) if component.per_neuron else ("d_model",)
        wide = ("d_head",) if component.per_head and component is not Component.head_out else wide
        if tuple(vector.dims) != wide:
            raise DeclarationError(
                f"{self.site}: a vector there has the dims ({', '.join(wide)}), and this array has "
                f"({', '.join(map(str, vector.dims))}): choose with .sel, or take the mean of the others"
            )
        return vector.values.tolist()

    def __repr__(self) -> str:
        name, size = type(self).__name__, len(self.vector)
        shown = repr(self.vector) if size <= SHOWN else f"<{size} numbers of norm {math.hypot(*self.vector):.4g}>"
        return f"{name}(site={self.site!r}, vector={shown})"


def origin_of(vector: Any) -> str:
    """What a DataArray says of where it is from, and the place in it that was chosen."""
    chosen = [f"{name} {value.item()}" for name, value in vector.coords.items() if not value.dims]
    return ", ".join([str(vector.attrs["origin"]), *chosen]) if vector.attrs.get("origin") else ""


@dataclass(frozen=True, init=False, repr=False)
class Add(VectorEdit):
    """Add a vector to the site, at each of its positions (steering).

    Parameters
    ----------
    site : Site, Head, Neuron or str
        Of one head, where the component has heads; not ``pattern``.
    vector : sequence of float, DataArray, or float
        ``d_head`` numbers for ``q k v q_rot k_rot z`` of a head, ``d_mlp`` for ``mlp_pre mlp_post`` of a layer, one for
        a neuron, ``d_model`` for the others (``head_out`` too). A DataArray, such as `headwise.difference` gives, has
        that dim and no other.
    origin : str
        Where the vector is from, in words, which are stored beside it; those of a DataArray where left out. It does not
        count where interventions are compared.

    Raises
    ------
    DeclarationError
        The site takes no vector, or the vector is no flat sequence of finite numbers.

    Examples
    --------
    >>> hw.Add(hw.Layer(1).resid_pre.at(-1), [0.1] * 64)
    Add(site=Layer(1).resid_pre.at(-1), vector=<64 numbers of norm 0.8>)
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> hw.Add("L1.resid_pre", hw.difference(model, task, "L1.resid_pre")).origin[:35]
    'clean - corrupted at L1 resid_pre, '
    """

    def change(self) -> Change:
        """The vector, added."""
        return Change(How.ADD, self.vector)


@dataclass(frozen=True, init=False, repr=False)
class ProjectOut(VectorEdit):
    """Take away what the site has along a direction, at each of its positions: ``x - (x . u) u``.

    ``u`` is the vector divided by its norm, so only its direction counts.

    Parameters
    ----------
    site : Site, Head, Neuron or str
        Of one head, where the component has heads; not ``pattern``, nor ``head_out``.
    vector : sequence of float, DataArray, or float
        As for `Add`; not all zeros.
    origin : str
        As for `Add`.

    Raises
    ------
    DeclarationError
        The site takes no vector, or the vector is no flat sequence of finite numbers, or has no direction.

    Examples
    --------
    >>> hw.ProjectOut(hw.Layer(1).resid_pre, [3.0, 4.0])
    ProjectOut(site=Layer(1).resid_pre, vector=(3.0, 4.0))
    """

    def __init__(self, site: Site | Head | Neuron | str, vector: Iterable[float] | float, origin: str = "") -> None:
        super().__init__(site, vector, origin)
        if self.site.component is Component.head_out:
            raise DeclarationError(
                f"{self.site}: no pass computes what one head writes: possible are ProjectOut({self.site.place!r}.z, "
                f"...), with d_head numbers, and ProjectOut(Layer({self.site.layer}).attn_out, ...), of all heads"
            )
        if not any(self.vector):
            raise DeclarationError(f"{self.site}: a vector of zeros has no direction")

    def change(self) -> Change:
        """The direction, taken away."""
        largest = max(map(abs, self.vector))
        smaller = [value / largest for value in self.vector]
        norm = math.hypot(*smaller)
        return Change(How.PROJECT, tuple(value / norm for value in smaller))


@dataclass(frozen=True, init=False)
class Scale(SiteEdit):
    """Multiply the site by a factor. 0 is `ZeroAblate`, 1 changes nothing.

    A scaled ``pattern`` is not normalized again.

    Parameters
    ----------
    site : Site, Head, Neuron or str
    factor : float

    Raises
    ------
    DeclarationError
        `site` is none of these, or `factor` is no finite number.

    Examples
    --------
    >>> hw.Scale(hw.Head(1, 2), 0.5)
    Scale(site=Head(1, 2).z, factor=0.5)
    """

    factor: float

    def __init__(self, site: Site | Head | Neuron | str, factor: float) -> None:
        super().__init__(site)
        try:
            value = float(factor)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DeclarationError(f"{self.site}: a factor is a finite number, got {factor!r}")
        object.__setattr__(self, "factor", value)

    def change(self) -> Change:
        """The factor."""
        return Change(How.SCALE, self.factor)


@dataclass(frozen=True, init=False, repr=False)
class Knockout(SiteEdit):
    """Forbid a head to attend from queries to keys: their scores become minus infinity before the softmax.

    What the query gave to these keys goes to the others. For several pairs that are no rectangle, such as a diagonal,
    compose: ``sum(Knockout(head, q, q - 24) for q in range(25, 50))``.

    Parameters
    ----------
    head : Head, Layer, Site or str
        A layer stands for all of its heads.
    query, key : int, str, or iterable of these, optional
        Positions, negative ones from the end, or labels that the task gives positions. Left out, they are all keys, or
        all queries that keep a key (the first token can attend to itself alone); a query that is named must keep one.

    Raises
    ------
    DeclarationError
        Neither queries nor keys are named, a position is no whole number or named twice, or `head` is none of these.

    Examples
    --------
    >>> hw.Knockout(hw.Head(1, 2), query=-1, key=0)
    Knockout(Head(1, 2), query=-1, key=0)

    References
    ----------
    Geva et al. (2023), "Dissecting Recall of Factual Associations in Auto-Regressive Language Models".
    """

    key: tuple[Place, ...] | None

    def __init__(
        self,
        head: Head | Layer | Site | str,
        query: Place | Iterable[Place] | None = None,
        key: Place | Iterable[Place] | None = None,
    ) -> None:
        place = as_place(head) if isinstance(head, str) else head
        if isinstance(place, Neuron) or (isinstance(place, Site) and place.component is not Component.pattern):
            raise DeclarationError(f"{place}: attention is knocked out of a head or a layer, such as Head(5, 1)")
        site = place if isinstance(place, Site) else place.pattern if isinstance(place, Layer) else _pattern(place)
        if query is None and key is None and site.positions is None:
            raise DeclarationError(f"{site}: name the queries or the keys that are knocked out")
        super().__init__(site if query is None else site.at(query))
        object.__setattr__(self, "key", None if key is None else _keys(self.site, key))

    @property
    def is_of_later_keys(self) -> bool:
        """Whether all keys lie after all queries, as far as positions counted from 0 tell: nothing attends there."""
        queries, keys = ([at for at in some or () if isinstance(at, int)] for some in (self.site.positions, self.key))
        whole = (len(queries), len(keys)) == (len(self.site.positions or ()), len(self.key or ()))
        return bool(queries and keys and whole and min(queries) >= 0 and max(queries) < min(keys))

    def change(self) -> Change:
        """Its scores, masked; at which keys is counted out when the length of the prompts is known."""
        return Change(How.MASK, None)

    def clashes(self, other: Edit, site: Site, other_site: Site) -> bool:
        """Two knockouts meet in a query and a key; any other edit of the pattern in a query."""
        if isinstance(other, Knockout) and None not in (self.key, other.key):
            return site.overlaps(other_site) and bool({*(self.key or ())} & {*(other.key or ())})
        return site.overlaps(other_site)

    def __repr__(self) -> str:
        return f"Knockout({self.site.place!r}, query={_short(self.site.positions)}, key={_short(self.key)})"


def _pattern(head: Head) -> Site:
    site = as_site(head)
    return Site(Component.pattern, site.layer, site.head)


def _keys(site: Site, given: Place | Iterable[Place]) -> tuple[Place, ...]:
    keys = check_places(several_places(given), f"{site}: keys")
    if not keys:
        raise DeclarationError(f"{site}: keys must be at least one position")
    return keys


def _short(positions: tuple[Place, ...] | None) -> str:
    return "None" if positions is None else repr(positions[0] if len(positions) == 1 else positions)
