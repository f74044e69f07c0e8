"""The report of a plain measurement: sentences, tables and figures of whatever `measure` gives. Measures nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from ...metrics.intervals import few_prompts
from ..output.page import Number, Page, folded, number, table
from ..output.phrases import count, listed
from ..storage.attributes import json_in, number_in
from ..storage.record import edits_in
from .changes import NOISE, Changes, Values, baseline, changed, changes, heads_in, metrics_in
from .figures import draw, draw_changes
from .generic import figure, overview, unit_words
from .induction import Section, why_not
from .random_heads import random_heads, shown_with

TOP = 20
"""Rows of a table; the others are counted."""
SAID = 3
"""Conditions that the answer names."""
WORDS = {
    "ZeroAblate": "zero ablation",
    "MeanAblate": "mean ablation",
    "ResampleAblate": "resample ablation",
    "Patch": "patching",
    "Add": "steering",
    "Scale": "scaling",
    "ProjectOut": "projecting out",
    "Knockout": "attention knockout",
    "PathPatch": "path patching",
    "Circuit": "circuits of edges",
}
"""Kind of intervention to the words for it; another kind stands as it is called."""


def title(ds: xr.Dataset) -> str:
    """What was measured, as a heading."""
    what, labels = done(ds.attrs), listed(_label(ds, name) for name in metrics_in(ds))
    of = f" of {ds.attrs['model']}" if "model" in ds.attrs else ""
    return _capital(f"{labels}{of}{f' under {what}' if what else ''}")


def question(ds: xr.Dataset) -> str:
    """The question that the measurement answers."""
    labels = listed(_label(ds, name) for name in metrics_in(ds))
    who = str(ds.attrs.get("model", "the model"))
    if not any(changed(ds, name) for name in metrics_in(ds)):
        return f"What {'is' if len(metrics_in(ds)) == 1 else 'are'} the {labels} of {who}, as it is?"
    axes = _axes(ds)
    each = f", for each {listed(axes)}" if axes else ""
    what = done(ds.attrs) or "the intervention"
    return f"What {'do' if ' and ' in what else 'does'} {what} of {who} change in {labels}{each}?"


def done(attrs: Mapping[Any, Any]) -> str:
    """The kinds of intervention, in words; nothing where there are none or they are not known."""
    kinds = (str(edit["type"]) for edit in edits_in(json_in(attrs, "interventions", object)))
    return listed(dict.fromkeys(WORDS.get(kind, kind) for kind in kinds))


def summary(ds: xr.Dataset) -> list[str]:
    """The answer: for each metric the largest changes, and how many are beyond noise."""
    return [text for name in metrics_in(ds) for text in _answer(ds, name)]


def _answer(ds: xr.Dataset, metric: str) -> list[str]:
    moved = changes(ds, metric)
    return [] if moved is None else on_changes(moved, "estimated " if _estimated(ds) else "")


def on_changes(moved: Changes, kind: str = "") -> list[str]:
    """What changes most, and how many changes are beyond noise, in sentences."""
    what = f"{kind}change of the {_short(moved.label)}"
    if np.isnan(moved.mean).all():
        return [f"No {what} can be given: 0 of {moved.mean.size} conditions have a value."]
    if moved.rounding[~np.isnan(moved.mean)].all():
        largest = np.nanmax(np.abs(moved.mean))
        return [f"No condition changes the {_short(moved.label)} by more than rounding (at most {largest:.1e})."]
    places = [at for at in moved.order() if not np.isnan(moved.mean[at]) and not moved.rounding[at]][:SAID]
    strongest = listed(f"{moved.names[at]} ({_with_interval(moved, at)})" for at in places)
    if len(moved.names) == 1:
        text = f"The {what} is {_with_interval(moved, 0)}, from {_shown(moved, moved.after[0] - moved.mean[0])}."
    else:
        text = (
            f"The largest {what} is that of {strongest}."
            if len(places) == 1
            else (f"The {what} is largest for {strongest}.")
        )
    return [text, _how_many(moved)]


def _how_many(moved: Changes) -> str:
    total = int((~np.isnan(moved.mean)).sum())
    if moved.examples < 2:
        return f"There is {count(moved.examples, 'prompt')}, so no interval: how much of this is chance is not known."
    if total == 1:
        holds = "excludes" if moved.excludes.any() else "does not exclude"
        return f"Its 95% interval over {count(moved.examples, 'prompt')} {holds} 0."
    text = (
        f"For {moved.excludes.sum() or 'none'} of {total} conditions the 95% interval over "
        f"{count(moved.examples, 'prompt')} excludes 0, for {moved.sure.sum() or 'none'} also after correction for "
        f"{total} tests (Benjamini-Hochberg, false discovery rate {NOISE})."
    )
    if moved.least_p > NOISE:
        text += f" With so few prompts no p can be below {moved.least_p:.2g}, so none could be found."
    return text


def on_baseline(values: Values, base: str) -> str:
    """The metric without intervention, in a sentence."""
    over = f"over {count(values.examples, 'prompt')}"
    if values.names and _is_head(values.names[0]):
        places = [at for at in values.order() if not np.isnan(values.mean[at])][:SAID]
        if not places:
            return f"Without intervention, 0 of {count(len(values.names), 'head')} have a value."
        best = listed(f"{values.names[at]} ({_with_interval(values, at)})" for at in places)
        return (
            f"Without intervention, of {count(len(values.names), 'head')}, the {_short(values.label)} on the {base} "
            f"run is highest for {best}, {over}; the mean over heads is "
            f"{_shown(values, float(np.nanmean(values.mean)))}."
        )
    each = listed(f"{_with_interval(values, at)} on the {name} run" for at, name in enumerate(values.names))
    return f"Without intervention, the {_short(values.label)} is {each}, {over}."


def _is_head(name: str) -> bool:
    return re.fullmatch(r"L\d+H\d+", name) is not None


def limits(ds: xr.Dataset) -> list[str]:
    """What the measurement does not show."""
    texts = []
    if _estimated(ds):
        texts.append(
            f"The changes are estimates from gradients ({ds.attrs['estimator']}), not measured ones: "
            "hw.compare_estimates says how far they can be trusted."
        )
    if "example" in ds.sizes:
        few = few_prompts(ds.sizes["example"])
        texts += [f"{few}."] if few else []
        number_of = count(ds.sizes["example"], "prompt")
        texts.append(f"Intervals are over {number_of} of one draw, not over trained models.")
    if any("position" in ds[f"baseline_{name}"].dims for name in metrics_in(ds)):
        texts.append(
            f"Values were kept at each of {count(ds.sizes['position'], 'position')}; sentences and tables are about "
            "the mean over the scored ones."
        )
    deviation = json_in(ds.attrs, "float32_deviation", dict)
    for name in deviation:
        if (size := number_in(deviation, name)) is not None:
            texts.append(f"In this number type, {name} is off by up to {size:.2g} from that of a float32 copy.")
    return texts


def sections(ds: xr.Dataset) -> list[Section]:
    """A section for each metric, and one for what else the dataset holds."""
    names = metrics_in(ds)
    found = []
    for name in names:
        label = _label(ds, name)
        asked = f"What changes in {label}?" if changed(ds, name) else f"What is the {label}?"
        found.append(Section(f"metric-{name}", _capital(label), asked, partial(_metric, name=name)))
    shown = {one for name in names for one in shown_with(ds, name)}
    other = [one for one in map(str, ds.data_vars) if one.removeprefix("baseline_") not in names and one not in shown]
    if other:
        found.append(
            Section("further", "Further variables", "What else is in the file?", partial(_others, names=other))
        )
    return found


def sentences(ds: xr.Dataset) -> dict[str, list[str]]:
    """Section to what it says in sentences."""
    found = {}
    for name in metrics_in(ds):
        moved = changes(ds, name)
        random = None if moved is None else random_heads(ds, name, moved)
        texts = [random.sentence] if random else []
        denoised = name == "logit_diff" and ds.attrs.get("direction") == "denoising"
        if denoised and moved is not None and moved.share is not None:
            clean = float(ds[f"baseline_{name}"].sel(run="clean").mean())
            texts += [why for why in [why_not(ds.attrs, clean, moved.share)] if why]
        texts += [on_baseline(baseline(ds, name), str(ds.attrs["base"]))]
        found[f"metric-{name}"] = [*_answer(ds, name), *texts]
    return found


def _metric(page: Page, ds: xr.Dataset, tree: xr.DataTree, *, name: str) -> None:
    """Figures and tables of one metric."""
    moved, before = changes(ds, name), baseline(ds, name)
    if moved is None:
        base = {"run": ds.attrs["base"]} if heads_in(ds[f"baseline_{name}"]) else {}
        draw(page, ds, f"baseline_{name}", f"{_capital(before.label)}, without intervention.", **base)
        page.add(_baseline_table(before))
        return
    page.add('<div class="beside">')
    draw_changes(page, ds, moved)
    page.add(f"<div>{changes_table(moved)}</div></div>")
    if random := random_heads(ds, name, moved):
        random.fill(page, ds)
    if _is_head(before.names[0]):  # of a run, the sentence says it all
        page.add(folded(f"Without intervention: {before.label}", _baseline_table(before)))


def changes_table(moved: Changes) -> str:
    """The strongest changes as a table."""
    order = moved.order()
    unit = unit_words(moved.unit).strip()
    head = ["condition", moved.label, "change", "95% interval", "q"]
    head += ["normalized"] if moved.share is not None else []
    rows = []
    for at in order[:TOP]:
        change = 0.0 if moved.rounding[at] else float(moved.mean[at])
        row = [moved.names[at], figure(moved.after[at]), figure(change, "+"), _ends(moved, at)]
        row.append(Number("<0.001") if moved.q[at] < 0.001 else number(float(moved.q[at]), ".3f"))
        rows.append([*row, number(float(moved.share[at]))] if moved.share is not None else row)
    further = len(order) - len(rows)
    which = f"The {len(rows)} largest of {count(len(order), 'change')}" if further else "Every change"
    note = f"{which}{f', in {unit}' if unit else ''}; q: t-test over prompts, Benjamini-Hochberg over all conditions."
    note += " Normalized: 0 is the corrupted run, 1 the clean one." if moved.share is not None else ""
    return table(head, rows, caption=note) + _further(further)


def _baseline_table(values: Values) -> str:
    order = values.order() if len(values.names) > TOP else range(len(values.names))
    rows = [[values.names[at], figure(values.mean[at]), _ends(values, at)] for at in list(order)[:TOP]]
    first = "head" if values.names and _is_head(values.names[0]) else "run"
    unit = unit_words(values.unit).strip()
    note = f"Without intervention{f', in {unit}' if unit else ''}, over {count(values.examples, 'prompt')}."
    return table([first, values.label, "95% interval"], rows, caption=note) + _further(len(values.names) - len(rows))


def _further(number_of: int) -> str:
    return f'<p class="note">{number_of} further are in the file.</p>' if number_of > 0 else ""


def _others(page: Page, ds: xr.Dataset, tree: xr.DataTree, *, names: list[str]) -> None:
    overview(page, ds[names])


def _axes(ds: xr.Dataset) -> list[str]:
    """Dims of the conditions."""
    for name in metrics_in(ds):
        if changed(ds, name):
            inner = {*ds[f"baseline_{name}"].dims, "example"}
            return [str(dim) for dim in ds[name].dims if dim not in inner]
    return []


def _label(ds: xr.Dataset, metric: str) -> str:
    """What a metric is called in a sentence: ``logit difference``, without ``, target minus distractor``."""
    return _short(str(ds[f"baseline_{metric}"].attrs.get("long_name", metric)))


def _short(label: str) -> str:
    return label.partition(",")[0]


def _estimated(ds: xr.Dataset) -> bool:
    return str(ds.attrs.get("estimator", "exact")) != "exact"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _shown(values: Values, value: float, sign: str = "") -> str:
    return f"{figure(value, sign)}{unit_words(values.unit)}"


def _ends(values: Values, at: int) -> str:
    if np.isnan(values.low[at]) or (isinstance(values, Changes) and values.rounding[at]):
        return "–"
    sign = "+" if isinstance(values, Changes) else ""
    return f"{figure(values.low[at], sign)} to {figure(values.high[at], sign)}"


def _with_interval(values: Values, at: int) -> str:
    sign = "+" if isinstance(values, Changes) else ""
    text = _shown(values, values.mean[at], sign)
    return text if np.isnan(values.low[at]) else f"{text}, 95% interval {_ends(values, at)}"
