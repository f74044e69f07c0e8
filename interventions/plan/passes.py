"""Packing: which conditions share a pass, and how many examples. Pure: imports no torch.

Conditions that first change a late position are kept apart from those that change an early one, since a pass computes
every position from its first one on; within a pass they stand in the order in which they join.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from ..base.shape import Group, Shape
from ..declare.circuits import Circuit
from .cost import Extent, block_flops, cache_bytes, circuit_bytes, logits_bytes, row_bytes
from .reads import Read, joins_whole, own_point, read_bytes
from .writes import ATTN_IN, ATTN_OUT, MLP_IN, MLP_POST, OF_KEYS, QKV, STREAM, Join, Write, last_position

READ_AT_STAGE = (
    ("stream",),
    ("stream",),
    ("stream", "qkv", "z"),
    ("stream", "z"),
    ("stream", "attn_out"),
    ("resid_mid",),
    ("resid_mid", "mlp_in"),
    ("resid_mid", "mlp_pre", "mlp_up"),
    ("resid_mid", "mlp_post"),
    ("resid_mid", "mlp_out"),
)
"""What a condition that joins at a stage takes from the base run, where the MLP reads what attention wrote."""

READ_AT_STAGE_PARALLEL = (
    ("stream",),
    ("stream", "mlp_out"),
    ("stream", "qkv", "z", "mlp_out"),
    ("stream", "z", "mlp_out"),
    ("stream", "attn_out", "mlp_out"),
    (),
    ("stream", "attn_out", "mlp_in"),
    ("stream", "attn_out", "mlp_pre", "mlp_up"),
    ("stream", "attn_out", "mlp_post"),
    ("stream", "attn_out", "mlp_out"),
)
"""The same where attention and MLP both read the stream that enters the layer."""


def at_stage(shape: Shape, stage: int) -> tuple[str, ...]:
    """What a condition that joins at a stage takes from the base run."""
    read = (READ_AT_STAGE_PARALLEL if shape.parallel else READ_AT_STAGE)[stage]
    return tuple(point for point in read if point != "mlp_up" or shape.gated)


@dataclass(frozen=True)
class Pass:
    """Conditions that go through the model together.

    Attributes
    ----------
    conditions : tuple of int
        In the order in which they join.
    joins : tuple of Join
        Where each joins.
    start : int
        The first position that is computed.
    """

    conditions: tuple[int, ...]
    joins: tuple[Join, ...]
    start: int

    def some(self, indices: Iterable[int]) -> Pass:
        """The pass of some of its conditions, by their indices in `conditions`."""
        kept = list(indices)
        return Pass(tuple(self.conditions[at] for at in kept), tuple(self.joins[at] for at in kept), self.start)


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
    reads : tuple of Site or Logits
        What is read in every condition. Then each has a row in a pass, also one that changes nothing of it.
    """

    shape: Shape
    columns: int
    patterns: bool
    budget: int
    overhead: float
    limit: int | None = None
    sources: tuple[tuple[int, str], ...] = ()
    explicit: bool = False
    reads: tuple[Read, ...] = ()

    def extent(self, group: Group, examples: int, start: int = 0) -> Extent:
        """How much of a pass from position `start` is computed."""
        return extent_of(group, examples, start, self.columns, self.patterns, self.shape.called)

    def rows(self, group: Group, start: int = 0, circuits: bool = False) -> int:
        """Rows of a pass whose tensors fit in a quarter of the budget; at least one."""
        explicit = self.shape.cap is not None or self.shape.sinks
        row = row_bytes(self.shape, self.extent(group, 1, start), self.explicit or self.shape.called or explicit)
        row += circuit_bytes(self.shape, self.extent(group, 1)) if circuits else 0
        return max(1, self.budget // 4 // (row + read_bytes(self.reads, self.shape, group)))

    def chunks(self, number: int, group: Group, conditions: Sequence[Sequence[Write]]) -> list[ExampleChunk]:
        """The examples of a group in chunks, each with its passes."""
        joins = {at: self._join(writes) for at, writes in enumerate(conditions) if writes}
        every = self.patterns or self.shape.called
        alone = {at for at in joins if any(isinstance(write.value, Circuit) for write in conditions[at])}
        whole = {*joins} if every else alone
        starts = {at: 0 if at in whole else min(write.first for write in conditions[at]) for at in joins}
        for at in range(len(conditions)) if self.reads else ():
            joins.setdefault(at, Join(self.shape.layers + 1, STREAM))
            starts.setdefault(at, max(starts.values(), default=0))
        size, rows = len(group.examples), self.limit
        if rows is None:
            rows = min(self.rows(group, circuits=bool(alone)), self._examples(group, joins, starts))
        kinds = [
            ({at: starts[at] for at in starts if (at in alone) == circuits}, circuits) for circuits in (False, True)
        ]
        return [
            ExampleChunk(
                number,
                (start, stop),
                tuple(one for some, kind in kinds for one in self._passes(group, stop - start, joins, some, kind)),
            )
            for start, stop in equal_parts(size, -(-size // min(size, rows)))
        ]

    def _join(self, writes: Sequence[Write]) -> Join:
        """Where a condition joins."""
        layer, stage = min(write.join for write in writes)
        # where patterns are read, those of all heads of the layer are, not only of those that change
        every = (self.patterns and stage == QKV) or joins_whole(self.reads, self.shape, layer, stage)
        # norms of q and k over all heads change each head where one is written to
        every = every or (
            self.shape.joint_norms and any(one.join == (layer, QKV) and one.point in "qk" for one in writes)
        )
        # beside attention, the MLP of rows that join in attention is that of the base run, unless it is written to
        every = every or self.shape.called
        within = any(write.layer == layer and MLP_IN <= write.join.stage <= MLP_POST for write in writes)
        both = self.shape.parallel and ATTN_IN <= stage <= ATTN_OUT and within
        return Join(layer, STREAM if every or both else stage)

    def _examples(self, group: Group, joins: Mapping[int, Join], starts: Mapping[int, int]) -> int:
        """Examples of which half of the budget keeps what is read of the runs."""
        points = {(layer, name) for layer, stage in joins.values() for name in at_stage(self.shape, stage)}
        points |= {own_point(read, self.shape) for read in self.reads}
        if any(starts.values()):
            points |= {(layer, "qkv") for layer in range(self.shape.layers)}
        logits = logits_bytes(self.shape, self.extent(group, 1))
        held = cache_bytes(self.shape, group.length, (*points, *self.sources)) + logits
        return max(1, self.budget // 2 // held)

    def _passes(
        self, group: Group, examples: int, joins: Mapping[int, Join], starts: Mapping[int, int], circuits: bool
    ) -> Iterator[Pass]:
        for start, numbers in self._by_start(group, examples, joins, starts):
            conditions = max(1, (self.limit or self.rows(group, start, circuits)) // examples)
            ordered = sorted(numbers, key=lambda number: (joins[number], number))
            kinds = [[*some] for _, some in groupby(ordered, lambda number: joins[number])]  # rows of one first layer
            for alike in kinds if self.shape.called else [ordered]:
                for first, last in equal_parts(len(alike), -(-len(alike) // conditions)):
                    some = alike[first:last]
                    yield Pass(tuple(some), tuple(joins[number] for number in some), start)

    def _by_start(
        self, group: Group, examples: int, joins: Mapping[int, Join], starts: Mapping[int, int]
    ) -> list[tuple[int, list[int]]]:
        """Conditions by the first position computed; neighbours join where a pass of their own would cost more."""
        position = block_flops(self.shape, examples, 1, last_position(group, self.patterns))
        buckets: list[tuple[int, list[int]]] = []
        wasted = 0.0
        by_start: dict[int, list[int]] = {}
        for number, start in starts.items():
            by_start.setdefault(start, []).append(number)
        before = 0
        for start, numbers in sorted(by_start.items()):
            layers = [self.shape.layers - joins[number].layer for number in numbers]
            extra = (start - before) * position * sum(layers) if buckets else 0.0
            if buckets and wasted + extra <= self.overhead * max(1, *layers):
                buckets[-1][1].extend(numbers)
                wasted += extra
            else:
                buckets.append((start, numbers))
                before, wasted = start, 0.0
        return buckets


def equal_parts(size: int, parts: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each of some parts of ``range(size)``, as equal as can be."""
    return pairwise(size * part // parts for part in range(parts + 1))


def extent_of(group: Group, examples: int, start: int, columns: int, patterns: bool, whole: bool = False) -> Extent:
    """How much of a pass from position `start` is computed.

    Parameters
    ----------
    group : Group
    examples : int
    start : int
        The first position that is computed.
    columns : int
        Logits that are computed at each scored position.
    patterns : bool
        Whether attention patterns are read.
    whole : bool
        Whether prompts go through the model whole.

    Returns
    -------
    Extent
    """
    scored = sum(position >= start for position in group.scored)
    return Extent(examples, start, last_position(group, patterns or whole), scored, columns, patterns)


def recomputed_heads(writes: Sequence[Write], join: Join, shape: Shape) -> list[int]:
    """Heads whose attention is computed again for a condition that joins at ``q k v pattern``."""
    if join.stage != QKV:
        return []
    return sorted({head for write in writes if write.join == join for head in changed_heads(write, shape)})


def changed_heads(write: Write, shape: Shape) -> range:
    """Heads that a write to ``q k v pattern`` changes; several, where they share the key-value head that it is to."""
    if write.part is None:
        return range(shape.heads)
    return shape.readers(write.part) if write.point in OF_KEYS else range(write.part, write.part + 1)
