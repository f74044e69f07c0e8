"""Owns more small random models, one shape each: variants of architectures, and those that differ in instructive ways.

Norms after the sum, experts that all tokens share, gates on heads, mixers that are no attention. The
tables of `architectures` and `architecture_parts` have them all.
"""

from __future__ import annotations

from typing import Any

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
GROUPED = {**WIDE, "num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": False}
GROUPED_8 = {**GROUPED, "head_dim": 8}
SLIDING, FULL = "sliding_attention", "full_attention"
ALTERNATING = {"sliding_window": 4, "layer_types": [SLIDING, FULL]}
PADDED = {"pad_token_id": 0}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
MAMBA_2 = {"num_heads": 4, "head_dim": 16, "state_size": 6, "n_groups": 2, "conv_kernel": 3, "chunk_size": 4}
MIXED = {
    "mamba_d_state": 6,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 3,
}

MORE: dict[str, dict[str, Any]] = {
    "opt, norms after": {
        **WIDE,
        "ffn_dim": 48,
        "word_embed_proj_dim": 20,
        "do_layer_norm_before": False,
        "max_position_embeddings": 32,
    },
    "bloom, stream of norms": {
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 61,
        "apply_residual_connection_post_layernorm": True,
    },
    "falcon, alibi": {
        **WIDE,
        "alibi": True,
        "multi_query": False,
        "new_decoder_architecture": False,
        "parallel_attn": False,
    },
    "phi3, long": {
        **GROUPED_8,
        **PADDED,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 6,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
    },
    "olmoe": {**GROUPED_8, "num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**GROUPED_8, "num_local_experts": 4, "num_experts_per_tok": 2, "lm_head_bias": True},
    "granitemoe": {**GROUPED_8, "num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.4, **PADDED},
    "glm4_moe": {**GROUPED, **ROUTED, "use_qk_norm": True},
    "dots1": {**GROUPED, **ROUTED},
    "deepseek_v2": {
        **WIDE,
        **ROUTED,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 7,
        "topk_method": "greedy",
    },
    "exaone4": {**GROUPED, **ALTERNATING},
    "seed_oss": GROUPED,
    "ernie4_5": {**GROUPED, "use_bias": True},
    "cwm": {**GROUPED, **ALTERNATING},
    "hunyuan_v1_dense": GROUPED,
    "ministral3": GROUPED,
    "arcee": GROUPED,
    "apertus": GROUPED_8,
    "nanochat": GROUPED_8,
    "vaultgemma": {**GROUPED, **ALTERNATING, "query_pre_attn_scalar": 13, "attn_logit_softcapping": 1.5},
    "bitnet": GROUPED_8,
    "hyperclovax": {**GROUPED_8, "residual_multiplier": 0.4, "use_post_norm": True},
    "afmoe": {
        **GROUPED,
        **ALTERNATING,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "moe_intermediate_size": 20,
        **PADDED,
    },
    "diffllama": {**GROUPED_8},
    "biogpt": {**WIDE, "max_position_embeddings": 32},
    "xglm": {
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "attention_heads": 4,
        "vocab_size": 61,
        "max_position_embeddings": 32,
    },
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 32},
    "ctrl": {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 32},
    "llama4_text": {
        **GROUPED,
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 4,
    },
    "minimax": {**GROUPED, "num_local_experts": 4, "layer_types": [FULL, FULL]},
    "qwen3_next": {
        **GROUPED,
        **LINEAR,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", FULL],
    },
    "lfm2": {**GROUPED_8, "layer_types": ["conv", FULL]},
    "falcon_h1": {**GROUPED, **MIXED, "mamba_d_ssm": 64},
    "jamba": {
        **GROUPED_8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
    },
    "bamba": {**GROUPED_8, **MIXED, "attn_layer_indices": [1]},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "expand": 2, **MAMBA_2},
    "recurrent_gemma": {
        **GROUPED,
        "attention_window_size": 4,
        "lru_width": 32,
        "block_types": ["recurrent", "attention"],
    },
}
