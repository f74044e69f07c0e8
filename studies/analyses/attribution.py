"""Do the induction heads write the answer themselves? What heads add to it directly, and copy, against random heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import HeadwiseError
from ...interventions.base.shape import Shape
from ...interventions.declare.sites import Head
from ...metrics.intervals import bootstrap_interval, interval_attrs
from ...metrics.statistics import benjamini_hochberg, null_p_value
from ..inspection.attribution import direct_logit_attribution
from ..inspection.circuits import circuit_scores
from ..measuring.controls import CONTROLS, random_sets
from ..tasks.tasks import RepeatedTokens

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]
OF = {
    "attribution": "logits that a head adds directly, mean over a set",
    "copying": "share of positive eigenvalues of the OV circuit, mean over a set",
}
"""What sets of heads are compared in, and its name in words."""


def what_heads_write(
    model: Model, task: RepeatedTokens, heads: Sequence[Head], *, draws: int = 50, seed: int = 0
) -> xr.Dataset:
    """What every head adds to the answer directly and how far it copies, and some heads against random sets of others.

    Of all prompts at once: one forward pass of each gives the values of every head and of every set. What heads copy is
    read off their weights.

    Parameters
    ----------
    model : Model
    task : RepeatedTokens
    heads : sequence of Head
        Induction heads; no set is compared where there are none.
    draws, seed : int
        Number and seed of the random sets of each control; all distinct sets where there are fewer.

    Returns
    -------
    Dataset
        ``attribution(layer, head, example)``, ``other(part, example)`` of the embeddings, MLPs and biases, and
        ``whole(example)``, the logit difference, in logits: see `direct_logit_attribution`. ``copying(layer, head)``
        and ``eigenvalue_score(layer, head)`` of OV circuits: see `circuit_scores`. Of the heads: as text ``heads``;
        ``set_attribution``, the mean over heads and prompts, with ``set_attribution_low`` and ``_high`` (95% bootstrap
        interval over prompts), and ``set_copying``; ``control_attribution(control, draw)`` and ``control_copying``, NaN
        beyond the sets that exist and where a head has no value, and ``control_heads(control, draw)`` as text;
        ``p_attribution(control)`` and ``p_copying``, one-sided: how often a random set has at least as much; and
        ``q(of, control)``, all p of this group after Benjamini-Hochberg. Where logits are no linear function of the
        normed stream: no variable, and the attribute ``left_out``, which says why.

    Raises
    ------
    ModelError
        A self-check failed.
    ServerError
        As `direct_logit_attribution`.
    """
    if model.why_no_sums:
        return xr.Dataset(attrs={"left_out": model.why_no_sums})
    try:
        found = direct_logit_attribution(model, task)
    except HeadwiseError:
        raise
    except ValueError as error:  # an unembedding that is more than a linear layer, as with an adapter on it
        return xr.Dataset(attrs={"left_out": str(error)})
    scores = circuit_scores(model)
    result = _by_head(found, model.shape).assign(
        copying=scores["copying"], eigenvalue_score=scores["eigenvalue_score"].sel(circuit="ov", drop=True)
    )
    return result.merge(_against_random(result, heads, model.shape, draws, seed)) if heads else result


def flops(shape: Shape, positions: int) -> int:
    """Operations beside the forward passes, at so many scored positions in all; those of float64 count twice."""
    direct = 2 * positions * shape.layers * (shape.d_model * shape.width + shape.width + 2 * shape.d_model)
    inner = 2 * shape.d_model * shape.d_head * (shape.d_model + shape.d_head)
    return direct + 2 * 2 * (2 * shape.vocabulary * shape.d_model**2 + shape.layers * shape.heads * inner)


def _by_head(found: xr.Dataset, shape: Shape) -> xr.Dataset:
    """Heads by layer and head, and the other parts by their names."""
    values, own = found["attribution"].transpose("source", "example"), found["kind"].values == "head"
    words = str(values.attrs["long_name"]).removesuffix("of a part")
    attrs = {"units": values.attrs["units"]}
    of_heads = values.values[own].reshape(shape.layers, shape.heads, -1)
    return xr.Dataset(
        {
            "attribution": (("layer", "head", "example"), of_heads, attrs | {"long_name": f"{words}of a head"}),
            "other": (("part", "example"), values.values[~own], attrs | {"long_name": f"{words}of another part"}),
            "whole": found["whole"],
        },
        coords={
            "layer": range(shape.layers),
            "head": range(shape.heads),
            "part": found["source"].values[~own],
            "example": found["example"].values,
        },
        attrs=found.attrs,
    )


def _against_random(found: xr.Dataset, heads: Sequence[Head], shape: Shape, draws: int, seed: int) -> xr.Dataset:
    """The heads together, and random sets of as many others."""
    drawn = random_sets(heads, shape, draws, seed)
    most = max(map(len, drawn.values()))
    names = np.full((len(CONTROLS), most), "", dtype=object)
    for row, sets in enumerate(drawn.values()):
        names[row, : len(sets)] = [" ".join(map(str, one)) for one in sets]
    ends = bootstrap_interval(mean_of(found["attribution"], heads))
    logit = {"units": "logit"} | interval_attrs(found.sizes["example"])
    result: dict[str, Any] = {
        "heads": ((), " ".join(map(str, heads))),
        "control_heads": (("control", "draw"), names),
    }
    for end, value in zip(("low", "high"), ends, strict=True):
        words = f"{OF['attribution']}, {end}er end of 95% interval".replace("higher", "upper")
        result[f"set_attribution_{end}"] = ((), float(value), logit | {"long_name": words})
    p = np.full((len(OF), len(CONTROLS)), np.nan)
    for row, (of, words) in enumerate(OF.items()):
        attrs = {"units": str(found[of].attrs["units"]), "long_name": words}
        own = float(mean_of(found[of], heads).mean())
        control = np.full(names.shape, np.nan)
        for column, sets in enumerate(drawn.values()):
            control[column, : len(sets)] = [mean_of(found[of], one).mean() for one in sets]
            p[row, column] = null_p_value(own, control[column])
        result[f"set_{of}"] = ((), own, attrs)
        random = attrs | {"long_name": f"{words}, random heads"}
        result[f"control_{of}"] = (("control", "draw"), control, random)
        told = {"long_name": "p: random sets with as much", "units": "1"}
        result[f"p_{of}"] = (("control",), p[row], told)
    q = benjamini_hochberg(p.ravel()).reshape(p.shape)
    result["q"] = (("of", "control"), q, {"long_name": "q: every p of this group together", "units": "1"})
    labels: Mapping[str, Any] = {
        "of": np.asarray([*OF], dtype=object),
        "control": np.asarray([*CONTROLS], dtype=object),
        "draw": np.arange(most),
    }
    return xr.Dataset(result, coords=labels)


def mean_of(values: xr.DataArray, heads: Sequence[Head]) -> Array:
    """The mean over some heads of ``(layer, head, ...)``."""
    places = values.transpose("layer", "head", ...).values
    found: Array = np.mean([places[head.layer, head.head].astype(np.float64) for head in heads], axis=0)
    return found
