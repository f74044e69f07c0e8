"""Places, scores and random models that the tests of `raw_paths` share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.oracles import raw_paths
from tests.oracles.raw_paths import (
    Place,
)

SHAPES: dict[str, dict[str, Any]] = {
    "2x3": {"layers": 2, "heads": 3, "d_head": 4, "vocab": 17, "context": 8, "n_inner": 20, "seed": 1},
    "3x2": {"layers": 3, "heads": 2, "d_head": 6, "vocab": 11, "context": 9, "seed": 2, "scale": 0.2},
}
SCALED = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


def close(actual: Any, wanted: Any, atol: float = 1e-10) -> None:
    actual, wanted = (np.asarray(torch.as_tensor(x).detach()) for x in (actual, wanted))
    np.testing.assert_allclose(actual, np.broadcast_to(wanted, actual.shape), rtol=0, atol=atol)


def draw(model: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (3, model.config.n_positions - 1), generator=generator)


def place(component: str, layer: int = 1, positions: Sequence[int] | None = (4, 2)) -> Place:
    return Place(layer, component, 1 if component in raw_paths.PER_HEAD else None, positions)


def head_weight(model: Any, layer: int, head: int) -> Tensor:
    """W_O of one head, (d_head, d_model)."""
    d_head = model.config.n_embd // model.config.n_head
    weight: Tensor = model.transformer.h[layer].attn.c_proj.weight[head * d_head : (head + 1) * d_head]
    return weight


def without_mlps(model: Any) -> Any:
    model = copy.deepcopy(model)
    for block in model.transformer.h:
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.zero_()
    return model
