"""How much memory a pass may take, and what running out of it looks like. `engine.run_pass_in_parts` halves a pass."""

from __future__ import annotations

import torch

from ..base.memory import free_memory
from ..plan.cost import DEFAULT_BUDGET, OVERHEAD

SHARE = 4
"""All tensors together take at most one part in this many of the free memory."""
ACCELERATOR_OVERHEAD = 300 * OVERHEAD
"""An accelerator does more work in the time in which a pass is set up; a guess, since none was at hand."""


def budget(device: torch.device) -> int:
    """Bytes for all tensors, beside the weights.

    Half of the free memory of a GPU. On a CPU a share of the free memory, and no more than is of use.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for us
        return int((torch.cuda.mem_get_info(device)[0] + kept) // 2)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()) // 2
    free = free_memory()
    return DEFAULT_BUDGET if free is None else max(1, min(DEFAULT_BUDGET, free // SHARE))


def overhead(device: torch.device) -> float:
    """Operations that a layer of a pass costs beside its work."""
    return OVERHEAD if device.type == "cpu" else ACCELERATOR_OVERHEAD


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError | MemoryError):
            return True
        text = str(seen).lower()
        if isinstance(seen, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text):
            return True
        seen = seen.__cause__
    return False
