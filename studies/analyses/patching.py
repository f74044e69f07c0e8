"""Which of q, k and v carries the pattern, and which the token: activation patching of every head, both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import xarray as xr

from ...interventions.declare.edits import Compose, Patch
from ...interventions.declare.grid import Grid
from ...interventions.declare.sites import Head
from ...metrics.attention import induction
from ...metrics.outputs import logit_diff
from ..measuring.compare import compare_estimates
from ..measuring.effects import effect_interval, normalized
from ..measuring.measure import measure
from ..tasks.tasks import Task
from .heads import mean_of_heads

if TYPE_CHECKING:
    from ...interventions.models.model import Model

COMPONENTS = ("q", "k", "v")
DIRECTIONS = {"noising": ("clean", "corrupted"), "denoising": ("corrupted", "clean")}
"""Direction to (base, source)."""
PREDICTION = {
    "q": "changes nothing: the queries of the second half see the same tokens in both runs",
    "k": "carries the pattern: among the corrupted keys none follows a copy of the query, so attention misses",
    "v": "carries the token: attention stays, and what is copied is the token that stood in the corrupted first half",
}
"""What the induction circuit says must happen when q, k or v of the induction heads is taken from the corrupted run."""


def qkv_of_every_head(model: Model, task: Task) -> xr.Dataset:
    """Patch q, k or v of every head, noising and denoising, by logit difference.

    Where heads share keys and values, k and v of a head are those that it reads, and patching them changes the others
    that read them too.

    Returns
    -------
    Dataset
        ``<direction>(component, layer, head, example)`` in logits, ``baseline_logit_diff(run, example)``,
        ``<direction>_normalized(component, layer, head)`` (0 corrupted, 1 clean), and the 95% bootstrap interval of the
        effect, ``<direction>_effect_low`` and ``_high``.
    """
    result = xr.Dataset()
    for direction, (base, source) in DIRECTIONS.items():
        measured = measure(model, task, _each_head(model, source), [logit_diff], base=base)
        words = f"{direction}, {source} into {base}"
        result[direction] = measured["logit_diff"].assign_attrs(long_name=f"logit difference, {words}")
        result[f"{direction}_normalized"] = normalized(measured, "logit_diff").assign_attrs(
            long_name=f"normalized logit difference, {words}"
        )
        for name, end in effect_interval(measured, "logit_diff").items():
            result[name.replace("logit_diff", direction)] = end
        result["baseline_logit_diff"] = measured["baseline_logit_diff"]
        result.attrs = {name: value for name, value in measured.attrs.items() if name not in ("base", "interventions")}
        result.attrs["direction"] = "noising and denoising"
    return result


def _each_head(model: Model, source: str) -> Grid:
    return Grid(
        lambda component, layer, head: Patch(model.read_by(Head(layer, head), component), source=source),
        component=COMPONENTS,
        layer=model.layers,
        head=model.heads,
    )


def estimates_of_every_head(model: Model, task: Task, exact: xr.Dataset, steps: int) -> xr.Dataset:
    """Noising of q, k and v of every head, estimated, beside the exact effects on the logit difference.

    Parameters
    ----------
    model : Model
    task : Task
    exact : Dataset
        From `qkv_of_every_head` with the same model and task.
    steps : int
        Of the integrated estimates.

    Returns
    -------
    Dataset
        As of `compare_estimates`; axes ``component``, ``layer``, ``head``.
    """
    base, source = DIRECTIONS["noising"]
    measured = exact[["baseline_logit_diff"]].assign(logit_diff=exact["noising"]).assign_attrs(base=base)
    grid = _each_head(model, source)
    return compare_estimates(model, task, grid, logit_diff, steps=steps, base=base, exact=measured).assign_attrs(
        long_name="noising of q, k and v of every head, by logit difference"
    )


def qkv_of_set(model: Model, task: Task, heads: Sequence[Head]) -> xr.Dataset:
    """Take q, k or v of all `heads` together from the corrupted run: what happens to pattern and to answer.

    Returns
    -------
    Dataset
        ``set_logit_diff(component, example)``, ``set_normalized(component)`` and
        ``set_induction(component, example)``: the mean induction score of those heads; with their baselines on the
        clean run, ``clean_logit_diff(example)`` and ``clean_induction(example)``.
    """
    grid = Grid(
        lambda component: Compose(*map(Patch, dict.fromkeys(model.read_by(head, component) for head in heads))),
        component=COMPONENTS,
    )
    measured = measure(model, task, grid, [logit_diff, induction])
    clean = measured.sel(run="clean", drop=True)
    score = {"long_name": "induction score of the induction heads", "units": "1"}
    result = xr.Dataset(
        {
            "set_logit_diff": measured["logit_diff"],
            "set_normalized": normalized(measured, "logit_diff"),
            "set_induction": mean_of_heads(measured["induction"], heads).assign_attrs(score),
            "clean_logit_diff": clean["baseline_logit_diff"],
            "clean_induction": mean_of_heads(clean["baseline_induction"], heads).assign_attrs(score),
        }
    )
    result["prediction"] = ("component", np.asarray([PREDICTION[name] for name in COMPONENTS], dtype=object))
    return result


def verdicts(ds: xr.Dataset) -> dict[str, tuple[bool | None, pd.Series]]:
    """For q, k and v: whether the prediction of the circuit held, and the induction score and logit difference.

    None instead of a verdict where the clean run has no clear answer: a logit difference within noise of 0, or below.
    """
    table = pd.DataFrame(
        {
            "score": ds["set_induction"].mean("example").to_series(),
            "answer": ds["set_logit_diff"].mean("example").to_series(),
        }
    )
    clean = ds["clean_logit_diff"].values
    share = table / [float(ds["clean_induction"].mean()), float(clean.mean())]
    held = {
        "q": share["score"]["q"] > 0.8 and share["answer"]["q"] > 0.8,
        "k": share["score"]["k"] < 0.5 and share["answer"]["k"] < 0.5,
        "v": share["score"]["v"] > 0.8 and share["answer"]["v"] < 0,
    }
    clear = clean.mean() > 2 * clean.std(ddof=1) / np.sqrt(len(clean))
    return {name: (bool(held[name]) if clear else None, table.loc[name]) for name in ("q", "k", "v")}
