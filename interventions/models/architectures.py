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


def _without(family: Family, *parts: str) -> dict[str, str]:
    """The modules of a family, some left out."""
    return {part: path for part, path in family.modules.items() if part not in parts}


NO_NEURONS = ("pre", "up", "act", "down")
"""What an MLP of experts, or one whose gate and input are one matrix, has not as modules of its own."""


def _experts(config: Any, width: str = "intermediate_size") -> int:
    """The width that an MLP of experts works with for one token."""
    return int(
        config.num_experts_per_tok * getattr(config, width) + getattr(config, "shared_expert_intermediate_size", 0)
    )


def _mixtral_sizes(config: Any) -> dict[str, Any]:
    return _mistral_sizes(config) | {"d_mlp": _experts(config)}


def _qwen_moe_sizes(config: Any) -> dict[str, Any]:
    return _qwen_sizes(config) | {"d_mlp": _experts(config, "moe_intermediate_size")}


MINISTRAL = register(replace(QWEN2, name="ministral", model_types=("ministral",)))
MIXTRAL = register(
    replace(
        LLAMA,
        name="mixtral",
        model_types=("mixtral",),
        modules=_without(LLAMA, *NO_NEURONS),
        sizes=_mixtral_sizes,
    )
)
QWEN2_MOE = register(replace(MIXTRAL, name="qwen2_moe", model_types=("qwen2_moe",), sizes=_qwen_moe_sizes))
QWEN3_MOE = register(
    replace(
        QWEN3,
        name="qwen3_moe",
        model_types=("qwen3_moe",),
        modules=_without(QWEN3, *NO_NEURONS),
        sizes=_qwen_moe_sizes,
    )
)
PHI3 = register(
    replace(
        MISTRAL,
        name="phi3",
        model_types=("phi3",),
        modules=_without(LLAMA, "q", "k", "v", *NO_NEURONS) | {"qkv": "self_attn.qkv_proj"},
        layout="side by side",
    )
)


def _ungated_sizes(config: Any) -> dict[str, Any]:
    return standard_sizes(config) | {"gated": False}


NEMOTRON = register(
    replace(
        LLAMA,
        name="nemotron",
        model_types=("nemotron",),
        modules=_without(LLAMA, "up") | {"pre": "mlp.up_proj"},
        centred=True,
        gain_offset=1.0,
        sizes=_ungated_sizes,
    )
)
STARCODER2 = register(
    replace(
        LLAMA,
        name="starcoder2",
        model_types=("starcoder2",),
        modules=_without(LLAMA, "up") | {"pre": "mlp.c_fc", "act": "mlp.act", "down": "mlp.c_proj"},
        centred=True,
        sizes=lambda config: _mistral_sizes(config) | {"gated": False},
    )
)
STABLELM = register(
    replace(
        LLAMA,
        name="stablelm",
        model_types=("stablelm",),
        centred=True,
        sizes=lambda config: standard_sizes(config) | {"parallel": bool(config.use_parallel_residual)},
    )
)
PHI = register(
    replace(
        LLAMA,
        name="phi",
        model_types=("phi",),
        modules=_without(LLAMA, "up")
        | {"out": "self_attn.dense", "norm_2": "input_layernorm", "norm": "model.final_layernorm"}
        | {"pre": "mlp.fc1", "act": "mlp.activation_fn", "down": "mlp.fc2"},
        centred=True,
        sizes=lambda config: standard_sizes(config) | {"gated": False, "parallel": True},
    )
)


def _scaled_by_field(config: Any, layer: int) -> float:
    """One over the root of what the configuration says, which need not be the width of a head."""
    return float(config.query_pre_attn_scalar**-0.5)


def _gemma2_sizes(config: Any) -> dict[str, Any]:
    last = config.final_logit_softcapping
    tail = None if last is None else (1 / last, True, float(last))
    return _qwen_sizes(config) | {"cap": config.attn_logit_softcapping, "tail": tail}


NORMS_AFTER = {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
GEMMA2 = register(
    replace(
        GEMMA,
        name="gemma2",
        model_types=("gemma2",),
        modules={**LLAMA.modules, **NORMS_AFTER, "norm_2": "pre_feedforward_layernorm"},
        sizes=_gemma2_sizes,
        scaling=_scaled_by_field,
    )
)
GEMMA3 = register(
    replace(
        GEMMA2,
        name="gemma3",
        model_types=("gemma3_text",),
        modules={**GEMMA2.modules, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
        sizes=lambda config: _gemma2_sizes(config) | {"cap": None, "kinds": tuple(config.layer_types)},
    )
)
OLMO2 = register(
    replace(
        LLAMA,
        name="olmo2",
        model_types=("olmo2",),
        modules=_without(QWEN3, "norm_1", "norm_2") | NORMS_AFTER,
        sizes=lambda config: standard_sizes(config) | {"joint_norms": True},
    )
)
GPT_OSS = register(
    replace(
        MIXTRAL,
        name="gpt_oss",
        model_types=("gpt_oss",),
        modules={**MIXTRAL.modules, "sinks": "self_attn.sinks"},
        sizes=lambda config: _qwen_sizes(config) | {"d_mlp": _experts(config), "paired": True},
    )
)
GPT_J = register(
    replace(
        GPT2,
        name="gptj",
        model_types=("gptj",),
        embeddings={"embed": "transformer.wte"},
        modules=_without(GPT2, "qkv")
        | {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "out": "attn.out_proj", "norm_2": "ln_1"}
        | {"pre": "mlp.fc_in", "down": "mlp.fc_out", "rotary": "transformer.h.0.attn.embed_positions"},
        layout="apart",
        transposed=False,
        sizes=lambda config: _gpt2_sizes(config) | {"parallel": True, "neighbours": True, "paired": True},
        scaling=lambda config, layer: float((config.n_embd // config.n_head) ** -0.5),
    )
)
OLMO = register(replace(LLAMA, name="olmo", model_types=("olmo",), centred=True))

TABLES = tuple(FAMILIES.values())
"""Those of the package. A model of theirs that computes something else is called; another table has to fit."""
