"""What the weights of heads say of pairs of tokens: OV and QK circuits, from the embedding to the unembedding.

Functions that take `read` run where the weights are, on a server too: plain functions, whose numbers come back as one
array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from ...errors import DeclarationError, choices, whole
from ...interventions.declare.sites import Head
from ...interventions.plan.validate import check_site
from ...metrics.circuits import (
    copying,
    diagonal_z,
    eigenvalue_score,
    eigenvalues,
    singular_values,
    top_columns,
    top_pairs,
)
from ...metrics.weights import folded_factors
from ..measuring.context import check_remote
from ..measuring.labels import check_is_model
from ..storage.provenance import provenance
from ..tasks.prompts import token_id
from .predict import check_top, text_of_tokens

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...interventions.traced.specs import WeightsRead

Array = np.ndarray[Any, Any]
CIRCUITS = ("ov", "qk")
SIDES = ("highest", "lowest")
AT_ONCE = 4096
"""Tokens whose embeddings are made float64 together."""
READ_BY = {"q": "queries", "k": "keys", "v": "values"}
"""What an earlier head can come in by."""
ENDS = {"ov": ("source", "output"), "qk": ("query", "key")}
"""What rows and columns of a circuit are."""
OWN = {
    "ov": {"copying_rank": "raised less by a token than the token itself", "copying_z": "raises itself"},
    "qk": {"prefix_matching": "that a query prefers less, as keys, than itself", "prefix_z": "prefers itself as key"},
}
"""Names of `top_pairs`' share and of `diagonal_z`, and what they are of."""


class Circuits(NamedTuple):
    """The two circuits of a head.

    Attributes
    ----------
    ov, qk : Dataset
    """

    ov: xr.Dataset
    qk: xr.Dataset


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
    model.check_laid_open("circuit_scores")
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


