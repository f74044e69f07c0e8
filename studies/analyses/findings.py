"""What each part of the result says, in plain sentences: one writer for each group, every sentence from its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from ...interventions.declare.sites import Head
from ...metrics.intervals import bootstrap_interval
from ..output.phrases import article, count, listed, percent, points, rounded, went
from .ablation import CLEAR, REAL
from .estimate_verdicts import on_estimates
from .heads import ROLES
from .patching import CLEAR as CLEAR_SHARE
from .patching import verdicts
from .paths import strongest_pairs
from .word_lists import LISTS

CLEAR_NATS = CLEAR["loss"]


def _behaviour(ds: xr.Dataset) -> list[str]:
    clean = ds.sel(run="clean")
    before, after = (float(clean[f"accuracy_{when}"].mean()) for when in ("before", "after"))
    early, late = (float(clean[f"loss_{when}"].mean()) for when in ("before", "after"))
    low, high = bootstrap_interval(clean["accuracy_after"].values, bounds=(0, 1))
    broken = float(ds["accuracy_after"].sel(run="corrupted").mean())
    interval = "" if percent(low) == percent(high) else f" (95% interval {percent(low)} to {percent(high)})"
    gain = "The model repeats what it has seen" if after - before > 0.1 else "The model hardly uses the repeat"
    right = f"{percent(before)} before the repeat and {percent(after)} after it"
    right = f"{percent(before)} before the repeat and after it" if percent(before) == percent(after) else right
    return [
        f"{gain}: next-token accuracy is {right}{interval}, and the loss {went(f'{early:.2f}', f'{late:.2f}')} nats.",
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


def _patterns(ds: xr.Dataset) -> list[str]:
    shares: dict[str, list[str]] = {}
    for row, name in enumerate(ds["shown"].values):
        expected = ds["expected"].values[row]
        queries = np.flatnonzero(np.isfinite(expected))
        share = ds["pattern"].values[row, queries, expected[queries].astype(int)].mean()
        wanted = "the token after the earlier copy" if ds["kind"].values[row] == "induction" else "the previous token"
        shares.setdefault(wanted, []).append(f"{percent(share)} for {name}")
    each = [f"to {wanted} {'it ' if at else ''}is {listed(found)}" for at, (wanted, found) in enumerate(shares.items())]
    return [f"On one short prompt of {ds.sizes['query']} tokens, attention {'; '.join(each)}."]


def _ablation(ds: xr.Dataset) -> list[str]:
    change = (ds["loss"] - ds["baseline_loss"].sel(run="clean")).mean("example").transpose("ablation", "layer", "head")
    real = (ds["loss_effect_q"].transpose(*change.dims) <= REAL).values
    worst: dict[str, dict[str, str]] = {}
    for ablation, here, sure in zip(change["ablation"].values, change.values, real, strict=True):
        at = np.unravel_index(int(here.argmax()), here.shape)
        name = f"L{at[0]}H{at[1]} costs most" if here.max() > 0 and sure[at] else NONE
        worst.setdefault(name, {})[str(ablation)] = _signed(here.max())
    first = _worst(worst)
    sentences = [f"{first[0].upper()}{first[1:]}."]
    kinds = list(change["ablation"].values)
    zero, mean = (change.values[kinds.index(name)] for name in ("zero", "mean"))
    share = ds["constant_share"].transpose("layer", "head").values
    signs = np.where(real & (np.abs(change.values) > CLEAR_NATS), np.sign(change.values), 0).astype(int)
    of_zero, of_mean = (signs[kinds.index(name)] for name in ("zero", "mean"))
    changed = np.argwhere((of_zero != of_mean) & (np.abs(zero - mean) > CLEAR_NATS))
    sentences += [
        f"What L{at[0]}H{at[1]} does depends on the ablation: {VERDICT[of_zero[at]]} under zero "
        f"({_signed(zero[at])} nats), {VERDICT[of_mean[at]]} under mean ({_signed(mean[at])}). "
        f"{_why(zero[at], mean[at], share[at])}"
        for at in sorted(map(tuple, changed), key=lambda at: -abs(zero[at] - mean[at]))
    ]
    if len(changed) == 0:
        at = np.unravel_index(int(np.abs(zero - mean).argmax()), zero.shape)
        gap = abs(zero[at] - mean[at])
        differ = f"at most {gap:.2f} nats (L{at[0]}H{at[1]}, {percent(share[at])} of whose output is the same for "
        differ = f"{differ}every prompt)" if round(gap, 2) else "less than 0.01 nats"
        sentences.append(
            "No head's verdict (necessary, harmful, or neither) changes between zero and mean ablation: the two differ "
            f"by {differ}."
        )
    return sentences


def _worst(worst: Mapping[str, Mapping[str, str]]) -> str:
    """What costs most, by what is said and the ablations that it is said of, each with the nats."""
    if len(worst) > 1:
        each = (
            f"under {listed(ways)} ablation {name} ({'at most ' * (name == NONE)}{listed(ways.values())} nats)"
            for name, ways in worst.items()
        )
        return "; ".join(each)
    ((name, ways),) = worst.items()
    values = listed(f"{one} nats by {way}" for way, one in ways.items())
    if name != NONE:
        return f"{name} under every ablation ({values})"
    small = all(float(one) <= 0 for one in ways.values())
    return f"{name} under any ablation ({'none adds 0.01 nats' if small else f'at most {values}'})"


NONE = "no head costs anything beyond noise"
VERDICT = {1: "necessary", 0: "not necessary", -1: "harmful"}
"""What ablation says of a head: to take away tells what is necessary, never what is sufficient."""
SHOWS = {
    "noising": "noising, which shows what is necessary",
    "denoising": "denoising, which shows what is sufficient",
}
"""Direction of patching, and what it can show."""


def _why(zero: float, mean: float, share: float) -> str:
    """Why zero and mean ablation differ, as far as the constant part of the head's output says."""
    constant = f"{percent(share)} of its output is the same for every prompt"
    if abs(zero) > abs(mean) and share >= 0.5:
        return f"{constant}: zeroing takes that constant away from the layers that rely on it, and the mean leaves it."
    if abs(mean) > abs(zero) and share < 0.5:
        return f"Only {constant}: the mean is an output that fits few prompts, where zero puts in none."
    return f"{constant}, which does not explain the difference."


