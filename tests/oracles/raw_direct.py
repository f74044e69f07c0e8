"""A second opinion on direct logit attribution: each source is taken out of the stream before the frozen final norm.

Imports torch and what `raw_families` and `raw_paths` read. The share of a source is what the difference of two logits
loses where the vector that it wrote is taken out of the last stream, the norm's mean and deviation staying those of the
whole stream. What no source wrote is the bias.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from tests.oracles import raw_families, raw_paths
from tests.oracles.raw_paths import Place


def shares(model: Any, tokens: Tensor, plus: Tensor, minus: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Source to its share ``(example, position)`` of ``logit[plus] - logit[minus]``, and that difference itself.

    `plus` and `minus` are token ids ``(example, position)``.
    """
    gpt2 = model.config.model_type == "gpt2"
    read = raw_paths.read if gpt2 else raw_families.read
    blocks = model.transformer.h if gpt2 else attrgetter(raw_families.anatomy(model).blocks)(model)
    norm = model.transformer.ln_f if gpt2 else _last_norm(model)
    vectors: dict[str, Tensor] = {"embed": read(model, tokens, Place(0, "embed"))}
    if model.config.model_type == "gemma":
        vectors["embed"] = read(model, tokens, Place(0, "resid_pre"))  # the embedding, scaled
    if gpt2 or raw_families.anatomy(model).pos_embed:
        vectors["pos_embed"] = read(model, tokens, Place(0, "pos_embed")).expand_as(vectors["embed"])
    for layer, block in enumerate(blocks):
        out = attrgetter("attn.c_proj" if gpt2 else raw_families.anatomy(model).out)(block)
        matrix = out.weight if gpt2 else out.weight.T
        heads = model.config.num_attention_heads
        size = matrix.shape[0] // heads
        for head in range(heads):
            z = read(model, tokens, Place(layer, "z", head))
            vectors[f"L{layer}H{head}"] = z @ matrix[head * size : (head + 1) * size]
        vectors[f"L{layer}.mlp"] = read(model, tokens, Place(layer, "mlp_out"))
    with torch.no_grad():
        stream = read(model, tokens, Place(len(blocks) - 1, "resid_post")).double()
        unembed, bias = model.lm_head.weight.double(), getattr(model.lm_head, "bias", None)
        bias = torch.zeros(len(unembed)).double() if bias is None else bias.double()
        deviation = _deviation(norm, stream)

        def difference(value: Tensor) -> Tensor:
            normed = _frozen(norm, value, deviation)
            logits = normed @ unembed.T + bias
            return (logits.gather(-1, plus[..., None]) - logits.gather(-1, minus[..., None]))[..., 0]

        whole = difference(stream)
        found = {name: whole - difference(stream - vector.double()) for name, vector in vectors.items()}
        logits = (raw_paths.run if gpt2 else raw_families.run)(model, tokens).double()
        said = (logits.gather(-1, plus[..., None]) - logits.gather(-1, minus[..., None]))[..., 0]
    assert (whole - said).abs().max() < 1e-3  # the norm that is written below is the model's
    return found | {"bias": whole - sum(found.values())}, said


def _last_norm(model: Any) -> Any:
    body = model.base_model
    return next(getattr(body, name) for name in ("norm", "final_layer_norm", "ln_f") if hasattr(body, name))


def _deviation(norm: Any, stream: Tensor) -> Tensor:
    """What the norm divides by."""
    if isinstance(norm, torch.nn.LayerNorm):
        return (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return (stream.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _frozen(norm: Any, value: Tensor, deviation: Tensor) -> Tensor:
    """The norm of `value`, divided by a given deviation."""
    if isinstance(norm, torch.nn.LayerNorm):
        return (value - value.mean(-1, keepdim=True)) / deviation * norm.weight.double() + norm.bias.double()
    gain = norm.weight.double() + (1 if type(norm).__name__.startswith("Gemma") else 0)
    return value / deviation * gain
