"""Reads which model is in hand: its fingerprint, and the facts of an `Identity`. For models that run here."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from ...errors import HeadwiseError
from ..base.hashing import data_hash, short_hash
from ..models.family import registered_attention
from ..models.identity import Fingerprint, Identity
from ..models.model import Model
from ..traced import structure
from ..traced.passes import traces
from ..traced.structure import configuration_of
from .activations import handles
from .memory import is_out_of_memory

Array = np.ndarray[Any, Any]
LENGTH = 8
"""Tokens of the prompt of a fingerprint."""


def prompt(vocabulary: int, context: int) -> Array:
    """The prompt of a fingerprint: random tokens, the same for every model with this vocabulary, ``(1, position)``."""
    return np.random.RandomState(0).randint(0, vocabulary, (1, min(LENGTH, context)))


def fingerprint_of(model: Model) -> Fingerprint | None:
    """What a model computes now on its prompt; None where it fails on so short a one."""
    tokens = torch.as_tensor(prompt(model.shape.vocabulary, model.shape.context), device=model.device)
    try:
        return Fingerprint.of(traces.sketch(traces.short_run(model.traced, handles(model), tokens)).numpy())
    except Exception as error:  # whatever a strange model raises; the self-check says it, where one is wanted
        if isinstance(error, HeadwiseError) or is_out_of_memory(error):
            raise
        return None


def identity_of(model: Model) -> Identity:
    """The facts of a model that runs here; every weight and buffer is read."""
    module = model.module
    return Identity(
        family=model.family.name,
        dtype=model.dtype,
        attention=_attention(module),
        configuration=configuration_of(module.config),
        buffers=structure.buffer_hash(module),
        weights=structure.weight_hash(module),
        tokenizer=model.tokenizer_hash,
        fingerprint=fingerprint_of(model),
        **modules_facts(facts_of_modules(module)),
    )


def _attention(module: Any) -> str:
    """The implementation of attention; one that somebody registered counts by what it does."""
    name, function = str(module.config._attn_implementation), registered_attention(module.config)
    return name if function is None else f"{name} {data_hash(function)}"


def facts_of_modules(module: Any) -> dict[str, str]:
    """What `structure.modules_of` says here of a module: functions and objects count by their code and content."""
    names = {id(one): f"module {path}" for path, one in module.named_modules()}
    names |= {id(one): f"tensor {path}" for path, one in [*module.named_parameters(), *module.named_buffers()]}
    return structure.modules_of(module, lambda value: data_hash(value, names))


def modules_facts(modules: dict[str, str], kind: str = "") -> dict[str, Any]:
    """The facts of an identity on modules, from what `structure.modules_of` says of them."""
    return {"modules": modules, "modules_hash": kind + short_hash(json.dumps(modules))}