def _sets(ds: xr.Dataset) -> list[str]:
    if "set" not in ds.dims:
        return []
    base = float(ds["baseline_accuracy"].sel(run="clean").mean())
    return [_set_words(ds.sel(set=name), str(name), base) for name in ds["set"].values]


def _set_words(here: xr.Dataset, name: str, base: float) -> str:
    kind = "induction and previous-token" if name == "both" else name.removesuffix(" heads")
    who = count(len(str(here["heads"].values).split()), f"{kind} head")
    after = here["accuracy"].mean("example").to_series()
    words = _ends(percent(base), {ablation: percent(after[ablation]) for ablation in after.index})
    low, high = (round(-100 * float(here[f"accuracy_effect_{end}"].sel(ablation="zero"))) for end in ("high", "low"))
    interval = f", 95% interval {low} to {high}" if low != high else ""
    cost = base - after["zero"]
    text = f"Without the {who}, accuracy {words} (zero costs {points(cost)}{interval})."
    return " ".join([text, *(_control_words(here, str(control), base) for control in here["control"].values)])


def _ends(before: str, after: Mapping[str, str]) -> str:
    """Where a number goes under each ablation."""
    under: dict[str, list[str]] = {}
    for ablation, value in after.items():
        under.setdefault(value, []).append(ablation)
    if {*under} == {before}:
        return f"stays at {before} under {listed(after)} ablation"
    return f"goes from {before} to " + listed(f"{value} under {listed(one)} ablation" for value, one in under.items())


