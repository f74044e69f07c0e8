"""One table per model family: the only file that names Hugging Face modules. Imports `family`.

Another family becomes known with `register`; `Family.template` writes a table to start from::

    from dataclasses import replace
    import headwise as hw
    from headwise.interventions import FAMILIES

    hw.register(replace(FAMILIES["llama"], name="olmo", model_types=("olmo",), centred=True))
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .family import FAMILIES, Family, register, standard_scaling, standard_sizes
from .windows import windows_by_layer, windows_everywhere

__all__ = [
    "FAMILIES",
    "Family",
    "register",
    "standard_scaling",
    "standard_sizes",
    "windows_by_layer",
    "windows_everywhere",
]


def _gpt2_sizes(config: Any) -> dict[str, Any]:
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
    return float(scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale)


GPT2 = register(
    Family(
        name="gpt2",
        model_types=("gpt2",),
        blocks="transformer.h",
        embeddings={"embed": "transformer.wte", "pos_embed": "transformer.wpe"},
        modules={
            "norm_1": "ln_1",
            "qkv": "attn.c_attn",
            "out": "attn.c_proj",
            "attention": "attn",
            "norm_2": "ln_2",
            "mlp": "mlp",
            "pre": "mlp.c_fc",
            "act": "mlp.act",
            "down": "mlp.c_proj",
            "norm": "transformer.ln_f",
            "unembed": "lm_head",
        },
        layout="side by side",
        transposed=True,
        centred=True,
        sizes=_gpt2_sizes,
        scaling=_gpt2_scaling,
    )
)


def _gpt_neo_sizes(config: Any) -> dict[str, Any]:
    return {
        "layers": config.num_layers,
        "heads": config.num_heads,
        "d_model": config.hidden_size,
        "d_head": config.hidden_size // config.num_heads,
        "d_mlp": config.intermediate_size or 4 * config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "windows": tuple(config.window_size if kind == "local" else None for kind in config.attention_layers),
    }


GPT_NEO = register(
    Family(
        name="gpt_neo",
        model_types=("gpt_neo",),
        blocks="transformer.h",
        embeddings={"embed": "transformer.wte", "pos_embed": "transformer.wpe"},
        modules={
            "norm_1": "ln_1",
            "q": "attn.attention.q_proj",
            "k": "attn.attention.k_proj",
            "v": "attn.attention.v_proj",
            "out": "attn.attention.out_proj",
            "attention": "attn",
            "norm_2": "ln_2",
            "mlp": "mlp",
            "pre": "mlp.c_fc",
            "act": "mlp.act",
            "down": "mlp.c_proj",
            "norm": "transformer.ln_f",
            "unembed": "lm_head",
        },
        centred=True,
        sizes=_gpt_neo_sizes,
        scaling=lambda config, layer: 1.0,
    )
)


def _gpt_neox_sizes(config: Any) -> dict[str, Any]:
    return standard_sizes(config) | {"gated": False, "parallel": bool(config.use_parallel_residual)}


GPT_NEOX = register(
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        embeddings={"embed": "gpt_neox.embed_in"},
        modules={
            "norm_1": "input_layernorm",
            "qkv": "attention.query_key_value",
            "out": "attention.dense",
            "attention": "attention",
            "norm_2": "post_attention_layernorm",
            "mlp": "mlp",
            "pre": "mlp.dense_h_to_4h",
            "act": "mlp.act",
            "down": "mlp.dense_4h_to_h",
            "norm": "gpt_neox.final_layer_norm",
            "rotary": "gpt_neox.rotary_emb",
            "unembed": "lm_head",
        },
        layout="by head",
        centred=True,
        sizes=_gpt_neox_sizes,
    )
)

LLAMA = register(
    Family(
        name="llama",
        model_types=("llama",),
        blocks="model.layers",
        embeddings={"embed": "model.embed_tokens"},
        modules={
            "norm_1": "input_layernorm",
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "out": "self_attn.o_proj",
            "attention": "self_attn",
            "norm_2": "post_attention_layernorm",
            "mlp": "mlp",
            "pre": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "act": "mlp.act_fn",
            "down": "mlp.down_proj",
            "norm": "model.norm",
            "rotary": "model.rotary_emb",
            "unembed": "lm_head",
        },
    )
)


def _mistral_sizes(config: Any) -> dict[str, Any]:
    return standard_sizes(config) | {"windows": windows_everywhere(config)}


def _qwen_sizes(config: Any) -> dict[str, Any]:
    return standard_sizes(config) | {"windows": windows_by_layer(config)}


MISTRAL = register(replace(LLAMA, name="mistral", model_types=("mistral",), sizes=_mistral_sizes))
QWEN2 = register(replace(LLAMA, name="qwen2", model_types=("qwen2",), sizes=_qwen_sizes))
QWEN3 = register(
    replace(
        QWEN2,
        name="qwen3",
        model_types=("qwen3",),
        modules={**LLAMA.modules, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
    )
)
GEMMA = register(replace(LLAMA, name="gemma", model_types=("gemma",), gain_offset=1.0))

TABLES = tuple(FAMILIES.values())
"""Those of the package. A model of theirs that computes something else is called; another table has to fit."""
