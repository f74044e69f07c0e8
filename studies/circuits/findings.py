"""What the study of a circuit found, in sentences. Every sentence is written from numbers of the result."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import xarray as xr

from ...interventions.declare.changes import MEAN
from ...metrics.intervals import few_prompts
from ..analyses.conclusion import Finding
from ..output.phrases import count, listed, percent, rounded
from .at_random import ANY, CONNECTED
from .inclusion import unstable
from .kept import worse
from .nodes import BY_SCORE, GREEDY

SHOWN = 5
"""Edges that a sentence names."""
OFTEN = 0.95
"""Share of resamples from which an edge counts as always chosen."""
REAL = 0.05


def conclude(tree: xr.DataTree) -> list[Finding]:
    """The findings of a result of `CircuitStudy`; the summary holds those of circuit and edges, the first of others."""
    told = {
        "circuit": [*_circuit(tree)],
        "curve": [*_curve(tree)],
        "edges": [*_edges(tree)],
        "nodes": [*_nodes(tree)],
        "inclusion": [*_inclusion(tree)],
    }
    whole = ("circuit", "edges")
    first = [text for name, texts in told.items() for text in (texts if name in whole else texts[:1])]
    groups = {"summary": first} | told | {"limits": [*_limits(tree)]}
    return [Finding(group, text) for group, texts in groups.items() for text in texts]


def score_in_words(scores: xr.DataArray, metric: str) -> str:
    """What scores of edges are, as a caption says it; `metric` in words."""
    units, source = (str(scores.attrs.get(name, "")) for name in ("units", "source"))
    unit = f" ({units})" if units not in ("", "1") else ""
    carried = "the means over the reference prompts" if source == MEAN else f"the values of the {source or 'other'} run"
    sign = {"higher": "below 0", "lower": "above 0"}.get(str(scores.attrs.get("better")))
    return (
        f"Score: how much the {metric} changes{unit} where this edge alone carries {carried}"
        f"{f'; {sign}, the edge matters' if sign else ''}."
    )


def _interval(ds: xr.Dataset, name: str, form: str = ".2f") -> str:
    """A value with its interval, in words."""
    value, low, high = (rounded(ds[f"{name}{end}"], form) for end in ("", "_low", "_high"))
    return f"{value} (95%: {low} to {high})" if "nan" not in (low, high) else value


def _ends(tree: xr.DataTree) -> tuple[str, str, str]:
    """The metric in words, and its mean in the empty circuit and in the whole model."""
    ds = tree["curve"].to_dataset()
    empty, whole = (rounded(ds[name].mean(), ".2f") for name in ("empty", "whole"))
    return metric_in_words(tree), empty, whole


def metric_in_words(tree: xr.DataTree) -> str:
    """The metric that circuits of a result are judged by, without what is added to its name: ``logit difference``."""
    told = str(tree["curve"]["empty"].attrs.get("long_name", "metric"))
    return told.removesuffix(" of the empty circuit").partition(",")[0]


def _circuit(tree: xr.DataTree) -> Iterator[str]:
    ds, every = tree["circuit"].to_dataset(), int(tree.attrs["graph_edges"])
    n, left = int(ds.attrs["n"]), ds.sizes["edge"]
    metric, empty, whole = _ends(tree)
    source = json.loads(tree.attrs["study"]).get("source", "corrupted")
    source = "means over the reference prompts" if source == "mean" else f"{source} run"
    between = f"of the change of the {metric} between the {source} ({empty}) and the whole model ({whole})"
    asked = bool(ds.attrs.get("asked", 0))
    if tree["edges"].attrs.get("reverse"):
        yield f"By the {metric}, {worse(str(tree['edges']['score'].attrs['better']))}."
    if left == every:
        yield (
            f"A circuit of all {every} edges was asked for: it is the whole model, and keeps all {between}."
            if asked
            else f"No smaller circuit than the whole model, {every} edges, keeps {_share(tree)} {between}."
        )
        return
    few = 1 / (1 + ds.sizes["draw"]) > REAL
    by_chance = ds.sizes["draw"] and not few and float(ds["p"]) > REAL
    if by_chance or (n > every / 2 and not asked):
        size = f"this one has {n} of {every} edges" if n > every / 2 and not asked else ""
        chance = f"random circuits of as many {CONNECTED} may keep as much (p = {float(ds['p']):.3f})"
        why = listed([*filter(None, [size, chance * bool(by_chance)])])
        yield f"No small circuit was found by these scores: {why}."
    connected = "" if left == n else f", {left} of which are connected,"
    yield (
        f"Of {every} edges, a circuit of {count(n, 'edge')}{connected} keeps a share of "
        f"{_interval(ds, 'faithfulness')} {between}; all other edges together keep {_interval(ds, 'complement')}."
    )
    scored = int(np.count_nonzero(tree["edges"].to_dataset()["score"].mean("example").values))
    if (without := n - scored) > 0:
        yield (
            f"Of these {count(n, 'edge')}, {without} have a score of exactly 0: they are in by their place in the "
            "model, not by what they do."
        )
    if ds.sizes["draw"]:
        random, p = ds["random"].values, float(ds["p"])
        yield (
            f"Of {count(len(random), 'random circuit')} of as many {CONNECTED}, none keeps more than "
            f"{rounded(random.max())}, and on average they keep {rounded(random.mean())} (p = {p:.3f}): "
            + (
                "this circuit keeps more than its size explains."
                if p <= REAL
                else "so few cannot tell whether that is chance."
                if few
                else "as much may be kept by chance."
            )
        )
    if "on_others" in ds:
        yield f"On prompts that played no part in choosing it, the circuit keeps {_interval(ds, 'on_others')}."
    if said := few_prompts(tree["edges"].sizes["example"]):
        yield f"{said}."


def _share(tree: xr.DataTree) -> str:
    return percent(json.loads(tree.attrs["study"]).get("share", 0.9))


def _curve(tree: xr.DataTree) -> Iterator[str]:
    ds, random = tree["curve"].to_dataset(), tree["random"].to_dataset()
    means = random[["cpr", "cmd"]].mean("draw")
    each = {
        kind: " and ".join(rounded(means[name].sel(kind=kind), ".3f") for name in ("cpr", "cmd"))
        for kind in (ANY, CONNECTED)
    }
    yield (
        f"Over MIB's shares of all edges, CPR is {_interval(ds, 'cpr', '.3f')} and CMD {_interval(ds, 'cmd', '.3f')}; "
        f"of random circuits, {each[ANY]} where edges are drawn one by one, {each[CONNECTED]} where they are "
        "connected. Higher is better for CPR, lower for CMD."
    )
    yield (
        f"Over the logarithm of the share, CPR is {rounded(ds['cpr_log'], '.3f')} and CMD "
        f"{rounded(ds['cmd_log'], '.3f')}: this counts small circuits as much as large ones."
    )
    above = ds["faithfulness"].max()
    if float(above) > 1.1:
        at = ds["faithfulness"].where(ds["faithfulness"] == above, drop=True)
        yield (
            f"At {count(int(at['edges'].values.ravel()[0]), 'edge')} a circuit keeps {rounded(above)}, more than the "
            "whole model: it leaves out edges that work against the behaviour."
        )


def _edges(tree: xr.DataTree) -> Iterator[str]:
    scores = tree["edges"].to_dataset()["score"].mean("example")
    order = np.argsort(-np.abs(scores.values), kind="stable")
    named = [
        f"{scores['sender'].values[at]}->{scores['receiver'].values[at]} ({rounded(scores.values[at], '+.2f')})"
        for at in order[:SHOWN]
    ]
    size = np.abs(scores.values)[order]
    total = float(size.sum())
    half = int(np.searchsorted(np.cumsum(size), total / 2) + 1) if total else 0
    estimator = str(tree["edges"].attrs.get("estimator", "exact"))
    how = "exactly" if estimator == "exact" else f"by an estimate ({estimator})"
    if verified := int(tree["edges"].attrs.get("verified", 0)):
        how += f", the {verified} with the largest estimates exactly"
    yield (
        f"Scored {how}, the largest of {len(order)} edges are {listed(named)}; {count(half, 'edge')} "
        f"{'holds' if half == 1 else 'hold'} half of the sum of absolute scores."
    )
    if verified:
        yield str(tree["edges"].attrs["verification"])


def _nodes(tree: xr.DataTree) -> Iterator[str]:
    ds = tree["nodes"].to_dataset()
    heads = ds["lost"].size
    for name in (GREEDY, BY_SCORE):
        one = ds.sel(set=name)
        members, number = str(one["heads"].values).split(), int(one["count"])
        if name == BY_SCORE and members == str(ds["heads"].sel(set=GREEDY).values).split():
            yield "Taken by score, these same heads are found."
            return
        found = "Greedily," if name == GREEDY else "Taken by score,"
        if number == heads:
            yield f"{found} no smaller set than all {heads} heads keeps {_share(tree)}."
            continue
        who = f"{count(number, 'head')} of {heads} ({listed(members)})" if number else f"none of the {heads} heads"
        yield (
            f"{found} {who} with all MLPs {'keeps' if number == 1 else 'keep'} a share of "
            f"{_interval(one, 'faithfulness')}; the other heads keep {_interval(one, 'complement')}, random sets of as "
            f"many {rounded(one['random'].mean())} on average, at most {rounded(one['random'].max())} "
            f"(p = {float(one['p']):.3f})."
        )


def _inclusion(tree: xr.DataTree) -> Iterator[str]:
    if "inclusion" not in tree.children:
        return
    ds = tree["inclusion"].to_dataset()
    inside = ds["in_circuit"].values.astype(bool)
    always, text = int((ds["inclusion"].values[inside] >= OFTEN).sum()), unstable(ds)
    unsure = ": which edges are in depends on the prompts" if text else ""
    yield (
        f"Circuits of {ds.attrs['n']} edges from prompts drawn again share {rounded(ds['jaccard'])} of their edges "
        f"(Jaccard overlap){unsure}; {always} of the {count(int(inside.sum()), 'edge')} are in {percent(OFTEN)} of "
        "them or more."
    )
    if text:
        yield f"Warning: {text}."


def _limits(tree: xr.DataTree) -> Iterator[str]:
    study, ds = json.loads(tree.attrs["study"]), tree["circuit"].to_dataset()
    prompts = tree["edges"].sizes["example"]
    others = ", but for the one circuit that was judged on others too" if "on_others" in ds else ""
    same = f"Edges were chosen and circuits judged on the same {count(prompts, 'prompt')}{others}"
    yield f"{same}{'' if others else ': on others, less may be kept'}."
    yield (
        "An edge is scored alone: edges that do the same job for each other score low, and a circuit without all of "
        "them can lose what none loses alone."
    )
    if study.get("estimator", "exact") != "exact":
        left = "but for those that were verified" if "verification" in tree["edges"].attrs else "not measured"
        yield f"Scores are estimates ({study['estimator']}), {left}: the order of edges rests on them."
    if study.get("source") == "mean":
        yield "Edges outside of a circuit carry means, which no prompt has: part of a loss is that."
    else:
        run = study.get("source", "corrupted")
        yield f"What a circuit keeps is relative to the {run} run: what both runs share is no part of the behaviour."
    yield (
        "The circuit is the smallest of those that the order of scores gives and that were tried; another choice of "
        "edges may be smaller."
    )
    if float(ds["faithfulness"]) > 1.1:
        yield "The circuit keeps more than the whole model has: it leaves out edges that work against the behaviour."
