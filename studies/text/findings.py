"""What a study of induction on text found, in sentences. Every sentence is written from numbers of the result."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import xarray as xr

from ...interventions.declare.sites import Head
from ..analyses.ablation import REAL
from ..analyses.conclusion import Finding
from ..analyses.induction import ALPHA
from ..output.phrases import count, listed, rounded
from ..tasks.tasks import REFERENCE_EXAMPLES
from .measured import SET

WORDS = {"distance": "distance", "candidates": "number of candidates", "position": "position"}
FEWEST = 20
"""Occurrences of a bin that is worth a sentence."""


def conclude(tree: xr.DataTree) -> list[Finding]:
    """The findings of a result of `TextInduction`; the summary holds the first of each part."""
    told = {
        "gains": [*_gains(tree)],
        "heads": [*_heads(tree)],
        "ablation": [*_ablation(tree)],
        "distance": [*_where(tree)],
        "prompts": [*_prompts(tree)],
    }
    first = [*told["gains"], *(texts[0] for name, texts in told.items() if texts and name != "gains")]
    groups = {"summary": first} | told | {"limits": [*_limits(tree)]}
    return [Finding(group, text) for group, texts in groups.items() for text in texts]


def _interval(ds: xr.Dataset, name: str, form: str = "+.2f") -> str:
    """A value with its interval, in words."""
    value, low, high = (float(ds[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return _ends(value, low, high, form)


def _ends(value: float, low: float, high: float, form: str = "+.2f") -> str:
    known = np.isfinite([low, high]).all()
    value_said, low_said, high_said = (rounded(one, form) for one in (value, low, high))
    return f"{value_said} (95%: {low_said} to {high_said})" if known else value_said


def _gains(tree: xr.DataTree) -> Iterator[str]:
    ds, windows = tree["gains"].to_dataset(), tree["windows"].to_dataset()
    gain, causal, elsewhere, net = (ds.sel(gain=name) for name in ("gain", "causal_gain", "elsewhere", "net_gain"))
    (n, size), files = windows["tokens"].shape, len({*map(str, windows["file"].values)})
    yield (
        f"In {n} windows of {size} tokens from {count(files, 'file')}, {int(gain['count'])} token pairs recur where "
        f"nothing else had followed the first token: the loss is {float(ds['loss_second']):.2f} nats at the second "
        f"occurrence and {float(ds['loss_first']):.2f} at the first, a gain of {_interval(gain, 'mean')}."
    )
    if not (number := int(net["count"])):
        return
    said = "that it is used is not shown."
    if float(net["mean_low"]) > 0:
        said = "the model uses it."
    elif float(net["mean_high"]) < 0:
        said = "it makes the prediction worse."
    yield (
        f"With the first occurrence replaced, the loss at the second changes by {_interval(causal, 'mean')} nats "
        f"({count(number, 'occurrence')}); with another place replaced, by {_interval(elsewhere, 'mean')}. The first "
        f"occurrence itself is worth the difference, {_interval(net, 'mean')} nats: {said}"
    )


def _heads(tree: xr.DataTree) -> Iterator[str]:
    ds, names = tree["heads"].to_dataset(), json.loads(tree.attrs["heads"])["induction"]
    best = _head_at(ds["successor"], int(ds["successor"].values.argmax()))
    there = ds.sel(layer=best.layer, head=best.head)
    highest = float(ds["induction"].mean("example").max())
    yield (
        (
            f"{count(len(names), 'induction head')} ({', '.join(names)}) {'is' if len(names) == 1 else 'are'} found on "
            "random tokens. "
            if names
            else f"No head passes both tests of an induction head on random tokens (highest score {highest:.2f}). "
        )
        + f"On the text, {best} attends most to the first successor: {_interval(there, 'successor', '.2f')}, over the "
        f"same distance elsewhere {float(there['distance_control']):.2f}, where uniform attention gives "
        f"{float(ds['chance_successor']):.2f}."
    )
    top, shared = int(ds.attrs["top"]), float(ds.attrs["shared"])
    among = f" {round(top * shared)} of the {top} highest on random tokens are among the {top} highest on text."
    yield (
        f"Over all {ds['successor'].size} heads, scores on random tokens and on text have a rank correlation of "
        f"{rounded(ds.attrs['rank_correlation'])}.{among if shared == shared else ''}"
    )
    for head in map(Head.parse, names):
        here = ds.sel(layer=head.layer, head=head.head)
        shown = "attends" if float(here["above_control_low"]) > 0 else "is not shown to attend"
        yield (
            f"{head}: {float(here['induction'].mean()):.2f} on random tokens, {_interval(here, 'successor', '.2f')} on "
            f"the text, {_interval(here, 'above_control')} above the same distance elsewhere: it {shown} to first "
            "successors there."
        )


def _head_at(values: xr.DataArray, number: int) -> Head:
    return Head(*(int(at) for at in np.unravel_index(number, values.shape)))


def _ablation(tree: xr.DataTree) -> Iterator[str]:
    ds = tree["ablation"].to_dataset()
    alone = ds["alone_gain"]
    strongest = _head_at(alone, int(alone.values.argmin()))
    if "set" in ds.dims:
        yield from _set(ds.sel(set=SET, run="clean").isel(ablation=0), strongest)
    change, p = rounded(alone.min(), "+.2f"), float(ds["p_alone_gain"].sel(layer=strongest.layer, head=strongest.head))
    known = f" (p = {p:.2g}, corrected for all heads)" if np.isfinite(p) else ""
    yield (
        f"Of single heads, {strongest} matters most: without it"
        if p <= ALPHA and change.startswith("-")
        else f"No single head is shown to matter more than others: without {strongest}"
    ) + f" the gain changes by {change} nats, without the median head by {rounded(alone.median(), '+.2f')}{known}."


def _set(ds: xr.Dataset, strongest: Head) -> Iterator[str]:
    """The induction heads beside random ones; `strongest` is the head that matters most alone."""
    told, real = {}, {}
    for name in ("gain", "loss_second", "loss_first"):
        change = float(ds[name] - ds[f"baseline_{name}"])
        low, high = (float(ds[f"{name}_effect_{end}"]) for end in ("low", "high"))
        p = float(ds[f"p_{name}"].sel(control="all layers"))
        told[name] = f"{_ends(change, low, high)} nats"
        real[name] = p <= REAL and (low > 0 or name == "gain")
        told[f"p_{name}"] = f"p = {p:.3f}"
    every, same = (int(ds["draws"].sel(control=control)) for control in ("all layers", "same layers"))
    beat = (ds["control_gain"].sel(control="all layers") <= ds["gain"]).values
    sets = [str(one).split() for one in ds["control_heads"].sel(control="all layers").values[beat]]
    holding = sum(str(strongest) in one for one in sets)
    other = f", {holding} of them with {strongest}" if holding and str(strongest) not in ds["heads"].item() else ""
    floor = 1 / (1 + every)
    rests = real["gain"] and float(ds["gain_effect_high"]) < 0
    yield (
        f"Without {listed(ds['heads'].item().split())} ({ds['ablation'].item()} ablation) the gain changes by "
        f"{told['gain']}, from {rounded(ds['baseline_gain'])} to {rounded(ds['gain'])}. Of {every} random sets of "
        f"as many heads over all layers, {len(sets)} do as much{other} ({told['p_gain']}): "
        + (
            "it rests on these heads more than on others."
            if rests
            else "that it rests on these heads alone is not shown."
        )
    )
    floor, p_same = 1 / (1 + same), float(ds["p_gain"].sel(control="same layers"))
    if not same:
        yield "The layers of these heads have too few other heads to draw a random set from."
    else:
        yield f"Of {count(same, 'random set')} in the same layers, p = {p_same:.3f}" + (
            f", and it cannot be below {floor:.3f}: these alone could not tell." if floor > REAL else "."
        )
    yield (
        f"The loss at second occurrences changes by {told['loss_second']} ({told['p_loss_second']}), at first "
        f"occurrences by {told['loss_first']} ({told['p_loss_first']}): "
        + (
            "these heads matter more than random ones at first occurrences too, so they do more than induction."
            if real["loss_first"]
            else "at first occurrences these heads are not shown to matter more than random ones."
        )
    )


def _where(tree: xr.DataTree) -> Iterator[str]:
    """How the net gain depends on distance, candidates and position."""
    parts, unsure = [], []
    for name, words in WORDS.items():
        ds = tree[name].to_dataset()
        many = ds.isel(bin=np.flatnonzero(ds["count_net_gain"].values >= FEWEST))
        if open_bins := [str(one) for one in many["bin"].values[~(many["net_gain_low"].values > 0)]]:
            unsure.append(f"{words} {listed(open_bins)}")
        if many.sizes["bin"] > 1:
            ends = (f"{rounded(many['net_gain'][at], '+.2f')} at {many['bin'].values[at]}" for at in (0, -1))
            parts.append(f"by {words} {' and '.join(ends)}")
    if parts:
        yield f"The net gain in nats: {'; '.join(parts)}. " + (
            f"It is not shown to be above 0 at {'; '.join(unsure)}."
            if unsure
            else f"It is above 0 in every part with {FEWEST} occurrences or more."
        )


def _prompts(tree: xr.DataTree) -> Iterator[str]:
    if "prompts" not in tree.children:
        return
    ds = tree["prompts"].to_dataset()
    known = np.isfinite(float(ds["mean_causal_gain"]))
    yield (
        f"On {count(ds.sizes['prompt'], 'prompt')} of your own, the answer has a probability of "
        f"{float(ds['prob'].mean()):.2f} on average and is the most likely token in {int(ds['accuracy'].sum())}; the "
        f"gain is {_interval(ds, 'mean_gain')} nats"
        + (
            f", and with the first occurrence replaced the loss changes by {_interval(ds, 'mean_causal_gain')}."
            if known
            else "; no other prompt has tokens to replace the first occurrence by."
        )
    )


def _limits(tree: xr.DataTree) -> Iterator[str]:
    gains, windows, study = tree["gains"].to_dataset(), tree["windows"].to_dataset(), json.loads(tree.attrs["study"])
    yield (
        "The gain alone shows no induction: pairs that recur are frequent ones, and later tokens have more context. "
        "What the first occurrence does, the net gain says."
    )
    yield (
        "Replaced tokens make the text less likely where they stand. The loss with another place replaced says how "
        "much that alone does, on average: for a single occurrence that place may be nearer or farther."
    )
    yield "Attention to the first successor does not say that its token is copied; ablation says what rests on a head."
    yield (
        f"Heads that are no induction heads on random tokens (a score below {float(study['threshold']):.2f}, or not "
        "above untrained models) may do induction on text: they were ablated alone only, without a test."
    )
    if study["text"] is not None:
        yield f"That the model has not read the text in {study['text']} is taken for granted: nothing here can tell."
    yield (
        f"Intervals take {gains.attrs['unit']}s for independent ({int(gains.attrs['units_of'])} have an occurrence)"
        + (
            ": with so few files, what the windows of a file share is not in them."
            if gains.attrs["unit"] == "window"
            else "."
        )
    )
    beside = int(windows.attrs["possible"]) - windows.sizes["window"]
    if beside < REFERENCE_EXAMPLES:
        yield (
            f"The text has {count(beside, 'window')} beside those that were drawn: what is put in their place comes "
            "from these too, and may be a window's own."
        )
    few = [words for name, words in WORDS.items() if (tree[name]["count_net_gain"] < FEWEST).any()]
    if few:
        yield f"Some parts by {listed(few)} hold fewer than {FEWEST} occurrences: see the counts."
