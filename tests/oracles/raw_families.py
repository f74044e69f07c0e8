"""Owns the second opinion on model families other than GPT-2: plain torch hooks, and a stand-in for eager attention.

Imports torch, transformers and what `raw_paths` says of places; written from the modelling code of transformers. The
functions and shapes are those of `raw_paths`. What lies inside attention (``q_rot k_rot pattern``) is read and changed
in a stand-in for the function that the family calls under eager attention: it gets q and k after rotation, and the
mask that the model made. Heads of ``k v k_rot`` are key-value heads.

=============  ================================================================================
``q k v``      what ``q_proj k_proj v_proj`` write; in GPT-NeoX the head's part of ``query_key_value``, which lays
               q, k and v of one head side by side
``attn_in``    input of the module that holds the projections
``resid_mid``  input of the second norm where the MLP follows attention; nothing where both read the block's input
``mlp_in``     input of the MLP
``mlp_pre``    output of its first matrix, where it is gated ``gate_proj``; with a head, the number of a neuron
``mlp_post``   input of its last matrix
=============  ================================================================================
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

from tests.oracles import raw_variants
from tests.oracles.raw_paths import Change, Place, _at, _changed, _fixed, _reader

QKV = ("q", "k", "v")
OF_KEYS = ("k", "v", "k_rot")
INSIDE = ("q_rot", "k_rot", "pattern")
PER_NEURON = ("mlp_pre", "mlp_post")


@dataclass(frozen=True)
class Anatomy:
    """Where a family keeps its parts."""

    blocks: str
    embed: str
    pos_embed: str | None
    attention: str
    out: str
    mlp: str
    norm_2: str
    matrices: tuple[str, str] | None = ("mlp.gate_proj", "mlp.down_proj")
    fused: str | None = None
    rotary: bool = True
    attn_out: str | None = None
    """The module whose output is added to the stream, where that is not the attention."""
    mlp_out: str | None = None


LLAMA = Anatomy(
    "model.layers",
    "model.embed_tokens",
    None,
    "self_attn",
    "self_attn.o_proj",
    "mlp",
    "post_attention_layernorm",
)
NEOX = Anatomy(
    "gpt_neox.layers",
    "gpt_neox.embed_in",
    None,
    "attention",
    "attention.dense",
    "mlp",
    "post_attention_layernorm",
    ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "attention.query_key_value",
)
NEO = Anatomy(
    "transformer.h", "transformer.wte", "transformer.wpe", "attn.attention", "attn.attention.out_proj", "mlp", "ln_2",
    ("mlp.c_fc", "mlp.c_proj"), rotary=False, attn_out="attn",
)  # fmt: skip


def anatomy(model: Any) -> Anatomy:
    kind = model.config.model_type
    return {"gpt_neox": NEOX, "gpt_neo": NEO}.get(kind, replace(LLAMA, **raw_variants.ANATOMIES.get(kind, {})))


def heads_of(model: Any) -> tuple[int, int]:
    """Query heads and key-value heads."""
    heads = model.config.num_attention_heads
    return heads, getattr(model.config, "num_key_value_heads", None) or heads


def is_parallel(model: Any) -> bool:
    return getattr(model.config, "use_parallel_residual", model.config.model_type == "gptj")


def components(model: Any) -> tuple[str, ...]:
    """What the family has, in forward order."""
    own = anatomy(model)
    position = ("pos_embed",) if own.pos_embed else ()
    rotated = ("q_rot", "k_rot") if own.rotary else ()
    mid = () if is_parallel(model) else ("resid_mid",)
    neurons = PER_NEURON if own.matrices else ()
    rest = ("pattern", "z", "head_out", "attn_out", *mid, "mlp_in", *neurons, "mlp_out", "resid_post")
    return ("embed", *position, "resid_pre", "attn_in", *QKV, *rotated, *rest)


# --- inside attention ------------------------------------------------------------------------------------------------

ACTS: list[tuple[Any, str, Callable[[Tensor], Tensor]]] = []
"""What is done inside attention at the moment: ``(attention module, stage, act)``; ``weigh <head>`` is a stage too."""


def _acts(module: Any, stage: str) -> list[Callable[[Tensor], Tensor]]:
    return [act for where, name, act in ACTS if where is module and name == stage]


def _through(module: Any, stage: str, value: Tensor) -> Tensor:
    """``(example, head, position, d)`` after all acts of a stage, which get ``(example, position, head, d)``."""
    for act in _acts(module, stage):
        value = act(value.transpose(1, 2)).transpose(1, 2)
    return value


def _weighted(
    module: Any, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float, cap: float | None = None
) -> Any:
    """``(example, head, position, d)`` of every head, one after the other, and all weights."""
    query, key = _through(module, "q_rot", query), _through(module, "k_rot", key)
    each, group, weights = [], query.shape[1] // key.shape[1], []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // group].transpose(1, 2) * scaling
        scores = raw_variants.capped(scores, cap).masked_fill(~allowed, -torch.inf)
        acts = _acts(module, f"weigh {head}")
        made = raw_variants.softmax(module, head, scores)
        for act in acts:
            made = act(scores)
        weights.append(made)
        each.append(made @ value[:, head // group])
    return torch.stack(each, 1), torch.stack(weights, 1)


def _eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """In place of ``eager_attention_forward``."""
    z, weights = _weighted(module, query, key, value, attention_mask[:, 0] > -1, scaling, softcap)
    return z.transpose(1, 2).contiguous(), weights


def _neo(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> tuple[Tensor, Tensor]:
    """In place of ``GPTNeoSelfAttention._attn``, whose scores are not scaled."""
    size = query.shape[-2]
    return _weighted(module, query, key, value, module.bias[0, :, :size, :size], 1.0)


def _gptj(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> tuple[Tensor, Tensor]:
    """In place of ``GPTJAttention._attn``."""
    size = query.shape[-2]
    allowed = torch.ones(size, size, dtype=torch.bool).tril() if attention_mask is None else attention_mask[:, 0] > -1
    return _weighted(module, query, key, value, allowed, query.shape[-1] ** -0.5)


class Inside:
    """A handle, as of a hook, on something done inside an attention module."""

    def __init__(self, model: Any, layer: int, stage: str, act: Callable[[Tensor], Tensor]) -> None:
        module = attrgetter(anatomy(model).attention)(attrgetter(anatomy(model).blocks)(model)[layer])
        self.act, self.stack = (module, stage, act), ExitStack()
        usual = model.config._attn_implementation
        if usual != "eager":
            model.set_attn_implementation("eager")
            self.stack.callback(model.set_attn_implementation, usual)
        code = sys.modules[type(module).__module__]
        stand_in = {"gpt_neo": _neo, "gptj": _gptj}.get(model.config.model_type)
        if stand_in is not None:
            self.stack.enter_context(mock.patch.object(type(module), "_attn", stand_in))
        else:
            self.stack.enter_context(mock.patch.object(code, "eager_attention_forward", _eager))
        ACTS.append(self.act)

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *_: Any) -> None:
        ACTS.remove(self.act)
        self.stack.close()


def weights(model: Any, layer: int, head: int, scores: Tensor) -> Tensor:
    """Weights of keys from scores of a head; of a GPT-2 too."""
    if model.config.model_type == "gpt2":
        return scores.softmax(-1)
    block = attrgetter(anatomy(model).blocks)(model)[layer]
    return raw_variants.softmax(attrgetter(anatomy(model).attention)(block), head, scores)


def _attention_hooks(model: Any, layer: int, head: int, queries: Sequence[int] | None, weigh: Change) -> list[Any]:
    """Handles that make the weights of a head ``weigh(scores)``; scores are (example, query, key), hidden ones -inf."""

    def act(scores: Tensor) -> Tensor:
        usual = weights(model, layer, head, scores)
        return _changed(usual, _at(queries), lambda _old: weigh(scores[_at(queries)]))

    return [Inside(model, layer, f"weigh {head}", act)]


# --- places ----------------------------------------------------------------------------------------------------------


def _hooks(model: Any, tokens: Tensor, place: Place, change: Change) -> list[Any]:
    """Handles that change one place; they act in the order in which they were made."""
    layer, component, head, positions = place
    if component not in components(model):
        raise ValueError(f"{component!r} is not one of {components(model)}")
    own, (heads, kv_heads) = anatomy(model), heads_of(model)
    count = kv_heads if component in OF_KEYS else heads
    block = attrgetter(own.blocks)(model)[layer]

    def on_input(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_changed(args[0], _at(positions, head), change), *args[1:])

    def on_named_input(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if args:
            return on_input(_module, args), named
        return args, {**named, "hidden_states": _changed(named["hidden_states"], _at(positions), change)}

    def on_neurons(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return _changed(output, _at(positions, head), change)

    def on_output(_module: Any, _args: Any, output: Any) -> Any:
        whole, *rest = output if isinstance(output, tuple) else (output,)
        changed = _changed(whole.expand(tokens.shape[0], -1, -1), _at(positions), change)
        return (changed, *rest) if isinstance(output, tuple) else changed

    def on_projection(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return _changed(output.unflatten(-1, (count, -1)), _at(positions, head), change).flatten(2)

    def on_fused(_module: Any, _args: Any, output: Tensor) -> Tensor:
        parts = output.unflatten(-1, (heads, 3, -1)).transpose(2, 3)
        changed = _changed(parts, _at(positions, QKV.index(component), head), change)
        return changed.transpose(2, 3).flatten(2)

    def on_z(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_changed(args[0].unflatten(-1, (heads, -1)), _at(positions, head), change).flatten(2),)

    def on_head_out(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        z, rows = args[0].unflatten(-1, (heads, -1))[:, :, head], module.weight.T.unflatten(0, (heads, -1))[head]
        return output + (_changed(z @ rows, _at(positions), change) - z @ rows)

    def on_mid(_module: Any, args: tuple[Tensor, ...]) -> None:
        args[0].copy_(_changed(args[0], _at(positions), change))  # the block adds this very tensor to the MLP's output

    if component == "pattern":
        usual = partial(weights, model, layer, head)
        return _attention_hooks(model, layer, head, positions, lambda scores: change(usual(scores)))
    if component in INSIDE:
        return [Inside(model, layer, component, lambda value: _changed(value, _at(positions, head), change))]
    if component == "attn_in":
        return [attrgetter(own.attention)(block).register_forward_pre_hook(on_named_input, with_kwargs=True)]
    before = {
        "resid_pre": ("", on_input),
        "z": (own.out, on_z),
        "resid_mid": (own.norm_2, on_mid),
        "mlp_in": (own.mlp, on_input),
        "mlp_post": (own.matrices and own.matrices[1], on_input),
    }
    if component in before:
        path, hook = before[component]
        module = attrgetter(path)(block) if path else block
        return [module.register_forward_pre_hook(hook)]
    if component in ("embed", "pos_embed"):
        return [attrgetter(getattr(own, component))(model).register_forward_hook(on_output)]
    if component == "resid_post":
        return [block.register_forward_hook(on_output)]
    after = {
        "head_out": (own.out, on_head_out),
        "attn_out": (own.attn_out or own.attention, on_output),
        "mlp_pre": (own.matrices and own.matrices[0], on_neurons),
        "mlp_out": (own.mlp_out or own.mlp, on_output),
        **{
            part: (own.fused or f"{own.attention}.{part}_proj", on_fused if own.fused else on_projection)
            for part in QKV
        },
    }
    path, hook = after[component]
    return [attrgetter(path)(block).register_forward_hook(hook)]


def _forward(model: Any, tokens: Tensor, changes: Sequence[tuple[Place, Change]]) -> Tensor:
    with ExitStack() as stack:
        for place, change in changes:
            for handle in _hooks(model, tokens, Place(*place), change):
                stack.enter_context(handle)
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits


@torch.no_grad()
def run(model: Any, tokens: Tensor, changes: Sequence[tuple[Place, Change]] = ()) -> Tensor:
    """Logits with several changes in one forward pass; changes of one component of one layer act in list order."""
    return _forward(model, tokens, changes)


@torch.no_grad()
def read(model: Any, tokens: Tensor, place: Place) -> Tensor:
    """Value at one place in an untouched run."""
    seen: dict[str, Tensor] = {}
    _forward(model, tokens, [_reader(seen, place)])
    return seen[str(place)]


def write(model: Any, tokens: Tensor, place: Place, new: Tensor | float) -> Tensor:
    """Logits where a place is set to ``new``, which broadcasts to the place's value."""
    return run(model, tokens, [(place, _fixed(new))])


