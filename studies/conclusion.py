"""The conclusion in plain sentences. Every sentence is written from numbers of the result; none stands without one."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import xarray as xr

from ..metrics.statistics import bootstrap_interval
from .heads import ROLES


@dataclass(frozen=True)
class Finding:
    """A sentence, and the group of the result that it was written from."""

    group: str
    text: str


def conclude(tree: xr.DataTree) -> list[Finding]:
    """What the result of an `InductionStudy` says, and what it did not show."""
    writers = {
        "behaviour": _behaviour,
        "heads": _heads,
        "sets": _sets,
        "ablation": _ablation,
        "patching": _patching,
        "composition": _composition,
        "words": _words,
    }
    findings = [
        Finding(group, text) for group, write in writers.items() for text in write(tree[group].to_dataset(), tree)
    ]
    return findings + [Finding("limits", text) for text in _limits(tree)]


def _behaviour(ds: xr.Dataset, tree: xr.DataTree) -> list[str]:
    clean = ds.sel(run="clean")
    before, after = (float(clean[f"accuracy_{when}"].mean()) for when in ("before", "after"))
    early, late = (float(clean[f"loss_{when}"].mean()) for when in ("before", "after"))
    low, high = bootstrap_interval(clean["accuracy_after"].values)
    broken = float(ds["accuracy_after"].sel(run="corrupted").mean())
    gain = "The model repeats what it has seen" if after - before > 0.1 else "The model hardly uses the repeat"
    return [
        f"{gain}: next-token accuracy is {_percent(before)} before the repeat and {_percent(after)} after it "
        f"(95% interval {_percent(low)} to {_percent(high)}), and the loss goes from {early:.2f} to {late:.2f} nats.",
        f"Where the first half is replaced so that nothing repeats, accuracy at the same positions is {_percent(broken)}.",
    ]


def _heads(ds: xr.Dataset, tree: xr.DataTree) -> list[str]:
    sentences = []
    for score, role in ROLES.items():
        mean = ds[score].mean("example")
        chance = float(ds[f"chance_{score}"].mean())
        best = float(ds[f"untrained_{score}"].max())
        named = [
            (value, f"L{layer}H{head}")
            for (layer, head), value in np.ndenumerate(mean.values)
            if ds["role"].values[layer, head] == role
        ]
        background = f"chance is {chance:.2f} and the best of {ds[f'untrained_{score}'].size} untrained heads has {best:.2f}"
        if named:
            listed = _listed([f"{name} ({value:.2f})" for value, name in sorted(named, reverse=True)])
            sentences.append(f"{_count(len(named), f'{role} head')} of {mean.size}: {listed}; {background}.")
        else:
            sentences.append(
                f"No head is {_article(role)} {role} head: the highest score is {float(mean.max()):.2f} "
                f"(q = {float(ds[f'q_{score}'].values.flat[int(mean.values.argmax())]):.2f}), and a head needs "
                f"{float(ds.attrs['threshold']):.2f} with q of at most {float(ds.attrs['alpha']):.2f}; {background}."
            )
    return sentences


def _sets(ds: xr.Dataset, tree: xr.DataTree) -> list[str]:
    if "set" not in ds.dims:
        return []
    base = float(ds["baseline_accuracy"].sel(run="clean").mean())
    sentences = []
    for name in ds["set"].values:
        here = ds.sel(set=name)
        drops = {method: base - float(here["accuracy"].sel(ablation=method).mean()) for method in ds["ablation"].values}
        interval = _drop_interval(here, "zero")
        listed = _listed([f"{_points(drop)} under {method} ablation" for method, drop in drops.items()])
        text = f"Without {_the(str(name))} together, accuracy falls from {_percent(base)} by {listed} (zero: 95% interval {interval})."
        sentences.append(text + " " + " ".join(_control_words(here, control, base) for control in ds["control"].values))
    return sentences


def _drop_interval(here: xr.Dataset, method: str) -> str:
    ends = (-float(here[f"accuracy_effect_{end}"].sel(ablation=method)) for end in ("high", "low"))
    return " to ".join(_points(end).removesuffix(" points") for end in ends) + " points"


def _control_words(here: xr.Dataset, control: str, base: float) -> str:
    count = int(here["draws"].sel(control=control))
    place = "of the same layers" if control == "same layers" else "from all layers"
    if count == 0:
        return f"There are not enough other heads for a control {place}."
    kind = f"all {count} distinct sets" if int(here["exhaustive"].sel(control=control)) else f"{count} random sets"
    drops = base - here["control_accuracy"].sel(control=control, ablation="zero").mean("example")
    p = float(here["p_accuracy"].sel(control=control, ablation="zero"))
    floor = f", the smallest that {count} sets can give" if np.isclose(p, 1 / (1 + count)) else ""
    return (
        f"Zeroing as many other heads {place} ({kind}) costs {_points(float(drops.mean()))} on average and "
        f"{_points(float(drops.max()))} at most (p = {p:.3f}{floor})."
    )


def _ablation(ds: xr.Dataset, tree: xr.DataTree) -> list[str]:
    base = ds["baseline_loss"].sel(run="clean")
    change = (ds["loss"] - base).mean("example")
    share = ds["constant_share"]
    real = (ds["loss_effect_q"] <= 0.05) & (change > 0)
    zero, mean = (change.sel(ablation=method) for method in ("zero", "mean"))
    worst = {method: _worst(change.sel(ablation=method)) for method in ds["ablation"].values}
    sentences = [
        "The single head that costs most is "
        + _listed([f"{head} under {method} ablation (+{value:.2f} nats)" for method, (head, value) in worst.items()])
        + "."
    ]
    only_zero = (real.sel(ablation="zero") & (zero > 2 * np.maximum(mean, 0)) & (zero - mean > 0.05)).values
    only_mean = (real.sel(ablation="mean") & (mean > 2 * np.maximum(zero, 0)) & (mean - zero > 0.05)).values
    if not only_zero.any() and not only_mean.any():
        gap = np.abs(zero - mean)
        at = np.unravel_index(int(gap.values.argmax()), gap.shape)
        sentences.append(
            f"No head's verdict changes between zero and mean ablation: the two differ by at most {float(gap.max()):.2f} nats "
            f"(L{at[0]}H{at[1]})."
        )
    for mask, first, second, small, large in ((only_zero, "zero", "mean", mean, zero), (only_mean, "mean", "zero", zero, mean)):
        for layer, head in sorted(zip(*np.nonzero(mask), strict=True), key=lambda at: -float(abs(zero - mean)[at])):
            part = float(share[layer, head])
            why = (
                "zeroing takes that constant away from the layers that rely on it, and the mean leaves it"
                if first == "zero"
                else "the mean adds an output that is wrong for most prompts, where zero adds none"
            )
            sentences.append(
                f"L{layer}H{head} looks needed under {first} ablation (+{float(large[layer, head]):.2f} nats) and not, or far "
                f"less, under {second} ablation ({float(small[layer, head]):+.2f}): {_percent(part)} of its output is the same "
                f"for every prompt; {why}."
            )
    return sentences


def _patching(ds: xr.Dataset, tree: xr.DataTree) -> list[str]:
    sentences = []
    for direction in ("noising", "denoising"):
        best = ds[f"{direction}_normalized"]
        sign = 1 if direction == "denoising" else -1
        values = (sign * best).fillna(-np.inf)
        at = np.unravel_index(int(values.values.argmax()), values.shape)
        component, layer, head = str(ds["component"].values[at[0]]), at[1], at[2]
        sentences.append(
            f"By {direction}, the single most telling patch is {component} of L{layer}H{head}: the normalised logit "
            f"difference is {float(best[at]):.2f} (0 is the corrupted run, 1 the clean one)."
        )
    if "set_normalized" not in ds:
        return sentences
    clean_score, clean_diff = float(ds["clean_induction"].mean()), float(ds["clean_logit_diff"].mean())
    for component, held in _predicted(ds).items():
        score = float(ds["set_induction"].sel(component=component).mean())
        answer = float(ds["set_logit_diff"].sel(component=component).mean())
        sentences.append(
            f"Taking {component} of all induction heads from the corrupted run {_verdict(component, held)}: their induction "
            f"score is {score:.2f} ({clean_score:.2f} before), the logit difference {answer:+.1f} ({clean_diff:+.1f} before)."
        )
    return sentences


def _predicted(ds: xr.Dataset) -> dict[str, bool]:
    """Whether each of q, k, v did what the circuit predicts (see `patching.PREDICTION`)."""
    score = (ds["set_induction"].mean("example") / ds["clean_induction"].mean()).to_series()
    answer = (ds["set_logit_diff"].mean("example") / ds["clean_logit_diff"].mean()).to_series()
    return {
        "q": bool(score["q"] > 0.8 and answer["q"] > 0.8),
        "k": bool(score["k"] < 0.5 and answer["k"] < 0.5),
        "v": bool(score["v"] > 0.8 and answer["v"] < 0),
    }


def _verdict(component: str, held: bool) -> str:
    if component == "q":
        return "changes little, as predicted" if held else "was predicted to change nothing, and did change something"
    carried = {"k": "pattern", "v": "token"}[component]
    change = {"k": "breaks the attention", "v": "keeps the attention and swaps the answer for the distractor"}[component]
    return f"{change}: as predicted, {component} carries the {carried}" if held else (
        f"does not do what was predicted ({component} carrying the {carried})"
    )


def _composition(ds: xr.Dataset, tree: xr.DataTree) -> list[str]:
    if "pair_mean" not in ds:
        return []
    series = {name: ds[name].to_series() for name in ("pair_mean", "pair_z", "other_mean", "pair_above")}
    floor = ds["floor_mean"].to_series()
    strongest = str(series["pair_z"].idxmax())
    listed = _listed([
        f"{kind.upper()} {series['pair_mean'][kind]:.2f} ({series['pair_z'][kind]:+.0f} deviations from the random floor "
        f"of {floor[kind]:.2f}; other pairs {series['other_mean'][kind]:.2f})"
        for kind in ("q", "k", "v")
    ])
    verdict = (
        "so previous-token heads feed the keys of induction heads"
        if strongest == "k" and series["pair_z"]["k"] > 3
        else "so the weights do not single out the keys"
    )
    sentences = [
        f"From previous-token to induction heads, composition is {listed}: {strongest.upper()} stands out most, {verdict}. "
        f"{_percent(series['pair_above']['k'])} of the other pairs between those layers have less K-composition."
    ]
    before = float(ds["receiver_induction"].mean())
    after = _listed([f"{float(ds['ablated_induction'].sel(ablation=m).mean()):.2f} under {m} ablation" for m in ds["ablation"].values])
    text = f"It is causal: " if before - float(ds["ablated_induction"].max("ablation").mean()) > 0.1 else "The causal check is weak: "
    text += f"without the previous-token heads the score of the induction heads goes from {before:.2f} to {after}"
    if ds.sizes["control_draw"]:
        low, high = float(ds["control_induction"].sel(ablation="zero").min()), float(ds["control_induction"].sel(ablation="zero").max())
        p = float(ds["p_induction"].sel(ablation="zero"))
        text += f"; zeroing as many other heads of those layers ({ds.sizes['control_draw']} sets) leaves it at {low:.2f} to {high:.2f} (p = {p:.3f})"
    return [*sentences, text + "."]


def _words(ds: xr.Dataset, tree: xr.DataTree) -> list[str]:
    if "accuracy" not in ds:
        return [f"Words in context were not run: none of the lists fits this tokenizer ({ds.attrs['left_out']})."]
    right, total = int(ds["accuracy"].sum()), ds.sizes["example"]
    agreement, p = float(ds["agreement"]), float(ds["agreement_p"])
    text = f"On {total} short word lists such as “{ds['prompt'].values[0]}” the model gives the right next word {right} times"
    text += f"; the heads' prefix-matching there agrees with their induction score at a rank correlation of {agreement:.2f} (p = {p:.1e})"
    if "ablated_accuracy" in ds:
        left = _listed([f"{int(ds['ablated_accuracy'].sel(ablation=m).sum())} under {m} ablation" for m in ds["ablation"].values])
        text += f". Without the induction heads {left} of the {total} are right"
    return [text + "."]


def _limits(tree: xr.DataTree) -> list[str]:
    ds, heads = tree["sets"].to_dataset(), tree["heads"].to_dataset()
    limits = [
        f"Not shown: that the K path alone carries the effect. Ablating the previous-token heads removes everything they "
        f"write; path patching would isolate one path. ({tree['behaviour'].sizes['example']} prompts, one seed, one model.)",
        f"Roles rest on a threshold of {heads.attrs['threshold']:.2f}; "
        + f"{int(((heads['induction'].mean('example') > 0.5 * heads.attrs['threshold']) & (heads['role'] != 'induction')).sum())} "
        "further heads have an induction score above half of it.",
    ]
    if "draws" in ds:
        few = [f"{name} ({int(ds['draws'].sel(set=name, control='same layers'))})" for name in ds["set"].values]
        limits.append(f"The control in the same layers has at most these many sets: {_listed(few)}; p cannot be below 1 / (1 + that).")
    return limits


def _worst(change: xr.DataArray) -> tuple[str, float]:
    at = np.unravel_index(int(change.values.argmax()), change.shape)
    return f"L{at[0]}H{at[1]}", float(change.values[at])


def _percent(value: float) -> str:
    return f"{100 * float(value):.0f}%"


def _points(value: float) -> str:
    return f"{100 * value:.0f} points"


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _the(name: str) -> str:
    return "induction and previous-token heads" if name == "both" else f"the {name}"


def heads_of(tree: xr.DataTree) -> dict[str, list[str]]:
    """Role to names of heads, from the attributes of a result."""
    found: dict[str, list[str]] = json.loads(tree.attrs["heads"])
    return found
