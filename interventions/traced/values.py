"""What the writes of a pass put in, made from what was read of the runs. Runs where the activations are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .activations import pattern_between
from .rows import write_into

if TYPE_CHECKING:
    from .specs import (
        EmbeddingSum,
        FromRun,
        LogitsSpec,
        PassSpec,
        PathSender,
        ResolvedPass,
        RunCache,
        TensorWrite,
        Value,
        WriteSite,
    )


def resolve_values(spec: PassSpec, cache: RunCache) -> ResolvedPass:
    """A pass with the values that were known only when the runs were read."""
    attended = cache["base_attended"]
    return {
        **spec,
        "writes": resolve_writes(spec["writes"], cache),
        "pair_writes": resolve_writes(spec["pair_writes"], cache),
        "changes": [sender_change(sender, cache) for sender in spec["senders"]],
        "pattern_kernels": cache["pattern_kernels"],
        "base_attended": {name: value.repeat(spec["conditions"], 1, 1) for name, value in attended.items()},
        "logits": without_first(cache["logits"], spec["skip"]),
        "angles": None,
    }


def resolve_writes(table: dict[WriteSite, list[TensorWrite]], cache: RunCache) -> dict[WriteSite, list[TensorWrite]]:
    """Writes with their values."""
    return {
        site: [{**write, "value": resolve(write["value"], cache)} for write in writes] for site, writes in table.items()
    }


def resolve(value: Value, cache: RunCache) -> Any:
    """A deferred value as a tensor, broadcastable to ``(example, position, column)``; anything else as it is.

    What a path brings stays deferred: the pass itself finds it.
    """
    if not isinstance(value, dict) or value["kind"] == "path":
        return value
    if value["kind"] == "vector":
        like = next(iter(cache["base"].values()))
        return torch.tensor(value["numbers"], dtype=like.dtype, device=like.device)
    if value["kind"] == "embeddings":
        return embedding_sum(value, cache)
    reference, site, pattern = cache["reference"], value["site"], value["pattern"]
    if value["run"] is None and reference["whole"] and value["reduce"] == "mean over example and position":
        parts = [points[site][..., value["columns"]].flatten(0, 1) for points in reference["whole"]]
        return torch.cat(parts).mean(dim=0)[None, None]
    source = (reference["alike"] if value["run"] is None else cache["sources"][value["run"]])[site]
    if pattern is None:
        return reduce_examples(source[..., value["columns"]], value)
    taken = reduce_examples(pattern_between(source, **pattern).transpose(1, 2), value)
    return taken.transpose(1, 2)[..., : value["stop"]]


def reduce_examples(source: torch.Tensor, value: FromRun) -> torch.Tensor:
    """What a deferred value takes of ``(example, position, ...)``."""
    positions: Any = value["positions"]
    if value["reduce"] == "mean over example":
        return source[:, positions].mean(dim=0, keepdim=True)
    if value["reduce"] == "mean over example and position":
        return source.mean(dim=(0, 1), keepdim=True)
    if value["reduce"] == "partner":
        return source[torch.as_tensor(value["partners"], device=source.device)][:, positions]
    return source[:, positions]


def embedding_sum(value: EmbeddingSum, cache: RunCache) -> torch.Tensor:
    """The stream before layer 0 as the sum of its embeddings, some of them changed."""
    base = cache["base"]
    parts = {name: base[(0, name)].clone() for name in ("embed", "pos_embed") if (0, name) in base}
    for one in value["writes"]:
        write = one["write"]
        write_into(parts[one["embedding"]], [{**write, "value": resolve(write["value"], cache)}])
    positions: Any = value["positions"]
    return torch.stack(list(parts.values())).sum(0)[:, positions]


def sender_change(sender: PathSender, cache: RunCache) -> torch.Tensor:
    """What the value of a path's sender changes by: ``(example, position, column)``."""
    site, window = sender["site"], sender["window"]
    base = cache["base"][site]
    change: torch.Tensor = (cache["sources"][sender["run"]][site] - base)[:, window, sender["columns"]]
    if sender["positions"] is None:
        return change
    marks = torch.zeros(base.shape[1], device=change.device, dtype=torch.bool)
    marks[sender["positions"]] = True
    return change * marks[window, None]


def without_first(spec: LogitsSpec, skip: int) -> LogitsSpec:
    """`spec` without the first scored positions."""
    return {
        **spec,
        "kernels": [
            {**kernel, "arguments": {name: value[:, skip:] for name, value in kernel["arguments"].items()}}
            for kernel in spec["kernels"]
        ],
        "tokens": None if spec["tokens"] is None else spec["tokens"][:, skip:],
    }
