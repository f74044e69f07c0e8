"""The report of a formation study: when parts appear, the curves, heads with a slider, composition, positions."""

from __future__ import annotations

import numpy as np
import xarray as xr

from ...errors import DeclarationError
from .. import plots
from ..dynamics.formation_changes import REFERENCE
from ..output.page import Page, folded, number, table
from ..plots.formation import of_seeds
from .induction import Section

QUESTION = "When does induction form in training, in which order do its parts appear, and what does it need?"
SLIDES = 10
"""Steps of a slider."""
SHOWN = 5
"""Steps whose losses are drawn by position."""


def _curves(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    page.figure(
        plots.formation(tree),
        "Means over seeds with 95% intervals over seeds, against the step of training, after Olsson et al. (2022). "
        "Shaded: while attention of the main training behind the earlier copy goes from 10% to 90% of its change; "
        "dashed: its change point. An induction head attends behind the earlier copy of a token: 1 behind stands the "
        "token that followed, and attention to it is the induction score; “behind” takes the distance, 1 to 4, at "
        "which a head attends most. “Further back” is a head of layer 0 that attends to one of the tokens 2 to 4 back. "
        "The in-context-learning score is the mean loss of the last quarter of the tokens less that of the tokens "
        "before which nothing can repeat, on sequences held out in which a part repeats.",
    )


def _changes(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    for training in ds["training"].values:
        try:
            page.figure(
                plots.change_points(tree, training),
                f"Change points of the training “{training}”: each seed (blue) with its 95% interval over prompts, and"
                " the geometric mean over seeds (orange) with its 95% interval over seeds. Others are left out.",
            )
        except DeclarationError:
            page.add(f"<p>No curve of the training “{training}” has a change point.</p>")
    page.add(folded("Every change point, as a table", _table(ds)))


def _table(ds: xr.Dataset) -> str:
    head = [
        "training",
        "curve",
        "seeds",
        "change point",
        "95% over seeds",
        "over that of induction",
        "95%",
        "first",
        "last",
    ]
    rows = []
    for training in ds["training"].values:
        for curve in ds["curve"].values:
            here = ds.sel(training=training, curve=curve)
            value = {name: float(here[name].mean()) for name in here.data_vars}
            ends = [
                f"{value[low]:{form}} to {value[high]:{form}}" if np.isfinite(value[low]) else ""
                for low, high, form in (("mean_low", "mean_high", ".0f"), ("ratio_low", "ratio_high", ".2f"))
            ]
            row = [
                training,
                str(curve).replace("_", " "),
                f"{value['appeared']:.0f}",
                number(value["mean_step"], ".0f"),
            ]
            row += [ends[0], number(value["ratio"]), ends[1], number(value["first"]), number(value["last"])]
            rows.append(row)
    note = "The change point is the middle of the logistic step, in the logarithm of the step, that fits best."
    return table(head, rows, caption=note)


def _heads(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    training = "main" if "main" in ds["training"] else ds["training"].values[0]
    steps = np.unique(np.linspace(0, ds.sizes["step"] - 1, SLIDES).round().astype(int))
    whole = ds.assign(behind=ds["behind"].max("distance", keep_attrs=True))
    for name in ("behind", "previous_token"):
        values = whole[name].sel(training=training, drop=True).isel(seed=0, step=steps, drop=True)
        words = str(values.attrs.get("long_name", name))
        page.figure(
            plots.head_grid_over_steps(values, title=name.partition("_")[0]),
            f"{words[:1].upper()}{words[1:]} of every head, training “{training}”, seed 0: the slider sets the step.",
        )


def _composition(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    best = ds["composition"].max(["sender_head", "receiver_head"]).rename(seed="example")
    best.attrs = {"long_name": "largest composition score of a pair of heads", "units": "1"}
    training = "main" if "main" in ds["training"] else ds["training"].values[0]
    values = best.sel(training=training, drop=True).to_dataset(name="largest")
    floor = ", ".join(f"{str(kind).upper()} {float(ds['floor_mean'].sel(kind=kind)):.2f}" for kind in ds["kind"].values)
    page.figure(
        of_seeds(plots.over_steps(values, "largest", title="Composition")),
        f"The largest composition score of a head of layer 0 into a head of layer 1, training “{training}”, mean over "
        f"seeds with 95% intervals. Random weights score {floor}.",
    )


def _positions(page: Page, ds: xr.Dataset, tree: xr.DataTree) -> None:
    training = "main" if "main" in ds["training"] else ds["training"].values[0]
    steps = ds["step"].values
    at = [0, len(steps) - 1]
    changes = tree["changes"].to_dataset().sel(training=training, curve=REFERENCE)
    for name in ("begin_step", "change_step", "end_step"):
        if np.isfinite(changes[name]).any():
            middle = float(np.exp(np.nanmean(np.log(changes[name]))))
            at.append(int(np.abs(np.log(np.maximum(steps, 0.5)) - np.log(middle)).argmin()))
    here = ds.sel(training=training, drop=True).isel(step=sorted({*at})[:SHOWN]).rename(seed="example")
    here = here.assign_coords(step=np.asarray([f"step {step}" for step in here["step"].values], dtype=object))
    scored = here.isel(position=slice(0, -1))
    page.figure(
        of_seeds(plots.along(scored, "loss", "position", curves="step", title="loss"))
        + of_seeds(plots.along(scored, "accuracy", "position", curves="step", title="accuracy")),
        "Loss and accuracy at each position of repeated random tokens: before, while and after induction "
        f"appears, training “{training}”, mean over seeds with 95% intervals.",
    )


SECTIONS = (
    Section("curves", "The phase change", "What happens, and when?", _curves),
    Section("changes", "Change points", "When does each part appear, and in which order?", _changes),
    Section("heads", "Heads", "Which heads are they?", _heads),
    Section("composition", "Composition", "Do the heads read from each other?", _composition),
    Section("behaviour", "Positions", "Where in the sequence does the loss fall?", _positions),
)
