"""Which of q, k and v carries the pattern, and which the token: activation patching of every head, both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from ...interventions.declare.edits import Compose, Patch
from ...interventions.declare.grid import Grid
from ...interventions.declare.sites import Head
from ...metrics.attention import induction
from ...metrics.intervals import bootstrap_interval, level_at, looks, ratio_interval, settled
from ...metrics.outputs import logit_diff
from ..measuring.effects import effect_interval, normalized
from ..measuring.looks import Span, measure_some, until_settled
from ..tasks.tasks import RepeatedTokens
from .heads import mean_of_heads

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]
COMPONENTS = ("q", "k", "v")
DIRECTIONS = {"noising": ("clean", "corrupted"), "denoising": ("corrupted", "clean")}
"""Direction to (base, source)."""
PREDICTION = {
    "q": "changes nothing: the queries of the second half see the same tokens in both runs",
    "k": "carries the pattern: among the corrupted keys none follows a copy of the query, so attention misses",
    "v": "carries the token: attention stays, and what is copied is the token that stood in the corrupted first half",
}
"""What the induction circuit says must happen when q, k or v of the induction heads is taken from the corrupted run."""

HELD = {
    "q": {"score": (True, 0.8), "answer": (True, 0.8)},
    "k": {"score": (False, 0.5), "answer": (False, 0.5)},
    "v": {"score": (True, 0.8), "answer": (False, 0.0)},
}
"""Where the prediction held: whether the induction score, and the logit difference, stay above a share of before."""
CLEAR = 0.1
"""Share of the difference between the clean and the corrupted run, or logits where there is none, below which a change
is not worth a sentence. Known to within this, a change is settled."""


def qkv_of_every_head(
    model: Model, task: RepeatedTokens, together: Sequence[Head] = (), *, first: int | None = None
) -> xr.Dataset:
    """Patch q, k or v of every head, noising and denoising, by logit difference; and of some heads together.

    Where heads share keys and values, k and v of a head are those that it reads, and patching them changes the others
    that read them too.

    Parameters
    ----------
    model : Model
    task : RepeatedTokens
    together : sequence of Head
        Induction heads, of which q, k or v is also taken from the corrupted run all together.
    first : int, optional
        Prompts to start with, doubled until every effect is settled (see `patches_settled` and `set_settled`) or all
        are used; left out, all at once. Intervals then hold for all looks together, see `intervals.looks`.

    Returns
    -------
    Dataset
        ``<direction>(component, layer, head, example)`` in logits, ``baseline_logit_diff(run, example)``,
        ``<direction>_normalized(component, layer, head)`` (0 corrupted, 1 clean), and the 95% bootstrap interval of the
        effect, ``<direction>_effect_low`` and ``_high``; of the heads `together`, what `describe_set` gives. With
        several looks also ``gap``, ``gap_low`` and ``gap_high``, by how much the runs differ over all prompts; where
        that is within noise, nothing is normalized.
    """
    counts = looks(task.n, first)

    def measure_part(span: Span) -> dict[str, xr.Dataset]:
        """Measure some prompts in both directions, and the heads together."""
        parts = {
            direction: measure_some(model, task, each_head(model, source), [logit_diff], span, base=base)
            for direction, (base, source) in DIRECTIONS.items()
        }
        if together:
            parts["set"] = measure_some(model, task, set_grid(model, together), [logit_diff, induction], span)
        return parts

    def judged(found: dict[str, xr.Dataset]) -> xr.Dataset:
        """What was measured so far, with what is derived of it."""
        result = _both_directions(found, level_at(len(counts)))
        if together:
            result = result.merge(describe_set(found["set"], together), combine_attrs="override")
        return result if gap is None else _with_gap(result, gap)

    gap = gap_of_all(model, task) if len(counts) > 1 else None

    def is_settled(found: dict[str, xr.Dataset]) -> bool:
        ds = judged(found)
        return patches_settled(ds, len(counts)) and (not together or set_settled(ds, len(counts)))

    return judged(until_settled(counts, measure_part, is_settled))


def _both_directions(found: dict[str, xr.Dataset], level: float) -> xr.Dataset:
    """The measurements of both directions as one dataset."""
    result = xr.Dataset()
    for direction, (base, source) in DIRECTIONS.items():
        measured = found[direction]
        words = f"{direction}, {source} into {base}"
        result[direction] = measured["logit_diff"].assign_attrs(long_name=f"logit difference, {words}")
        result[f"{direction}_normalized"] = normalized(measured, "logit_diff").assign_attrs(
            long_name=f"normalized logit difference, {words}"
        )
        for name, end in effect_interval(measured, "logit_diff", level).items():
            result[name.replace("logit_diff", direction)] = end
        result["baseline_logit_diff"] = measured["baseline_logit_diff"]
        result.attrs = {name: value for name, value in measured.attrs.items() if name not in ("base", "interventions")}
        result.attrs["direction"] = "noising and denoising"
    return result


def patches_settled(ds: xr.Dataset, count: int) -> bool:
    """Whether each effect of both directions is settled at one of `count` looks, to within `CLEAR` of the gap.

    Where the clean and the corrupted run do not differ beyond noise over all prompts of the task, no effect says
    anything, with however many of them.
    """
    if float(ds["gap_low"]) <= 0 <= float(ds["gap_high"]):
        return True
    gap, low, high = gap_between_runs(ds["baseline_logit_diff"], level_at(count))
    if low <= 0 <= high:
        return False
    ends = [[ds[f"{direction}_effect_{end}"].values for end in ("low", "high")] for direction in DIRECTIONS]
    return all(bool(settled(low, high, CLEAR * abs(gap)).all()) for low, high in ends)


def gap_of_all(model: Model, task: RepeatedTokens) -> xr.Dataset:
    """How the clean and the corrupted run differ over all prompts: ``gap``, and its 95% interval, in logits."""
    runs = [
        measure_some(model, task, None, [logit_diff], (0, task.n), base=run)["baseline_logit_diff"].sel(run=[run])
        for run in ("clean", "corrupted")
    ]
    values = gap_between_runs(xr.concat(runs, "run"), 0.95)
    words = f"logit difference of the clean run minus that of the corrupted one, over all {task.n} prompts"
    ends = ("", ", lower end of 95% interval", ", upper end of 95% interval")
    attrs = [{"long_name": words + end, "units": "logit", "prompts": task.n} for end in ends]
    names = ("gap", "gap_low", "gap_high")
    return xr.Dataset({name: ((), value, said) for name, value, said in zip(names, values, attrs, strict=True)})


def _with_gap(ds: xr.Dataset, gap: xr.Dataset) -> xr.Dataset:
    """Add the gap over all prompts; where it is within noise, nothing is normalized by what some of them show."""
    if float(gap["gap_low"]) <= 0 <= float(gap["gap_high"]):
        ds = ds.assign({name: xr.full_like(ds[name], np.nan) for name in ds if str(name).endswith("_normalized")})
    return ds.assign(gap)


def gap_between_runs(baseline: xr.DataArray, level: float) -> tuple[float, Array, Array]:
    """Mean difference of the clean and the corrupted run, and the ends of its interval."""
    gap = (baseline.sel(run="clean") - baseline.sel(run="corrupted")).values
    return float(gap.mean()), *bootstrap_interval(gap, level)


def each_head(model: Model, source: str) -> Grid:
    """q, k or v of every head taken from a run; axes ``component``, ``layer`` and ``head``."""
    return Grid(
        lambda component, layer, head: Patch(model.read_by(Head(layer, head), component), source=source),
        component=COMPONENTS,
        layer=model.layers,
        head=model.heads,
    )


def set_grid(model: Model, heads: Sequence[Head]) -> Grid:
    """q, k or v of all `heads` together taken from the corrupted run; axis ``component``."""
    return Grid(
        lambda component: Compose(*map(Patch, dict.fromkeys(model.read_by(head, component) for head in heads))),
        component=COMPONENTS,
    )


def describe_set(measured: xr.Dataset, heads: Sequence[Head]) -> xr.Dataset:
    """What happens to pattern and to answer where q, k or v of all `heads` comes from the corrupted run.

    Returns
    -------
    Dataset
        ``set_logit_diff(component, example)``, ``set_normalized(component)`` and
        ``set_induction(component, example)``: the mean induction score of those heads; with their baselines on the
        clean run, ``clean_logit_diff(example)`` and ``clean_induction(example)``.
    """
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


def set_settled(ds: xr.Dataset, count: int) -> bool:
    """Whether the verdicts on q, k and v are settled at one of `count` looks.

    Each rests on a mean after the patch, as a share of the mean before: its interval lies on one side of the bounds of
    `HELD`, or tells it to within `CLEAR`. Where there is no clear answer before, there is no verdict to settle.
    """
    level = level_at(count)
    for part, before in (("induction", "score"), ("logit_diff", "answer")):
        clean = ds[f"clean_{part}"].values
        for component, bounds in HELD.items():
            low, high = ratio_interval(ds[f"set_{part}"].sel(component=component).values, clean, level)
            bound = bounds[before][1]
            if not (np.isnan(low) or settled(low - bound, high - bound, CLEAR)):
                return False
    return True


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
        name: all(above == (share[column][name] > bound) for column, (above, bound) in bounds.items())
        for name, bounds in HELD.items()
    }
    clear = clean.mean() > 2 * clean.std(ddof=1) / np.sqrt(len(clean))
    return {name: (bool(held[name]) if clear else None, table.loc[name]) for name in ("q", "k", "v")}