def slope(model: Any, tokens: Tensor, score: Callable[[Tensor], Tensor], place: Place) -> tuple[Tensor, Tensor]:
    """What stands at a place, and the gradient of the summed score by it."""
    leaf = read(model, tokens, place).requires_grad_()
    with torch.enable_grad():
        logits = _forward(model, tokens, [(place, _fixed(leaf))])
        (found,) = torch.autograd.grad(score(logits).sum(), [leaf])
    return leaf.detach(), found


def integrated_estimate(
    model: Any,
    tokens: Tensor,
    score: Callable[[Tensor], Tensor],
    places: Sequence[Place],
    news: Sequence[Tensor],
    steps: int,
) -> list[Tensor]:
    """As that of `raw_paths`: the places are of one component of one layer, and move together."""
    olds = [read(model, tokens, place) for place in places]
    totals = [torch.zeros_like(old) for old in olds]
    for step in range(steps):
        share = (step + 0.5) / steps
        leaves = [(old + share * (new - old)).requires_grad_() for old, new in zip(olds, news, strict=True)]
        with torch.enable_grad():
            logits = _forward(model, tokens, [(one, _fixed(leaf)) for one, leaf in zip(places, leaves, strict=True)])
            for total, slope in zip(totals, torch.autograd.grad(score(logits).sum(), leaves), strict=True):
                total += slope / steps
    moves = [new - old for old, new in zip(olds, news, strict=True)]
    return [(move * total).flatten(1).sum(1) for move, total in zip(moves, totals, strict=True)]


