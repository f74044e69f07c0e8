"""One table per model family: the only file that names Hugging Face modules. A leaf: imports torch and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ..errors import ModelError, choices


@dataclass(frozen=True)
class Point:
    """A place in a block where values can be read and replaced: a module (path from the block) and a side of it."""

    path: str
    side: Literal["input", "output"]


class HeadWeights(NamedTuple):
    """The weights of all heads of a layer, for row vectors (``x @ W``).

    ``W_Q``, ``W_K``, ``W_V`` have shape ``(head, d_model, d_head)``, ``W_O`` has ``(head, d_head, d_model)``, and
    ``gain``, the gain of the norm that the layer reads through, has ``(d_model,)``.
    """

    W_Q: torch.Tensor
    W_K: torch.Tensor
    W_V: torch.Tensor
    W_O: torch.Tensor
    gain: torch.Tensor


@dataclass(frozen=True)
class Family:
    """What headwise has to know about a model family.

    Attributes
    ----------
    name : str
    model_types : tuple of str
        Values of ``config.model_type`` that it covers.
    blocks : str
        Path of the list of blocks, from the model.
    points : mapping
        ``resid_pre qkv z attn_out resid_mid mlp_out resid_post`` to a `Point`, in forward order. ``qkv`` holds q, k
        and v of all heads side by side, ``z`` all heads side by side.
    sizes : callable
        ``config -> dict`` with layers, heads, d_model, d_head, d_mlp, vocabulary, context.
    scaling : callable
        ``(config, layer) -> float``, the factor of the attention scores.
    head_weights : callable
        ``(model, layer, heads) -> tuple``, the fields of `HeadWeights`. It may run on a server.
    embeddings : mapping
        ``embed`` and, where the model adds one, ``pos_embed``, to the path of its module from the model.
    modules : mapping
        What a planned pass calls, to its path: ``norm_1 qkv out norm_2 mlp`` of a block, ``norm unembed`` of the model.
    project : callable
        ``(block, normed, columns) -> Tensor``: these columns of q, k and v side by side. It runs inside a trace.
    combine : callable
        ``(block, z, columns) -> Tensor``: what these columns of ``z`` write, without bias. It runs inside a trace.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    points: Mapping[str, Point]
    sizes: Callable[[Any], dict[str, int]]
    scaling: Callable[[Any, int], float]
    head_weights: Callable[[Any, int, int], tuple[torch.Tensor, ...]]
    embeddings: Mapping[str, str]
    modules: Mapping[str, str]
    project: Callable[[Any, torch.Tensor, slice], torch.Tensor]
    combine: Callable[[Any, torch.Tensor, slice], torch.Tensor]


def _gpt2_sizes(config: Any) -> dict[str, int]:
    return {
        "layers": config.n_layer,
        "heads": config.n_head,
        "d_model": config.n_embd,
        "d_head": config.n_embd // config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "vocabulary": config.vocab_size,
        "context": config.n_positions,
    }


def _gpt2_scaling(config: Any, layer: int) -> float:
    scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def _gpt2_head_weights(model: Any, layer: int, heads: int) -> tuple[torch.Tensor, ...]:
    block = model.transformer.h[layer]
    d_model = block.attn.c_attn.weight.shape[0]
    q, k, v = (
        part.reshape(d_model, heads, -1).transpose(0, 1) for part in block.attn.c_attn.weight.detach().chunk(3, dim=1)
    )
    return q, k, v, block.attn.c_proj.weight.detach().reshape(heads, -1, d_model), block.ln_1.weight.detach()


def _gpt2_project(block: Any, normed: torch.Tensor, columns: slice) -> torch.Tensor:
    linear = block.attn.c_attn
    sides: torch.Tensor = normed @ linear.weight[:, columns] + linear.bias[columns]
    return sides


def _gpt2_combine(block: Any, z: torch.Tensor, columns: slice) -> torch.Tensor:
    written: torch.Tensor = z @ block.attn.c_proj.weight[columns]
    return written


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    blocks="transformer.h",
    points={
        "resid_pre": Point("", "input"),
        "qkv": Point("attn.c_attn", "output"),
        "z": Point("attn.c_proj", "input"),
        "attn_out": Point("attn", "output"),
        "resid_mid": Point("ln_2", "input"),
        "mlp_out": Point("mlp", "output"),
        "resid_post": Point("", "output"),
    },
    sizes=_gpt2_sizes,
    scaling=_gpt2_scaling,
    head_weights=_gpt2_head_weights,
    embeddings={"embed": "transformer.wte", "pos_embed": "transformer.wpe"},
    modules={
        "norm_1": "ln_1",
        "qkv": "attn.c_attn",
        "out": "attn.c_proj",
        "norm_2": "ln_2",
        "mlp": "mlp",
        "norm": "transformer.ln_f",
        "unembed": "lm_head",
    },
    project=_gpt2_project,
    combine=_gpt2_combine,
)

FAMILIES = (GPT2,)


def family_of(config: Any, name: str) -> Family:
    """The family of a Hugging Face configuration, or an error that lists those that are known."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = choices(model_type for family in FAMILIES for model_type in family.model_types)
    raise ModelError(f"{name} is a {config.model_type} model: headwise knows {known} (interventions/architectures.py)")
