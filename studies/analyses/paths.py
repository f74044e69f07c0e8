"""What the keys of induction heads read: path patching from previous-token heads, and between the strongest pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...interventions.declare.paths import PathPatch
from ...interventions.declare.sites import Head
from ...metrics.intervals import level_at, settled
from ...metrics.outputs import logit_diff
from ...metrics.statistics import null_p_value
from ...metrics.weights import KINDS
from ..measuring.effects import effect, effect_interval
from ..measuring.looks import Span, measure_some
from ..tasks.tasks import RepeatedTokens
from .patching import CLEAR, gap_between_runs

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]
Paths = dict[str, PathPatch]
Pair = tuple[Head, Head, float]
"""Sender, receiver, and their composition score."""
PATHS = ("k", "q", "v")
"""Where the paths end: at the keys, and for contrast at the queries and values."""


def paths_into(model: Model, senders: Sequence[Head], receivers: Sequence[Head]) -> Paths:
    """From each sender, and from each other head of the senders' layers, into k, q and v of the receivers after it.

    Those others, which are no receivers, are what the senders are compared with. Named ``"L0H3 to k"``.
    """
    layers = sorted({sender.layer for sender in senders if any(sender.layer < one.layer for one in receivers)})
    found = {}
    for sender in (Head(layer, head) for layer in layers for head in model.heads):
        later = [one for one in receivers if one.layer > sender.layer]
        if sender in receivers or not later:
            continue
        for kind in PATHS:
            ends = list(dict.fromkeys(model.read_by(one, kind) for one in later))
            found[f"{sender} to {kind}"] = PathPatch(sender, ends)
    return found


def strongest_pairs(scores: xr.Dataset) -> dict[str, Pair]:
    """For each kind of composition the sender and receiver with the highest score, and the score; none in one layer."""
    found = {}
    for kind in KINDS:
        here = scores["composition"].sel(kind=kind, variant="folded")
        table = here.transpose("sender_layer", "sender_head", "receiver_layer", "receiver_head").values
        if np.isfinite(table).any():
            at = np.unravel_index(int(np.nanargmax(table)), table.shape)
            found[kind] = Head(int(at[0]), int(at[1])), Head(int(at[2]), int(at[3])), float(table[at])
    return found


def paths_of_pairs(model: Model, pairs: Mapping[str, Pair]) -> Paths:
    """From the sender of each of `strongest_pairs` into its receiver. Named ``"strongest k"``."""
    return {
        f"strongest {kind}": PathPatch(sender, model.read_by(receiver, kind))
        for kind, (sender, receiver, _) in pairs.items()
    }


def measure_paths(model: Model, task: RepeatedTokens, paths: Paths, span: Span) -> xr.Dataset:
    """The logit difference where the value of each sender comes from the corrupted run, on its direct paths alone.

    Parameters
    ----------
    model : Model
    task : RepeatedTokens
    paths : mapping of name to PathPatch
    span : (start, stop)
        Prompts.

    Returns
    -------
    Dataset
        As of `measure`, with the dim ``condition``.
    """
    return measure_some(model, task, paths, [logit_diff], span)


def paths_settled(measured: xr.Dataset, senders: Sequence[Head], count: int) -> bool:
    """Whether the effects from `senders`, and of the strongest pairs, are settled at one of `count` looks.

    To within `CLEAR` of the gap between the clean and the corrupted run, as patches are.
    """
    level = level_at(count)
    gap, low, high = gap_between_runs(measured["baseline_logit_diff"], level)
    margin = CLEAR * (abs(gap) if low > 0 or high < 0 else 1.0)
    own = tuple(f"{name} " for name in ("strongest", *senders))
    names = [name for name in measured["condition"].values if name.startswith(own)]
    ends = effect_interval(measured.sel(condition=names), "logit_diff", level)
    low, high = (ends[f"logit_diff_effect_{end}"].values for end in ("low", "high"))
    return bool(settled(low, high, margin).all())


def describe_paths(measured: xr.Dataset, senders: Sequence[Head], pairs: Mapping[str, Pair], count: int) -> xr.Dataset:
    """What paths brought.

    Parameters
    ----------
    measured : Dataset
        From `measure_paths`.
    senders : sequence of Head
        Previous-token heads; the others are what they are compared with.
    pairs : mapping
        Of `strongest_pairs`.
    count : int
        Looks, see `intervals.looks`.

    Returns
    -------
    Dataset
        ``path_logit_diff(path, sender, example)``, with ``path`` the component that the receivers read by; the 95%
        interval of its change, ``path_effect_low`` and ``_high``; ``is_sender(sender)``, 1 for those that were asked
        for; ``p_path(path, sender)``, how often another head of the sender's layer lowers it as much, NaN for these
        others. ``strongest_logit_diff(kind, example)``, ``strongest_effect_low`` and ``_high``,
        ``strongest_score(kind)`` and ``strongest_pair(kind)``, such as ``L0H3 to L1H2``. ``path_baseline(run,
        example)``: the logit difference of the runs as they are. What was not measured is left out.
    """
    ends = effect_interval(measured, "logit_diff", level_at(count))
    low, high = (ends[f"logit_diff_effect_{end}"].values for end in ("low", "high"))
    rows = {str(name): row for row, name in enumerate(measured["condition"].values)}
    values = measured["logit_diff"].transpose("condition", "example").values
    fall = -effect(measured, "logit_diff").transpose("condition", "example").values.mean(axis=-1)
    units = {"units": "logit"}
    words = "logit difference"
    baseline = measured["baseline_logit_diff"].reset_coords(drop=True).drop_vars("example", errors="ignore")
    result = xr.Dataset({"path_baseline": baseline.assign_attrs(long_name=words)})

    def table(name: str, dims: tuple[str, ...], at: Array, of: str) -> None:
        """Add values, and the ends of the interval of their change."""
        result[f"{name}_logit_diff"] = ((*dims, "example"), values[at], {"long_name": f"{words}, {of}", **units})
        for end, found in (("low", low), ("high", high)):
            long = f"change in {words}, {of}, 95% interval, {end} end"
            result[f"{name}_effect_{end}"] = (dims, found[at], {"long_name": long, **units})

    names = list(dict.fromkeys(name.partition(" to ")[0] for name in rows if not name.startswith("strongest")))
    if names:
        at = np.array([[rows[f"{name} to {path}"] for name in names] for path in PATHS])
        coords = {"path": np.asarray(PATHS, dtype=object), "sender": np.asarray(names, dtype=object)}
        result = result.assign_coords(coords)
        table("path", ("path", "sender"), at, "corrupted on the path from a head")
        heads = [Head.parse(name) for name in names]
        own = np.array([head in senders for head in heads])
        result["is_sender"] = ("sender", own.astype(np.int8), {"long_name": "1 for previous-token heads", "units": "1"})
        p = np.full(at.shape, np.nan)
        for column in np.flatnonzero(own):
            others = [not own[one] and head.layer == heads[column].layer for one, head in enumerate(heads)]
            p[:, column] = [null_p_value(fall[row[column]], fall[row[others]]) for row in at]
        long = "p: other heads of the layer that lower it as much"
        result["p_path"] = (("path", "sender"), p, {"long_name": long, "units": "1"})
    if pairs:
        kinds = list(pairs)
        result = result.assign_coords(kind=np.asarray(kinds, dtype=object))
        table("strongest", ("kind",), np.array([rows[f"strongest {kind}"] for kind in kinds]), "corrupted on one path")
        scores = [score for *_, score in pairs.values()]
        named = [f"{sender} to {receiver}" for sender, receiver, _ in pairs.values()]
        result["strongest_score"] = ("kind", scores, {"long_name": "highest composition score", "units": "1"})
        result["strongest_pair"] = ("kind", np.asarray(named, dtype=object))
    return result
