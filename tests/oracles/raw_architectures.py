"""Owns the second opinion on decoders of any architecture: plain torch hooks at the borders of modules.

Imports torch and what `raw_paths` says of places; its table of paths is read off the modelling files of transformers.
A place is ``(layer, component, head, positions)``; a value is (example, position, ...), as in `raw_paths`.

=====================  ==========================================================================================
``embed pos_embed``    what the embedding of tokens (of positions) gives; the layer is ignored
``resid_pre``          what enters the block; ``resid_post`` what leaves it
``attn_in``            what enters the attention module; ``mlp_in`` the MLP
``q k v``              what the projections write, before any norm, clipping, scale or rotary embedding; heads of
                       ``k v`` are key-value heads; with latent attention q and v only
``z``                  what enters the output projection of attention, split into heads
``head_out``           z of a head times its rows of that projection, without bias, norm or multiplier
``attn_out mlp_out``   what is added to the stream: after a norm that follows, times a multiplier of the block
``resid_mid``          stream between attention and MLP; not there where both read the block's input
``mlp_pre mlp_post``   what the first matrix of the MLP writes (where it is gated: the gate), what enters its last;
                       nothing of experts; with a head, the number of a neuron
=====================  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from tests.oracles.raw_paths import Change, Place, _at, _changed, _fixed, _reader

QKV = ("q", "k", "v")
PER_HEAD = (*QKV, "z", "head_out")
PER_NEURON = ("mlp_pre", "mlp_post")


@dataclass(frozen=True)
class Parts:
    """Where an architecture keeps its parts: paths in the model and in a block. None: it has no such part."""

    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    pos_embed: str | None = None
    attention: str | None = "self_attn"
    out: str | None = "self_attn.o_proj"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    layout: str = "apart"
    """How the columns of one projection belong to q, k, v and heads: see `_columns`."""
    attn_out: str = "self_attn"
    """The module whose output is added to the stream."""
    mlp: str = "mlp"
    mlp_out: str = "mlp"
    neurons: tuple[str, str] | None = ("mlp.gate_proj", "mlp.down_proj")
    multiplier: str | None = None
    """The field of the configuration that what is added to the stream is multiplied by."""
    parallel: bool | str = False
    """Whether attention and MLP both read the block's input, or the field that says so."""


LLAMA = Parts()
TWO_NORMS = replace(LLAMA, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
EXPERTS = replace(LLAMA, neurons=None)
PHI_3 = replace(LLAMA, qkv=("self_attn.qkv_proj",), layout="in turn")
GPT_2 = Parts(
    "transformer.h", "transformer.wte", "transformer.wpe", "attn", "attn.c_proj", ("attn.c_attn",), "in turn", "attn",
    neurons=("mlp.c_fc", "mlp.c_proj"),
)  # fmt: skip
NEO_X = Parts(
    "gpt_neox.layers", "gpt_neox.embed_in", None, "attention", "attention.dense", ("attention.query_key_value",),
    "by group", "attention", neurons=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), parallel="use_parallel_residual",
)  # fmt: skip
GPT_J = Parts(
    "transformer.h", "transformer.wte", None, "attn", "attn.out_proj", ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "apart", "attn", neurons=("mlp.fc_in", "mlp.fc_out"), parallel=True,
)  # fmt: skip
BLOOM = Parts(
    "transformer.h", "transformer.word_embeddings", None, "self_attention", "self_attention.dense",
    ("self_attention.query_key_value",), "by group", "self_attention.dense",
    "mlp", "mlp.dense_4h_to_h", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)  # fmt: skip
NEO_PARTS = ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")
OPT_QKV = LLAMA.qkv

PARTS = {
    "gpt2": GPT_2,
    "gpt_neo": replace(GPT_2, attention="attn.attention", out="attn.attention.out_proj", qkv=NEO_PARTS, layout="apart"),
    "gpt_neox": NEO_X,
    "gptj": GPT_J,
    "opt": Parts(
        "model.decoder.layers", "model.decoder.embed_tokens", "model.decoder.embed_positions", "self_attn",
        "self_attn.out_proj", OPT_QKV, mlp="fc1", mlp_out="fc2", neurons=("fc1", "fc2"),
    ),
    "bloom": BLOOM,
    "phi": replace(LLAMA, out="self_attn.dense", neurons=("mlp.fc1", "mlp.fc2"), parallel=True),
    "phi3": replace(PHI_3, neurons=("mlp.gate_up_proj", "mlp.down_proj")),
    "falcon": replace(BLOOM, parallel="parallel_attn"),
    "stablelm": replace(LLAMA, parallel="use_parallel_residual"),
    "starcoder2": replace(LLAMA, neurons=("mlp.c_fc", "mlp.c_proj")),
    "granite": replace(LLAMA, multiplier="residual_multiplier"),
    "deepseek_v3": replace(EXPERTS, qkv=("self_attn.q_b_proj", "self_attn.kv_b_proj"), layout="latent"),
    "glm": replace(LLAMA, neurons=("mlp.gate_up_proj", "mlp.down_proj")),
    "glm4": replace(
        LLAMA, attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm",
        neurons=("mlp.gate_up_proj", "mlp.down_proj"),
    ),
    "nemotron": replace(LLAMA, neurons=("mlp.up_proj", "mlp.down_proj")),
    "mpt": Parts(
        "transformer.blocks", "transformer.wte", None, "attn", "attn.out_proj", ("attn.Wqkv",), "in turn", "attn",
        "ffn", "ffn.down_proj", ("ffn.up_proj", "ffn.down_proj"),
    ),
    "codegen": replace(GPT_J, qkv=("attn.qkv_proj",), layout="in fours"),
    "gpt_bigcode": GPT_2,
    "persimmon": replace(
        LLAMA, out="self_attn.dense", qkv=("self_attn.query_key_value",), layout="by group",
        neurons=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "mamba": Parts("backbone.layers", "backbone.embeddings", attention=None, out=None, qkv=(), mlp="", neurons=None),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3"), TWO_NORMS),
    **dict.fromkeys(("cohere", "cohere2"), replace(LLAMA, parallel=True)),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"), EXPERTS),
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "olmo", "smollm3", "helium"), LLAMA
    ),
}  # fmt: skip


