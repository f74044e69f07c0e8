"""Plan: which conditions run together, where each joins, on which examples, in what order. Pure: imports no torch.

A pass walks through the layers once. Its rows are conditions times examples. A condition joins the pass at the first
point that it changes, with the rows that the base run has there; nothing before that point, and no position before the
first changed one, is computed again. `make_plan` checks everything that can be checked before the first pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...errors import DeclarationError, UnknownNameError, choices, printable, whole
from ..base.shape import Group, Shape
from ..declare.components import Component
from ..declare.edits import Edit
from ..declare.sites import Site
from .cost import DEFAULT_BUDGET, OVERHEAD
from .explain import Cost, cost_of, explain
from .passes import Packer
from .reads import Inside, Read, positions_needed, writes_seen
from .schedule import Schedule, sources
from .validate import check_beside, check_condition, check_edit, check_read, check_site, how_to_have
from .writes import Write, alike_in_groups, writes_of


class Plan(Schedule):
    """What will run, in order. Its text explains it; the fields are those of `Schedule`."""

    def __repr__(self) -> str:
        return printable(explain(self), lines=True)

    def cost(self) -> Cost:
        """Add up the operations, the memory and, where the speed of the model was measured, the time of the plan.

        Returns
        -------
        Cost
            ``base``, ``passes``, ``total`` and ``naive`` in floating-point operations, ``share`` (``total / naive``),
            ``memory`` in bytes, ``rows`` and ``positions`` of the largest passes, ``seconds`` or None.
        """
        return cost_of(self)


def make_plan(
    conditions: Sequence[Sequence[Edit]],
    *,
    model: str,
    shape: Shape,
    groups: Sequence[Group],
    runs: Sequence[str],
    base: str,
    measured: Sequence[str] | None = None,
    batch_size: int | str = "auto",
    reads_patterns: bool = False,
    columns: int | None = None,
    budget: int = DEFAULT_BUDGET,
    overhead: float = OVERHEAD,
    reads: Sequence[Read] = (),
    inside: Inside | None = None,
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
    measured : sequence of str, optional
        Runs that are measured as they are; the base run, and those that an intervention takes from, always are. All
        when left out.
    batch_size : int or "auto"
        Rows of one pass; ``"auto"`` sizes it from `budget`. No number changes by more than rounding.
    reads_patterns : bool
        Whether attention patterns are read in every pass.
    columns : int, optional
        Logits that the metrics look at, at each scored position; the whole vocabulary when left out.
    budget : int
        Bytes for all tensors, beside the weights.
    overhead : float
        Operations that a layer of a pass costs beside its work.
    reads : sequence of Site or Logits
        What is read in every condition; then no other position is scored.
    inside : Inside, optional
        What is made of it; then the scored positions stay.

    Returns
    -------
    Plan

    Raises
    ------
    DeclarationError, UnknownNameError
        Something is out of range; the text says what is possible.
    """
    if base not in runs:
        raise UnknownNameError(f"base={base!r}: the task has the runs {choices(runs)}{how_to_have(base)}")
    asked = runs if measured is None else measured
    for run in asked:
        if run not in runs:
            raise UnknownNameError(f"runs={run!r}: the task has the runs {choices(runs)}")
    limit = _limit(batch_size)
    if reads_patterns:
        check_site(Site(Component.pattern, 0), model, shape, ())
    for group in groups:
        if not group.scored and columns != 0:
            raise DeclarationError(
                f"a prompt of {group.length} tokens has no scored position: metrics of logits need one"
            )
        if group.length > shape.context:
            raise DeclarationError(f"a prompt has {group.length} tokens: {model} reads at most {shape.context}")
    for group in groups:
        for read in reads:
            check_read(read, model, shape, group)
    if reads and inside is None:
        groups = [replace(group, scored=positions_needed(reads, group)) for group in groups]
    ordered = tuple(tuple(sorted(edits, key=lambda edit: edit.site.order)) for edits in conditions)
    for edits in ordered:
        for edit in edits:
            check_edit(edit, model, shape, groups, runs)
        check_condition(edits, shape, groups)
        check_beside(edits, reads)
    columns = shape.vocabulary if columns is None else columns
    taken = sources(ordered, shape)
    writes: list[tuple[tuple[Write, ...], ...]] = []
    for group in groups:
        before = writes[0] if writes else None
        writes.append(
            tuple(
                before[at]
                if before is not None and alike_in_groups(edits)
                else writes_seen(writes_of(edits, shape, group, reads_patterns), reads, shape)
                for at, edits in enumerate(ordered)
            )
        )
    packer = Packer(
        shape,
        columns,
        reads_patterns,
        budget,
        overhead,
        limit,
        tuple(point for sites in taken.values() for point in {(one.layer, one.component.point) for one in sites}),
        any(write.point in ("scores", "pattern") for group in writes for each in group for write in each)
        or any(isinstance(read, Site) and read.component is Component.pattern for read in reads),
        tuple(reads),
    )
    chunks = tuple(
        chunk for number, group in enumerate(groups) for chunk in packer.chunks(number, group, writes[number])
    )
    run_as_they_are = tuple(run for run in runs if run in {base, *asked, *taken})
    names = (model, shape, base, run_as_they_are, ordered, tuple(groups))
    return Plan(
        *names, tuple(writes), chunks, columns, reads_patterns, budget, overhead, reads=tuple(reads), inside=inside
    )


def _limit(batch_size: int | str) -> int | None:
    if batch_size == "auto":
        return None
    try:
        return whole(batch_size, "batch_size", low=1)
    except DeclarationError:
        message = f'batch_size={batch_size!r}: possible are "auto" and a whole number from 1'
        raise DeclarationError(message) from None
