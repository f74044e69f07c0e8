"""A plan in words and figures, like a database's EXPLAIN. Pure: imports the plan's arithmetic, no torch."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ...errors import choices
from ..declare.circuits import Circuit
from ..declare.paths import PathPatch
from ..declare.sites import Site
from .cost import (
    BYTES,
    Extent,
    cache_bytes,
    circuit_bytes,
    circuit_flops,
    forward_flops,
    logits_bytes,
    logits_flops,
    mlp_flops,
    pass_flops,
    row_bytes,
)
from .passes import ExampleChunk, recomputed_heads
from .reads import read_bytes, sizes_of_logits
from .schedule import Schedule
from .writes import JOIN_STAGES, Join

UNNAMED = ("scores", "q_rot", "k_rot", "heads")
POINTS_AT = {
    stage: " ".join(point for point, number in JOIN_STAGES.items() if number == stage and point not in UNNAMED)
    for stage in sorted(set(JOIN_STAGES.values()))
}
"""Stage to the points that it stands for, in words."""


@dataclass(frozen=True)
class Cost:
    """What a plan costs.

    Attributes
    ----------
    base, passes, naive : int
        Floating-point operations of the runs as they are, of the passes with interventions, and of one plain forward
        pass with all its logits for each condition and example.
    forward : float
        Operations of one plain forward pass of one prompt (the mean, where lengths differ).
    rows : int
        Most rows of a pass.
    positions : int
        Most positions of a pass.
    memory : int
        Bytes of the tensors of the largest pass, with what is kept of the base run (float32, without the weights).
    seconds : float, optional
        Estimate, where the speed was measured.
    result : int
        Bytes of the activations that come back, where some are captured (float32).
    """

    base: int
    passes: int
    naive: int
    forward: float
    rows: int
    positions: int
    memory: int
    seconds: float | None
    result: int = 0

    @property
    def total(self) -> int:
        """Operations in all."""
        return self.base + self.passes

    @property
    def share(self) -> float:
        """Operations in all over those of the naive way; not a number where nothing is changed."""
        return self.total / self.naive if self.naive else float("nan")


class _Work:
    """Operations of passes of a chunk; the many passes that are alike are counted once."""

    def __init__(self, plan: Schedule, chunk: ExampleChunk) -> None:
        self.plan, self.chunk = plan, chunk
        self.blocks = plan.blocks if plan.reads else None
        self.extents: dict[int, Extent] = {}
        self.passes: dict[tuple[int, tuple[Join, ...], tuple[int, ...]], int] = {}

    def extent(self, start: int) -> Extent:
        """How much a pass from a position on computes."""
        if start not in self.extents:
            self.extents[start] = self.plan.extent(self.chunk, start)
        return self.extents[start]

    def heads(self, number: int, join: Join) -> int:
        """How many heads' attention is computed again for a condition."""
        return len(recomputed_heads(self.plan.writes[self.chunk.group][number], join, self.plan.shape))

    def of(self, start: int, joins: tuple[Join, ...], heads: tuple[int, ...]) -> int:
        """Operations of a pass whose conditions join there, and compute the attention of so many heads again."""
        if (start, joins, heads) not in self.passes:
            again = [(join.layer, count) for join, count in zip(joins, heads, strict=True)]
            flops = pass_flops(self.plan.shape, self.extent(start), joins, again, self.blocks)
            self.passes[start, joins, heads] = flops
        return self.passes[start, joins, heads]

    def of_paths(self, start: int, numbers: Sequence[int]) -> int:
        """Operations of the direct paths of conditions in one pass, and of the streams of circuits."""
        extent, shape, total = self.extent(start), self.plan.shape, 0
        rows = self.chunk.size * (extent.stop - extent.start)
        sent: set[tuple[Site, str, bool]] = set()
        for write in (write for number in numbers for write in self.plan.writes[self.chunk.group][number]):
            total += circuit_flops(shape, extent) if isinstance(write.value, Circuit) else 0
            if not isinstance(path := write.value, PathPatch):
                continue
            ends = int(write.part is not None)
            if path.sender.head is not None and (path.sender, path.source, path.through_mlps) not in sent:
                sent.add((path.sender, path.source, path.through_mlps))  # which is made once in a pass
                ends += 1
                total += 2 * rows * shape.d_model * shape.width * shape.normed_after  # of what all heads write
            total += 2 * ends * rows * shape.d_model * shape.d_head
            if path.through_mlps:
                layers = write.layer - max(path.after, 0)
                layers -= shape.parallel and path.after >= 0  # whose own MLP it does not enter
                total += mlp_flops(shape, layers, rows)
        return total


