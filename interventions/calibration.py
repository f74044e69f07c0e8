"""What half precision costs: measured on a few prompts without intervention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from .load import load
from .models.model import Model
from .plan.plan import Plan
from .run.backend import PROMPTS
from .run.cache import CompiledMetric
from .run.engine import run_unmodified
from .run.memory import is_out_of_memory
from .run.outcome import Inputs


def against_float32(
    model: Model, plan: Plan, readers: Sequence[CompiledMetric], inputs: Inputs
) -> dict[str, float | None]:
    """Measure how far half precision is from a float32 copy of the model: the largest difference over runs and prompts.

    The values are those of runs without intervention, averaged over scored positions. The copy starts from the weights
    as they stand, so what rounding them lost before is not in the difference.

    Parameters
    ----------
    model : Model
    plan : Plan
        Its first chunk gives the prompts, at most `PROMPTS`.
    readers : sequence of CompiledMetric
    inputs : Inputs

    Returns
    -------
    dict of str to float or None
        Difference in the unit of the metric. None where there is no memory for a copy and its passes, and of a model on
        a server, where there can be no copy. Empty where the model is not in half precision, or the plan has no chunks.

    Raises
    ------
    Exception
        What a pass raised, where that does not say that memory ran out.
    """
    if model.dtype not in ("bfloat16", "float16") or not plan.chunks:
        return {}
    unknown: dict[str, float | None] = {reader.name: None for reader in readers}
    module = model.backend.module
    if module is None:
        return unknown
    try:
        return {**_differences(model, module, plan, readers, inputs)}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return unknown


def _differences(
    model: Model, module: PreTrainedModel, plan: Plan, readers: Sequence[CompiledMetric], inputs: Inputs
) -> dict[str, float]:
    exact = load(module, device=str(model.device), dtype="float32", tokenizer=model.tokenizer)
    first = plan.chunks[0]
    chunk = replace(first, examples=(0, min(PROMPTS, first.size)), passes=())
    found = [
        run_unmodified(one, replace(plan, conditions=()), chunk, readers, inputs, {"alike": {}, "whole": []})[1]
        for one in (model, exact)
    ]
    return {
        reader.name: max(
            float((_mean(found[0][run][reader.name]) - _mean(found[1][run][reader.name])).abs().max())
            for run in plan.runs
        )
        for reader in readers
    }


def _mean(value: torch.Tensor) -> torch.Tensor:
    return value.float().mean(-1) if value.dim() == 2 else value.float()
