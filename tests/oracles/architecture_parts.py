"""Owns the table of where architectures of transformers keep their parts, read off their modelling files.

Imports torch only. `raw_architectures` reads and writes there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

QKV = ("q", "k", "v")


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
    """How the columns of one projection belong to q, k, v and heads: see `columns`."""
    attn_out: str = "self_attn"
    """The module whose output is added to the stream."""
    mlp: str = "mlp"
    mlp_out: str = "mlp"
    neurons: tuple[str, str] | None = ("mlp.gate_proj", "mlp.down_proj")
    multiplier: str | None = None
    """The field of the configuration that what is added to the stream is multiplied by."""
    parallel: bool | str = False
    """Whether attention and MLP both read the block's input, or the field that says so."""
    sums: bool = True
    """Whether a block adds what attention and MLP give to the stream, and does nothing else to it."""
    normed: str | None = None
    """The module that gives what attention reads, where attention takes that several times."""


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
BLOCKS = Parts(attention=None, out=None, qkv=(), mlp="", neurons=None)
NEO_PARTS = ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")
OPT_LIKE = replace(
    LLAMA, pos_embed="model.embed_positions", out="self_attn.out_proj", mlp="fc1", mlp_out="fc2", neurons=("fc1", "fc2")
)

PARTS = {
    "gpt2": GPT_2,
    "gpt_neo": replace(GPT_2, attention="attn.attention", out="attn.attention.out_proj", qkv=NEO_PARTS, layout="apart"),
    "gpt_neox": NEO_X,
    "gptj": GPT_J,
    "opt": replace(
        OPT_LIKE, blocks="model.decoder.layers", embed="model.decoder.embed_tokens",
        pos_embed="model.decoder.embed_positions",
    ),
    "bloom": BLOOM,
    "xglm": OPT_LIKE,
    "biogpt": replace(
        OPT_LIKE, blocks="biogpt.layers", embed="biogpt.embed_tokens", pos_embed="biogpt.embed_positions",
    ),
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
    "granitemoe": replace(
        EXPERTS, mlp="block_sparse_moe", mlp_out="block_sparse_moe", multiplier="residual_multiplier"
    ),
    "deepseek_v2": replace(EXPERTS, qkv=("self_attn.q_b_proj", "self_attn.kv_b_proj"), layout="latent"),
    "hyperclovax": replace(LLAMA, attn_out="post_norm1", mlp_out="post_norm2", multiplier="residual_multiplier"),
    "afmoe": replace(EXPERTS, attn_out="post_attention_layernorm", mlp_out="post_mlp_layernorm"),
    "nanochat": replace(LLAMA, neurons=("mlp.fc1", "mlp.fc2")),
    "openai-gpt": replace(GPT_2, embed="transformer.tokens_embed", pos_embed="transformer.positions_embed", sums=False),
    "ctrl": Parts(
        "transformer.h", "transformer.w", None, "multi_head_attention", "multi_head_attention.dense",
        ("multi_head_attention.Wq", "multi_head_attention.Wk", "multi_head_attention.Wv"), "apart",
        "multi_head_attention", "ffn", "ffn", ("ffn.0", "ffn.2"), normed="layernorm1",
    ),
    "llama4_text": replace(EXPERTS, mlp="feed_forward", mlp_out="feed_forward"),
    "minimax": replace(EXPERTS, sums=False),
    "falcon_h1": replace(
        LLAMA, mlp="feed_forward", mlp_out="feed_forward", sums=False,
        neurons=("feed_forward.gate_proj", "feed_forward.down_proj"),
    ),
    **dict.fromkeys(("mamba", "mamba2"), replace(BLOCKS, blocks="backbone.layers", embed="backbone.embeddings")),
    **dict.fromkeys(("qwen3_next", "lfm2", "jamba", "bamba", "recurrent_gemma"), BLOCKS),
    **dict.fromkeys(("arcee", "apertus"), replace(LLAMA, neurons=("mlp.up_proj", "mlp.down_proj"))),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), TWO_NORMS),
    **dict.fromkeys(("cohere", "cohere2"), replace(LLAMA, parallel=True)),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "phimoe", "glm4_moe", "dots1"), EXPERTS),
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "olmo", "smollm3", "helium", "seed_oss"),
            *("ernie4_5", "cwm", "hunyuan_v1_dense", "ministral3", "vaultgemma", "bitnet", "diffllama"),
        ),
        LLAMA,
    ),
}  # fmt: skip


def parts(model: Any) -> Parts:
    own, config = PARTS[model.config.model_type], model.config
    if not getattr(config, "do_layer_norm_before", True) or getattr(
        config, "apply_residual_connection_post_layernorm", False
    ):
        return replace(own, sums=False)
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


def columns(model: Any, component: str, width: int) -> Tensor:
    """Which columns of the output of a projection are a component: (head, d), or (key-value head, d)."""
    (heads, kv_heads), layout, all_of = heads_of(model), parts(model).layout, torch.arange(width)
    part = QKV.index(component)
    if layout == "apart" or (layout == "latent" and component == "q"):
        return all_of.view(kv_heads if part else heads, -1)
    if layout == "in turn":  # q of all heads, k of all, v of all
        return all_of.view(heads + 2 * kv_heads, -1).split((heads, kv_heads, kv_heads))[part]
    if layout == "by group":  # the query heads that share keys, then their k, then their v
        grouped = all_of.view(kv_heads, heads // kv_heads + 2, -1)
        return (grouped[:, :-2], grouped[:, -2], grouped[:, -1])[part].reshape((heads, kv_heads, kv_heads)[part], -1)
    if layout == "in fours":  # four shards, in each q, then v, then k of its heads
        return all_of.view(4, 3, heads // 4, -1)[:, (0, 2, 1)[part]].flatten(0, 1)
    return all_of.view(heads, -1)[:, model.config.qk_nope_head_dim :]  # latent: keys without rotary part, and v
