"""Do previous-token heads feed the keys of induction heads? Composition from the weights, and its causal check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...interventions.base.shape import Shape
from ...interventions.declare.sites import Head
from ...metrics.attention import induction
from ...metrics.intervals import level_at, looks
from ...metrics.statistics import control_sets, null_p_value, ranking_settled
from ...metrics.weights import KINDS, pair_table, random_composition
from ..measuring.labels import check_is_model
from ..measuring.looks import Span, measure_some, until_settled
from ..storage.provenance import provenance
from ..tasks.tasks import RepeatedTokens
from .ablation import METHODS, ablation_grid
from .heads import mean_of_heads
from .paths import Pair, describe_paths, measure_paths, paths_into, paths_of_pairs, paths_settled

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...interventions.traced.specs import WeightsRead

Array = np.ndarray[Any, Any]
FOLDING = ("folded", "raw")
CLEAR_SCORE = 0.05
"""Change of an induction score below which it is not worth a sentence. Known to within this, it is settled."""
PAIR = ("sender_layer", "sender_head", "receiver_layer", "receiver_head")


def composition_scores(model: Model, *, draws: int = 200, seed: int = 0, check: bool = True) -> xr.Dataset:
    """Q-, K- and V-composition between every pair of heads of different layers.

    Rotary embedding is left out of the products of weights. Heads that share keys and values have the same ``W_K`` and
    ``W_V``.

    Parameters
    ----------
    model : Model
    draws, seed : int
        Number and seed of the random factors.
    check : bool
        As for `capture`.

    Returns
    -------
    Dataset
        ``composition(kind, variant, sender_layer, sender_head, receiver_layer, receiver_head)``, NaN unless the sender
        is in an earlier layer; ``variant`` says whether the norm is folded in, LayerNorm or RMSNorm
        as the model has it. ``floor_mean(kind)`` and
        ``floor_sd(kind)``: the same score for random Gaussian factors of the same shape.

    Raises
    ------
    ModelError
        A self-check failed.

    Examples
    --------
    Which head of layer 0 is nearest to the keys of head 2 of layer 1:

    >>> ds = hw.composition_scores(hw.load("words-2l"), draws=10)
    >>> keys = ds["composition"].sel(kind="k", variant="folded", sender_layer=0, receiver_layer=1, receiver_head=2)
    >>> int(keys.argmax("sender_head"))
    3
    """
    from ...interventions.begin import begin

    check_is_model(model)
    model.check_laid_open("composition_scores")
    with begin(model, check=check) as call:
        found = _composition(model, draws, seed)
    return found.assign_attrs(provenance(model, call.identity))


def score_flops(shape: Shape) -> int:
    """Operations of `composition_scores`, in passes of float32: those of float64 count twice."""
    pairs = shape.layers * (shape.layers - 1) // 2 * shape.heads**2
    product = 2 * shape.d_model * shape.d_head**2 + 3 * 2 * shape.d_head**3
    return 2 * len(KINDS) * len(FOLDING) * pairs * product


def _composition(model: Model, draws: int, seed: int) -> xr.Dataset:
    shape = model.shape
    score = partial(_tables, layers=shape.layers, centred=model.family.centred)
    pairs = (shape.layers, shape.heads) * 2
    table = model.backend.score_weights(score, (len(KINDS), len(FOLDING), *pairs))
    floor = random_composition(shape.d_model, shape.d_head, draws, seed)
    long = "composition score"
    return xr.Dataset(
        {
            "composition": (
                ("kind", "variant", *PAIR),
                table,
                {"long_name": long, "units": "1", "references": "Elhage et al. 2021"},
            ),
            "floor_mean": (
                "kind",
                [floor[kind][0] for kind in KINDS],
                {"long_name": f"{long} of random weights", "units": "1"},
            ),
            "floor_sd": (
                "kind",
                [floor[kind][1] for kind in KINDS],
                {"long_name": "its standard deviation", "units": "1"},
            ),
        },
        coords={
            "kind": np.asarray(KINDS, dtype=object),
            "variant": np.asarray(FOLDING, dtype=object),
            "sender_layer": list(model.layers),
            "sender_head": list(model.heads),
            "receiver_layer": list(model.layers),
            "receiver_head": list(model.heads),
        },
    )


def pair_scores(
    scores: xr.Dataset, senders: Sequence[Head], receivers: Sequence[Head], variant: str = "folded"
) -> xr.Dataset:
    """The scores of the pairs from `senders` to `receivers`, against all other pairs between the same layers.

    Parameters
    ----------
    scores : Dataset
        From `composition_scores`.
    senders, receivers : sequences of Head
        Pairs whose sender is not in an earlier layer are left out.
    variant : {"folded", "raw"}
        Whether the norm is folded into the weights.

    Returns
    -------
    Dataset
        ``pair_mean(kind)``; ``pair_z(kind)``, its distance from the random floor in deviations of the floor;
        ``other_mean(kind)``; ``pair_above(kind)``, the share of the other pairs that score below the mean of these.
    """
    table = scores["composition"].sel(variant=variant)
    own = np.zeros(table.isel(kind=0).shape, dtype=bool)
    layers = np.zeros_like(own)
    for sender in senders:
        for receiver in receivers:
            if sender.layer < receiver.layer:
                own[sender.layer, sender.head, receiver.layer, receiver.head] = True
                layers[sender.layer, :, receiver.layer, :] = True
    found: dict[str, list[float]] = {"pair_mean": [], "pair_z": [], "other_mean": [], "pair_above": []}
    for kind in KINDS:
        values = table.sel(kind=kind).transpose(*PAIR).values
        pairs, others = values[own], values[layers & ~own]
        mean = float(np.nanmean(pairs)) if np.isfinite(pairs).any() else np.nan
        others = others[np.isfinite(others)]
        floor = scores.sel(kind=kind)
        found["pair_mean"].append(mean)
        found["pair_z"].append((mean - float(floor["floor_mean"])) / float(floor["floor_sd"]))
        found["other_mean"].append(float(others.mean()) if len(others) else np.nan)
        found["pair_above"].append(float((others < mean).mean()) if len(others) else np.nan)
    words = {
        "pair_mean": "mean score from previous-token to induction heads",
        "pair_z": "its distance from the random floor, in deviations of the floor",
        "other_mean": "mean score of the other pairs between those layers",
        "pair_above": "share of the other pairs that score lower",
    }
    return xr.Dataset(
        {name: ("kind", values, {"long_name": words[name], "units": "1"}) for name, values in found.items()},
        coords={"kind": np.asarray(KINDS, dtype=object)},
    )


def causal_check(
    model: Model,
    task: RepeatedTokens,
    senders: Sequence[Head],
    receivers: Sequence[Head],
    pairs: Mapping[str, Pair] | None = None,
    *,
    draws: int = 50,
    seed: int = 0,
    first: int | None = None,
) -> xr.Dataset:
    """Ablate the senders and watch the induction score of the receivers; patch single paths and watch the answer.

    Parameters
    ----------
    model : Model
    task : RepeatedTokens
    senders, receivers : sequences of Head
        Nothing is ablated where no sender is in an earlier layer than a receiver.
    pairs : mapping of kind to (sender, receiver, score), optional
        Of `paths.strongest_pairs`: the paths of these are patched as well.
    draws : int
        Random sets of heads of the same layers, none of them a receiver; all distinct sets where there are fewer.
    seed : int
        Of the random sets.
    first : int, optional
        Prompts to start with, doubled until the order of the senders among the random sets (see
        `statistics.ranking_settled`) and the effects on the senders' paths (`paths.paths_settled`) are settled or all
        are used; left out, all at once.

    Returns
    -------
    Dataset
        ``receiver_induction(example)``, ``ablated_induction(ablation, example)``,
        ``control_induction(ablation, control_draw)`` and ``p_induction(ablation)``: how often random heads of
        the same layers lower the score as much; and what `paths.describe_paths` gives. Empty where nothing was asked.
    """
    connected = any(one.layer < two.layer for one in senders for two in receivers)
    counts, strongest = looks(task.n, first), pairs or {}
    level = level_at(len(counts))
    sets = ablated_sets(model, senders, receivers, draws, seed) if connected else []
    patched = (paths_into(model, senders, receivers) if connected else {}) | paths_of_pairs(model, strongest)

    def measure_part(span: Span) -> dict[str, xr.Dataset]:
        ablated = {"sets": measure_some(model, task, ablation_grid(sets), [induction], span)} if sets else {}
        return ablated | ({"paths": measure_paths(model, task, patched, span)} if patched else {})

    def is_settled(found: dict[str, xr.Dataset]) -> bool:
        ranked = not sets or all(
            ranking_settled(after, CLEAR_SCORE, level) for after in _scores(found["sets"], receivers)[1].values
        )
        return ranked and (not patched or paths_settled(found["paths"], senders, len(counts)))

    if not (sets or patched):
        return xr.Dataset()
    found = until_settled(counts, measure_part, is_settled)
    parts = [_ablated(found["sets"], receivers)] if sets else []
    parts += [describe_paths(found["paths"], senders, strongest, len(counts))] if patched else []
    told = {name: value for name, value in next(iter(found.values())).attrs.items() if name in ("looks", "settled")}
    return xr.merge(parts).assign_attrs(told)


def ablated_sets(
    model: Model, senders: Sequence[Head], receivers: Sequence[Head], draws: int, seed: int
) -> list[Sequence[Head]]:
    """The sets of heads that `causal_check` ablates.

    Parameters
    ----------
    model : Model
    senders, receivers : sequences of Head
    draws, seed : int
        Number and seed of the random sets.

    Returns
    -------
    list of sequences of Head
        The senders, then random sets of as many heads of the same layers, none of them a receiver.
    """
    places, readers = ([(head.layer, head.head) for head in heads] for heads in (senders, receivers))
    others = control_sets(places, model.shape.layers, model.shape.heads, draws, seed, excluded=readers)
    return [senders, *([Head(*place) for place in one] for one in others)]


def _scores(measured: xr.Dataset, receivers: Sequence[Head]) -> tuple[xr.DataArray, xr.DataArray]:
    """The mean score of the receivers before, ``(example)``, and after, ``(ablation, number, example)``."""
    before = mean_of_heads(measured["baseline_induction"].sel(run="clean", drop=True), receivers)
    return before, mean_of_heads(measured["induction"], receivers).transpose("ablation", "number", "example")


def _ablated(measured: xr.Dataset, receivers: Sequence[Head]) -> xr.Dataset:
    """The part of `causal_check` that is about ablation."""
    before, after = _scores(measured, receivers)
    ablated, control = after.values[:, 0], after.values[:, 1:].mean(axis=-1)
    fall = float(before.mean()) - ablated.mean(axis=-1)
    p = [null_p_value(own, float(before.mean()) - drawn) for own, drawn in zip(fall, control, strict=True)]
    words = "induction score of the induction heads"
    return xr.Dataset(
        {
            "receiver_induction": ("example", before.values, {"long_name": words, "units": "1"}),
            "ablated_induction": (
                ("ablation", "example"),
                ablated,
                {"long_name": f"{words} without the previous-token heads", "units": "1"},
            ),
            "control_induction": (
                ("ablation", "control_draw"),
                control,
                {"long_name": f"{words} without as many random heads", "units": "1"},
            ),
            "p_induction": ("ablation", p, {"long_name": "p: random sets that lower it as much", "units": "1"}),
        },
        coords={"ablation": np.asarray(list(METHODS), dtype=object)},
    )


def _tables(read: WeightsRead, *, layers: int, centred: bool) -> Array:
    """``(kind, variant, sender layer and head, receiver layer and head)``; runs where the weights are."""
    fields = [
        [None if one is None else one.detach().cpu().double().numpy() for one in read["heads"](layer)]
        for layer in range(layers)
    ]
    return np.stack([pair_table(fields, folded, centred) for folded in (True, False)], axis=1)
