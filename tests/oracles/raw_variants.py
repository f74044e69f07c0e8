"""Owns what `raw_families` says of models with other parts: norms after attention, soft caps, sinks, other rotations.

Tables of paths and configurations, and the softmax of scores; written from the modelling code of transformers. Imports
torch only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AFTER = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
GEMMA_2 = {**AFTER, "norm_2": "pre_feedforward_layernorm"}
ANATOMIES: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA_2,
    "gemma3_text": GEMMA_2,
    "olmo2": {**AFTER, "norm_2": "mlp"},  # which reads the stream itself
    "gpt_oss": {"matrices": None},
    "gptj": {
        "blocks": "transformer.h",
        "embed": "transformer.wte",
        "attention": "attn",
        "out": "attn.out_proj",
        "matrices": ("mlp.fc_in", "mlp.fc_out"),
    },
}
"""What differs from Llama in where a family keeps its parts; ``attn_out mlp_out`` are added to the stream."""


def capped(scores: Tensor, cap: float | None) -> Tensor:
    """What becomes of scores before the mask."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def softmax(attention: Any, head: int, scores: Tensor) -> Tensor:
    """Weights of keys from scores ``(..., key)``; where there are sinks, that of the head is a key more, left out."""
    sinks = getattr(attention, "sinks", None)
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks[head].to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


ROPE = {"rope_type": "default", "rope_theta": 100.0}
SMALL = {
    "hidden_size": 24, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 24,
    "intermediate_size": 20, "pad_token_id": None, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
LAYERS = {"num_hidden_layers": 3, "layer_types": KINDS, "sliding_window": 5, "rope_parameters": ROPE}
BY_KIND = {"full_attention": ROPE, "sliding_attention": {**ROPE, "rope_theta": 10.0}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "Gemma2",
        {**SMALL, **LAYERS, "head_dim": 8, "query_pre_attn_scalar": 13}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {**SMALL, **LAYERS, "head_dim": 8, "query_pre_attn_scalar": 13, "rope_parameters": BY_KIND},
    ),
    "olmo2": ("Olmo2", {**SMALL, "num_hidden_layers": 2, "rope_parameters": ROPE}),
    "gpt-oss": (
        "GptOss",
        {**SMALL, **LAYERS, "head_dim": 8, "intermediate_size": 24, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "gptj": (
        "GPTJ",
        {"n_embd": 24, "vocab_size": 50, "n_positions": 24, "n_layer": 2, "n_head": 3, "n_inner": 30, "rotary_dim": 4}
        | {"bos_token_id": 0, "eos_token_id": 0},
    ),
}
"""As `raw_families.MODELS`."""
