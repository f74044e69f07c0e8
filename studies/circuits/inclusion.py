"""How sure the edges of a circuit are: how often each is chosen when prompts are drawn again. Knows no model."""

from __future__ import annotations

import warnings

import numpy as np
import xarray as xr

from ...errors import LARGEST_SEED, AdviceWarning, DeclarationError, choices, whole
from ...interventions.declare.circuits import ABS, Circuit, edge_order, sign_of
from ...metrics.statistics import jaccard_overlap
from .edges import edge_coords, edges_of

STABLE = 0.8
"""Jaccard overlap below which a circuit is said to depend on the prompts."""
MOST_RESAMPLES = 10_000
LEAST_SCORES = 2_000_000
"""Scores of resamples that are held at once."""


def edge_inclusion(scores: xr.DataArray, n: int, by: str = ABS, *, resamples: int = 200, seed: int = 0) -> xr.Dataset:
    """How often each edge is among the `n` of `Circuit.top`, where prompts are drawn again with replacement.

    Of equal scores at the end of a circuit any may be in: in each draw other ones, so that they do not pass for sure.

    Parameters
    ----------
    scores : DataArray (edge, example)
        Of each edge and prompt, with the coordinates ``sender`` and ``receiver`` along ``edge``.
    n : int
        Edges of the circuit.
    by : {"abs", "signed"}
        As for `Circuit.top`; the mean over prompts is chosen by.
    resamples : int
    seed : int
        The same seed gives the same draws.

    Returns
    -------
    Dataset
        In forward order of the edges, whose text is the coordinate ``edge``: ``inclusion (edge)``, the share of
        resamples whose circuit has the edge; ``in_circuit (edge)``, whether the circuit of all prompts has it; ``score
        (edge)``, its mean; and ``jaccard``, the mean over pairs of resamples of the edges in both over those in either.

    Raises
    ------
    DeclarationError
        The scores have other dims or there are fewer than two prompts, or what `Circuit.top` refuses.

    Warns
    -----
    AdviceWarning
        ``jaccard`` is below 0.8: which edges the circuit has depends on the prompts.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> names = {"sender": ("edge", ["input", "m0"]), "receiver": ("edge", ["logits", "logits"])}
    >>> scores = xr.DataArray([[3.0, 2.0, 4.0], [1.0, 0.0, -1.0]], coords=names, dims=("edge", "example"))
    >>> found = hw.edge_inclusion(scores, n=1)
    >>> found["inclusion"].values.tolist(), float(found["jaccard"])
    ([1.0, 0.0], 1.0)

    References
    ----------
    Méloux et al. (2025), "Mechanistic Interpretability as Statistical Estimation: A Variance Analysis of EAP-IG".
    """
    if not isinstance(scores, xr.DataArray) or {*scores.dims} != {"edge", "example"}:
        dims = choices(getattr(scores, "dims", ())) or "none"
        raise DeclarationError(f"edge_inclusion takes a DataArray with the dims edge and example: this has {dims}")
    examples = scores.sizes["example"]
    if examples < 2:
        raise DeclarationError("edge_inclusion draws prompts again, so it needs two or more: there is 1")
    draws, seed = whole(resamples, "resamples", low=2, high=MOST_RESAMPLES), whole(seed, "a seed", high=LARGEST_SEED)
    mean = scores.mean("example", skipna=False, keep_attrs=True)
    chosen = Circuit.top(mean, n, by)
    pairs = edges_of(scores)
    order = sorted(range(len(pairs)), key=lambda at: edge_order(pairs[at]))
    ordered = scores.transpose("edge", "example").isel(edge=order)
    values, count = np.asarray(ordered.values, dtype=np.float64), len(chosen)
    counts = np.random.default_rng(seed).multinomial(examples, np.full(examples, 1 / examples), size=draws)
    sign = sign_of(scores, by)
    member = np.zeros((draws, len(pairs)), dtype=bool)
    size = max(1, LEAST_SCORES // len(pairs))
    lots = np.random.default_rng((seed, 1))
    for start in range(0, draws, size):
        means = counts[start : start + size] @ values.T
        first = -np.abs(means) if by == ABS else sign * means
        taken = np.lexsort((lots.random(first.shape), first), axis=-1)[:, :count]  # of equal scores, any
        np.put_along_axis(member[start : start + size], taken, True, axis=-1)
    overlap = jaccard_overlap(member)
    found = xr.Dataset(
        {
            "inclusion": ("edge", member.mean(axis=0), {"units": "1", "long_name": "share of resamples with the edge"}),
            "in_circuit": ("edge", [pairs[at] in chosen for at in order]),
            "score": ("edge", values.mean(axis=-1), dict(scores.attrs)),
            "jaccard": ((), overlap, {"units": "1", "long_name": "Jaccard overlap of two resamples, mean over pairs"}),
        },
        coords=edge_coords(pairs[at] for at in order),
        attrs={"n": count, "by": by, "resamples": draws, "seed": seed, "examples": examples},
    )
    if overlap < STABLE:
        warnings.warn(unstable(found), AdviceWarning, stacklevel=2)
    return found


def unstable(found: xr.Dataset) -> str:
    """What is said of a circuit whose edges depend on the prompts; empty where they do not."""
    overlap, attrs = float(found["jaccard"]), found.attrs
    if not overlap < STABLE:
        return ""
    return (
        f"circuits of {attrs['n']} edges from prompts drawn again share {overlap:.2f} of their edges (Jaccard overlap "
        f"below {STABLE}): which edges are in depends on the {attrs['examples']} prompts; take more prompts or another "
        "number of edges, and look at how often each edge is included"
    )
