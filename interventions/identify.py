"""Reads which model is in hand: its fingerprint, and the facts of an `Identity`. For models that run here."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch

from . import structure, traces
from .configuration import configuration_of
from .digest import data_hash, short_hash
from .identity import Fingerprint, Identity
from .models import Model
from .native import handles

Array = np.ndarray[Any, Any]
LENGTH = 8
"""Tokens of the prompt of a fingerprint."""


def prompt(vocabulary: int, context: int) -> Array:
    """The prompt of a fingerprint: random tokens, the same for every model with this vocabulary, ``(1, position)``."""
    return np.random.RandomState(0).randint(0, vocabulary, (1, min(LENGTH, context)))


def fingerprint_of(model: Model) -> Fingerprint:
    """What a model computes now on its prompt."""
    tokens = torch.as_tensor(prompt(model.shape.vocabulary, model.shape.context), device=model.device)
    found = traces.short_run(model.traced, handles(model), tokens)
    digest = hashlib.sha256()
    for one in found:
        digest.update(structure.bytes_of(one))
    return Fingerprint.of(traces.sketch(found).numpy(), digest.hexdigest()[:16])


def identity_of(model: Model, fingerprint: Fingerprint, before: Identity | None = None) -> Identity:
    """The facts of a model that runs here.

    Parameters
    ----------
    model : Model
    fingerprint : Fingerprint
        Of this moment.
    before : Identity, optional
        Whose hashes of weights and buffers still hold; left out, every weight and buffer is read.
    """
    module = model.module
    hashes = (before.weights, before.buffers) if before else _hashes(module)
    return Identity(
        family=model.family.name,
        dtype=model.dtype,
        attention=str(module.config._attn_implementation),
        configuration=configuration_of(module.config),
        buffers=hashes[1],
        weights=hashes[0],
        tokenizer=model.tokenizer_hash,
        fingerprint=fingerprint,
        **modules_facts(facts_of_modules(module)),
    )


def _hashes(module: Any) -> tuple[str, str]:
    return structure.weight_hash(module), structure.buffer_hash(module)


def facts_of_modules(module: Any) -> dict[str, str]:
    """What `structure.modules_of` says here of a module."""
    return structure.modules_of(module, data_hash)


def modules_facts(modules: dict[str, str], kind: str = "") -> dict[str, Any]:
    """The facts of an identity on modules, from what `structure.modules_of` says of them."""
    return {"modules": modules, "modules_hash": kind + short_hash(json.dumps(modules))}
