"""The names of the estimators, which edits one estimates together, and what that costs. Pure: imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

from ...errors import MOST_STEPS, DeclarationError, choices, whole
from .cost import pass_flops
from .explain import cost_of
from .schedule import Schedule
from .writes import Write

ESTIMATORS = ("exact", "gradient", "integrated")
THERE_AND_BACK = 3
"""Work of a pass whose slopes are wanted, as a multiple of the pass."""


def check_estimator(estimator: str, steps: int) -> None:
    """Refuse an estimator that is not known, or no number of steps."""
    if estimator not in ESTIMATORS:
        raise DeclarationError(f"estimator={estimator!r}: possible are {choices(ESTIMATORS)}")
    whole(steps, "steps, of the integrated estimate,", low=1, high=MOST_STEPS)


def moved_together(
    conditions: Sequence[Sequence[Write]], steps: int | None
) -> dict[tuple[int, str, str], list[tuple[int, Write]]]:
    """The writes of conditions, with the condition's number, by layer, point and what an estimate moves together.

    The integrated estimate moves edits together that are alike in all but where they are.
    """
    moved: dict[tuple[int, str, str], list[tuple[int, Write]]] = {}
    for number, writes in enumerate(conditions):
        for write in writes:
            moved.setdefault((write.layer, write.point, _kind(write) if steps else ""), []).append((number, write))
    return moved


def _kind(write: Write) -> str:
    """What edits have in common that move together in the integrated estimate: all but where they are."""
    named = {one.name: getattr(write.edit, one.name) for one in fields(write.edit) if one.name != "site"}
    return f"{type(write.edit).__name__} {named}"


def estimate_flops(plan: Schedule, steps: int | None) -> int:
    """Operations of an estimate of every condition of a plan, with the runs as they are.

    One pass there and back from the first layer that changes; for the integrated estimate, besides, one of `steps`
    copies from each layer for the edits that move together, and as many more as write to one head or neuron.
    """
    total = cost_of(plan).base
    for chunk in plan.chunks:
        moved, extent = moved_together(plan.writes[chunk.group], steps), plan.extent(chunk)
        layers = [layer for layer, _, _ in moved]
        passes = [(min(layers), 1)] if moved else []
        if steps is not None:
            passes += [
                (layer, steps * max(Counter(write.part for _, write in members).values()))
                for (layer, _, _), members in moved.items()
            ]
        for layer, copies in passes:
            total += THERE_AND_BACK * pass_flops(plan.shape, extent, [(layer, 0)] * copies, [])
    return total
