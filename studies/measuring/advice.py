"""What the literature advises on how interventions are measured, told of what is asked for or what was done."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import AdviceWarning
from ..storage.attributes import json_in
from ..storage.record import edits_in

PACKAGE = __name__.partition(".")[0]
ABLATIONS = {"ZeroAblate": "zero", "MeanAblate": "mean", "ResampleAblate": "resample"}
"""Interventions that replace a site by what says nothing of the prompt."""
PROBABILITY = (
    "Patching is measured by prob alone: a probability is near 0 on a corrupted run, so it hides what lowers the "
    "answer and what adds to it little by little. Measure logit_diff too (Zhang & Nanda 2023)."
)
ZEROS = (
    "Zero ablation alone: zeros may be far from all that the model ever has there, so that a part of the effect can "
    "come from them. MeanAblate or ResampleAblate beside it tells (Zhang & Nanda 2023; Heimersheim & Nanda 2024)."
)


def advice(attrs: Mapping[Any, Any]) -> list[str]:
    """What is advised otherwise than a measurement does it, in sentences.

    Parameters
    ----------
    attrs : mapping
        Of the measurement: ``interventions`` and ``metrics`` as JSON text, and ``base``.

    Returns
    -------
    list of str
        Empty where nothing is to be said, or where the attributes do not say what was measured.
    """
    edits = [*edits_in(json_in(attrs, "interventions", object))]
    metrics, base = json_in(attrs, "metrics", list), str(attrs.get("base", "clean"))
    other_run = any(edit.get("source", base) != base for edit in edits) or (edits and base != "clean")
    found = [PROBABILITY] if other_run and "prob" in metrics and "logit_diff" not in metrics else []
    kinds = {ABLATIONS[str(edit["type"])] for edit in edits if edit["type"] in ABLATIONS}
    return found + ([ZEROS] if kinds == {"zero"} else [])


def warn(found: Iterable[str], claimed: bool) -> None:
    """Warn of what `advice` found; of zero ablation alone where a claim is made, by random heads beside it.

    The warning names the line that called this package, whichever function it called.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == PACKAGE:
        level, frame = level + 1, frame.f_back
    for text in found:
        if text != ZEROS or claimed:
            warnings.warn(text, AdviceWarning, stacklevel=level)
