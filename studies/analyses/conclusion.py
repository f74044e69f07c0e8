"""The conclusion of a study: the answer in short, what each part says, and what was not shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import xarray as xr

from ...metrics.intervals import few_prompts
from ..output.phrases import count, listed, percent
from .findings import WRITERS
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
        count(len(members), f"{role} head") + (f" ({', '.join(members)})" if members else "")
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
        yield "Patching gives 0 verdicts on q, k and v: the clean run has no clear answer to begin with."
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
            f"{float(weights['pair_z'].sel(kind='k')):+.0f} deviations from random weights, and zeroing the "
            f"previous-token heads takes the induction score from {before:.2f} to {after:.2f}."
        )
    words = tree["words"].to_dataset()
    if "ablated_accuracy" in words:
        left = int(words["ablated_accuracy"].sel(ablation="zero").sum())
        yield (
            f"Of {words.sizes['example']} lists of plain words it continues {int(words['accuracy'].sum())} rightly, "
            f"and {left} without its induction heads."
        )


def _needed(here: xr.Dataset) -> str:
    base = float(here["baseline_accuracy"].sel(run="clean").mean())
    after = float(here["accuracy"].sel(ablation="zero").mean())
    drawn = int(here["draws"].sel(control="same layers"))
    text = f"Without the induction heads, accuracy on what repeats goes from {percent(base)} to {percent(after)}"
    if drawn == 0:
        return f"{text}; there are 0 sets of other heads in the same layers to compare with."
    control = here["control_accuracy"].sel(control="same layers", ablation="zero").mean("example")
    return (
        f"{text}; without as many other heads of the same layers, to {percent(control.mean())} on average and "
        f"{percent(control.min())} at worst ({count(drawn, 'set')})."
    )


def _limits(tree: xr.DataTree) -> list[str]:
    sets, heads, weights = (tree[name].to_dataset() for name in ("sets", "heads", "composition"))
    threshold = float(heads.attrs["threshold"])
    near = (heads["induction"].mean("example") > threshold / 2) & (heads["role"] != "induction")
    few = few_prompts(tree["behaviour"].sizes["example"])
    limits = [
        *([f"{few}."] if few else []),
        f"One model and one seed of prompts ({tree['behaviour'].sizes['example']} of them): intervals are over "
        "prompts, not over trained models.",
        f"Roles rest on a threshold of {threshold:.2f}. Heads without the role whose induction score is above half of "
        f"it: {int(near.sum())}.",
    ]
    if "ablated_induction" in weights:
        limits.append(
            f"Through which path the previous-token heads ({len(heads_of(tree)['previous-token'])}) act: ablation "
            "removes everything they write, and only path patching would isolate what the keys read."
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
