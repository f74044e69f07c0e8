"""What needs weights, for servers that run jobs apart from them too. Plain functions, as in `traces`.

NDIF runs what it does not trust in a process that has the model's structure alone, where a module can be called inside
a trace but not looked into.
"""

from __future__ import annotations

from typing import Any

import torch

from .traces import nothing
from .weights import weights_made, weights_read


def weights_of(root: Any, parts: dict[str, Any], layer: int, like: torch.Tensor) -> list[torch.Tensor | None]:
    """The fields of `HeadWeights` of a layer, read; or what its modules make of unit vectors, where they cannot be."""
    block = parts["blocks"][layer]
    if not parts["apart"]:
        return weights_read(parts, block._module)
    with torch.no_grad(), root.trace(nothing(like.device), use_cache=False):
        made = weights_made(parts, block, like)
    return made
