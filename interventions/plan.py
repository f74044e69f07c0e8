"""Plan: which conditions run together, on which examples, in what order. Pure: imports no torch, touches no model.

This planner runs whole forward passes with conditions as rows. It checks everything that can be checked before the
first pass; the engine executes what it says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DeclarationError, UnknownNameError, choices
from .edits import SiteEdit, check_disjoint
from .shape import Group, Shape
from .sites import Site

BYTES = 4
DEFAULT_BUDGET = 128 * 2**20
"""Bytes of the largest tensors of one pass. The shipped model takes 0.77 of the time that it takes with 512 MiB."""


@dataclass(frozen=True)
class Chunk:
    """Some examples of a group, with what runs on them: every run once as it is, then the conditions span by span.

    Attributes
    ----------
    group : int
    examples : tuple of int
        Start and stop among the examples of the group.
    conditions : tuple of (int, int)
        Start and stop of each span of conditions that goes through the model together, as rows of one batch.
    """

    group: int
    examples: tuple[int, int]
    conditions: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> list[int]:
        """Rows of each of its passes with interventions."""
        examples = self.examples[1] - self.examples[0]
        return [examples * (stop - start) for start, stop in self.conditions]


@dataclass(frozen=True)
class Plan:
    """What will run, in order. ``print(plan)`` says how much it is."""

    model: str
    shape: Shape
    base: str
    runs: tuple[str, ...]
    conditions: tuple[tuple[SiteEdit, ...], ...]
    groups: tuple[Group, ...]
    chunks: tuple[Chunk, ...]

    @property
    def passes(self) -> int:
        """Forward passes with interventions."""
        return sum(len(chunk.conditions) for chunk in self.chunks)

    @property
    def steps(self) -> int:
        """All forward passes that yield numbers: those with interventions, and each run as it is."""
        return self.passes + len(self.runs) * len(self.chunks)

    @property
    def uses_reference(self) -> bool:
        """Whether any edit takes its value from the reference draw."""
        return any(edit.uses_reference for edits in self.conditions for edit in edits)

    def sources(self) -> dict[str, list[Site]]:
        """Run name to the sites that patches take from it."""
        wanted: dict[str, list[Site]] = {}
        for edits in self.conditions:
            for edit in edits:
                if edit.run is not None:
                    wanted.setdefault(edit.run, []).append(edit.site)
        return wanted

    def reference_sites(self) -> list[Site]:
        """Sites read from the reference draw."""
        return [edit.site for edits in self.conditions for edit in edits if edit.uses_reference]

    def __str__(self) -> str:
        examples = sum(len(group.examples) for group in self.groups)
        rows = [row for chunk in self.chunks for row in chunk.rows]
        return (
            f"{self.model}: {len(self.conditions)} conditions on {examples} examples of the {self.base} run, "
            f"{self.passes} passes, {sum(rows)} rows, at most {max(rows, default=0)} rows together; "
            f"before them the runs {choices(self.runs)} without any intervention"
        )


def make_plan(
    conditions: Sequence[Sequence[SiteEdit]],
    *,
    model: str,
    shape: Shape,
    groups: Sequence[Group],
    runs: Sequence[str],
    base: str,
    batch_size: int | str = "auto",
    reads_patterns: bool = False,
) -> Plan:
    """Check the conditions against the model and the prompts, and lay them out in passes.

    Parameters
    ----------
    conditions : sequence of sequences of edits
        Each inner sequence is one condition: edits that happen in one forward pass.
    model : str
        Name, for messages.
    shape : Shape
    groups : sequence of Group
        Examples by length.
    runs : sequence of str
        Runs that the task has.
    base : str
        The run that is intervened on.
    batch_size : int or "auto"
        Rows of one pass; ``"auto"`` sizes it from a memory budget. It never changes a number.
    reads_patterns : bool
        Whether attention patterns are read in every pass (they need memory).

    Raises
    ------
    DeclarationError, UnknownNameError
        Something is out of range; the text says what is possible.
    """
    if base not in runs:
        raise UnknownNameError(f"base={base!r}: the task has the runs {choices(runs)}")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise DeclarationError(f'batch_size={batch_size!r}: possible are "auto" and a whole number from 1')
    for group in groups:
        if group.length > shape.context:
            raise DeclarationError(f"a prompt has {group.length} tokens: {model} reads at most {shape.context}")
    ordered = tuple(tuple(sorted(edits, key=lambda edit: edit.site.order)) for edits in conditions)
    for edits in ordered:
        for edit in edits:
            check_edit(edit, model, shape, groups, runs)
        check_negative_positions(edits, groups)
    chunks = []
    for number, group in enumerate(groups):
        rows = rows_within(DEFAULT_BUDGET, shape, group, reads_patterns) if batch_size == "auto" else int(batch_size)
        examples = min(len(group.examples), rows)
        together = max(1, rows // examples)
        spans = [(first, min(first + together, len(ordered))) for first in range(0, len(ordered), together)]
        chunks += [
            Chunk(number, (start, min(start + examples, len(group.examples))), tuple(spans))
            for start in range(0, len(group.examples), examples)
        ]
    return Plan(model, shape, base, tuple(runs), ordered, tuple(groups), tuple(chunks))


def rows_within(budget: int, shape: Shape, group: Group, reads_patterns: bool) -> int:
    """Rows of a forward pass whose largest tensors fit in `budget` bytes (float32), at least one."""
    residual = group.length * shape.d_model * 16
    attention = group.length**2 * shape.heads * (3 if reads_patterns else 1)
    logits = len(group.scored) * shape.vocabulary * 4
    return max(1, math.floor(budget / (BYTES * (residual + attention + logits))))


def check_site(site: Site, model: str, shape: Shape, groups: Sequence[Group]) -> None:
    """Refuse a layer, head or position that the model or the prompts do not have."""
    if site.layer >= shape.layers:
        raise DeclarationError(f"{site}: {model} has layers 0 to {shape.layers - 1}")
    if site.head is not None and site.head >= shape.heads:
        raise DeclarationError(f"{site}: {model} has heads 0 to {shape.heads - 1}")
    for group in groups:
        for position in site.positions or ():
            if not -group.length <= position < group.length:
                raise DeclarationError(
                    f"{site}: position {position} does not exist in a prompt of {group.length} tokens "
                    f"(0 to {group.length - 1}, or -{group.length} to -1 from the end)"
                )


def check_edit(edit: SiteEdit, model: str, shape: Shape, groups: Sequence[Group], runs: Sequence[str]) -> None:
    """Refuse an edit whose site or source run does not exist."""
    check_site(edit.site, model, shape, groups)
    if edit.run is not None and edit.run not in runs:
        raise UnknownNameError(f"{edit!r}: the task has the runs {choices(runs)}")


def check_negative_positions(edits: Sequence[SiteEdit], groups: Sequence[Group]) -> None:
    """Refuse edits that meet only once positions from the end are counted out."""
    if any(position < 0 for edit in edits for position in edit.site.positions or ()):
        for group in groups:
            check_disjoint(edits, [_counted_out(edit.site, group.length) for edit in edits])


def positions_in(site: Site, length: int) -> list[int] | None:
    """The positions of a site in a prompt of `length` tokens, counted from 0; None for all."""
    if site.positions is None:
        return None
    return [position % length for position in site.positions]


def _counted_out(site: Site, length: int) -> Site:
    positions = positions_in(site, length)
    return site if positions is None else site.at(positions)
