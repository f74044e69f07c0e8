"""What each part of the result says, in plain sentences: one writer for each group, every sentence from its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import xarray as xr

from ..metrics.statistics import bootstrap_interval
from .heads import ROLES
from .phrases import article, count, listed, percent, points
from .words import LISTS

REAL = 0.05
"""False discovery rate up to which an effect is taken for real."""
CLEAR_NATS = 0.05
"""Difference in loss between two ablations below which it is not worth a sentence."""


def _behaviour(ds: xr.Dataset) -> list[str]:
    clean = ds.sel(run="clean")
    before, after = (float(clean[f"accuracy_{when}"].mean()) for when in ("before", "after"))
    early, late = (float(clean[f"loss_{when}"].mean()) for when in ("before", "after"))
    low, high = bootstrap_interval(clean["accuracy_after"].values)
    broken = float(ds["accuracy_after"].sel(run="corrupted").mean())
    gain = "The model repeats what it has seen" if after - before > 0.1 else "The model hardly uses the repeat"
    return [
        f"{gain}: next-token accuracy is {percent(before)} before the repeat and {percent(after)} after it "
        f"(95% interval {percent(low)} to {percent(high)}), and the loss goes from {early:.2f} to {late:.2f} nats.",
        f"Where the first half is replaced so that nothing repeats, accuracy at the same positions is "
        f"{percent(broken)}.",
    ]


def _heads(ds: xr.Dataset) -> list[str]:
    return [_role_words(ds, score, role) for score, role in ROLES.items()]


def _role_words(ds: xr.Dataset, score: str, role: str) -> str:
    mean = ds[score].mean("example").values
    untrained = ds[f"untrained_{score}"]
    background = (
        f"chance is {float(ds[f'chance_{score}'].mean()):.2f} and the best of {untrained.size} untrained heads has "
        f"{float(untrained.max()):.2f}"
    )
    named = sorted(
        ((value, f"L{at[0]}H{at[1]}") for at, value in np.ndenumerate(mean) if ds["role"].values[at] == role),
        reverse=True,
    )
    if named:
        members = listed(f"{name} ({value:.2f})" for value, name in named)
        return f"{count(len(named), f'{role} head')} of {mean.size}: {members}; {background}."
    best_q = float(ds[f"q_{score}"].values.flat[int(mean.argmax())])
    return (
        f"No head is {article(role)} {role} head: the highest score is {mean.max():.2f} (q = {best_q:.2f}), and a "
        f"head needs {float(ds.attrs['threshold']):.2f} with q of at most {float(ds.attrs['alpha']):.2f}; {background}."
    )


def _sets(ds: xr.Dataset) -> list[str]:
    if "set" not in ds.dims:
        return []
    base = float(ds["baseline_accuracy"].sel(run="clean").mean())
    return [_set_words(ds.sel(set=name), str(name), base) for name in ds["set"].values]


def _set_words(here: xr.Dataset, name: str, base: float) -> str:
    who = "induction and previous-token heads" if name == "both" else f"the {name}"
    after = here["accuracy"].mean("example").to_series()
    falls = listed(f"{percent(after[ablation])} under {ablation} ablation" for ablation in after.index)
    low, high = (-float(here[f"accuracy_effect_{end}"].sel(ablation="zero")) for end in ("high", "low"))
    text = (
        f"Without {who} together, accuracy falls from {percent(base)} to {falls} (zero costs "
        f"{points(base - after['zero'])}, "
        f"95% interval {round(100 * low)} to {round(100 * high)})."
    )
    return " ".join([text, *(_control_words(here, str(control), base) for control in here["control"].values)])


def _control_words(here: xr.Dataset, control: str, base: float) -> str:
    number = int(here["draws"].sel(control=control))
    place = "of the same layers" if control == "same layers" else "from all layers"
    if number == 0:
        return f"There are not enough other heads {place} for a control (0 sets)."
    kind = f"all {number} distinct sets" if int(here["exhaustive"].sel(control=control)) else f"{number} random sets"
    falls = base - here["control_accuracy"].sel(control=control, ablation="zero").mean("example")
    p = float(here["p_accuracy"].sel(control=control, ablation="zero"))
    floor = f", the smallest that {number} sets can give" if np.isclose(p, 1 / (1 + number)) else ""
    return (
        f"Zeroing as many other heads {place} ({kind}) costs {points(falls.mean())} on average and "
        f"{points(falls.max())} at most (p = {p:.3f}{floor})."
    )


def _ablation(ds: xr.Dataset) -> list[str]:
    change = (ds["loss"] - ds["baseline_loss"].sel(run="clean")).mean("example").transpose("ablation", "layer", "head")
    worst = []
    for ablation in change["ablation"].values:
        here = change.sel(ablation=ablation).values
        layer, head = np.unravel_index(int(here.argmax()), here.shape)
        worst.append(f"L{layer}H{head} under {ablation} ablation ({here.max():+.2f} nats)")
    sentences = [f"The single head that costs most is {listed(worst)}."]
    zero, mean = (change.sel(ablation=name).values for name in ("zero", "mean"))
    changed = [*_only_under("zero", "mean", ds, zero, mean), *_only_under("mean", "zero", ds, mean, zero)]
    if changed:
        return sentences + changed
    gap = np.abs(zero - mean)
    layer, head = np.unravel_index(int(gap.argmax()), gap.shape)
    sentences.append(
        f"No head's verdict changes between zero and mean ablation: the two differ by at most {gap.max():.2f} nats "
        f"(L{layer}H{head}, {percent(ds['constant_share'].values[layer, head])} of whose output is the same for "
        f"every prompt)."
    )
    return sentences


def _only_under(
    first: str, second: str, ds: xr.Dataset, large: np.ndarray[tuple[int, int]], small: np.ndarray[tuple[int, int]]
) -> list[str]:
    """Heads that look needed under one ablation and not, or less than half as much, under the other; and why."""
    real = (ds["loss_effect_q"].sel(ablation=first).values <= REAL) & (large - small > CLEAR_NATS)
    found = np.argwhere(real & (large > 2 * np.maximum(small, 0)))
    why = {
        "zero": "zeroing takes that constant away from the layers that rely on it, and the mean leaves it",
        "mean": "the mean puts in an output that is wrong for most prompts, where zero puts in none",
    }[first]
    return [
        f"L{layer}H{head} looks needed under {first} ablation ({large[layer, head]:+.2f} nats) and less than half as "
        f"much under {second} ablation ({small[layer, head]:+.2f}): "
        f"{percent(ds['constant_share'].values[layer, head])} "
        f"of its output is the same for every prompt; {why}."
        for layer, head in sorted(map(tuple, found), key=lambda at: small[at] - large[at])
    ]


def _patching(ds: xr.Dataset) -> list[str]:
    sentences = []
    for direction, start in (("noising", 1.0), ("denoising", 0.0)):
        ratio = ds[f"{direction}_normalized"].transpose("component", "layer", "head").values
        if np.isnan(ratio).all():
            sentences.append(
                f"By {direction}, nothing can be said: over {ds.sizes['example']} prompts, the clean and the "
                "corrupted run do not differ in logit difference by more than noise."
            )
            continue
        at = np.unravel_index(int(np.nanargmax(np.abs(ratio - start))), ratio.shape)
        beyond = ": below 0, so the answer turns to the distractor" if ratio[at] < -0.1 else ""
        sentences.append(
            f"By {direction}, the single patch that changes most is {ds['component'].values[at[0]]} of "
            f"L{at[1]}H{at[2]}: the normalised logit difference goes from {start:.0f} to {ratio[at]:.2f} (0 is the "
            f"corrupted run, 1 the clean one){beyond}."
        )
    if "set_induction" not in ds:
        return sentences
    for component, (held, change) in verdicts(ds).items():
        yes, no = WORDS[component]
        sentences.append(
            f"Taking {component} of all induction heads from the corrupted run {yes if held else no}: their induction "
            f"score goes from {float(ds['clean_induction'].mean()):.2f} to {change['score']:.2f}, the logit difference "
            f"from {float(ds['clean_logit_diff'].mean()):+.1f} to {change['answer']:+.1f}."
        )
    return sentences


WORDS = {
    "q": ("changes little, as predicted", "was predicted to change nothing, and did change something"),
    "k": (
        "breaks the attention: as predicted, k carries the pattern",
        "does not break the attention as predicted",
    ),
    "v": (
        "keeps the attention and swaps the answer for the distractor: as predicted, v carries the token",
        "does not swap the answer as predicted",
    ),
}
"""What is said of q, k and v where the prediction of the circuit (`patching.PREDICTION`) held, and where it did not."""


def verdicts(ds: xr.Dataset) -> dict[str, tuple[bool, pd.Series]]:
    """For q, k and v: whether the prediction of the circuit held, and the induction score and logit difference."""
    table = pd.DataFrame(
        {
            "score": ds["set_induction"].mean("example").to_series(),
            "answer": ds["set_logit_diff"].mean("example").to_series(),
        }
    )
    share = table / [float(ds["clean_induction"].mean()), float(ds["clean_logit_diff"].mean())]
    held = {
        "q": share["score"]["q"] > 0.8 and share["answer"]["q"] > 0.8,
        "k": share["score"]["k"] < 0.5 and share["answer"]["k"] < 0.5,
        "v": share["score"]["v"] > 0.8 and share["answer"]["v"] < 0,
    }
    return {component: (bool(held[component]), table.loc[component]) for component in ("q", "k", "v")}


def _composition(ds: xr.Dataset) -> list[str]:
    if "pair_mean" not in ds:
        return []
    pair = ds[["pair_mean", "pair_z", "other_mean", "pair_above", "floor_mean"]].to_dataframe()
    strongest = str(pair["pair_z"].idxmax())
    each = listed(
        f"{kind.upper()} {row['pair_mean']:.2f} ({row['pair_z']:+.0f} deviations from the random floor of "
        f"{row['floor_mean']:.2f}; other pairs {row['other_mean']:.2f})"
        for kind, row in pair.iterrows()
    )
    feeds = strongest == "k" and pair["pair_z"]["k"] > 3
    verdict = "so they feed the keys" if feeds else "so the weights do not single out the keys"
    sentences = [
        f"From previous-token to induction heads, composition is {each}. {strongest.upper()} stands out most, "
        f"{verdict}: {percent(pair['pair_above']['k'])} of the other pairs between those layers have less "
        f"K-composition."
    ]
    before = float(ds["receiver_induction"].mean())
    after = ds["ablated_induction"].mean("example").to_series()
    causal = "It is causal" if before - after.max() > 0.1 else "The causal check is weak"
    falls = listed(f"{after[ablation]:.2f} under {ablation} ablation" for ablation in after.index)
    text = (
        f"{causal}: without the previous-token heads the score of the induction heads goes from {before:.2f} to {falls}"
    )
    if ds.sizes["control_draw"]:
        control = ds["control_induction"].sel(ablation="zero")
        text += (
            f"; zeroing as many other heads of those layers ({ds.sizes['control_draw']} sets) leaves it at "
            f"{float(control.min()):.2f} to {float(control.max()):.2f} (p = "
            f"{float(ds['p_induction'].sel(ablation='zero')):.3f})"
        )
    return [*sentences, f"{text}."]


def _words(ds: xr.Dataset) -> list[str]:
    if "accuracy" not in ds:
        return [f"Words in context were not run: 0 of {len(LISTS)} lists fit this model's tokenizer."]
    total = ds.sizes["example"]
    text = (
        f"On {total} short word lists such as “{ds['prompt'].values[0]}” the model gives the right next word "
        f"{int(ds['accuracy'].sum())} times; where its heads look there agrees with their induction score at a rank "
        f"correlation of {float(ds['agreement']):.2f} (p = {float(ds['agreement_p']):.1e})."
    )
    if "ablated_accuracy" in ds:
        right = ds["ablated_accuracy"].sum("example").to_series()
        left = listed(f"{count(int(right[ablation]), 'time')} under {ablation} ablation" for ablation in right.index)
        text += f" Without the induction heads it is right {left}."
    return [text]


WRITERS: Mapping[str, Callable[[xr.Dataset], list[str]]] = {
    "behaviour": _behaviour,
    "heads": _heads,
    "ablation": _ablation,
    "sets": _sets,
    "patching": _patching,
    "composition": _composition,
    "words": _words,
}
"""Group of the result to what writes about it."""