def head_circuits(
    model: Model,
    head: Head | str,
    *,
    through: Head | str | Mapping[str, Head | str] | None = None,
    tokens: Sequence[str | int] = (),
    top: int = 10,
    distance: int = 0,
    folded: bool = True,
    check: bool = True,
    remote: bool | None = None,
) -> Circuits:
    """What a head does with tokens, from the weights: which token raises which (OV), which query wants which key (QK).

    The OV circuit is ``W_E @ W_V @ W_O @ W_U.T``, the QK circuit ``W_E @ W_Q @ (W_E @ W_K).T``, tokens by tokens;
    neither is ever held whole. ``b_Q``, ``b_K``, ``b_V``, position embeddings and MLPs are left out, and so are the
    factor of the scores and what norms divide by.

    Parameters
    ----------
    model : Model
    head : Head or str
        Such as ``"L1H2"``.
    through : Head, str, or mapping of {"q", "k", "v"} to Head or str, optional
        An earlier head by whose OV circuit tokens come in, in place of the embedding: a head for keys and values, or
        one each for queries, keys and values. With a head that attends to the previous token, a key is then the
        position after the token, and `prefix_matching` is that of an induction head.
    tokens : sequence of str or int
        Text or ids of tokens of which the highest and lowest are wanted as well.
    top : int
        Tokens, 100 at most.
    distance : int
        How many positions a key stands before its query, in models that rotate q and k; 0 leaves the rotation out.
    folded : bool
        As for `circuit_scores`.
    check, remote
        As for `capture`; of a server, these numbers come back and nothing else.

    Returns
    -------
    tuple of Dataset
        ``ov`` and ``qk``. Each has ``eigenvalue_real``, ``eigenvalue_imag`` and ``singular_value`` ``(index)``, the
        largest first; ``eigenvalue_score``, as in `circuit_scores`; the highest and lowest pairs as ``source_token
        source_id output_token output_id`` or ``query_token query_id key_token key_id``, ``(side, rank)``, with their
        ``weight``, less the mean of its row, of which the softmax after it takes no notice. ``ov`` has ``copying``;
        ``copying_rank``, the share of other tokens that a token raises less than itself, and ``copying_z``, how many
        standard deviations of its row a token's own entry lies above the mean, both averaged over tokens. ``qk`` has
        ``prefix_matching`` and ``prefix_z``, these two for keys; by chance 0.5 and 0. With `tokens`,
        ``chosen_output_token`` or ``chosen_key_token``, with ``_id`` and ``_weight``, ``(chosen, side, rank)``.

    Raises
    ------
    DeclarationError
        The model has no such head or token, `through` is not in an earlier layer, or `distance` is not possible.
    ModelError
        A self-check failed.
    ServerError
        As `capture`.

    Examples
    --------
    An induction head: it copies, and its keys match by the token before them, which head 3 of layer 0 brings.

    >>> ov, qk = hw.head_circuits(hw.load("words-2l"), "L1H2", through={"k": "L0H3"}, top=3)
    >>> float(ov["copying"]), round(float(qk["prefix_matching"]), 2)
    (1.0, 1.0)

    References
    ----------
    Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    from ...interventions.begin import begin

    check_is_model(model)
    model.check_laid_open("head_circuits")
    check_remote(model, remote)
    own, top = _head(model, head), check_top(model, top)
    earlier = _through(model, own, through)
    chosen = [token_id(model, one) for one in ([tokens] if isinstance(tokens, str | int) else tokens)]
    shape, distance = model.shape, whole(distance, "distance", high=model.shape.context - 1)
    if distance and not shape.rotary:
        raise DeclarationError(f"distance={distance}: {model.name} does not rotate q and k: leave distance out")
    score = partial(
        _pairs,
        heads=[_place(shape, one) for one in (own, *(earlier.get(side) for side in READ_BY))],
        chosen=chosen,
        top=top,
        distance=distance,
        folded=bool(folded),
        centred=model.family.centred,
    )
    shapes = _shapes(shape.d_head, top, len(chosen))
    with begin(model, check=check) as call:
        flat = model.backend.score_weights(score, (2 * sum(int(np.prod(one)) for one in shapes.values()),))
    attrs = provenance(model, call.identity) | {
        "head": str(own),
        "folded": int(bool(folded)),
        "distance": distance,
        "left_out": "b_Q, b_K, b_V, position embeddings, MLPs, the factor of scores, what norms divide by",
    }
    attrs |= {f"through_{side}": str(one) for side, one in earlier.items()}
    halves = zip(CIRCUITS, np.split(flat, 2), strict=True)
    return Circuits(
        *(_labelled(model, kind, unpacked(half, shapes), chosen).assign_attrs(attrs) for kind, half in halves)
    )


def _head(model: Model, given: Head | str) -> Head:
    """A head of the model, given as one or as text."""
    head = Head.parse(given) if isinstance(given, str) else given
    if not isinstance(head, Head):
        raise DeclarationError(f"{given!r} is no head: give one such as Head(1, 2) or 'L1H2'")
    check_site(head.site("z"), model.name, model.shape, [])
    return head


def _through(model: Model, head: Head, given: Any) -> dict[str, Head]:
    """Earlier heads, by what they come in by."""
    named = dict(given) if isinstance(given, Mapping) else {} if given is None else {"k": given, "v": given}
    if unknown := [side for side in named if side not in READ_BY]:
        raise DeclarationError(f"through={{{unknown[0]!r}: ...}}: possible are {choices(READ_BY)}")
    found = {side: _head(model, one) for side, one in named.items()}
    for side, one in found.items():
        if one.layer >= head.layer:
            raise DeclarationError(f"through={one}: {READ_BY[side]} of {head} read heads of earlier layers only")
    return found


def _place(shape: Any, head: Head | None) -> tuple[int, int, int] | None:
    """Layer, head, and the head of keys and values that it reads."""
    return None if head is None else (head.layer, head.head, shape.key_head(head.head))


def _shapes(d_head: int, top: int, chosen: int) -> dict[str, tuple[int, ...]]:
    """What is known of a circuit, in the order in which it comes."""
    single = dict.fromkeys(("copying", "eigenvalue_score", "rank", "z"), ())
    several = dict.fromkeys(("eigenvalue_real", "eigenvalue_imag", "singular_value"), (d_head,))
    pairs = dict.fromkeys(("weight", "row", "column"), (2, top))
    return single | several | pairs | dict.fromkeys(("chosen_weight", "chosen_column"), (chosen, 2, top))


def unpacked(flat: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Arrays by name, from one that holds them in this order."""
    sizes = [int(np.prod(one)) for one in shapes.values()]
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def _labelled(model: Model, kind: str, found: Mapping[str, Array], chosen: Sequence[int]) -> xr.Dataset:
    """The dataset of a circuit."""
    circuit, ends, (rank, z) = kind.upper(), ENDS[kind], OWN[kind]
    of_side, of_chosen = ("side", "rank"), ("chosen", "side", "rank")
    rows, columns, picked = (found[name].astype(np.int64) for name in ("row", "column", "chosen_column"))
    words = {
        "copying": (f"share of positive eigenvalues of the {circuit} circuit", ()),
        "eigenvalue_score": (f"sum of eigenvalues of the {circuit} circuit over sum of absolute values", ()),
        "eigenvalue_real": (f"real part of eigenvalues of the {circuit} circuit", "index"),
        "eigenvalue_imag": (f"imaginary part of eigenvalues of the {circuit} circuit", "index"),
        "singular_value": (f"singular values of the {circuit} circuit", "index"),
        "weight": (f"entry of the {circuit} circuit above its row's mean", of_side),
    }
    made: dict[str, Any] = {
        name: (dims, found[name], {"long_name": long, "units": "1"})
        for name, (long, dims) in words.items()
        if name != "copying" or kind == "ov"
    }
    share, above = OWN[kind].values()
    made[rank] = (), found["rank"], {"long_name": f"share of other tokens {share}", "units": "1"}
    made[z] = (), found["z"], {"long_name": f"how far a token {above}, in deviations of its row", "units": "1"}
    for end, ids in zip(ends, (rows, columns), strict=True):
        made[f"{end}_token"] = of_side, text_of_tokens(model, ids), {"long_name": f"{end} token"}
        made[f"{end}_id"] = of_side, ids, {"long_name": f"id of the {end} token", "units": "1"}
    coords: dict[str, Any] = {"side": np.asarray(SIDES, dtype=object), "rank": np.arange(rows.shape[-1])}
    if chosen:
        name = f"chosen_{ends[1]}"
        made[f"{name}_token"] = of_chosen, text_of_tokens(model, picked), {"long_name": f"{ends[1]} token"}
        made[f"{name}_id"] = of_chosen, picked, {"long_name": f"id of the {ends[1]} token", "units": "1"}
        made[f"{name}_weight"] = of_chosen, found["chosen_weight"], made["weight"][2]
        coords["chosen"] = text_of_tokens(model, np.asarray(chosen))
        coords["chosen_id"] = "chosen", np.asarray(chosen), {"long_name": f"id of the {ends[0]} token"}
    return xr.Dataset(made, coords=coords)