def _control_words(here: xr.Dataset, control: str, base: float) -> str:
    number = int(here["draws"].sel(control=control))
    place = "of the same layers" if control == "same layers" else "from all layers"
    if number == 0:
        return f"There are not enough other heads {place} for a control."
    every = int(here["exhaustive"].sel(control=control))
    kind = (
        ("the only set there is" if number == 1 else f"all {number} sets there are")
        if every
        else count(number, "random set")
    )
    costs = base - here["control_accuracy"].sel(control=control, ablation="zero").mean("example").dropna("draw").values
    mean, most = points(costs.mean()), points(costs.max())
    cost = mean if mean == most else f"{mean} on average, {most.partition(' ')[0]} at most"
    p = float(here["p_accuracy"].sel(control=control, ablation="zero"))
    floor = ", the smallest possible" if np.isclose(p, 1 / (1 + number)) else ""
    nothing = {mean, most, points(costs.min())} == {points(0)}
    return f"Zeroing as many other heads {place} costs {'nothing' if nothing else cost} ({kind}; p = {p:.3f}{floor})."


def _patching(ds: xr.Dataset) -> list[str]:
    sentences = []
    prompts = int(ds["gap"].attrs["prompts"]) if "gap" in ds else ds.sizes["example"]
    gap = float((ds["baseline_logit_diff"].sel(run="clean") - ds["baseline_logit_diff"].sel(run="corrupted")).mean())
    scale = f"0 is the corrupted run, 1 the clean one; they are {abs(gap):.2g} logits apart"
    for direction, start in (("noising", 1.0), ("denoising", 0.0)):
        ratio = ds[f"{direction}_normalized"].transpose("component", "layer", "head").values
        if np.isnan(ratio).all():
            sentences.append(
                f"By {SHOWS[direction]}, nothing can be said: over {prompts} prompts, the clean and the "
                "corrupted run do not differ in logit difference by more than noise."
            )
            continue
        at = np.unravel_index(int(np.nanargmax(np.abs(ratio - start))), ratio.shape)
        beyond = ": below 0, so the answer turns to the distractor" if ratio[at] < -0.1 else ""
        sentences.append(
            f"By {SHOWS[direction]}, the single patch that changes most is {ds['component'].values[at[0]]} of "
            f"L{at[1]}H{at[2]}: the normalized logit difference goes from {rounded(start, '.0f')} to "
            f"{rounded(ratio[at])}{f' ({scale})' if direction == 'noising' else ''}{beyond}."
        )
    if "set_induction" not in ds:
        return sentences
    clean_score, clean_answer = float(ds["clean_induction"].mean()), float(ds["clean_logit_diff"].mean())
    for component, (held, change) in verdicts(ds).items():
        words = {
            True: WORDS[component][0],
            False: WORDS[component][1],
            None: "cannot be judged (no clear answer before)",
        }
        sentences.append(
            f"Taking {component} of all induction heads from the corrupted run {words[held]}. Their induction score "
            f"{went(f'{clean_score:.2f}', f'{change.score:.2f}')}; the logit difference "
            f"{went(*(rounded(one, '+.1f') for one in (clean_answer, change.answer)))}."
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


def _composition(ds: xr.Dataset) -> list[str]:
    if "pair_mean" not in ds:
        none = "there is no pair of a previous-token head and an induction head in a later layer"
        return [f"Composition has no answer: {none}.", *_strongest(ds)]
    pair = ds[["pair_mean", "pair_z", "other_mean", "pair_above", "floor_mean"]].to_dataframe()
    others = bool(np.isfinite(pair["other_mean"]).all())
    strongest = str(pair["pair_z"].idxmax())
    each = []
    for kind, row in pair.iterrows():
        beside = f"; other pairs {row['other_mean']:.2f}" if others else ""
        each.append(
            f"{str(kind).upper()} {row['pair_mean']:.2f} ({rounded(row['pair_z'], '+.0f')} deviations from the "
            f"random floor of {row['floor_mean']:.2f}{beside})"
        )
    above = pair["pair_above"]["k"]
    feeds = strongest == "k" and pair["pair_z"]["k"] > 3 and (above > 0.9 or not others)
    verdict = "so they feed the keys" if feeds else "so the weights alone do not show that they feed the keys"
    text = (
        f"From previous-token to induction heads, composition is {listed(each)}. {strongest.upper()} stands out most, "
    )
    text += verdict
    text += f": {percent(above)} of the other pairs between those layers have less K-composition." if others else "."
    return [text, *_strongest(ds), *_path_words(ds), _causal_words(ds)]


def _strongest(ds: xr.Dataset) -> list[str]:
    """The strongest single pair of each kind, whatever the heads' roles, and what its path does on this task."""
    pairs = strongest_pairs(ds)
    if not pairs:
        return []
    named = {kind: f"{kind.upper()} {sender} to {receiver}" for kind, (sender, receiver, _) in pairs.items()}
    text = f"The strongest pairs of all, by kind: {listed(f'{named[kind]} ({pairs[kind][2]:.2f})' for kind in pairs)}."
    if "strongest_logit_diff" not in ds:
        return [text]
    effects: dict[str, tuple[float, float, float]] = {}
    for kind in pairs:
        low, high = (float(ds[f"strongest_effect_{end}"].sel(kind=kind)) for end in ("low", "high"))
        before, after = ds["path_baseline"].sel(run="clean"), ds["strongest_logit_diff"].sel(kind=kind)
        effects[kind] = float((after - before).mean()), low, high
    each = listed(f"{_signed(mean)} ({_signed(low)} to {_signed(high)})" for mean, low, high in effects.values())
    top = max(pairs, key=lambda kind: pairs[kind][2])
    changes = f"changes by {each} logits (95% intervals)"
    if not any(round(one, 2) for ends in effects.values() for one in ends):
        changes = "does not change by 0.01 logits on any of them"
    return [
        f"{text} With the sender taken from the corrupted run on that path alone, the logit difference {changes}. "
        f"{_used(named[top], *effects[top], _clear_change(ds))}"
    ]


def _used(name: str, mean: float, low: float, high: float, clear: float) -> str:
    """Whether the answer needs the path of the strongest pair."""
    if max(abs(low), abs(high)) <= clear:
        return f"So the strongest of them, {name}, is in the weights, and this answer needs nothing of it."
    if low <= 0 <= high:
        return f"So it is not shown that the answer needs the strongest of them, {name}."
    return f"So the answer {'needs' if mean < 0 else 'is hindered by'} what the strongest of them, {name}, brings."


def _clear_change(ds: xr.Dataset) -> float:
    """The change in logit difference on a path that is worth a sentence."""
    gap = float((ds["path_baseline"].sel(run="clean") - ds["path_baseline"].sel(run="corrupted")).mean())
    return CLEAR_SHARE * abs(gap)


def _signed(value: float) -> str:
    return rounded(value, "+.2f")


def _path_words(ds: xr.Dataset) -> list[str]:
    """What path patching says that the keys of the induction heads read."""
    if "path_logit_diff" not in ds:
        return []
    before = float(ds["path_baseline"].sel(run="clean").mean())
    change = (ds["path_logit_diff"] - ds["path_baseline"].sel(run="clean")).mean("example")
    own = (ds["is_sender"] == 1).values
    senders = change.isel(sender=own).sortby(change.isel(sender=own).sel(path="k"))
    each = []
    for name in senders["sender"].values[:SENDERS]:
        low, high = (_signed(float(ds[f"path_effect_{end}"].sel(path="k", sender=name))) for end in ("low", "high"))
        ends = {path: rounded(before + float(senders.sel(path=path, sender=name)), "+.1f") for path in ("k", "q", "v")}
        each.append(
            f"With {name} taken from the corrupted run on its direct paths into them alone, the logit difference "
            f"{went(rounded(before, '+.1f'), ends['k'])} through k (95% interval of the "
            f"change {low} to {high}), {went(rounded(before, '+.1f'), ends['q'])} through q and "
            f"{went(rounded(before, '+.1f'), ends['v'])} through v"
        )
    text = f"Path patching isolates what the induction heads read. {'. '.join(each)}."
    if len(senders["sender"]) > SENDERS:
        text += f" ({len(senders['sender']) - SENDERS} further previous-token heads do less through k.)"
    first = senders.isel(sender=0)
    fall, clear = -float(first.sel(path="k")), float(ds["path_effect_high"].sel(path="k", sender=first["sender"])) < 0
    others, most = int((~own).sum()), 0.0
    if others:
        most = max(0.0, float(-change.isel(sender=~own).sel(path="k").min()))
        p = float(ds["p_path"].sel(path="k", sender=first["sender"]))
        compared = "" if np.isnan(p) else f" (p = {p:.3f})"
        text += f" Of {count(others, 'other head')} of those layers, none lowers it by more than {most:.2f} through k"
        text += f"{compared}."
    by_keys = fall > max(_clear_change(ds), most, *(-float(first.sel(path=path)) for path in ("q", "v")))
    if clear and by_keys:
        return [f"{text} So it is their keys that read {first['sender'].item()}."]
    return [f"{text} So it is not shown that their keys read these heads more than others."]


def strongest_path(ds: xr.Dataset) -> str:
    """What the direct paths from the previous-token head that matters most into the keys of induction heads carry."""
    own = ds["path_logit_diff"].sel(path="k").isel(sender=(ds["is_sender"] == 1).values).mean("example")
    least = own.isel(sender=int(np.argmin(own.values)))
    before = float(ds["path_baseline"].sel(run="clean").mean())
    return (
        f"With {least['sender'].item()} taken from the corrupted run on its direct paths into their keys alone, the "
        f"logit difference {went(*(rounded(one, '+.1f') for one in (before, least)))}."
    )


SENDERS = 3
"""Previous-token heads that the sentence on paths names, the strongest first."""


def _causal_words(ds: xr.Dataset) -> str:
    before = float(ds["receiver_induction"].mean())
    after = ds["ablated_induction"].mean("example").to_series()
    falls = _ends(f"{before:.2f}", {ablation: f"{after[ablation]:.2f}" for ablation in after.index})
    text = f"without the previous-token heads the score of the induction heads {falls}"
    clear, number = before - after.max() > 0.1, ds.sizes["control_draw"]
    if number == 0:
        start = "It is causal, though without a control" if clear else "Not shown to be causal"
        return f"{start}: {text} (there is no set of other heads to compare with)."
    control = ds["control_induction"].sel(ablation="zero")
    start = "It is causal" if clear and after["zero"] < float(control.min()) else "Not shown to be causal"
    return (
        f"{start}: {text}; zeroing as many other heads of those layers ({count(number, 'set')}) leaves it at "
        f"{float(control.min()):.2f} to {float(control.max()):.2f} "
        f"(p = {float(ds['p_induction'].sel(ablation='zero')):.3f})."
    )


def _attribution(ds: xr.Dataset) -> list[str]:
    if "attribution" not in ds:
        return [f"What heads write directly was not measured: {ds.attrs.get('left_out', 'why is not known')}."]
    each = {
        f"L{layer}H{head}": float(value)
        for (layer, head), value in ds["attribution"].mean("example").to_series().sort_values(ascending=False).items()
    }
    whole, rest = float(ds["whole"].mean()), float(ds["other"].mean("example").sum())
    of = f"Of the {rounded(whole, '+.1f')} logits by which the answer stands above the distractor"
    own = str(ds["heads"].values).split() if "heads" in ds else []
    others = {name: value for name, value in each.items() if name not in own}
    most = f"{next(iter(others))} most, {_signed(next(iter(others.values())))}" if others else ""
    if not own:
        named = f"the {count(len(others), 'head')} write {_signed(sum(others.values()))} directly ({most})"
        return [f"{of}, {named}, and embeddings, MLPs and biases {_signed(rest)}."]
    listing = ", ".join(f"{name} {_signed(each[name])}" for name in each if name in own)
    heads = count(len(own), "induction head")
    text = f"{of}, the {heads} write {_signed(sum(each[name] for name in own))} directly ({listing})"
    if others:
        text += f", the {count(len(others), 'other head')} {_signed(sum(others.values()))} ({most})"
    low, high = (float(ds[f"set_attribution_{end}"]) for end in ("low", "high"))
    interval = "" if np.isnan(low) else f" (95% interval {_signed(low)} to {_signed(high)})"
    beside = _beside_random(ds, "attribution", _signed)
    texts = [
        f"{text}, and embeddings, MLPs and biases {_signed(rest)}.",
        f"A head of these writes {_signed(float(ds['set_attribution']))} on average{interval}{beside}. "
        f"{_writes(ds, low)}",
    ]
    return [*texts, _copying(ds, own)]


def _copying(ds: xr.Dataset, own: list[str]) -> str:
    """How far the OV circuits of the induction heads copy, and random sets of others."""
    heads = {name: Head.parse(name) for name in own}
    each = ", ".join(
        f"{name} {float(ds['copying'].sel(layer=head.layer, head=head.head)):.2f}" for name, head in heads.items()
    )
    mean = float(ds["set_copying"])
    text = (
        f"By their weights, a share of {mean:.2f} of the eigenvalues of their OV circuits is positive ({each}; random "
        f"weights have about half){_beside_random(ds, 'copying', '{:.2f}'.format)}."
    )
    others = ds["control_copying"].values[np.isfinite(ds["control_copying"].values)]
    if others.size and mean > max(0.5, others.max()):
        return f"{text} So they copy, more than other heads do."
    if mean > COPIES:
        return f"{text} So they copy{', and that does not set them apart from other heads' if others.size else ''}."
    return f"{text} So their weights alone do not show that they copy."


COPIES = 0.75
"""Share of positive eigenvalues from which heads are said to copy: half way from random weights to all."""


def _beside_random(ds: xr.Dataset, of: str, say: Callable[[float], str]) -> str:
    """What random sets of as many other heads have, by where they were drawn from."""
    each = []
    for control in ds["control"].values:
        values = ds[f"control_{of}"].sel(control=control).dropna("draw").values
        if values.size:
            p, q = float(ds[f"p_{of}"].sel(control=control)), float(ds["q"].sel(of=of, control=control))
            floor = ", the smallest possible" if np.isclose(p, 1 / (1 + values.size)) else ""
            place = "of the same layers" if control == "same layers" else "from all layers"
            each.append(
                f"of as many other heads {place} {say(values.mean())}, at most {say(values.max())} "
                f"({count(values.size, 'set')}; p = {p:.3f}{floor}; q = {q:.3f})"
            )
    return f"; {'; '.join(each)}" if each else "; there are no other heads with a value to compare with"


def _writes(ds: xr.Dataset, low: float) -> str:
    """Whether the induction heads write the answer more than any random set does."""
    if not low > 0:
        return "So it is not shown that they write the answer: the interval does not lie above 0."
    others = ds["control_attribution"].values[np.isfinite(ds["control_attribution"].values)]
    if others.size and float(ds["set_attribution"]) <= others.max():
        return "So it is not shown that they write the answer more than other heads do."
    return f"So they write the answer themselves{'' if others.size else ', though without a control'}."


def _small(p: float) -> str:
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"


def _words(ds: xr.Dataset) -> list[str]:
    if "accuracy" not in ds:
        return [f"Words in context were not run: none of {len(LISTS)} lists fits this model's tokenizer."]
    total = ds.sizes["example"]
    text = (
        f"On {count(total, 'short word list')} such as “{ds['prompt'].values[0]}” the model gives the right next word "
        f"in {int(ds['accuracy'].sum()) or 'none'} of them."
    )
    if total < len(LISTS):
        text += f" ({len(LISTS) - total} lists do not fit its tokenizer.)"
    if np.isfinite(float(ds["agreement"])):
        text += (
            " Over heads, the rank correlation of how much they look at the right word there with their induction "
            f"score is {float(ds['agreement']):.2f} (p = {_small(float(ds['agreement_p']))})."
        )
    if "ablated_accuracy" in ds:
        right = ds["ablated_accuracy"].sum("example").to_series()
        under: dict[str, list[str]] = {}
        for ablation, number in right.items():
            under.setdefault(f"in {int(number) or 'none'}", []).append(ablation)
        text += " Without the induction heads it does so "
        text += listed(f"{times} under {listed(one)} ablation" for times, one in under.items()) + "."
    return [text]


WRITERS: Mapping[str, Callable[[xr.Dataset], list[str]]] = {
    "behaviour": _behaviour,
    "heads": _heads,
    "patterns": _patterns,
    "ablation": _ablation,
    "sets": _sets,
    "patching": _patching,
    "composition": _composition,
    "attribution": _attribution,
    "words": _words,
    "estimates/ablation": on_estimates,
    "estimates/patching": on_estimates,
}
"""Group of the result to what writes about it."""
