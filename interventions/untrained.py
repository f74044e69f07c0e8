"""A model in hand with random weights, to compare with. Draws from torch's generator, and gives its state back."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..errors import ModelError
from .identify import facts_of_modules
from .identity import Identity
from .models import Model
from .structure import buffer_hash


def untrained_module(model: Model, identity: Identity, seed: int) -> Any:
    """A new module of the class and configuration of a model, initialised as transformers does it.

    Where the model was changed in place, by another activation, a hook or a buffer, so is what is given.

    Raises
    ------
    ModelError
        What was changed has weights of its own, of which it is not known how they begin.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model.module)(model.module.config)
    if model.remote or _built_alike(fresh, identity):
        return fresh
    try:
        changed = copy.deepcopy(model.module)
        changed.load_state_dict(fresh.state_dict())
    except (RuntimeError, TypeError) as error:  # other names, or something that cannot be copied
        raise ModelError(
            f"{model.name} was changed since it was made from its configuration, so that random weights do not fit it "
            f"({str(error).strip().splitlines()[-1].strip()}): scores cannot be compared with those of untrained "
            "models; merge an adapter into the weights, or measure its scores alone"
        ) from None
    return changed


def _built_alike(fresh: Any, identity: Identity) -> bool:
    return facts_of_modules(fresh) == identity.modules and buffer_hash(fresh) == identity.buffers
