"""What `measure` gave with ``controls``: the conditions beside random sets of as many heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from .. import plots
from ..measuring.effects import effect_interval
from ..output.page import Number, Page, folded, number, table
from ..output.phrases import count, listed
from .changes import Array, Changes
from .generic import figure, unit_words

TOP = 20
"""Rows of the table."""
PLACES = {"same layers": "within the same layers", "all layers": "over all layers"}
SETS = ("control", "draw")
"""Dims of random sets: where they were drawn from, and which they are."""


@dataclass(frozen=True, eq=False)
class RandomHeads:
    """Random sets of heads beside the conditions of a measurement.

    Attributes
    ----------
    moved : Changes
        Of the conditions.
    controls : list of str
        Where sets were drawn from, such as ``same layers``.
    change : array (condition, control, draw)
        Mean changes; NaN beyond the sets that exist.
    p : array (condition, control)
    """

    moved: Changes
    controls: list[str]
    change: Array
    p: Array

    def _facts(self, at: int, control: int) -> tuple[Array, float]:
        """The changes of the sets that exist, and p."""
        values = self.change[at, control]
        return values[~np.isnan(values)], float(self.p[at, control])

    @property
    def sentence(self) -> str:
        """What changes most, beside random sets."""
        at, each = self.moved.order()[0], []
        for place, control in enumerate(self.controls):
            values, p = self._facts(at, place)
            if values.size:
                ends = f"{figure(values.min(), '+')} to {figure(values.max(), '+')}"
                mean = f"{figure(values.mean(), '+')}{unit_words(self.moved.unit)}"
                each.append(f"{mean} {PLACES.get(control, control)} ({count(values.size, 'set')}, {ends}; p = {p:.3f})")
        who = "these heads" if len(self.moved.names) == 1 else self.moved.names[at]
        if not each:
            return f"There are not enough other heads to compare {who} with."
        what = self.moved.label.partition(",")[0]
        return f"Beside {who}, as many random heads change the {what} on average by {listed(each)}."

    def fill(self, page: Page, ds: xr.Dataset) -> None:
        """Append the figure and the table."""
        name = self.moved.name
        page.figure(
            plots.sets_against_null(ds.assign(effect_interval(ds, name)), name),
            f"Change of the {self.moved.label} when heads are ablated (diamond, with its 95% interval) and when as many"
            " other heads are, drawn from the same layers (grey) or from all (blue). Of many conditions, those that "
            "change most.",
        )
        head, rows = ["condition", "change"], []
        for control in self.controls:
            head += [f"random, {control}: mean", "from", "to", "sets", "p"]
        for at in self.moved.order()[:TOP]:
            rows.append([self.moved.names[at], figure(self.moved.mean[at], "+")])
            for place in range(len(self.controls)):
                values, p = self._facts(at, place)
                facts = [values.mean(), values.min(), values.max()] if values.size else [np.nan] * 3
                rows[-1] += [*(figure(one, "+") for one in facts), Number(values.size), number(p, ".3f")]
        note = "p: (1 + random sets that do at least as much damage) / (1 + random sets)."
        page.add(folded("Beside random heads, as a table", table(head, rows, caption=note)))


def shown_with(ds: xr.Dataset, metric: str) -> list[str]:
    """The variables of random sets, where they were measured beside a metric."""
    values = f"{metric}_control"
    whole = {values, f"p_{metric}"} <= {*ds.data_vars} and {*SETS} <= {*ds[values].dims}
    return [values, f"p_{metric}", "control_heads"] if whole else []


def random_heads(ds: xr.Dataset, metric: str, moved: Changes) -> RandomHeads | None:
    """The random sets beside the changes of a metric; None where there are none."""
    if not shown_with(ds, metric):
        return None
    base = ds[f"baseline_{metric}"].sel(run=ds.attrs["base"], drop=True).astype(np.float64).mean("example")
    change = ds[f"{metric}_control"].astype(np.float64).mean("example") - base
    values = change.transpose(*moved.axes, *SETS).values.reshape(-1, *(change.sizes[dim] for dim in SETS))
    p = ds[f"p_{metric}"].transpose(*moved.axes, SETS[0]).values.reshape(values.shape[:2])
    return RandomHeads(moved, [str(one) for one in ds[SETS[0]].values], values, p)