def _pairs(
    read: WeightsRead,
    *,
    heads: list[tuple[int, int, int] | None],
    chosen: list[int],
    top: int,
    distance: int,
    folded: bool,
    centred: bool,
) -> Array:
    """Both circuits of a head as `_shapes` has them, one after the other; runs where the weights are.

    Parameters
    ----------
    read : WeightsRead
    heads : list of (layer, head, key-value head) or None
        The head, and those by which queries, keys and values come in.
    chosen : list of int
        Tokens.
    top, distance, folded
        As for `head_circuits`.
    centred : bool
        Whether norms take the mean away.

    Returns
    -------
    array (number,)
    """
    embed, unembed, gain = read["ends"]()
    device = float64_device(embed)
    own, by_query, by_key, by_value = (
        [] if one is None else _head_factors(read["heads"](one[0]), one, folded, centred, device) for one in heads
    )
    q, k, v, o = own
    gain = (gain if folded else torch.ones_like(gain)).to(device, torch.float64)
    value, query = _tokens_in(embed, v, by_value), _tokens_in(embed, q, by_query)
    turned = read["turned"](heads[0][0], distance, query) if distance and heads[0] else query
    ov = value, _tokens_in(unembed, (o * gain).T, []).T
    qk = turned, _tokens_in(embed, k, by_key).T
    found = []
    for left, right in (ov, qk):
        values = eigenvalues(right @ left)
        weights, rows, columns, share = top_pairs(left, right, top)
        picked = left[torch.tensor(chosen, dtype=torch.long, device=device)]
        more = top_columns(picked, right.T, top, True) if chosen else ()
        single = [copying(values), eigenvalue_score(values), share, diagonal_z(left, right)]
        parts = [single, values.real, values.imag, singular_values(left, right), weights, rows, columns, *more]
        found += [np.asarray(part, dtype=np.float64).ravel() for part in parts]
    return np.concatenate(found)


def _head_factors(
    fields: list[Any], place: tuple[int, int, int], folded: bool, centred: bool, device: Any
) -> list[torch.Tensor]:
    """``W_Q W_K W_V (d_model, d_head)`` and ``W_O (d_head, d_model)`` of one head, float64."""
    _, head, shared = place
    q, k, v, o, gain, q_gain, k_gain, out_gain = fields
    q_gain, k_gain = (
        one if one is None or one.dim() == 1 else one[at : at + 1] for one, at in ((q_gain, head), (k_gain, shared))
    )
    gains = [gain, q_gain, k_gain, out_gain]
    picked = [q[head : head + 1], k[shared : shared + 1], v[shared : shared + 1], o[head : head + 1], *gains]
    return [one[0] for one in _folded(picked, folded, centred, device)]


def _tokens_in(ends: torch.Tensor, matrix: torch.Tensor, earlier: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a matrix ``(d_model, d_head)`` makes of each token, itself or as an earlier head writes it."""
    if earlier:
        _, _, v, o = earlier
        return _tokens_in(ends, v, []) @ (o @ matrix)
    starts = range(0, len(ends), AT_ONCE)
    return torch.cat([ends[start : start + AT_ONCE].to(matrix) @ matrix for start in starts])


def _scores(read: WeightsRead, *, layers: int, heads: int, folded: bool, centred: bool) -> Array:
    """``(copying, ov score, qk score)`` by layer and head; runs where the weights are."""
    embed, unembed, gain = read["ends"]()
    device = float64_device(embed)
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
    q, k, v, o, *gains = (None if one is None else one.detach().cpu().double().numpy() for one in fields)
    made = folded_factors(q, k, v, o, centred, *(gains if folded else [None] * len(gains)))
    return [torch.from_numpy(np.ascontiguousarray(one)).to(device) for one in made]


def float64_device(like: torch.Tensor) -> torch.device:
    """Where float64 is: the device of the weights, or the CPU where that has none."""
    return torch.device("cpu") if like.device.type == "mps" else like.device
