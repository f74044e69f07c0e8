"""A second opinion on circuits: whole matrices of tokens by tokens, from the weights as transformers has them.

Imports torch, NumPy and what `raw_families` says of places. Everything is a dense float64 product; a norm is written as
the matrix that it is once it divides by 1: it takes the mean away (LayerNorm), then multiplies by its gain.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.oracles import raw_families

Array = np.ndarray[Any, Any]


class HeadMatrices(NamedTuple):
    """For row vectors: what q, k and v of a head are made by, and what it writes by."""

    q: Array
    k: Array
    v: Array
    o: Array


def dense(tensor: Any) -> Array:
    return tensor.detach().double().numpy()


def blocks_of(model: Any) -> Any:
    return model.transformer.h if is_gpt2(model) else attrgetter(raw_families.anatomy(model).blocks)(model)


def is_gpt2(model: Any) -> bool:
    return bool(model.config.model_type == "gpt2")


def embedding(model: Any) -> Array:
    """What each token is in the stream before the first block, without its position."""
    with torch.no_grad():
        return dense(model.get_input_embeddings()(torch.arange(model.config.vocab_size)))


def unembedding(model: Any) -> Array:
    """``(d_model, token)``."""
    return dense(model.lm_head.weight).T


def norm(module: Any, folded: bool) -> Array:
    """A norm as a matrix for row vectors; the identity where it is not folded in."""
    size = len(module.weight)
    if not folded:
        return np.eye(size)
    gain = dense(module.weight) + (1 if type(module).__name__.startswith("Gemma") else 0)
    centre = np.eye(size) - np.ones((size, size)) / size if isinstance(module, torch.nn.LayerNorm) else np.eye(size)
    return centre @ np.diag(gain)


def last_norm(model: Any) -> Any:
    body = model.base_model
    return next(getattr(body, name) for name in ("norm", "final_layer_norm", "ln_f") if hasattr(body, name))


def head_matrices(model: Any, layer: int, head: int, folded: bool) -> HeadMatrices:
    block, heads = blocks_of(model)[layer], model.config.num_attention_heads
    if is_gpt2(model):
        d_model = model.config.n_embd
        size = d_model // heads
        here = slice(head * size, (head + 1) * size)
        fused = dense(block.attn.c_attn.weight)
        q, k, v = (fused[:, part * d_model : (part + 1) * d_model][:, here] for part in range(3))
        return HeadMatrices(
            *(norm(block.ln_1, folded) @ one for one in (q, k, v)), dense(block.attn.c_proj.weight)[here]
        )
    own = raw_families.anatomy(model)
    first = block.ln_1 if hasattr(block, "ln_1") else getattr(block, "input_layernorm", None)
    out = dense(attrgetter(own.out)(block).weight).T
    size = out.shape[0] // heads
    if own.fused:
        rows = dense(attrgetter(own.fused)(block).weight).reshape(heads, 3, size, -1)[head]
        q, k, v = rows[0].T, rows[1].T, rows[2].T
    else:
        attention = attrgetter(own.attention)(block)
        shared = head // (heads // raw_families.heads_of(model)[1])
        picked = {"q_proj": head, "k_proj": shared, "v_proj": shared}
        q, k, v = (dense(getattr(attention, name).weight)[at * size : (at + 1) * size].T for name, at in picked.items())
        if folded and hasattr(attention, "q_norm"):
            q, k = q @ of_head(attention.q_norm, head, size), k @ of_head(attention.k_norm, shared, size)
    reads = np.eye(len(q)) if first is None else norm(first, folded)
    writes = norm(getattr(block, own.attn_out), folded) if own.attn_out not in (None, "attn") else np.eye(len(q))
    return HeadMatrices(reads @ q, reads @ k, reads @ v, out[head * size : (head + 1) * size] @ writes)


def of_head(module: Any, head: int, size: int) -> Array:
    """A norm of q or k as a matrix: that of each head, or a head's part of one over all heads at once."""
    gain = np.diag(norm(module, True))
    return np.diag(gain if len(gain) == size else gain[head * size : (head + 1) * size])


def ov(model: Any, layer: int, head: int, folded: bool, through: tuple[int, int] | None = None) -> Array:
    """``(token read, token written)``."""
    own = head_matrices(model, layer, head, folded)
    read = stream(model, folded, through)
    return read @ own.v @ own.o @ norm(last_norm(model), folded) @ unembedding(model)


def qk(
    model: Any,
    layer: int,
    head: int,
    folded: bool,
    *,
    by_key: tuple[int, int] | None = None,
    by_query: tuple[int, int] | None = None,
    turn: Array | None = None,
) -> Array:
    """``(token of the query, token of the key)``; `turn` ``(d_head, d_head)`` turns queries against keys."""
    own = head_matrices(model, layer, head, folded)
    q = stream(model, folded, by_query) @ own.q
    return (q if turn is None else q @ turn) @ (stream(model, folded, by_key) @ own.k).T


def stream(model: Any, folded: bool, through: tuple[int, int] | None) -> Array:
    """What is read of each token: its embedding, or what an earlier head writes of it."""
    if through is None:
        return embedding(model)
    earlier = head_matrices(model, *through, folded)
    return embedding(model) @ earlier.v @ earlier.o


def nonzero_eigenvalues(matrix: Array, count: int) -> Array:
    """The `count` largest in absolute value, of a whole matrix, which has no others that are not 0."""
    found = np.linalg.eigvals(matrix)
    return found[np.argsort(-np.abs(found))[:count]]
