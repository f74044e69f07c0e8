"""What a formation study found, in sentences that are written from its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from ..analyses.conclusion import Finding
from ..output.phrases import count, listed
from .formation_changes import COMPOSED, CURVES, FITS, REFERENCE, SENDERS

CIRCUIT = (*SENDERS, *COMPOSED, REFERENCE, "repeat_loss", "in_context")
"""Curves whose order is told."""
KNOCKED_OUT = "With attention to the previous position knocked out throughout training in "
WITHOUT = {
    "one layer": "With one layer",
    "knockout in layer 0": f"{KNOCKED_OUT}every head of layer 0",
    "knockout in all layers": f"{KNOCKED_OUT}every head of all layers",
}
"""What a control lacks."""


def conclude(tree: xr.DataTree) -> list[Finding]:
    """What the result of a `FormationStudy` says. Every sentence is written from numbers; none stands without one."""
    changes, curves = tree["changes"].to_dataset(), tree["curves"].to_dataset()
    said = [("summary", text) for text in [*_appears(changes), *_where(changes, curves), *_order(changes, curves)]]
    said += [("summary", text) for text in [*_falls(changes), *_controls(changes)]]
    said += [("changes", text) for text in _each(changes)]
    said += [("heads", text) for text in _heads(curves)]
    said += [("limits", text) for text in _limits(changes, json.loads(tree.attrs["study"]))]
    return [Finding(group, text) for group, text in said]


def _main(changes: xr.Dataset) -> xr.Dataset | None:
    return changes.sel(training="main", drop=True) if "main" in changes["training"] else None


def _appears(changes: xr.Dataset) -> Iterator[str]:
    """When induction appears."""
    main = _main(changes)
    if main is None:
        return
    seeds, here = main.sizes["seed"], main.sel(curve=REFERENCE)
    if not int(here["appeared"]):
        last = here["last"].max().item()
        yield f"Induction appears in none of {count(seeds, 'training')}: the best head ends at a score of {last:.2f}."
        return
    yield (
        f"Induction appears in {int(here['appeared'])} of {count(seeds, 'training')}, at step {_step(here)}: the "
        f"{CURVES[REFERENCE].words} goes from {float(here['first'].mean()):.2f} to {float(here['last'].mean()):.2f}, "
        f"accuracy on repeated random tokens from {_ends(main, 'repeat_accuracy')}."
    )


def _ends(main: xr.Dataset, name: str) -> str:
    here = main.sel(curve=name)
    return f"{float(here['first'].mean()):.2f} to {float(here['last'].mean()):.2f}"


def _where(changes: xr.Dataset, curves: xr.Dataset) -> Iterator[str]:
    """How far behind the earlier copy the heads look, and how far back those of layer 0."""
    main = _main(changes)
    if main is None or not int(main["appeared"].sel(curve=REFERENCE)):
        return
    there = np.isfinite(main["change_step"].sel(curve=REFERENCE).values)
    here = curves.sel(training="main").isel(seed=there)
    distances, how_often = np.unique(here[f"distance_{REFERENCE}"].values, return_counts=True)
    each = [f"{distance} (in {often})" for distance, often in zip(distances, how_often, strict=True)]
    text = f"How many places behind the earlier copy that head looks, by training: {listed(each)}."
    if (distances > 1).any():
        text += (
            " At 1 stands the token that followed, and attention to it is the induction score, which goes from "
            f"{_ends(main, 'induction')}. A head that looks further behind needs others in layer 0 that carry tokens."
        )
    yield text
    back = main.sel(curve="further_back")
    if int(back["appeared"]):
        found = here["distance_further_back"].values
        yield (
            f"Beside the previous-token head a head of layer 0 comes to look {listed(sorted({str(d) for d in found}))} "
            f"back: attention from {_ends(main, 'further_back')}."
        )


def _step(here: xr.Dataset) -> str:
    """The mean step with its interval over seeds."""
    mean, low, high = (float(here[name]) for name in ("mean_step", "mean_low", "mean_high"))
    return f"{mean:.0f}" + (f" (95% over seeds: {low:.0f} to {high:.0f})" if np.isfinite(low) else "")


def _order(changes: xr.Dataset, curves: xr.Dataset) -> Iterator[str]:
    """In which order the parts appear."""
    main = _main(changes)
    if main is None:
        return
    for name in SENDERS:
        yield _against(main, name, curves["step"].values)
    steps = {name: float(main["mean_step"].sel(curve=name)) for name in CIRCUIT if name in main["curve"]}
    known = sorted((step, name) for name, step in steps.items() if np.isfinite(step))
    if len(known) > 2:
        yield f"In order of their steps: {listed(f'{CURVES[name].words} ({step:.0f})' for step, name in known)}."


def _against(main: xr.Dataset, name: str, measured: np.ndarray[Any, Any]) -> str:
    """Whether heads of layer 0 take their role before there are induction heads."""
    here = main.sel(curve=name)
    words = "further-back (2 to 4 tokens)" if name == "further_back" else name.replace("_", "-")
    steps, others = here["change_step"].values, main["change_step"].sel(curve=REFERENCE).values
    both = np.isfinite(steps) & np.isfinite(others)
    if not both.any():
        first, last = (float(here[key].mean()) for key in ("first", "last"))
        alone = "" if np.isfinite(others).any() else "nor does induction, "
        return (
            f"No {words} head appears in layer 0, {alone}in the same training: the best score goes from {first:.2f} to "
            f"{last:.2f}."
        )
    earlier = int((steps < others)[both].sum())
    ratio, low, high = (float(here[key]) for key in ("ratio", "ratio_low", "ratio_high"))
    own = float(main["mean_step"].sel(curve=REFERENCE))
    near = np.searchsorted(measured, own).clip(1, len(measured) - 1)
    if abs(ratio - 1) * own < measured[near] - measured[near - 1]:
        return (
            f"The {words} head of layer 0 comes with induction: at {ratio:.2f} times the step, less than one "
            "measurement apart."
        )
    word = "before" if ratio < 1 else "after"
    open_ = "" if np.isfinite(low) and (high < 1 or low > 1) else " on average, which these seeds leave open"
    within = f" (95% over seeds: {low:.2f} to {high:.2f})" if np.isfinite(low) else ""
    return (
        f"The {words} head of layer 0 comes {word} induction{open_}: in {earlier} of "
        f"{count(int(both.sum()), 'training')} with both it changes earlier, at {ratio:.2f} times the step{within}."
    )


def _falls(changes: xr.Dataset) -> Iterator[str]:
    """Whether the loss falls while induction rises."""
    main = _main(changes)
    if main is None or not int(main["appeared"].sel(curve=REFERENCE)):
        return
    begin, end = (np.exp(np.nanmean(np.log(main[name].sel(curve=REFERENCE)))) for name in ("begin_step", "end_step"))
    parts = []
    for name in ("repeat_loss", "in_context"):
        here = main.sel(curve=name)
        share, ratio, low, high = (
            float(here[key].mean()) for key in ("share_of_change", "ratio", "ratio_low", "ratio_high")
        )
        first, last = (float(here[key].mean()) for key in ("first", "last"))
        at = f"; its change point is at {ratio:.2f} times that of induction" if np.isfinite(ratio) else ""
        at += f" (95%: {low:.2f} to {high:.2f})" if np.isfinite(low) else ""
        parts.append(
            f"the {CURVES[name].words} makes {100 * share:.0f}% of its way from {first:.2f} to {last:.2f} nat{at}"
        )
    yield f"While induction goes from 10% to 90%, steps {begin:.0f} to {end:.0f}, {listed(parts)}."


def _controls(changes: xr.Dataset) -> Iterator[str]:
    """What the controls lack."""
    for training in changes["training"].values:
        if training == "main":
            continue
        here = changes.sel(training=training)
        seeds, own = here.sizes["seed"], here.sel(curve=REFERENCE)
        score, loss = float(own["last"].mean()), float(here["last"].sel(curve="repeat_loss").mean())
        found = int(own["appeared"])
        what = f"appears in {found or 'none'} of {count(seeds, 'training')}"
        at = f", at step {_step(own)}" if found else ""
        ends = f"attention behind the earlier copy ends at {score:.2f}, the loss on repeated tokens at {loss:.2f} nat"
        yield f"{WITHOUT[str(training)]}, induction {what}{at}: {ends}."


def _each(changes: xr.Dataset) -> Iterator[str]:
    """Change points of every curve in the main training."""
    main = _main(changes)
    for name in [] if main is None else main["curve"].values:
        here = main.sel(curve=name)  # type: ignore[union-attr]
        first, last = (float(here[key].mean()) for key in ("first", "last"))
        words, unit = CURVES[name].words, "" if CURVES[name].unit == "1" else " nat"
        words = f"{words[:1].upper()}{words[1:]}"
        if int(here["appeared"]):
            yield f"{words}: changes at step {_step(here)}, from {first:.2f} to {last:.2f}{unit}."
        else:
            yield f"{words}: no change point; {first:.2f}{unit} at first and {last:.2f}{unit} at last."


def _heads(curves: xr.Dataset) -> Iterator[str]:
    """Which heads they are."""
    for training in curves["training"].values:
        here = curves.sel(training=training)
        pairs = zip(here["best_previous_token"].values, here[f"best_{REFERENCE}"].values, strict=True)
        each = [f"{one} and {other} (seed {seed})" for seed, (one, other) in enumerate(pairs)]
        which = "best previous-token head of layer 0 and the head that attends most behind the earlier copy"
        yield f"{str(training).capitalize()}: {which} are {listed(each)}."


def _limits(changes: xr.Dataset, study: dict[str, Any]) -> Iterator[str]:
    """What was not shown."""
    seeds = changes.sizes["seed"]
    if seeds < 5:
        yield f"Intervals over {count(seeds, 'seed')} say little: with fewer than 5, take more seeds."
    yield (
        f"A curve has a change point where a logistic step explains {100 * FITS:.0f}% of its variance; what changes in "
        "two steps, or slowly, is told badly by one."
    )
    skip_bigrams, scored = study["skip_bigrams"], study["scored"]
    if skip_bigrams:
        yield (
            f"{100 * skip_bigrams:.0f}% of the tokens follow from the one two before, so that a head that attends to "
            "the previous position is of use without induction and may come first for that; skip_bigrams=0 takes that "
            "away."
        )
    if scored < 1:
        yield (
            f"Of the tokens that cannot be known {100 * scored:.0f}% entered the loss: what models say of others was "
            "hardly trained, and the in-context-learning score, which compares with it, says less than elsewhere."
        )
    yield "The order of change points is no proof of cause: that is what the controls are for."
    yield "The language is artificial and the models are small: what is found need not hold in large models."
