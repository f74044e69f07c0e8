"""The names of the estimators, which edits one estimates together, and what that costs. Pure: imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

from ...errors import MOST_STEPS, DeclarationError, choices, whole
from .cost import pass_flops
from .explain import cost_of
from .schedule import Schedule
from .writes import Write

ESTIMATORS = ("exact", "gradient", "integrated")
EDGE_ESTIMATORS = ("exact", "eap", "eap-ig", "eap-ig-activations", "atp*", "relp")
"""Those of edge scores, see `edge_scores`."""
STEPPED = ("integrated", "eap-ig", "eap-ig-activations")
"""Estimators that take steps."""
EDGE_STEPS = 5
"""Steps of an estimate of edges where none are given, as MIB takes them."""
THERE_AND_BACK = 3
"""Work of a pass whose slopes are wanted, as a multiple of the pass."""


def check_estimator(estimator: str, steps: int, of_edges: bool = False) -> None:
    """Refuse an estimator that is not known, or not of what is measured, or no number of steps.

    Parameters
    ----------
    estimator : str
    steps : int
    of_edges : bool
        Whether one condition for each edge is measured.

    Raises
    ------
    DeclarationError
    """
    known, others = (EDGE_ESTIMATORS, ESTIMATORS) if of_edges else (ESTIMATORS, EDGE_ESTIMATORS)
    if estimator not in known:
        what = "edges" if of_edges else "interventions"
        why = f" estimates {'interventions' if of_edges else 'scores of edges'}" if estimator in others else ""
        of = f" of {what}" if why else ""
        raise DeclarationError(f"estimator={estimator!r}{why}: possible{of} are {choices(known)}")
    whole(steps, f"steps, of the {estimator if of_edges else 'integrated'} estimate,", low=1, high=MOST_STEPS)


def said(estimator: str, steps: int) -> str:
    """An estimator as results state it: with its steps, where it takes some."""
    return f"{estimator}, {steps} steps" if estimator in STEPPED else estimator


def read_said(text: str) -> tuple[str, int | None] | None:
    """The estimator, and its steps where it takes some, that `said` wrote; None of other text."""
    for name in {*ESTIMATORS, *EDGE_ESTIMATORS}:
        found = re.fullmatch(re.escape(name) + (", ([0-9]{1,9}) steps" if name in STEPPED else ""), text)
        if found is not None:
            return name, int(found[1]) if name in STEPPED else None
    return None


def steps_of(estimator: str, steps: int) -> int | None:
    """The steps of an estimator; None where it takes none."""
    return steps if estimator in STEPPED else None


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
