"""Which tokens excite a neuron, and which logits it writes: from its input and output weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from ...errors import DeclarationError
from ...interventions.declare.sites import Layer, Neuron
from ...interventions.plan.validate import check_site
from ...metrics.circuits import top_columns
from ..measuring.context import check_remote
from ..measuring.labels import check_is_model
from ..storage.provenance import provenance
from .circuits import SIDES, float64_device
from .predict import check_top, text_of_tokens

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...interventions.traced.specs import WeightsRead

Array = np.ndarray[Any, Any]
MATRICES = {
    "input": "embedding by what the neuron reads",
    "up": "embedding by what multiplies the neuron",
    "output": "written by the neuron, above the mean",
}


def neuron_tokens(
    model: Model,
    neurons: Neuron | str | Layer | Sequence[Neuron | str],
    *,
    top: int = 10,
    folded: bool = True,
    check: bool = True,
    remote: bool | None = None,
) -> xr.Dataset:
    """Which tokens' embeddings excite neurons most and least, and which logits neurons raise and lower.

    From the weights: ``W_E`` by the neuron's input weights, and its output weights by ``W_U``. Biases, positions, what
    attention writes, and what norms divide by are left out.

    Parameters
    ----------
    model : Model
    neurons : Neuron, str, Layer, or sequence of Neuron or str
        One such as ``Neuron(0, 17)`` or ``"L0N17"``, several, or all of a layer.
    top : int
        Tokens, 100 at most.
    folded : bool
        Whether the gains of the norm before the MLP and of the last one are multiplied in, and what LayerNorm takes
        away, the mean over ``d_model``, is taken away.
    check, remote
        As for `capture`; of a server, these numbers come back and nothing else.

    Returns
    -------
    Dataset
        ``input_token``, ``input_id`` and ``input_weight`` ``([neuron,] side, rank)``: of the product that goes through
        the activation (`mlp_pre`). ``output_token``, ``output_id`` and ``output_weight``: logits for an activation of 1
        (`mlp_post`), less their mean over the vocabulary, of which no probability depends. Of an MLP with a gate also
        ``up_token ...``, of the product that the activation is multiplied by. ``side`` is ``highest`` or ``lowest``.
        Without the dim ``neuron`` where one is asked for.

    Raises
    ------
    DeclarationError
        The model has no such neuron, or its neurons are not found.
    ModelError
        A self-check failed.
    ServerError
        As `capture`.

    Examples
    --------
    >>> ds = hw.neuron_tokens(hw.load("words-2l"), ["L0N17", "L1N3"], top=3)
    >>> ds["input_token"].sizes
    Frozen({'neuron': 2, 'side': 2, 'rank': 3})
    """
    from ...interventions.begin import begin

    check_is_model(model)
    model.check_sums("neuron_tokens")
    check_remote(model, remote)
    asked, top = _asked(model, neurons), check_top(model, top)
    names = [name for name in MATRICES if name != "up" or model.shape.gated]
    score = partial(
        _tops,
        neurons=[(one.layer, one.neuron) for one in asked],
        top=top,
        folded=bool(folded),
        centred=model.family.centred,
    )
    with begin(model, check=check) as call:
        found = model.backend.score_weights(score, (2, len(names), len(asked), len(SIDES), top))
    dims, made = ("neuron", "side", "rank"), {}
    for at, name in enumerate(names):
        ids = found[1, at].astype(np.int64)
        units = "logit" if name == "output" else "1"
        made[f"{name}_token"] = dims, text_of_tokens(model, ids), {"long_name": f"{name} token"}
        made[f"{name}_id"] = dims, ids, {"long_name": f"id of the {name} token", "units": "1"}
        made[f"{name}_weight"] = dims, found[0, at], {"long_name": MATRICES[name], "units": units}
    coords: dict[str, Any] = {
        "neuron": np.asarray([str(one) for one in asked], dtype=object),
        "layer": ("neuron", np.asarray([one.layer for one in asked])),
        "side": np.asarray(SIDES, dtype=object),
        "rank": np.arange(top),
    }
    result = xr.Dataset(made, coords=coords)
    result = result.isel(neuron=0) if isinstance(neurons, Neuron | str) else result
    attrs = {"folded": int(bool(folded)), "left_out": "biases, positions, attention, what norms divide by"}
    return result.assign_attrs(provenance(model, call.identity) | attrs)


def _asked(model: Model, given: Any) -> list[Neuron]:
    """The neurons, which the model has."""
    if isinstance(given, Layer):
        check_site(given.site("mlp_post"), model.name, model.shape, [])
        return [Neuron(given.layer, neuron) for neuron in model.neurons]
    several = [given] if isinstance(given, Neuron | str) else given
    if not isinstance(several, Sequence) or not several:
        raise DeclarationError(f"{given!r} is no neuron: give one such as Neuron(0, 17) or 'L0N17', some, or Layer(0)")
    found = [Neuron.parse(one) if isinstance(one, str) else one for one in several]
    for one in found:
        if not isinstance(one, Neuron):
            raise DeclarationError(f"{one!r} is no neuron: give one such as Neuron(0, 17) or 'L0N17'")
        check_site(one.site("mlp_post"), model.name, model.shape, [])
    return found


def _tops(read: WeightsRead, *, neurons: list[tuple[int, int]], top: int, folded: bool, centred: bool) -> Array:
    """``(weight or token, matrix, neuron, side, rank)``; runs where the weights are."""
    embed, unembed, last = read["ends"]()
    device = float64_device(embed)
    parts: list[list[torch.Tensor]] = []
    fields = {layer: read["neurons"](layer) for layer in sorted({layer for layer, _ in neurons})}
    for layer, neuron in neurons:
        pre, up, down, gain = fields[layer]
        reads = [one[:, neuron] for one in (pre, up) if one is not None]
        rows = [one.to(device, torch.float64) * (gain.to(device) if folded else 1) for one in reads]
        rows.append(down[neuron].to(device, torch.float64))
        rows = [one - one.mean() if folded and centred else one for one in rows]
        rows[-1] = rows[-1] * last.to(device) if folded else rows[-1]
        parts.append(rows)
    *inputs, outputs = (torch.stack(rows) for rows in zip(*parts, strict=True))
    found = [*(top_columns(rows, embed, top, False) for rows in inputs), top_columns(outputs, unembed, top, True)]
    return np.stack([np.stack([one[at] for one in found]) for at in range(2)]).astype(np.float64)
