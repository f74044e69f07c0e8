"""From the normed stream to what metrics make of its logits. Runs inside a trace: plain functions."""

from __future__ import annotations

from typing import Any

import torch

from .projections import is_readable


def score(normed: torch.Tensor, unembed: Any, job: dict[str, Any], examples: int) -> dict[str, torch.Tensor]:
    """Kernels of logits: name to ``(row, scored)``.

    ``job`` has ``kernels``, a list of ``(name, kernel, arguments)``; ``tokens`` ``(example, scored, token)`` where only
    their logits are wanted, which the kernels then find in this order; ``apart``, whether the weights are elsewhere;
    and how many rows are scored at a time, ``rows``, or ``rows_of_all`` where all logits are computed: also where those
    of tokens are wanted, if the last layer is more than its weight or its weight is elsewhere.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name, _, _ in job["kernels"]}
    whole = job["tokens"] is None or not is_readable(job, unembed)
    columns = None if whole else unembed.weight[job["tokens"]]
    bias = getattr(unembed, "bias", None) if columns is not None else None
    size = job["rows_of_all"] if whole else job["rows"]
    for start in range(0, normed.shape[0], size):
        part = normed[start : start + size]
        rows = torch.arange(start, start + part.shape[0], device=part.device) % examples
        if columns is None:
            logits = unembed(part)
            logits = logits if job["tokens"] is None else logits.gather(-1, job["tokens"][rows])
        else:
            logits = (columns[rows] @ part.unsqueeze(-1)).squeeze(-1)
            logits = logits if bias is None else logits + bias[job["tokens"]][rows]
        for name, kernel, given in job["kernels"]:
            found[name].append(kernel(logits, **{key: value[rows] for key, value in given.items()}))
    return {name: torch.cat(values) for name, values in found.items()}


def comparing(job: dict[str, Any], found: dict[str, torch.Tensor]) -> dict[str, Any]:
    """`job` of `score` with the logits of this pass given to the kernels that compare with the base run."""
    if "logits" not in found:
        return job
    kernels = [
        (name, kernel, {**given, "base_logits": found["logits"]} if name in job["compare"] else given)
        for name, kernel, given in job["kernels"]
    ]
    return {**job, "kernels": kernels}
