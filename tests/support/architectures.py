"""Owns a table of small random models: decoders of transformers, each in two shapes; imports torch and transformers.

The two shapes of an architecture differ in layers, heads, widths, vocabulary and in what the architecture can vary:
heads that share keys and values, a head width that is not hidden width through heads, sliding windows (all are shorter
than `PROMPT`), soft caps, experts, tied or untied embeddings. Norm weights, biases, sinks and other vectors are random.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.more_architectures import MORE

PROMPT = 11
"""Tokens of a prompt; every sliding window is shorter."""

# Names of counts differ: `hidden_size` and others in most families, `n_embd` in those that follow GPT-2.
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
DEEP = {"hidden_size": 48, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "vocab_size": 53}
N_WIDE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 32}
N_DEEP = {"n_embd": 48, "n_layer": 3, "n_head": 3, "vocab_size": 53, "n_positions": 24}
GROUPED = {**WIDE, "num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": False}
ONE_KEY = {**DEEP, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}
GROUPED_8 = {**GROUPED, "head_dim": 8}
ONE_KEY_16 = {**ONE_KEY, "head_dim": 16}
SLIDING, FULL = "sliding_attention", "full_attention"
ALTERNATING = {"sliding_window": 4, "layer_types": [SLIDING, FULL]}
MOSTLY = {"sliding_window": 3, "layer_types": [SLIDING, SLIDING, FULL]}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
PARTLY = {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
LLAMA_3 = {
    "rope_parameters": {
        **ROPE,
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
}
BY_KIND = {FULL: ROPE, SLIDING: {"rope_type": "default", "rope_theta": 10.0}}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MORE_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 3}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT = {
    **WIDE,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 7,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
MAMBA = {"state_size": 6, "conv_kernel": 3, "expand": 2, "time_step_rank": 4}

SHAPES: dict[str, tuple[dict[str, Any], ...]] = {
    "gpt2": (N_WIDE, {**N_DEEP, "n_inner": 50, "tie_word_embeddings": False}),
    "gpt_neo": (
        {**WIDE, "num_layers": 2, "attention_types": [[["local", "global"], 1]], "window_size": 4},
        {**DEEP, "num_layers": 3, "attention_types": [[["global", "local", "local"], 1]], "window_size": 3},
    ),
    "gpt_neox": (
        WIDE,
        {**DEEP, "use_parallel_residual": False, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
    ),
    "gptj": ({**N_WIDE, "rotary_dim": 4}, {**N_DEEP, "rotary_dim": 16, "n_inner": 50}),
    "opt": (
        {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
        {**DEEP, "ffn_dim": 36, "word_embed_proj_dim": 20, "max_position_embeddings": 24, "tie_word_embeddings": False},
    ),
    "bloom": (
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61},
        {"hidden_size": 48, "n_layer": 3, "n_head": 3, "vocab_size": 53},
    ),
    "llama": (GROUPED, {**ONE_KEY, **LLAMA_3, "attention_bias": True, "mlp_bias": True}),
    "mistral": ({**GROUPED, "sliding_window": 4}, {**ONE_KEY, "sliding_window": None}),
    "ministral": ({**GROUPED, **ALTERNATING}, {**ONE_KEY, **MOSTLY}),
    "qwen2": (
        GROUPED_8,
        {**ONE_KEY_16, "use_sliding_window": True, **MOSTLY},
    ),
    "qwen3": (GROUPED, {**ONE_KEY, "use_sliding_window": True, "attention_bias": True, **MOSTLY}),
    "gemma": (GROUPED, ONE_KEY),
    "gemma2": (
        {
            **GROUPED,
            **ALTERNATING,
            "query_pre_attn_scalar": 13,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
        },
        {
            **ONE_KEY,
            **MOSTLY,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 0.7,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3_text": (
        {**GROUPED, **ALTERNATING, "query_pre_attn_scalar": 13, "rope_parameters": BY_KIND},
        {**ONE_KEY, **MOSTLY, "query_pre_attn_scalar": 5, "final_logit_softcapping": 2.0, "rope_parameters": BY_KIND},
    ),
    "phi": (
        {**WIDE, "num_key_value_heads": 2, "qk_layernorm": True, **PARTLY},
        {**DEEP, "num_key_value_heads": 1, "qk_layernorm": False, **PARTLY},
    ),
    "phi3": ({**GROUPED, "sliding_window": 4, "pad_token_id": 0}, {**ONE_KEY_16, **PARTLY, "pad_token_id": 0}),
    "olmo": ({**GROUPED_8, "clip_qkv": 0.5}, {**ONE_KEY_16, "attention_bias": True}),
    "olmo2": (GROUPED_8, {**ONE_KEY_16, "attention_bias": True}),
    "olmo3": ({**GROUPED_8, **ALTERNATING}, {**ONE_KEY_16, **MOSTLY}),
    "falcon": (
        {**WIDE, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
        {
            **DEEP,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
            "bias": True,
            "ffn_hidden_size": 40,
        },
    ),
    "stablelm": (
        {**WIDE, "num_key_value_heads": 2, "use_parallel_residual": True, "qk_layernorm": True},
        {**DEEP, "num_key_value_heads": 1, "use_qkv_bias": True, **PARTLY},
    ),
    "starcoder2": (
        {**WIDE, "num_key_value_heads": 2, "sliding_window": 4},
        {**DEEP, "num_key_value_heads": 1, "use_bias": False},
    ),
    "cohere": ({**GROUPED_8, "use_qk_norm": True, "logit_scale": 0.5}, {**ONE_KEY_16, "logit_scale": 0.25}),
    "cohere2": ({**GROUPED, **ALTERNATING, "logit_scale": 0.5}, {**ONE_KEY, **MOSTLY, "logit_scale": 0.25}),
    "granite": (
        {
            **GROUPED_8,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
        {
            **ONE_KEY_16,
            "residual_multiplier": 1.5,
            "attention_multiplier": 0.5,
            "embedding_multiplier": 0.5,
            "attention_bias": True,
        },
    ),
    "mixtral": ({**GROUPED, **EXPERTS, "sliding_window": 4}, {**ONE_KEY, **MORE_EXPERTS}),
    "qwen2_moe": (
        {**GROUPED_8, **QWEN_EXPERTS, "shared_expert_intermediate_size": 24},
        {
            **ONE_KEY_16,
            **QWEN_EXPERTS,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": ({**GROUPED, **QWEN_EXPERTS}, {**ONE_KEY, **QWEN_EXPERTS, "num_experts": 5, "norm_topk_prob": True}),
    "gpt_oss": ({**GROUPED, **EXPERTS, **ALTERNATING}, {**ONE_KEY, **MORE_EXPERTS, **MOSTLY}),
    "deepseek_v3": (
        LATENT,
        {**LATENT, "num_hidden_layers": 3, "q_lora_rank": None, "first_k_dense_replace": 2, "v_head_dim": 8},
    ),
    "smollm3": (
        {**GROUPED_8, "no_rope_layers": [1, 0], "pad_token_id": 0},
        {**ONE_KEY_16, "no_rope_layers": [0, 1, 1], "use_sliding_window": True, **MOSTLY, "pad_token_id": 0},
    ),
    "glm": ({**GROUPED, "attention_bias": True, "pad_token_id": 0}, {**ONE_KEY, "pad_token_id": 0}),
    "glm4": ({**GROUPED, "attention_bias": True, "pad_token_id": 0}, {**ONE_KEY, "pad_token_id": 0}),
    "nemotron": ({**GROUPED, "mlp_bias": True}, {**ONE_KEY, "attention_bias": True}),
    "mpt": (
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 32},
        {
            "d_model": 40,
            "n_heads": 8,
            "n_layers": 3,
            "vocab_size": 53,
            "max_seq_len": 24,
            "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.7},
        },
    ),
    "codegen": ({**N_WIDE, "rotary_dim": 4}, {**N_DEEP, "n_head": 8, "rotary_dim": 6}),
    "gpt_bigcode": ({**N_WIDE, "multi_query": True}, {**N_DEEP, "multi_query": False, "n_inner": 50}),
    "persimmon": ({**WIDE, "qk_layernorm": True}, {**DEEP, "qk_layernorm": False}),
    "helium": (GROUPED_8, {**ONE_KEY_16, "attention_bias": True}),
    "mamba": (
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, **MAMBA},
        {"hidden_size": 24, "num_hidden_layers": 3, "vocab_size": 53, **MAMBA},
    ),
    **{name: (one,) for name, one in MORE.items()},
}
"""What `AutoConfig.for_model` is given for an architecture, in two shapes, or one of a variant (after the comma)."""
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in range(len(shapes))]


def config(name: str, shape: int) -> Any:
    """The configuration of a shape of an architecture."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return AutoConfig.for_model(name.partition(",")[0], **{**ends, **SHAPES[name][shape]})


def build(name: str, shape: int, **other: Any) -> PreTrainedModel:
    """A random model in evaluation mode; the same one each time. `other` replaces fields of its configuration."""
    made = config(name, shape)
    for field, value in other.items():
        setattr(made, field, value)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the file of gpt_bigcode scripts functions
        torch.manual_seed(shape)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        draw(model)
    return model.eval()


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Draw all weights at random, so that every part has an effect and no softmax is saturated."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("A_log") or not (isinstance(weight, nn.Parameter) or "correction" in name):
            continue
        if weight.dim() == 1 or "norm" in name or name.endswith("bias"):
            first = 1.0 if name.endswith("weight") and weight.mean() > 0.5 else 0.0
            weight.normal_(first, 0.3)
        else:
            weight.normal_(0.0, 0.25 if id(weight) in embeddings else 0.8 / weight.shape[-1] ** 0.5)


@cache
def prompts(name: str, shape: int) -> torch.Tensor:
    """Tokens `(3, PROMPT)`: no token comes twice in a prompt."""
    made = torch.Generator().manual_seed(shape + 1)
    vocabulary = config(name, shape).vocab_size
    return torch.stack([torch.randperm(vocabulary - 1, generator=made)[:PROMPT] + 1 for _ in range(3)])
