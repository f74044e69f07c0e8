"""A plan in words and figures, like a database's EXPLAIN. Pure: imports the plan's arithmetic, no torch."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass
from math import prod

from ...errors import choices
from ..declare.paths import PathPatch
from .cost import BYTES, cache_bytes, forward_flops, logits_bytes, logits_flops, mlp_flops, pass_flops, row_bytes
from .passes import ExampleChunk, Pass, recomputed_heads
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


def cost_of(plan: Schedule) -> Cost:
    """Add up what a plan costs."""
    shape, base, passes, naive, prompts = plan.shape, 0, 0, 0, 0.0
    rows = positions = memory = 0
    blocks = plan.blocks if plan.reads else None
    for chunk in plan.chunks:
        group, extent = plan.groups[chunk.group], plan.extent(chunk)
        base += len(plan.runs) * forward_flops(shape, chunk.size, group.length, extent.scored, extent.columns, blocks)
        logits = sum(logits_flops(shape, 1, *sizes) for sizes in sizes_of_logits(plan.reads, shape, group))
        plain = forward_flops(shape, chunk.size, group.length)
        prompts += plain
        naive += len(plan.conditions) * plain
        read = [(site.layer, site.component.point) for sites in plan.sources().values() for site in {*sites}]
        kept = chunk.size * cache_bytes(shape, group.length, (*plan.base_points(chunk), *{*read}))
        memory = max(memory, kept + chunk.size * logits_bytes(shape, extent))
        for one in chunk.passes:
            now = plan.extent(chunk, one.start)
            count = chunk.size * len(one.conditions)
            heads = [
                (join.layer, len(recomputed_heads(plan.writes[chunk.group][number], join, shape)))
                for number, join in zip(one.conditions, one.joins, strict=True)
            ]
            passes += pass_flops(shape, now, one.joins, heads, blocks) + path_flops(plan, chunk, one) + count * logits
            held = min(count * logits_bytes(shape, now), max(plan.budget // 4, logits_bytes(shape, now)))
            rows, positions = max(rows, count), max(positions, now.stop - now.start)
            held += count * read_bytes(plan.reads, shape, group)
            memory = max(memory, kept + count * row_bytes(shape, now) + held)
    examples = sum(chunk.size for chunk in plan.chunks)
    overhead = plan.passes * shape.layers * plan.overhead
    seconds = None if plan.speed is None else (base + passes + overhead) / plan.speed
    result = BYTES * sum(map(prod, plan.sizes()))
    return Cost(base, passes, naive, prompts / max(1, examples), rows, positions, memory, seconds, result)


def path_flops(plan: Schedule, chunk: ExampleChunk, one: Pass) -> int:
    """Operations of the direct paths of a pass, from senders to receivers."""
    extent, total = plan.extent(chunk, one.start), 0
    window = extent.stop - extent.start
    for number in one.conditions:
        for write in plan.writes[chunk.group][number]:
            if isinstance(path := write.value, PathPatch):
                ends = (path.sender.head is not None) + (write.part is not None)
                total += 2 * ends * chunk.size * window * plan.shape.d_model * plan.shape.d_head
                if path.sender.head is not None and plan.shape.normed_after:  # the norm takes what all heads write
                    total += 2 * chunk.size * window * plan.shape.d_model * plan.shape.width
                layers = write.layer - max(path.after, 0)
                layers -= plan.shape.parallel and path.after >= 0  # whose own MLP it does not enter
                total += layers * mlp_flops(plan.shape, chunk.size, window) if path.through_mlps else 0
    return total


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
                f"of the naive way: {found.total / found.forward:.4g} instead of {found.naive / found.forward:.4g} "
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
    blocks = plan.blocks if plan.reads else None
    for chunk in plan.chunks:
        plain = forward_flops(plan.shape, chunk.size, plan.groups[chunk.group].length)
        for one in chunk.passes:
            extent = plan.extent(chunk, one.start)
            for number, join in zip(one.conditions, one.joins, strict=True):
                if join.layer > plan.shape.layers:
                    continue
                heads = len(recomputed_heads(plan.writes[chunk.group][number], join, plan.shape))
                count[join] += chunk.size
                work[join] += pass_flops(plan.shape, extent, [join], [(join.layer, heads)], blocks)
                work[join] += path_flops(plan, chunk, Pass((number,), (join,), one.start))
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
