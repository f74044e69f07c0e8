"""Packing: which conditions share a pass, and how many examples. Pure: imports no torch.

Conditions that first change a late position are kept apart from those that change an early one, since a pass computes
every position from its first one on; within a pass they stand in the order in which they join.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..base.shape import Group, Shape
from .cost import Extent, block_flops, cache_bytes, logits_bytes, row_bytes
from .writes import OF_KEYS, STAGES, Write, last_position

Entry = tuple[int, int, int]
"""Layer, stage and first position at which a condition joins."""

AT_STAGE = (
    ("stream",),
    ("stream", "qkv", "z"),
    ("stream", "z"),
    ("stream", "attn_out"),
    ("resid_mid",),
    ("resid_mid", "mlp_out"),
)
"""What a condition that joins at a stage takes from the base run, where the MLP reads what attention wrote."""

AT_STAGE_PARALLEL = (
    ("stream",),
    ("stream", "qkv", "z", "mlp_out"),
    ("stream", "z", "mlp_out"),
    ("stream", "attn_out", "mlp_out"),
    (),
    ("stream", "attn_out", "mlp_out"),
)
"""The same where attention and MLP both read the stream that enters the layer."""


def at_stage(shape: Shape, stage: int) -> tuple[str, ...]:
    """What a condition that joins at a stage takes from the base run."""
    return (AT_STAGE_PARALLEL if shape.parallel else AT_STAGE)[stage]


@dataclass(frozen=True)
class Pass:
    """Conditions that go through the model together.

    Attributes
    ----------
    conditions : tuple of int
        In the order in which they join.
    entries : tuple of (layer, stage)
        Where each joins, see `lowering.STAGES`.
    start : int
        The first position that is computed.
    """

    conditions: tuple[int, ...]
    entries: tuple[tuple[int, int], ...]
    start: int

    def some(self, places: Iterable[int]) -> Pass:
        """The same for the conditions at some places."""
        kept = list(places)
        return Pass(tuple(self.conditions[at] for at in kept), tuple(self.entries[at] for at in kept), self.start)


@dataclass(frozen=True)
class ExampleChunk:
    """Some examples of a group, with what runs on them: every run once as it is, then the passes.

    Attributes
    ----------
    group : int
    examples : tuple of int
        Start and stop among the examples of the group.
    passes : tuple of Pass
    """

    group: int
    examples: tuple[int, int]
    passes: tuple[Pass, ...]

    @property
    def size(self) -> int:
        """How many examples."""
        return self.examples[1] - self.examples[0]


@dataclass(frozen=True)
class Packer:
    """What packing depends on.

    Attributes
    ----------
    shape : Shape
    columns : int
        Logits that are computed at each scored position.
    patterns : bool
        Whether attention patterns are read.
    budget : int
        Bytes for all tensors: half for what is read of the runs, a quarter for a pass, a quarter for its logits.
    overhead : float
        Operations that a layer of a pass costs beside its work.
    limit : int, optional
        Rows of a pass, where they were asked for.
    sources : tuple of (layer, point)
        What is read of runs for patches, each as often as there are runs that it is read of.
    explicit : bool
        Whether some attention is made through its pattern, which takes memory.
    """

    shape: Shape
    columns: int
    patterns: bool
    budget: int
    overhead: float
    limit: int | None = None
    sources: tuple[tuple[int, str], ...] = ()
    explicit: bool = False

    def extent(self, group: Group, examples: int, start: int = 0) -> Extent:
        """How much of a pass from position `start` is computed."""
        return extent_of(group, examples, start, self.columns, self.patterns)

    def rows(self, group: Group, start: int = 0) -> int:
        """Rows of a pass whose tensors fit in a quarter of the budget; at least one."""
        return max(1, self.budget // 4 // row_bytes(self.shape, self.extent(group, 1, start), self.explicit))

    def chunks(self, number: int, group: Group, conditions: Sequence[Sequence[Write]]) -> list[ExampleChunk]:
        """The examples of a group in pieces, each with its passes."""
        entries = {at: entry for at, writes in enumerate(conditions) if (entry := self._entry(writes)) is not None}
        size, rows = len(group.examples), self.limit
        if rows is None:
            rows = min(self.rows(group), self._examples(group, entries))
        pieces = -(-size // min(size, rows))
        bounds = [size * piece // pieces for piece in range(pieces + 1)]
        return [
            ExampleChunk(number, (start, stop), tuple(self._passes(group, stop - start, entries)))
            for start, stop in pairwise(bounds)
        ]

    def _entry(self, writes: Sequence[Write]) -> Entry | None:
        """Where a condition joins; None where it changes nothing that is read."""
        if not writes:
            return None
        layer, stage = min((write.layer, STAGES[write.place]) for write in writes)
        if self.patterns and stage == 1:
            stage = 0  # the patterns of all heads of the layer are read, not only of those that change
        return layer, stage, 0 if self.patterns else min(write.first for write in writes)

    def _examples(self, group: Group, entries: Mapping[int, Entry]) -> int:
        """Examples of which half of the budget keeps what is read of the runs."""
        points = {(layer, name) for layer, stage, _ in entries.values() for name in at_stage(self.shape, stage)}
        if any(start for *_, start in entries.values()):
            points |= {(layer, "qkv") for layer in range(self.shape.layers)}
        logits = logits_bytes(self.shape, self.extent(group, 1))
        held = cache_bytes(self.shape, group.length, (*points, *self.sources)) + logits
        return max(1, self.budget // 2 // held)

    def _passes(self, group: Group, examples: int, entries: Mapping[int, Entry]) -> list[Pass]:
        made = []
        for start, numbers in self._by_start(group, examples, entries):
            rows = self.limit or self.rows(group, start)
            together = max(1, rows // examples)
            ordered = sorted(numbers, key=lambda number: (entries[number][:2], number))
            pieces = -(-len(ordered) // together)
            for piece in range(pieces):
                part = ordered[len(ordered) * piece // pieces : len(ordered) * (piece + 1) // pieces]
                made.append(Pass(tuple(part), tuple(entries[number][:2] for number in part), start))
        return made

    def _by_start(self, group: Group, examples: int, entries: Mapping[int, Entry]) -> list[tuple[int, list[int]]]:
        """Conditions by the first position computed; neighbours join where a pass of their own would cost more."""
        position = block_flops(self.shape, examples, 1, last_position(group, self.patterns))
        buckets: list[tuple[int, list[int]]] = []
        wasted = 0.0
        by_start: dict[int, list[int]] = {}
        for number, entry in entries.items():
            by_start.setdefault(entry[2], []).append(number)
        for start, numbers in sorted(by_start.items()):
            layers = [self.shape.layers - entries[number][0] for number in numbers]
            extra = (start - buckets[-1][0]) * position * sum(layers) if buckets else 0.0
            if buckets and wasted + extra <= self.overhead * max(1, *layers):
                buckets[-1][1].extend(numbers)
                wasted += extra
            else:
                buckets.append((start, numbers))
                wasted = 0.0
        return buckets


def extent_of(group: Group, examples: int, start: int, columns: int, patterns: bool) -> Extent:
    """How much of a pass from position `start` is computed."""
    scored = sum(position >= start for position in group.scored)
    return Extent(examples, start, last_position(group, patterns), scored, columns, patterns)


def heads_redone(writes: Sequence[Write], entry: tuple[int, int], shape: Shape) -> list[int]:
    """Heads whose attention is redone for a condition that joins at ``q k v pattern``."""
    if entry[1] != 1:
        return []
    touched: set[int] = set()
    for write in writes:
        if (write.layer, STAGES[write.place]) == entry:
            touched.update(heads_of(write, shape))
    return sorted(touched)


def heads_of(write: Write, shape: Shape) -> range:
    """Heads that a write to ``q k v pattern`` changes; several, where they share the key-value head that it is to."""
    if write.head is None:
        return range(shape.heads)
    return shape.readers(write.head) if write.place in OF_KEYS else range(write.head, write.head + 1)
