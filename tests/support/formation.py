"""A formation study without training: what would have been measured, made from curves whose change points are known."""

import numpy as np
import xarray as xr

import headwise as hw
from headwise.studies.dynamics.formation_look import SCORES

STUDY = hw.FormationStudy(
    heads=2,
    width=8,
    vocabulary=40,
    context=32,
    period=(8, 12),
    skip_bigrams=0.5,
    n=4,
    length=12,
    steps=1000,
    measured=40,
    seeds=3,
)
CHANGES = {"previous_token": 150.0, "behind": 300.0}
"""Change points of the main training, at seed 0; at seed k they are 1.1 ** k times as late."""

DISTANCE = 2
"""How far behind the earlier copy the induction head looks."""


def logistic(steps, change, width=0.15):
    with np.errstate(divide="ignore"):
        return 1 / (1 + (change / np.asarray(steps, dtype=float)) ** (1 / width))


def measured(study=STUDY):
    """Scores and losses of each training, seed, step and prompt, with a little noise between prompts."""
    random, rows = np.random.default_rng(0), []
    for training in study.trainings:
        each = [one(study, training, 1.1**seed, random) for seed in range(study.seeds)]
        rows.append(xr.concat(each, xr.DataArray(range(study.seeds), dims="seed", name="seed"), data_vars="all"))
    names = xr.DataArray(np.asarray(study.trainings, dtype=object), dims="training", name="training")
    return xr.concat(rows, names, data_vars="all", join="outer", combine_attrs="override", coords="minimal")


def one(study, training, factor, random):
    """One training: with one layer, or knockouts, nothing forms."""
    steps, layers = np.array(study.at), 1 if training == "one layer" else study.layers
    forms = 1.0 if training == "main" else 0.0
    previous, induction = (forms * logistic(steps, factor * CHANGES[name]) for name in CHANGES)
    sizes = (len(steps), study.n, layers, study.heads)
    dims = ("step", "example", "layer", "head")
    noise = {name: random.normal(0, 0.01, sizes) for name in SCORES}
    found = {name: 0.05 + values for name, values in noise.items()}
    found["previous_token"][:, :, 0, 1] += 0.8 * previous[:, None]
    found["behind"], found["back"] = (0.05 + random.normal(0, 0.01, (*sizes, 4)) for _ in range(2))
    found["behind"][:, :, -1, 0, DISTANCE - 1] += 0.7 * induction[:, None]
    found["behind"][..., 0], found["back"][..., 0] = found["induction"], found["previous_token"]
    ds = xr.Dataset(
        {name: (dims + ("distance",) * (values.ndim - 4), values) for name, values in found.items()},
        {"step": steps, "layer": range(layers), "head": range(study.heads), "distance": range(1, 5)},
    )
    repeat = np.arange(2 * study.length) >= study.length
    share = induction[:, None, None] * repeat
    loss = 3.5 - 3 * share + random.normal(0, 0.02, (len(steps), study.n, 2 * study.length))
    ds["loss"] = (("step", "example", "position"), loss)
    ds["accuracy"] = (("step", "example", "position"), 0.9 * share + np.zeros_like(loss))
    late = np.arange(study.context) >= study.period[1]
    held_out = np.stack([3.3 - 2 * induction[:, None] * late, np.full((len(steps), study.context), 3.3)], axis=1)
    held_out = held_out[:, :, None] + random.normal(0, 0.02, (1, 1, study.n, 1))
    ds["held_out_loss"] = (("step", "part", "example", "context_position"), held_out)
    ds = ds.assign_coords(part=np.asarray(["repeats", "new"], dtype=object))
    if layers > 1:
        table = np.full((len(steps), 3, study.heads, study.heads), 0.3)
        table[:, 1, 1, 0] += 0.4 * previous
        ds["composition"] = (("step", "kind", "sender_head", "receiver_head"), table)
        ds = ds.assign_coords(kind=np.asarray(["q", "k", "v"], dtype=object))
    return ds


def result(study=STUDY):
    """The result of the study, of these measurements."""
    return study._finished(measured(study), 0.0)
