"""Plan: which conditions run together, where each joins, on which examples, in what order. Pure: imports no torch.

A pass walks through the layers once. Its rows are conditions times examples, and a condition joins it at the first
place that it changes, from what the base run had there; nothing before that place, and no position before the first
one changed, is computed again. It checks everything that can be checked before the first pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DeclarationError, UnknownNameError, choices, printable, whole
from .checks import check_edit, check_together
from .cost import DEFAULT_BUDGET, OVERHEAD, Extent
from .edits import Edit
from .explain import explain
from .lowering import Write, lower
from .packing import Chunk, Packer, Pass, at_stage, extent_of
from .paths import PathPatch
from .shape import Group, Shape
from .sites import Site

Point = tuple[int, str]


@dataclass(frozen=True)
class Plan:
    """What will run, in order. ``print(plan)`` explains it.

    Attributes
    ----------
    model : str
    shape : Shape
    base : str
    runs : tuple of str
    conditions : tuple of tuples of Edit
    groups : tuple of Group
    writes : tuple of tuples of tuples of Write
        For each group and condition, what is written; nothing where no number depends on it.
    chunks : tuple of Chunk
    columns : int
        Logits that are computed at each scored position: the vocabulary, the few the metrics look at, or 0.
    patterns : bool
        Whether attention patterns are read in every pass.
    budget : int
        Bytes for all tensors, beside the weights: half for what is read of the runs, a quarter for a pass, a quarter
        for its logits.
    overhead : float
        Operations that a layer of a pass costs beside its work.
    speed : float, optional
        Operations a second, where that was measured; gives the estimate of time.
    """

    model: str
    shape: Shape
    base: str
    runs: tuple[str, ...]
    conditions: tuple[tuple[Edit, ...], ...]
    groups: tuple[Group, ...]
    writes: tuple[tuple[tuple[Write, ...], ...], ...]
    chunks: tuple[Chunk, ...]
    columns: int
    patterns: bool
    budget: int
    overhead: float
    speed: float | None = None

    @property
    def passes(self) -> int:
        """Forward passes with interventions."""
        return sum(len(chunk.passes) for chunk in self.chunks)

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
        return sources(self.conditions)

    def reference_sites(self) -> list[Site]:
        """Sites read from the reference draw."""
        return [edit.site for edits in self.conditions for edit in edits if edit.uses_reference]

    def scored(self, group: int, start: int) -> list[int]:
        """Positions from `start` on whose logits are read."""
        return [position for position in self.groups[group].scored if position >= start]

    def extent(self, chunk: Chunk, start: int = 0) -> Extent:
        """How much a pass of `chunk` computes."""
        return extent_of(self.groups[chunk.group], chunk.size, start, self.columns, self.patterns)

    def base_points(self, chunk: Chunk) -> set[Point]:
        """What is kept of the base run of `chunk`."""
        return {point for one in chunk.passes for point in self.points_of(chunk, one)}

    def points_of(self, chunk: Chunk, one: Pass) -> set[Point]:
        """What a pass takes from the base run: ``(layer, point)``."""
        wanted: set[Point] = set()
        for number, (layer, stage) in zip(one.conditions, one.entries, strict=True):
            wanted |= {(layer, name) for name in at_stage(self.shape, stage)}
            if one.start:  # keys and values of the positions that are not computed
                wanted |= {(later, "qkv") for later in range(layer + (stage > 0), self.shape.layers)}
            for write in self.writes[chunk.group][number]:
                if write.how == "embed":
                    wanted |= {(0, "embed"), (0, "pos_embed")} if self.shape.pos_embed else {(0, "embed")}
                if isinstance(write.edit, PathPatch):
                    wanted |= _points_of_path(write.edit, write.layer, self.shape.parallel)
        return wanted

    def __str__(self) -> str:
        return printable(explain(self), lines=True)


def _points_of_path(edit: PathPatch, end: int, parallel: bool) -> set[Point]:
    start = edit.sender.layer
    wanted = {(start, str(edit.sender.component))}
    for layer in range(start, end):
        wanted |= {(layer, "mlp_out" if parallel else "resid_mid"), (layer + 1, "stream")}
    return wanted


def make_plan(
    conditions: Sequence[Sequence[Edit]],
    *,
    model: str,
    shape: Shape,
    groups: Sequence[Group],
    runs: Sequence[str],
    base: str,
    batch_size: int | str = "auto",
    reads_patterns: bool = False,
    columns: int | None = None,
    budget: int = DEFAULT_BUDGET,
    overhead: float = OVERHEAD,
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
        Rows of one pass; ``"auto"`` sizes it from `budget`. No number changes by more than rounding.
    reads_patterns : bool
        Whether attention patterns are read in every pass.
    columns : int, optional
        Logits that the metrics look at, at each scored position; the whole vocabulary when left out.
    budget : int
        Bytes for all tensors, beside the weights.
    overhead : float
        Operations that a layer of a pass costs beside its work.

    Raises
    ------
    DeclarationError, UnknownNameError
        Something is out of range; the text says what is possible.
    """
    if base not in runs:
        raise UnknownNameError(f"base={base!r}: the task has the runs {choices(runs)}")
    limit = _limit(batch_size)
    for group in groups:
        if not group.scored and columns != 0:
            raise DeclarationError(
                f"a prompt of {group.length} tokens has no scored position: metrics of logits need one"
            )
        if group.length > shape.context:
            raise DeclarationError(f"a prompt has {group.length} tokens: {model} reads at most {shape.context}")
    ordered = tuple(tuple(sorted(edits, key=lambda edit: edit.site.order)) for edits in conditions)
    for edits in ordered:
        for edit in edits:
            check_edit(edit, model, shape, groups, runs)
        check_together(edits, shape, groups)
    columns = shape.vocabulary if columns is None else columns
    writes = tuple(tuple(lower(edits, shape, group, reads_patterns) for edits in ordered) for group in groups)
    packer = Packer(
        shape,
        columns,
        reads_patterns,
        budget,
        overhead,
        limit,
        tuple(
            point
            for sites in sources(ordered).values()
            for point in {(one.layer, one.component.point) for one in sites}
        ),
        any(write.place in ("scores", "pattern") for group in writes for each in group for write in each),
    )
    chunks = tuple(
        chunk for number, group in enumerate(groups) for chunk in packer.chunks(number, group, writes[number])
    )
    names = (model, shape, base, tuple(runs), ordered, tuple(groups))
    return Plan(*names, writes, chunks, columns, reads_patterns, budget, overhead)


def sources(conditions: Sequence[Sequence[Edit]]) -> dict[str, list[Site]]:
    """Run name to the sites that patches take from it."""
    wanted: dict[str, list[Site]] = {}
    for edits in conditions:
        for edit in edits:
            if edit.run is not None:
                wanted.setdefault(edit.run, []).append(edit.sender if isinstance(edit, PathPatch) else edit.site)
    return wanted


def _limit(batch_size: int | str) -> int | None:
    if batch_size == "auto":
        return None
    try:
        return whole(batch_size, "batch_size", low=1)
    except DeclarationError:
        message = f'batch_size={batch_size!r}: possible are "auto" and a whole number from 1'
        raise DeclarationError(message) from None