def cost_of(plan: Schedule) -> Cost:
    """Add up what a plan costs."""
    shape, base, passes, naive, prompts = plan.shape, 0, 0, 0, 0.0
    rows = positions = memory = 0
    blocks = plan.blocks if plan.reads else None
    read = {(site.layer, site.component.point) for sites in plan.sources().values() for site in {*sites}}
    for chunk in plan.chunks:
        group, extent, work = plan.groups[chunk.group], plan.extent(chunk), _Work(plan, chunk)
        base += len(plan.runs) * forward_flops(shape, chunk.size, group.length, extent.scored, extent.columns, blocks)
        logits = sum(logits_flops(shape, 1, *sizes) for sizes in sizes_of_logits(plan.reads, shape, group))
        plain = forward_flops(shape, chunk.size, group.length)
        prompts += plain
        naive += len(plan.conditions) * plain
        kept = chunk.size * cache_bytes(shape, group.length, (*plan.base_points(chunk), *read))
        memory = max(memory, kept + chunk.size * logits_bytes(shape, extent))
        for one in chunk.passes:
            now = work.extent(one.start)
            count = chunk.size * len(one.conditions)
            heads = tuple(map(work.heads, one.conditions, one.joins))
            passes += work.of(one.start, one.joins, heads) + count * logits
            passes += work.of_paths(one.start, one.conditions)
            held = min(count * logits_bytes(shape, now), max(plan.budget // 4, logits_bytes(shape, now)))
            rows, positions = max(rows, count), max(positions, now.stop - now.start)
            held += count * read_bytes(plan.reads, shape, group)
            if any(isinstance(edit, Circuit) for number in one.conditions for edit in plan.conditions[number]):
                held += count * circuit_bytes(shape, now)
            memory = max(memory, kept + count * row_bytes(shape, now) + held)
    examples = sum(chunk.size for chunk in plan.chunks)
    overhead = plan.passes * shape.layers * plan.overhead
    seconds = None if plan.speed is None else (base + passes + overhead) / plan.speed
    result = BYTES * sum(map(prod, plan.sizes()))
    return Cost(base, passes, naive, prompts / max(1, examples), rows, positions, memory, seconds, result)


def explain(plan: Schedule) -> str:
    """The plan as text: what runs, how much work that is against the naive way, memory, and time where known."""
    found = cost_of(plan)
    examples = sum(len(group.examples) for group in plan.groups)
    scored = sum(len(group.scored) * len(group.examples) for group in plan.groups)
    tokens = sum(group.length * len(group.examples) for group in plan.groups)
    pairs = f", each with its answer and with its distractor: {examples} rows" if plan.pairs else ""
    columns = "the whole vocabulary" if plan.columns == plan.shape.vocabulary else f"{plan.columns} tokens"
    lines = [
        f"{plan.model}: {_count(len(plan.conditions), 'condition')} on {_count(plan.pairs or examples, 'prompt')} of "
        f"the {plan.base} run{pairs}",
        _row("runs", len(plan.runs), f"as they are: {choices(plan.runs)}"),
    ]
    if plan.conditions:
        lines.append(_row("passes", plan.passes, f"at most {found.rows} rows of {found.positions} positions together"))
    reads = f"of {columns} at {scored} of {tokens} positions" if plan.columns else "none"
    if plan.reads:
        lines.append(_row("captured", _bytes(found.result), "the values that come back"))
        for read, sizes in zip(plan.reads, plan.sizes(), strict=True):
            lines.append(_row("", _bytes(BYTES * prod(sizes)), f"{read}: {' x '.join(map(str, sizes))} numbers"))
    else:
        lines.append(_row("logits", "", reads + (", and every attention pattern" if plan.patterns else "")))
    if plan.shape.called and plan.conditions:
        lines.append(_row("blocks", "", "called: whole ones run, from the first layer that a condition changes"))
    if plan.conditions:
        lines += [
            _row(
                "work",
                f"{found.share:.3f}",
                f"of the naive way: {_passes(found.total / found.forward)} instead of "
                f"{_passes(found.naive / found.forward)} "
                "passes of a prompt",
            ),
            _row("", "", f"{_flops(found.total)} instead of {_flops(found.naive)}"),
        ]
    else:
        lines.append(_row("work", "", _flops(found.total)))
    lines.append(_row("memory", _bytes(found.memory), "at most, beside the weights"))
    if found.seconds is not None and plan.speed:
        lines.append(_row("time", _seconds(found.seconds), f"estimated, at {_flops(plan.speed)} a second"))
    told = [textwrap.fill(text, 98, initial_indent="advice   ", subsequent_indent=9 * " ") for text in plan.advice]
    return "\n".join([*lines, *_by_join(plan), *([""] if told else []), *told])


def _by_join(plan: Schedule) -> list[str]:
    """A table of where conditions join, and what share of the naive work each kind is."""
    count: Counter[Join] = Counter()
    work: Counter[Join] = Counter()
    starts: dict[Join, list[int]] = {}
    naive: Counter[Join] = Counter()
    for chunk in plan.chunks:
        each = _Work(plan, chunk)
        plain = forward_flops(plan.shape, chunk.size, plan.groups[chunk.group].length)
        for one in chunk.passes:
            for number, join in zip(one.conditions, one.joins, strict=True):
                if join.layer > plan.shape.layers:
                    continue
                count[join] += chunk.size
                work[join] += each.of(one.start, (join,), (each.heads(number, join),))
                work[join] += each.of_paths(one.start, [number])
                naive[join] += plain
                starts.setdefault(join, []).append(one.start)
    rows = sum(count.values())
    idle = len(plan.conditions) * sum(chunk.size for chunk in plan.chunks) - rows
    lines = ["", "from layer  at               rows  from position  of a forward pass"] if count else []
    for join in sorted(count):
        layer = "end" if join.layer == plan.shape.layers else str(join.layer)
        first, last = min(starts[join]), max(starts[join])
        span = str(first) if first == last else f"{first} to {last}"
        lines.append(
            f"{layer:>10}  {POINTS_AT[join.stage]:<15}{count[join]:>6}  {span:>13}  {work[join] / naive[join]:>17.3f}"
        )
    if idle:
        lines.append(f"{'none':>10}  {'':<15}{idle:>6}  {'':>13}  {0:>17.3f}  change nothing that is read")
    return lines


def _row(name: str, figure: object, words: str) -> str:
    return f"{name:<8}{figure!s:>9}  {words}".rstrip()


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _passes(number: float) -> str:
    """``51.07``, ``49,900``: four digits, and never a power of ten."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def _flops(number: float) -> str:
    for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.3g} FLOP"


def _bytes(number: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number} B"


def _seconds(number: float) -> str:
    return (
        f"{number:.2g} s" if number < 120 else f"{number / 60:.3g} min" if number < 7200 else f"{number / 3600:.3g} h"
    )
