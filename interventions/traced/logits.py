"""From the normed stream to what metrics make of its logits. Runs inside a trace: plain functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .projections import is_readable

if TYPE_CHECKING:
    from .specs import Kernel, LogitsSpec


def logits_kernels(normed: torch.Tensor, unembed: Any, spec: LogitsSpec, examples: int) -> dict[str, torch.Tensor]:
    """Compute logits, some rows at a time, and what the kernels make of them.

    Where only the logits of some tokens are wanted, the kernels find them in the order of the tokens. All logits are
    computed for them too, if the last layer is more than its weight or its weight is elsewhere.

    Parameters
    ----------
    normed : tensor (row, scored, d_model)
    unembed : nnsight handle
        The last layer.
    spec : LogitsSpec
    examples : int
        Rows are conditions times examples.

    Returns
    -------
    dict
        Kernel name to values ``(row, scored)``.
    """
    found: dict[str, list[torch.Tensor]] = {kernel["name"]: [] for kernel in spec["kernels"]}
    tokens = spec["tokens"]
    every = tokens is None or not is_readable(spec["apart"], unembed)
    columns = None if every else unembed.weight[tokens]
    bias = getattr(unembed, "bias", None) if columns is not None else None
    size = spec["rows_of_all"] if every else spec["rows"]
    for start in range(0, normed.shape[0], size):
        part = normed[start : start + size]
        rows = torch.arange(start, start + part.shape[0], device=part.device) % examples
        if columns is None:
            logits = unembed(part)
            logits = logits if tokens is None else logits.gather(-1, tokens[rows])
        else:
            logits = (columns[rows] @ part.unsqueeze(-1)).squeeze(-1)
            logits = logits if bias is None else logits + bias[tokens][rows]
        for kernel in spec["kernels"]:
            given = {name: value[rows] for name, value in kernel["arguments"].items()}
            found[kernel["name"]].append(kernel["function"](logits, **given))
    return {name: torch.cat(values) for name, values in found.items()}


def with_base_logits(spec: LogitsSpec, logits: torch.Tensor | None) -> LogitsSpec:
    """`spec` with logits ``(example, scored, token)`` given to the kernels that compare with the base run."""
    if logits is None:
        return spec
    kernels: list[Kernel] = [
        {**kernel, "arguments": {**kernel["arguments"], "base_logits": logits}}
        if kernel["name"] in spec["compare"]
        else kernel
        for kernel in spec["kernels"]
    ]
    return {**spec, "kernels": kernels}
