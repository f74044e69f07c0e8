"""The tables of everything that is stored by name beside results: interventions, tasks, metrics. Owns no behaviour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...interventions.declare.codec import TABLE, Table
from ..tasks.tasks import Prompts, RepeatedTokens

if TYPE_CHECKING:
    from ...metrics.card import Metric

TASKS: Table = {**TABLE, "RepeatedTokens": RepeatedTokens, "Prompts": Prompts}
"""Type name to maker for tasks and interventions."""


def metric_names() -> dict[str, tuple[str, Metric]]:
    """Name in results of each metric that ships with headwise, to its name in `headwise.metrics` and itself."""
    from ... import metrics

    named = ((name, getattr(metrics, name)) for name in metrics.__all__)
    return {value.name: (name, value) for name, value in named if isinstance(value, metrics.Metric)}
