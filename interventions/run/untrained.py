"""A model in hand with random weights, to compare with. Draws from torch's generator, and gives its state back."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...errors import ModelError
from ..models.identity import Identity
from ..models.model import Model
from ..models.turns import making
from ..traced.structure import buffer_hash
from .identify import facts_of_modules


def untrained_module(model: Model, identity: Identity, seed: int) -> Any:
    """A new module of the class and configuration of a model, initialised as transformers does it.

    Where the model was changed in place, by another activation, a hook or a buffer, so is what is given.

    Raises
    ------
    ModelError
        What was changed has weights of its own, of which it is not known how they begin.
    """
    with making(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model.module)(model.module.config)
    module = model.backend.module
    if module is None or _built_alike(fresh, identity):
        return fresh
    drawn = dict(fresh.named_parameters())
    try:
        changed = copy.deepcopy(module)
    except Exception as error:  # a module may hold what cannot be copied
        raise _unlike(model, f"it cannot be copied: {type(error).__name__}") from error
    own = dict(changed.named_parameters())
    if other := sorted({*own} ^ {*drawn}) or [name for name in own if own[name].shape != drawn[name].shape]:
        raise _unlike(model, f"such as {other[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(drawn[name])
    return changed


def _unlike(model: Model, why: str) -> ModelError:
    return ModelError(
        f"{model.name} was changed since it was made from its configuration, so that random weights do not fit it "
        f"({why}): scores cannot be compared with those of untrained models; merge an adapter into the weights, or "
        "measure its scores alone"
    )


def _built_alike(fresh: Any, identity: Identity) -> bool:
    return facts_of_modules(fresh) == identity.modules and buffer_hash(fresh) == identity.buffers
