"""Would gradients have told the same? Estimates of the sweeps over every head, beside what was measured exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xarray as xr

from ...interventions.declare.grid import Grid
from ...interventions.plan.estimators import estimate_flops
from ...metrics.card import Metric
from ...metrics.outputs import logit_diff, loss
from ..measuring.compare import compared, same
from ..measuring.looks import measure_some, request_some
from ..tasks.tasks import RepeatedTokens
from . import ablation, patching

if TYPE_CHECKING:
    from ...interventions.models.model import Model

STEPS = 4
"""Of the integrated estimates. Eight times as many move those of the shipped model by up to a tenth of the largest."""
ESTIMATED = ("zero", "mean")
"""Ablations whose estimates are compared with the exact ones."""
SWEEPS = {
    "ablation": "zero and mean ablation of every head, by loss",
    "patching": "noising of q, k and v of every head, by logit difference",
}
"""Stage whose exact values are estimated, to what is estimated of it."""


@dataclass(frozen=True)
class Prices:
    """Operations of the exact values of a sweep, and of each estimate of them.

    Attributes
    ----------
    exact : int
    estimates : mapping of estimator to int
        Of all, cheap or dear.
    """

    exact: int
    estimates: Mapping[str, int]

    @property
    def chosen(self) -> list[str]:
        """Estimators that cost no more than what they estimate."""
        return [name for name, price in self.estimates.items() if price <= self.exact]

    @property
    def too_dear(self) -> dict[str, float]:
        """The others, with how many times the exact values they cost."""
        return {name: price / self.exact for name, price in self.estimates.items() if price > self.exact}


def sweep_of(model: Model, name: str) -> tuple[Grid, Metric, str]:
    """Conditions, metric and base run of a sweep of `SWEEPS`."""
    base, source = patching.DIRECTIONS["noising"]
    if name == "ablation":
        return ablation.each_head(model, ESTIMATED), loss, "clean"
    return patching.each_head(model, source), logit_diff, base


def prices(model: Model, task: RepeatedTokens, name: str, prompts: int) -> Prices:
    """What the exact values and each estimate of a sweep cost.

    Parameters
    ----------
    model : Model
    task : RepeatedTokens
    name : str
        A sweep of `SWEEPS`.
    prompts : int
        The first of the task, on which it runs.

    Returns
    -------
    Prices
    """
    grid, metric, base = sweep_of(model, name)
    plan = request_some(model, task, grid, [metric], (0, prompts), base).plan
    steps = {"gradient": None, "integrated": STEPS}
    return Prices(plan.cost().total, {one: estimate_flops(plan, number) for one, number in steps.items()})


def estimates_beside(model: Model, task: RepeatedTokens, name: str, exact: xr.Dataset) -> xr.Dataset:
    """Estimate a sweep by each estimator that costs no more than the exact values, on the prompts of these.

    Parameters
    ----------
    model : Model
    task : RepeatedTokens
    name : str
        A sweep of `SWEEPS`.
    exact : Dataset
        What the stage of that name gave, on the first prompts of the same task. Some estimator costs no more.

    Returns
    -------
    Dataset
        As of `compare_estimates`; axes ``ablation``, ``layer``, ``head`` or ``component``, ``layer``, ``head``. The
        attribute ``too_dear`` (JSON) holds the estimators that were left out, with their price as a multiple of that of
        the exact values.
    """
    grid, metric, base = sweep_of(model, name)
    if name == "ablation":
        exact = exact.sel(ablation=list(ESTIMATED))
    else:
        exact = exact[["baseline_logit_diff"]].assign(logit_diff=exact["noising"]).assign_attrs(base=base)
    span = (0, exact.sizes["example"])
    price = prices(model, task, name, span[1])
    found = {
        one: measure_some(model, task, grid, [metric], span, base=base, estimator=one, steps=STEPS)
        for one in price.chosen
    }
    like = found[price.chosen[0]]
    result = compared(found, same(exact, like, metric.name), metric, STEPS)
    return result.assign_attrs(long_name=SWEEPS[name], too_dear=json.dumps(price.too_dear))
