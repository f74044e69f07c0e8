"""The conclusion of a study: the answer in short, what each part says, and what was not shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import xarray as xr

from ...metrics.intervals import few_prompts
from ..measuring.looks import looks_of
from ..output.phrases import count, listed, no_or_count, percent, rounded, went
from .findings import WRITERS, strongest_path
from .patching import verdicts


@dataclass(frozen=True)
class Finding:
    """A sentence or two, and the stage that they were written from (or ``summary``, or ``limits``)."""

    group: str
    text: str


def conclude(tree: xr.DataTree) -> list[Finding]:
    """What the result of an `InductionStudy` says. Every sentence is written from numbers; none stands without one."""
    there = {node.path.strip("/") for node in tree.subtree}  # a server may give no gradients, and so no estimates
    groups = {group: write(tree[group].to_dataset()) for group, write in WRITERS.items() if group in there}
    return [
        Finding(group.partition("/")[0], text)
        for group, texts in {"summary": list(_summary(tree)), **groups, "limits": _limits(tree)}.items()
        for text in texts
    ]


def heads_of(tree: xr.DataTree) -> dict[str, list[str]]:
    """Role to names of heads, strongest first, from the attributes of a result."""
    found: dict[str, list[str]] = json.loads(tree.attrs["heads"])
    return found


def _summary(tree: xr.DataTree) -> Iterator[str]:
    """The answer in short."""
    heads, names = tree["heads"].to_dataset(), heads_of(tree)
    roles = listed(
        no_or_count(len(members), f"{role} head") + (f" ({', '.join(members)})" if members else "")
        for role, members in names.items()
    )
    yield (
        f"Of {heads['role'].size} heads of {tree.attrs['model']}, {roles} stand out, at a score of "
        f"{heads.attrs['threshold']:.2f} or more."
    )
    if not names["induction"]:
        score = heads["induction"].mean("example").values
        q = float(heads["q_induction"].values.flat[int(score.argmax())])
        yield (
            f"No head passes both tests of an induction head: the highest score is {score.max():.2f}, and its q "
            f"against untrained heads is {q:.2f}. So there is no circuit to take apart."
        )
        return
    yield _needed(tree["sets"].to_dataset().sel(set="induction heads"))
    held = {name: held for name, (held, _) in verdicts(tree["patching"].to_dataset()).items()}
    failed = [name for name, right in held.items() if right is False]
    if None in held.values():
        answer = float(tree["patching"]["clean_logit_diff"].mean())
        yield (
            "Patching gives no verdict on q, k and v: the logit difference of the clean run, "
            f"{rounded(answer, '+.2f')}, is no clear answer to begin with."
        )
    elif failed:
        yield f"Patching disagrees with the circuit in {len(failed)} of q, k and v: {listed(failed)}."
    else:
        yield "Patching agrees with the circuit in all 3 of q, k and v: keys carry the pattern, values the token."
    weights = tree["composition"].to_dataset()
    if "pair_z" in weights:
        before = float(weights["receiver_induction"].mean())
        after = float(weights["ablated_induction"].sel(ablation="zero").mean())
        yield (
            "From previous-token to induction heads, K-composition is "
            f"{rounded(weights['pair_z'].sel(kind='k'), '+.0f')} deviations from random weights; with the "
            f"previous-token heads zeroed, the induction score {went(f'{before:.2f}', f'{after:.2f}')}."
        )
    if "path_logit_diff" in weights:
        yield strongest_path(weights)
    if "attribution" in tree.children and "set_attribution" in (direct := tree["attribution"].to_dataset()):
        yield _directly(direct)
    words = tree["words"].to_dataset()
    if "ablated_accuracy" in words:
        right, left = (int(one.sum()) for one in (words["accuracy"], words["ablated_accuracy"].sel(ablation="zero")))
        yield (
            f"Of {words.sizes['example']} lists of plain words it continues {right or 'none'} rightly, "
            f"and {left or 'none'} without its induction heads."
        )


def _directly(ds: xr.Dataset) -> str:
    own, whole = len(str(ds["heads"].values).split()), float(ds["whole"].mean())
    who, circuits = ("the", "their OV circuits") if own > 1 else ("its", "its OV circuit")
    random = float(ds["control_copying"].sel(control="same layers").mean())
    beside = f" (of as many random heads of the same layers, {percent(random)})" if random == random else ""
    return (
        f"Directly, {who} {count(own, 'induction head')} {'write' if own > 1 else 'writes'} "
        f"{rounded(own * float(ds['set_attribution']), '+.1f')} of the {rounded(whole, '+.1f')} logits by which "
        f"the answer stands above the distractor; {percent(ds['set_copying'])} of the eigenvalues of "
        f"{circuits} are positive, as copying asks for{beside}."
    )


def _needed(here: xr.Dataset) -> str:
    base = float(here["baseline_accuracy"].sel(run="clean").mean())
    after = float(here["accuracy"].sel(ablation="zero").mean())
    drawn = int(here["draws"].sel(control="same layers"))
    text = f"Without the induction heads, accuracy on what repeats {went(percent(base), percent(after))}"
    if drawn == 0:
        return f"{text}; there is no set of other heads in the same layers to compare with."
    control = here["control_accuracy"].sel(control="same layers", ablation="zero").mean("example")
    mean, worst = percent(control.mean()), percent(control.min())
    others = (
        f"it stays at {mean} ({'all ' if drawn > 1 else ''}{count(drawn, 'set')})"
        if {mean, worst} == {percent(base)}
        else f"it is {mean} on average and {worst} at worst ({count(drawn, 'set')})"
    )
    return f"{text}; without as many other heads of the same layers, {others}."


def _prompts_used(tree: xr.DataTree) -> list[str]:
    """With how many prompts each sweep ended, and how the error rate allows for that."""
    used = {name: tree[name].to_dataset() for name in ("ablation", "sets", "patching", "composition")}
    used = {name: ds for name, ds in used.items() if looks_of(ds)}
    if not used:
        return []
    each = listed(
        f"{ds.sizes['example']} for {name}{'' if ds.attrs['settled'] else ' (not settled)'}"
        for name, ds in used.items()
    )
    counts = looks_of(next(ds for name, ds in used.items() if name != "sets" or len(used) == 1))
    other = looks_of(used["sets"]) if "sets" in used else counts
    fewer, more = "", ""
    if other[0] != counts[0]:
        fewer, more = f" (those of sets with {other[0]})", f", of sets for {len(other)}"
    return [
        f"Sweeps start with {counts[0]} prompts{fewer} and double them, up to {counts[-1]}, until their verdicts are "
        f"settled: {each}. Their intervals and q allow for {count(len(counts), 'look')}{more} (each of k looks gets "
        "1/k of the error, Bonferroni), and the order of a set among random ones settles by a rule that treats all "
        "sets alike."
    ]


def _limits(tree: xr.DataTree) -> list[str]:
    sets, heads, weights = (tree[name].to_dataset() for name in ("sets", "heads", "composition"))
    threshold = float(heads.attrs["threshold"])
    near = (heads["induction"].mean("example") > threshold / 2) & (heads["role"] != "induction")
    few = few_prompts(tree["behaviour"].sizes["example"])
    limits = [
        *([f"{few}."] if few else []),
        f"Intervals are over {tree['behaviour'].sizes['example']} prompts of one seed, not over trained models.",
        f"Roles rest on a threshold of {threshold:.2f}; {no_or_count(int(near.sum()), 'other head')} has an induction "
        "score above half of it.",
        *_prompts_used(tree),
    ]
    if "path_logit_diff" in weights:
        limits.append(
            f"Path patching takes 1 sender at a time, over {int(weights['is_sender'].sum())} previous-token "
            f"{'heads' if int(weights['is_sender'].sum()) > 1 else 'head'}: what several send together, and what goes "
            "through other heads on the way, it does not isolate."
        )
    if "draws" in sets:
        fewest = listed(
            f"{int(sets['draws'].sel(set=name, control='same layers'))} for {name}" for name in sets["set"].values
        )
        limits.append(
            f"Small p-values where there are few other heads: sets of the same layers number {fewest}, and p cannot be "
            "below 1 / (1 + that)."
        )
    return limits
