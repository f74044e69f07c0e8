"""What the weights of heads say of pairs of tokens: OV and QK circuits, from the embedding to the unembedding."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from ...metrics.circuits import copying, eigenvalue_score, eigenvalues
from ...metrics.weights import _factors
from ..measuring.labels import check_is_model
from ..storage.provenance import provenance

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...interventions.traced.specs import WeightsRead

Array = np.ndarray[Any, Any]
CIRCUITS = ("ov", "qk")
AT_ONCE = 4096
"""Tokens whose embeddings are made float64 together."""


def circuit_scores(model: Model, *, folded: bool = True, check: bool = True) -> xr.Dataset:
    """Copying by every head, and how far its circuits have positive eigenvalues: from the weights, no prompt is run.

    The OV circuit is ``W_E @ W_V @ W_O @ W_U.T``, which token raises which where it is attended to; the QK circuit
    ``W_E @ W_Q @ (W_E @ W_K).T``, which query attends to which key. Biases, positions and the rotation of q and k are
    left out. `head_circuits` says more of one head.

    Parameters
    ----------
    model : Model
    folded : bool
        Whether the gains of norms are multiplied in (that of the layer, of q and k, and the last one), and what
        LayerNorm takes away, the mean over ``d_model``, is taken away. How a norm scales a whole vector cannot be
        folded in.
    check : bool
        As for `capture`.

    Returns
    -------
    Dataset
        ``copying(layer, head)``: the share of eigenvalues of the OV circuit with a positive real part, about 0.5 for
        random weights. ``eigenvalue_score(circuit, layer, head)``: the sum of the eigenvalues over the sum of their
        absolute values, between -1 and 1; ``circuit`` is ``ov`` or ``qk``. NaN for a head without weights.

    Raises
    ------
    ModelError
        A self-check failed.

    Examples
    --------
    The induction heads of the shipped model copy:

    >>> ds = hw.circuit_scores(hw.load("words-2l"))
    >>> bool(ds["copying"].sel(layer=1).max() > 0.9)
    True

    References
    ----------
    Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    from ...interventions.begin import begin

    check_is_model(model)
    shape = model.shape
    score = partial(_scores, layers=shape.layers, heads=shape.heads, folded=bool(folded), centred=model.family.centred)
    with begin(model, check=check) as call:
        found = model.backend.score_weights(score, (3, shape.layers, shape.heads))
    references = "Elhage et al. 2021"
    result = xr.Dataset(
        {
            "copying": (
                ("layer", "head"),
                found[0],
                {"long_name": "share of positive eigenvalues of the OV circuit", "units": "1"},
            ),
            "eigenvalue_score": (
                ("circuit", "layer", "head"),
                found[1:],
                {
                    "long_name": "sum of eigenvalues over sum of absolute values",
                    "units": "1",
                    "references": references,
                },
            ),
        },
        coords={
            "circuit": np.asarray(CIRCUITS, dtype=object),
            "layer": list(model.layers),
            "head": list(model.heads),
        },
    )
    return result.assign_attrs(provenance(model, call.identity) | {"folded": int(bool(folded))})


def _scores(read: WeightsRead, *, layers: int, heads: int, folded: bool, centred: bool) -> Array:
    """``(copying, ov score, qk score)`` by layer and head; runs where the weights are."""
    embed, unembed, gain = read["ends"]()
    device = _device(embed)
    size = embed.shape[1]
    between, own = (torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(2))
    for start in range(0, len(embed), AT_ONCE):
        some, out = (one[start : start + AT_ONCE].to(device, torch.float64) for one in (embed, unembed))
        between += (out * gain.to(out) if folded else out).T @ some
        own += some.T @ some
    found = np.zeros((3, layers, heads))
    for layer in range(layers):
        q, k, v, o = _folded(read["heads"](layer), folded, centred, device)
        for head in range(heads):
            ov = eigenvalues(o[head] @ between @ v[head])
            qk = eigenvalues(k[head].T @ own @ q[head])
            found[:, layer, head] = copying(ov), eigenvalue_score(ov), eigenvalue_score(qk)
    return found


def _folded(fields: list[Any], folded: bool, centred: bool, device: Any) -> list[torch.Tensor]:
    """``W_Q W_K W_V (head, d_model, d_head)`` and ``W_O`` of a layer, float64, keys and values for each head."""
    q, k, v, o, *gains = (None if one is None else one.detach().double().cpu().numpy() for one in fields)
    made = _factors(q, k, v, o, centred, *(gains if folded else (None, None, None)))
    return [torch.from_numpy(np.ascontiguousarray(one)).to(device) for one in made]


def _device(like: torch.Tensor) -> torch.device:
    """Where float64 is: the device of the weights, or the CPU where that has none."""
    return torch.device("cpu") if like.device.type == "mps" else like.device