@torch.no_grad()
def own_weights(model: Any, tokens: Tensor) -> tuple[Tensor, ...]:
    """The attention weights that the model itself returns under eager attention, layer by layer."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        weights: tuple[Tensor, ...] = model(tokens, use_cache=False, output_attentions=True).attentions
        return weights
    finally:
        model.set_attn_implementation(usual)


# --- models ----------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 24, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 24}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
ROPE_3 = {
    **ROPE,
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}


def _llama_like(layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    counts = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {**SMALL, **counts, "intermediate_size": 20, "rope_parameters": ROPE, "pad_token_id": None, **more}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia": (
        "GPTNeoX",
        {**SMALL, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 30}
        | {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    ),
    "neox, one after the other": (
        "GPTNeoX",
        {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 30}
        | {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}, "use_parallel_residual": False},
    ),
    "neox without biases": (
        "GPTNeoX",
        {**SMALL, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 30, "attention_bias": False}
        | {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}},
    ),
    "llama": ("Llama", _llama_like(3, 4, 2)),
    "llama, wide heads": ("Llama", _llama_like(2, 3, 1, head_dim=10, attention_bias=True, mlp_bias=True)),
    "llama 3": ("Llama", _llama_like(2, 2, 2, rope_parameters=ROPE_3, tie_word_embeddings=True)),
    "gpt-neo": (
        "GPTNeo",
        {**SMALL, "num_layers": 4, "num_heads": 3, "intermediate_size": 30, "window_size": 5}
        | {"attention_types": [[["global", "local"], 2]]},
    ),
    "qwen2": ("Qwen2", _llama_like(3, 4, 2, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("Qwen3", _llama_like(2, 4, 2, head_dim=8)),
    "mistral": ("Mistral", _llama_like(3, 4, 2, sliding_window=5)),
    "gemma": ("Gemma", _llama_like(2, 4, 1, head_dim=8)),
}
"""Name to the class, without ``ForCausalLM``, and its configuration. All are small, and differ where families do."""


def random_model(name: str, seed: int = 0, **more: Any) -> Any:
    """A random model in eval mode, float32, far from linear: weights and biases N(0, 0.3), gains N(1, 0.3)."""
    kind, config = (MODELS | raw_variants.MODELS)[name]
    return random_weights(kind, {**config, **more}, seed)


@torch.no_grad()
def random_weights(kind: str, config: dict[str, Any], seed: int = 0) -> Any:
    """The same, of a class without ``ForCausalLM`` and a configuration."""
    with torch.random.fork_rng():
        made = getattr(transformers, f"{kind}Config")(**copy.deepcopy(config))  # it writes into what it is given
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(made)
    generator = torch.Generator().manual_seed(seed)
    own = anatomy(model)
    embeddings = {f"{path}.weight" for path in (own.embed, own.pos_embed) if path}
    for path, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if path in embeddings:
            parameter.copy_(
                noise / (24**0.5 if kind.startswith("Gemma") else 1)
            )  # which multiplies embeddings by as much
        elif "norm" in path.split(".")[-2] or ".ln_" in path:
            centre = float(path.endswith("weight") and not kind.startswith("Gemma"))
            parameter.copy_(centre + 0.3 * noise)
        elif kind == "GPTNeo" and ("q_proj" in path or "k_proj" in path):
            parameter.copy_(0.15 * noise)  # scores are not scaled
        else:
            parameter.copy_(0.3 * noise)
    return model.eval()
