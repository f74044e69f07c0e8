"""Circuits of nodes: the smallest set of heads that keeps a behaviour, by score and greedily, beside random sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from ...metrics.statistics import null_p_value
from .kept import Behaviour, with_interval

Array = np.ndarray[Any, Any]
BY_SCORE, GREEDY = "by score", "greedy"
SETS = (BY_SCORE, GREEDY)


def node_circuits(behaviour: Behaviour, share: float, draws: int, seed: int) -> xr.Dataset:
    """Find the smallest set of heads that keeps a share of the behaviour; MLPs stay, and all edges between them.

    The score of a head is what is lost without it alone. By score, heads are taken in until the share is reached.
    Greedily, from that set the head without which most is kept goes, again and again, as long as the share is kept.

    Parameters
    ----------
    behaviour : Behaviour
    share : float
    draws, seed : int
        Of random sets of as many heads.

    Returns
    -------
    Dataset
        ``lost (layer, head)``: 1 less the faithfulness without it; ``kept_by_score (size)`` and ``kept_greedy (size)``,
        from 0 heads to all, NaN where none was measured; for each ``set``: ``heads`` as text, ``count``,
        ``faithfulness`` and ``complement`` with intervals, ``random (set, draw)`` and ``p (set)``.
    """
    heads = behaviour.heads
    alone = behaviour.of([behaviour.between([one for one in heads if one != head]) for head in heads])
    score = 1 - behaviour.kept(alone)
    order = [heads[at] for at in np.argsort(-score, kind="stable")]
    grown = behaviour.kept(behaviour.of([behaviour.between(order[:size]) for size in range(len(heads) + 1)]))
    enough = np.flatnonzero(grown >= share)
    found = {BY_SCORE: order[: int(enough[0])] if len(enough) else order}
    found[GREEDY], greedy = _greedy(behaviour, found[BY_SCORE], share, len(heads))

    sets = [sorted(found[name], key=heads.index) for name in SETS]
    beside = [_some(heads, len(one), draws, seed) for one in sets]
    each = [behaviour.between(one) for one in sets]
    others = [behaviour.between([head for head in heads if head not in one]) for one in sets]
    drawn = [behaviour.between(one) for several in beside for one in several]
    measured = behaviour.of([*each, *others, *drawn])
    values, two = measured["value"].values, len(SETS)
    ds = measured[["empty", "whole"]].assign(
        faithfulness_value=(("set", "example"), values[:two], measured["value"].attrs),
        complement_value=(("set", "example"), values[two : 2 * two], measured["value"].attrs),
    )
    ds = with_interval(ds, "faithfulness", "share of the behaviour that the heads keep, with all MLPs")
    ds = with_interval(ds, "complement", "share that all other heads keep, with all MLPs")
    kept = behaviour.kept(measured)[2 * two :].reshape(two, draws)
    words = {"units": "1", "long_name": "share that random sets of as many heads keep"}
    ds["random"] = (("set", "draw"), kept, words)
    p = [null_p_value(float(ds["faithfulness"][at]), kept[at]) for at in range(two)]
    ds["p"] = (
        "set",
        p,
        {"units": "1", "long_name": "share of random sets, this one counted among them, that keep as much"},
    )
    ds["heads"] = ("set", np.asarray([" ".join(one) for one in sets], dtype=object), {"long_name": "heads of the set"})
    ds["count"] = ("set", [len(one) for one in sets], {"long_name": "number of heads"})
    layers = behaviour.graph.layers
    words = {"units": "1", "long_name": "share of the behaviour that is lost without the head"}
    ds["lost"] = (("layer", "head"), score.reshape(layers, -1), words)
    ds["kept_by_score"] = (
        "size",
        grown,
        {"units": "1", "long_name": "share that the heads with the highest scores keep"},
    )
    ds["kept_greedy"] = ("size", greedy, {"units": "1", "long_name": "share that is kept as heads go one by one"})
    numbers = {"layer": np.arange(layers), "head": np.arange(behaviour.graph.heads)}
    coords = {"set": list(SETS), **numbers, "size": np.arange(len(heads) + 1)}
    return ds.assign_coords(coords).assign_attrs(share=share)


def _greedy(behaviour: Behaviour, begin: list[str], share: float, most: int) -> tuple[list[str], Array]:
    """The heads that are left, and what was kept by each number of heads on the way, as far as it was measured."""
    left, path = list(begin), np.full(most + 1, np.nan)
    (path[len(left)],) = behaviour.kept(behaviour.of([behaviour.between(left)]))
    while left:
        kept = behaviour.kept(behaviour.of([behaviour.between([one for one in left if one != head]) for head in left]))
        best = int(kept.argmax())
        path[len(left) - 1] = kept[best]
        if not kept[best] >= share:
            break
        left.pop(best)
    return left, path


def _some(heads: tuple[str, ...], count: int, draws: int, seed: int) -> list[list[str]]:
    """Random sets of heads; the same ones for the same count."""
    random = np.random.default_rng((seed, 2, count))
    return [[heads[at] for at in sorted(random.permutation(len(heads))[:count])] for _ in range(draws)]