def parts(model: Any) -> Parts:
    own = PARTS[model.config.model_type]
    if model.config.model_type == "gpt_bigcode" and not model.config.multi_query:
        return replace(own, layout="by group")
    if own.layout == "latent" and model.config.q_lora_rank is None:
        return replace(own, qkv=("self_attn.q_proj", "self_attn.kv_b_proj"))
    return own


def is_parallel(model: Any) -> bool:
    own, config = parts(model).parallel, model.config
    if own == "parallel_attn":
        return config.new_decoder_architecture or config.parallel_attn
    return own if isinstance(own, bool) else getattr(config, own)


def heads_of(model: Any) -> tuple[int, int]:
    """Query heads and key-value heads."""
    config = model.config
    if parts(model).attention is None:
        return 0, 0
    heads = getattr(config, "n_heads", None) or config.num_attention_heads
    if config.model_type == "falcon":
        alone = config.multi_query and not config.new_decoder_architecture
        return heads, 1 if alone else config.num_kv_heads
    if config.model_type == "gpt_bigcode":
        return heads, 1 if config.multi_query else heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _columns(model: Any, component: str, width: int) -> Tensor:
    """Which columns of the output of a projection are a component: (head, d), or (key-value head, d)."""
    (heads, kv_heads), layout, columns = heads_of(model), parts(model).layout, torch.arange(width)
    part = QKV.index(component)
    if layout == "apart" or (layout == "latent" and component == "q"):
        return columns.view(kv_heads if part else heads, -1)
    if layout == "in turn":  # q of all heads, k of all, v of all
        return columns.view(heads + 2 * kv_heads, -1).split((heads, kv_heads, kv_heads))[part]
    if layout == "by group":  # the query heads that share keys, then their k, then their v
        grouped = columns.view(kv_heads, heads // kv_heads + 2, -1)
        return (grouped[:, :-2], grouped[:, -2], grouped[:, -1])[part].reshape((heads, kv_heads, kv_heads)[part], -1)
    if layout == "in fours":  # four shards, in each q, then v, then k of its heads
        return columns.view(4, 3, heads // 4, -1)[:, (0, 2, 1)[part]].flatten(0, 1)
    return columns.view(heads, -1)[:, model.config.qk_nope_head_dim :]  # latent: keys without rotary part, and v


def components(model: Any) -> tuple[str, ...]:
    """What the architecture has, in forward order."""
    own = parts(model)
    position = ("pos_embed",) if own.pos_embed else ()
    if own.attention is None:
        return ("embed", *position, "resid_pre", "resid_post")
    qkv = ("q", "v") if own.layout == "latent" else QKV
    mid = () if is_parallel(model) else ("resid_mid",)
    neurons = PER_NEURON if own.neurons else ()
    rest = ("z", "head_out", "attn_out", *mid, "mlp_in", *neurons, "mlp_out", "resid_post")
    return ("embed", *position, "resid_pre", "attn_in", *qkv, *rest)


def block_of(model: Any, layer: int) -> Any:
    return attrgetter(parts(model).blocks)(model)[layer]


def _of_input(act: Change, module: Any, rows: int) -> Any:
    """A hook on what enters a module: its first argument, or ``hidden_states`` by name."""

    def hook(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if args:
            return (_apart(args[0], act, rows), *args[1:]), named
        return args, {**named, "hidden_states": _apart(named["hidden_states"], act, rows)}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _of_output(act: Change, module: Any, rows: int) -> Any:
    """A hook on what leaves a module: all of it, or the first of several."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_apart(output[0], act, rows), *output[1:])
        return _apart(output, act, rows)

    return module.register_forward_hook(hook)


def _apart(value: Tensor, act: Change, rows: int) -> Tensor:
    """Some modules get (example x position, d) or (example, 1, position, d); positions are embedded once for all."""
    if value.dim() == 2 and value.shape[0] % rows == 0:
        return act(value.unflatten(0, (rows, -1))).flatten(0, 1)
    if value.dim() == 4:
        return act(value[:, 0])[:, None]
    return act(value.expand(rows, *value.shape[-2:]))


def _hooks(model: Any, tokens: Tensor, place: Place, change: Change) -> list[Any]:
    """Handles that change one place; they act in the order in which they were made."""
    layer, component, head, positions = place
    if component not in components(model):
        raise ValueError(f"{component!r} is not one of {components(model)}")
    own, (heads, _), rows = parts(model), heads_of(model), len(tokens)
    block = block_of(model, layer)
    times = getattr(model.config, own.multiplier) if own.multiplier else 1.0

    def at(path: str | None) -> Any:
        return attrgetter(path)(block) if path else block

    def whole(value: Tensor) -> Tensor:
        return _changed(value, _at(positions, head), change)

    def added(value: Tensor) -> Tensor:
        return whole(value * times) / times

    if component in ("embed", "pos_embed"):
        return [_of_output(whole, attrgetter(getattr(own, component))(model), rows)]
    if component in QKV:
        path = own.qkv[min(QKV.index(component), len(own.qkv) - 1)]

        def projected(value: Tensor) -> Tensor:
            columns = _columns(model, component, value.shape[-1])
            flat = columns.flatten()
            made = whole(value[..., flat].unflatten(-1, columns.shape))
            changed = value.clone()
            changed[..., flat] = made.flatten(2)
            return changed

        return [_of_output(projected, at(path), rows)]
    if component == "z":
        return [_of_input(lambda value: whole(value.unflatten(-1, (heads, -1))).flatten(2), at(own.out), rows)]
    if component == "head_out":
        out, seen = at(own.out), {}
        weight = out.weight if type(out).__name__ == "Conv1D" else out.weight.T
        of_head = weight.unflatten(0, (heads, -1))[head]

        def look(value: Tensor) -> Tensor:
            seen["z"] = value.unflatten(-1, (heads, -1))[:, :, head]
            return value

        def put(value: Tensor) -> Tensor:
            old = seen["z"] @ of_head
            return value + (_changed(old, _at(positions), change) - old)

        return [_of_input(look, out, rows), _of_output(put, out, rows)]
    if component == "resid_mid":
        stream = {}

        def enter(value: Tensor) -> Tensor:
            stream["pre"] = value
            return value

        def middle(value: Tensor) -> Tensor:
            return (whole(stream["pre"] + value * times) - stream["pre"]) / times

        return [_of_input(enter, block, rows), _of_output(middle, at(own.attn_out), rows)]
    if component == "mlp_pre":

        def gate(value: Tensor) -> Tensor:
            last = at(own.neurons[1])
            width = last.weight.shape[0 if type(last).__name__ == "Conv1D" else 1]
            return torch.cat([whole(value[..., :width]), value[..., width:]], -1)

        return [_of_output(gate, at(own.neurons[0]), rows)]
    entering = {
        "resid_pre": None,
        "attn_in": own.attention,
        "mlp_in": own.mlp,
        "mlp_post": own.neurons and own.neurons[1],
    }
    if component in entering:
        return [_of_input(whole, at(entering[component]), rows)]
    leaving = {"attn_out": own.attn_out, "mlp_out": own.mlp_out, "resid_post": None}
    return [_of_output(whole if component == "resid_post" else added, at(leaving[component]), rows)]


@torch.no_grad()
def run(model: Any, tokens: Tensor, changes: Sequence[tuple[Place, Change]] = ()) -> Tensor:
    """Logits with several changes in one forward pass; changes of one component of one layer act in list order."""
    with ExitStack() as stack:
        for place, change in changes:
            for handle in _hooks(model, tokens, Place(*place), change):
                stack.enter_context(handle)
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits


def read(model: Any, tokens: Tensor, *places: Place) -> list[Tensor]:
    """Values at places in one untouched run."""
    seen: dict[str, Tensor] = {}
    run(model, tokens, [_reader(seen, Place(*place)) for place in places])
    return [seen[str(Place(*place))] for place in places]


def write(model: Any, tokens: Tensor, place: Place, new: Tensor | float) -> Tensor:
    """Logits where a place is set to ``new``, which broadcasts to the place's value."""
    return run(model, tokens, [(place, _fixed(new))])


def add(model: Any, tokens: Tensor, place: Place, vector: Tensor) -> Tensor:
    """Logits where a vector is added at a place."""
    return run(model, tokens, [(place, lambda old: old + vector)])


def patch(model: Any, tokens: Tensor, place: Place, source: Tensor) -> Tensor:
    """Logits where a place has the value that it has in another run."""
    return write(model, tokens, place, read(model, source, place)[0])
