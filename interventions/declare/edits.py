"""What: interventions as frozen values, with fields only. Owns their structure; knows no model and no tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import LARGEST_SEED, DeclarationError, whole
from ..base.shape import Shape
from .changes import Change, FromRun, How, Reduce
from .components import Component
from .sites import Head, Neuron, Site, as_site

OVER = ("example", "position")


@dataclass(frozen=True)
class Intervention:
    """Base of everything that can be done to a forward pass. ``a + b`` does both in one pass, and so does ``sum``.

    Examples
    --------
    >>> both = hw.ZeroAblate("0.3") + hw.Patch(hw.Head(1, 2).k)
    >>> isinstance(both, hw.Intervention)
    True
    >>> sum([hw.ZeroAblate("0.3"), hw.Patch(hw.Head(1, 2).k)]) == both
    True
    """

    def edits(self) -> tuple[Edit, ...]:
        """The single-site edits it is made of, in forward order."""
        raise NotImplementedError  # each kind says so itself

    def __radd__(self, other: object) -> Intervention:
        return self if other == 0 else NotImplemented  # so that sum([...]) composes

    def __add__(self, other: Intervention) -> Compose:
        if not isinstance(other, Intervention):
            return NotImplemented
        return Compose(self, other)


@dataclass(frozen=True)
class Edit(Intervention):
    """An intervention that changes one site, its ``site``."""

    if TYPE_CHECKING:  # a field of some kinds, a property of others

        @property
        def site(self) -> Site:
            """Where."""

    def change(self) -> Change:
        """What it does to its site: how, and what value goes in."""
        raise NotImplementedError  # each kind says so itself

    @property
    def run(self) -> str | None:
        """The run of the evaluated prompts that the new value comes from, if it comes from one."""
        value = self.change().value
        return value.run if isinstance(value, FromRun) else None

    @property
    def uses_reference(self) -> bool:
        """Whether the new value comes from the reference draw of the task."""
        value = self.change().value
        return isinstance(value, FromRun) and value.run is None

    @property
    def over_all(self) -> bool:
        """Whether the new value is the mean over all examples and positions of the reference draw."""
        value = self.change().value
        return isinstance(value, FromRun) and value.reduce is Reduce.EXAMPLE_POSITION

    def taken(self, shape: Shape) -> tuple[Site, ...]:
        """The sites that its new value is made of, in the run or the reference draw that it comes from."""
        return (self.site,)

    def edits(self) -> tuple[Edit, ...]:
        """Itself alone."""
        return (self,)

    def clashes(self, other: Edit, site: Site, other_site: Site) -> bool:
        """Whether both change one place; the sites are theirs, with positions counted from the same end."""
        return site.overlaps(other_site)


@dataclass(frozen=True, init=False)
class SiteEdit(Edit):
    """An edit of a site that is given as such."""

    site: Site

    def __init__(self, site: Site | Head | Neuron | str) -> None:
        object.__setattr__(self, "site", as_site(site))


@dataclass(frozen=True, init=False)
class ZeroAblate(SiteEdit):
    """Replace the site by zeros.

    A head stands for its ``z``, so the value bias ``b_V``, which attention passes on whole, goes with the head, while
    the output bias of the layer stays. Where biases are folded elsewhere (as some libraries do with ``b_V``), zero
    ablation of the same head is a different intervention. Zeros may lie far from what later layers ever saw: compare
    with `MeanAblate` and `ResampleAblate`.

    Parameters
    ----------
    site : Site, Head, Neuron or str

    Raises
    ------
    DeclarationError
        `site` is none of these.

    Examples
    --------
    >>> hw.ZeroAblate(hw.Head(0, 3))
    ZeroAblate(site=Head(0, 3).z)
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.measure(model, task, hw.ZeroAblate(hw.Head(0, 3)))
    >>> round(float(hw.effect(ds, "loss").mean()), 1)
    6.8
    """

    def change(self) -> Change:
        """Zeros."""
        return Change(How.SET, None)


@dataclass(frozen=True, init=False)
class MeanAblate(SiteEdit):
    """Replace the site by its mean over a reference draw of the task.

    Parameters
    ----------
    site : Site, Head, Neuron or str
    over : {"example", ("example", "position")}
        What the mean is taken over: examples, giving one mean for each position (default), of reference prompts as long
        as the prompt; or examples and positions, that is every token of every reference prompt once, whatever its
        length. The hidden dimension is never averaged. The reference draw of a random task has its own seed, so the
        evaluated prompts are not in it; that of `Prompts` is its ``others``, or the prompts themselves where none are
        given.

    Raises
    ------
    DeclarationError
        `site` or `over` is none of these; or it is the mean of a pattern over positions.

    Examples
    --------
    >>> hw.MeanAblate(hw.Head(0, 3))
    MeanAblate(site=Head(0, 3).z, over='example')
    """

    over: str | tuple[str, ...] = "example"

    def __init__(self, site: Site | Head | Neuron | str, over: str | Iterable[str] = "example") -> None:
        super().__init__(site)
        names = (over,) if isinstance(over, str) else tuple(over) if isinstance(over, Iterable) else ()
        names = tuple(sorted(map(str, names)))
        if names not in (OVER[:1], OVER):
            raise DeclarationError(f"over={over!r}: possible are 'example' and ('example', 'position')")
        if names == OVER and self.site.component is Component.pattern:
            raise DeclarationError(
                f"{self.site}: the mean of a pattern over positions is no pattern; over='example' is"
            )
        object.__setattr__(self, "over", names[0] if len(names) == 1 else names)

    def change(self) -> Change:
        """The mean over the reference draw."""
        return Change(How.SET, FromRun(None, Reduce.EXAMPLE if self.over == "example" else Reduce.EXAMPLE_POSITION))


@dataclass(frozen=True, init=False)
class ResampleAblate(SiteEdit):
    """Replace the site by its value in another example of the reference draw (a seeded derangement of the examples).

    Keeps the site's distribution, and breaks its link to the prompt; the gentlest of the three ablations.

    Parameters
    ----------
    site : Site, Head, Neuron or str
    seed : int
        Of the derangement.

    Raises
    ------
    DeclarationError
        `site` or `seed` is none of these.

    Examples
    --------
    >>> hw.ResampleAblate(hw.Layer(0).mlp_out, seed=1)
    ResampleAblate(site=Layer(0).mlp_out, seed=1)
    """

    seed: int = 0

    def __init__(self, site: Site | Head | Neuron | str, seed: int = 0) -> None:
        super().__init__(site)
        object.__setattr__(self, "seed", whole(seed, "a seed", high=LARGEST_SEED))

    def change(self) -> Change:
        """The value of a partner in the reference draw."""
        return Change(How.SET, FromRun(None, Reduce.PARTNER, self.seed))


@dataclass(frozen=True, init=False)
class Patch(SiteEdit):
    """Replace the site by its value in another run of the same example (activation patching).

    Noising is ``base="clean", source="corrupted"``: a site whose breaking breaks the answer is necessary. Denoising is
    ``base="corrupted", source="clean"``: a site whose restoring restores the answer is sufficient. ``base`` belongs to
    the measurement. Neither says the other (Heimersheim & Nanda 2024).
    Which corruptions of repeated tokens leave something that can be restored, `RepeatedTokens` says.

    Parameters
    ----------
    site : Site, Head, Neuron or str
    source : str
        Name of the run that the value comes from.

    Raises
    ------
    DeclarationError
        `site` or `source` is none of these. Whether a task has the run is seen when the task is known.

    Examples
    --------
    >>> hw.Patch(hw.Head(1, 2).k)
    Patch(site=Head(1, 2).k, source='corrupted')
    """

    source: str = "corrupted"

    def __init__(self, site: Site | Head | Neuron | str, source: str = "corrupted") -> None:
        super().__init__(site)
        if not isinstance(source, str):
            raise DeclarationError(f"source={source!r}: give the name of a run, such as 'corrupted'")
        object.__setattr__(self, "source", source)

    def change(self) -> Change:
        """The value in the source run."""
        return Change(How.SET, FromRun(self.source))


@dataclass(frozen=True, init=False)
class Compose(Intervention):
    """Several interventions in one forward pass, in forward order whatever the order they were written in.

    ``a + b`` is short for ``Compose(a, b)``, and ``Compose(a, b) == Compose(b, a)``.

    Parameters
    ----------
    *parts : Intervention

    Raises
    ------
    DeclarationError
        There is no part, one is no intervention, or two change the same site, head and position: the text names both.

    Examples
    --------
    >>> hw.Compose(hw.Patch(hw.Head(1, 2).k), hw.ZeroAblate(hw.Head(0, 3)))
    Compose(ZeroAblate(site=Head(0, 3).z), Patch(site=Head(1, 2).k, source='corrupted'))
    """

    parts: tuple[Edit, ...]

    def __init__(self, *parts: Intervention) -> None:
        for part in parts:
            if not isinstance(part, Intervention):
                raise DeclarationError(f"Compose takes interventions, got {part!r}; of a list, write Compose(*list)")
        edits = sorted(
            (edit for part in parts for edit in part.edits()), key=lambda edit: (edit.site.order, repr(edit))
        )
        if not edits:
            raise DeclarationError("Compose needs at least one intervention")
        check_disjoint(edits)
        object.__setattr__(self, "parts", tuple(edits))

    def edits(self) -> tuple[Edit, ...]:
        """All of them, flattened."""
        return self.parts

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.parts))})"


def check_disjoint(edits: Sequence[Edit], sites: Sequence[Site] | None = None) -> None:
    """Refuse two edits of one place. `sites` stand for those of the edits, with positions counted out."""
    seen: dict[tuple[int, Component], dict[int | None, list[tuple[Edit, Site]]]] = {}
    for edit, site in zip(edits, sites or [edit.site for edit in edits], strict=True):
        parts = seen.setdefault((site.layer, site.component), {})
        meet = parts if site.part is None else [part for part in (None, site.part) if part in parts]
        for other, place in (one for part in meet for one in parts[part]):
            if edit.clashes(other, site, place):
                raise DeclarationError(f"two edits of one place: {other!r} and {edit!r}; keep one, or split positions")
        parts.setdefault(site.part, []).append((edit, site))
