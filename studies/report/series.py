"""The report of a study over steps of training: curves against the step, head grids with a slider, tables."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from .. import plots
from ..catalogue.summary import over_training
from ..output.page import Page, folded, number, table
from ..output.phrases import count, listed
from ..storage.record import Record
from .figures import draw
from .induction import Section

MOST = 10
"""Variables of a part that get a figure."""
ASIDE = ("baseline_", "chance_", "untrained_", "control_", "step_")
"""Beginnings of names of what stands beside other variables."""


def title(record: Record, tree: xr.DataTree) -> str:
    """What was measured, as a heading."""
    drawn = [(name, values) for name, values in tree.data_vars.items() if _drawn(name, values)]
    names = [str(values.attrs.get("long_name", name)) for name, values in drawn]
    of = f" of {record.model}" if record.model else ""
    what = listed(names) if 0 < len(names) <= 3 else str(record.study.get("type", "A study"))
    return f"{what[:1].upper()}{what[1:]}{of} over training"


def lead(tree: xr.DataTree) -> str:
    """At which steps, in a sentence."""
    steps = np.asarray(tree["step"])
    return f"Measured at {count(len(steps), 'step')} of training, from {steps.min()} to {steps.max()}."


def summary(tree: xr.DataTree) -> list[str]:
    """The answer: what each metric was at the first and at the last step."""
    return [f"{text[:1].upper()}{text[1:]}." for text in over_training(tree)]


def sections(tree: xr.DataTree) -> list[Section]:
    """A section for each part with variables that can be drawn against the step."""
    found: list[Section] = []
    for node in tree.subtree:
        ds = node.to_dataset()
        names = [str(name) for name, values in ds.data_vars.items() if _drawn(name, values)]
        if names:
            words = str(node.attrs.get("long_name", "")) if node.path != "/" else ""
            asked = f"{words[:1].upper()}{words[1:]}" if words else "What forms, and when?"
            fill = partial(_fill, path=node.path, names=names[:MOST])
            found.append(Section(f"part{len(found)}", node.path.strip("/") or "Over training", asked, fill))
    return found


def _drawn(name: object, values: xr.DataArray) -> bool:
    dims = {*map(str, values.dims)} - {"example"}
    kept = dims in ({"step"}, {"step", "layer", "head"}, {"step", "condition"})
    aside = str(name).startswith(ASIDE) or str(name).endswith(("_low", "_high", "_q"))
    return kept and not aside and values.dtype.kind in "iuf" and ("example" in values.dims or "layer" in values.dims)


def _fill(page: Page, ds: xr.Dataset, tree: xr.DataTree, *, path: str, names: list[str]) -> None:
    ds = tree[path].to_dataset()
    for name in names:
        values = ds[name]
        what = str(values.attrs.get("long_name", name)).removesuffix(", no intervention")
        what = f"{what[:1].upper()}{what[1:]}"
        unit = str(values.attrs.get("units", "1"))
        heads = "layer" in values.dims
        which = ": the heads with the largest have a name, the others are grey" if heads else ""
        caption = f"{what} against the step of training, mean over prompts with 95% intervals{which}."
        draw(page, ds, name, caption)
        if heads:
            page.figure(plots.head_grid_over_steps(values), f"{what} of every head: the slider chooses the step.")
        mean = values.mean("example") if "example" in values.dims else values
        others = [dim for dim in mean.dims if dim != "step"]
        titles = ["head", "largest"] if heads else [str(one) for one in mean[others[0]].values] if others else [what]
        rows = [[str(step), *_row(mean.isel(step=at), heads)] for at, step in enumerate(ds["step"].values)]
        caption = f"{what}{'' if unit == '1' else f', in {unit}'}, mean over prompts."
        page.add(folded(f"Values: {what}", table(["step", *titles], rows, caption=caption)))


def _row(mean: xr.DataArray, heads: bool) -> list[str]:
    """The cells of a step: every value, or of heads the largest with its head."""
    if not heads:
        return [number(float(value), ".4g") for value in mean.values.ravel()]
    if not bool(mean.notnull().any()):
        return ["", number(float("nan"))]
    layer, head = mean.stack(one=("layer", "head")).idxmax("one").item()
    return [f"L{layer}H{head}", number(float(mean.max()), ".3f")]
