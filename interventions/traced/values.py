"""What the writes of a pass put in, made from what was read of the runs. Runs where the activations are.

Plain functions of tensors, numbers, slices and dicts of them, as in `forward`: nothing here may need this package where
it runs. A job leaves open what depends on activations, and `resolve_values` puts that in. An open value is a dict:

=============  ==============================================================================================
``constant``   numbers of a vector; then nothing else
``of``         the run it is taken from; None for the reference draw
``at``         ``(layer, point)``
``columns``    of the tensor there; for patterns ``(columns of q, columns of k, d_head, scaling, window, stop)``
``positions``  those that are wanted
``how``        ``same`` example, ``rows`` of others, ``mean`` over examples, ``mean of all`` over positions too
``rows``       the other examples
=============  ==============================================================================================
"""

from __future__ import annotations

from typing import Any

import torch

from .activations import pattern_between
from .logits import comparing
from .rows import write_into


def resolve_values(job: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """`job` as `forward.run` takes it.

    ``known`` holds what was read of the runs: ``base``, ``sources`` by run, ``reference`` (all by ``(layer, point)``),
    and ``watch``, ``score``, ``base_attended`` of the base run.
    """
    attended = known["base_attended"]
    return {
        **job,
        "writes": {place: resolve_writes(place, writes, known) for place, writes in job["writes"].items()},
        "pair_writes": {place: resolve_writes(place, writes, known) for place, writes in job["pair_writes"].items()},
        "senders": [[*sender[:3], changed_by(sender, known), *sender[4:]] for sender in job["senders"]],
        "watch": known["watch"],
        "base_attended": {name: value.repeat(job["conditions"], 1, 1) for name, value in attended.items()},
        "score": from_position(known["score"], job["skip"]),
    }


def resolve_writes(place: tuple[int, str], writes: list[Any], known: dict[str, Any]) -> list[Any]:
    """The writes at a place with their values."""
    if place[1] == "scores":
        return writes
    return [entry if entry[3] == "path" else (*entry[:4], resolve(entry[4], known)) for entry in writes]


def resolve(given: Any, known: dict[str, Any]) -> Any:
    """An open value as a tensor, broadcastable to ``(example, position, column)``; anything else as it is."""
    if not isinstance(given, dict):
        return given
    if "constant" in given:
        like = next(iter(known["base"].values()))
        return torch.tensor(given["constant"], dtype=like.dtype, device=like.device)
    if "embedded" in given:
        return embedded(given, known)
    source = (known["reference"] if given["of"] is None else known["sources"][given["of"]])[given["at"]]
    columns, positions = given["columns"], given["positions"]
    if isinstance(columns, slice):
        return taken_from(source[..., columns], given["how"], given["rows"], positions)
    pattern = pattern_between(source, *columns[:5]).transpose(1, 2)
    return taken_from(pattern, given["how"], given["rows"], positions).transpose(1, 2)[..., : columns[5]]


def taken_from(source: torch.Tensor, how: str, rows: Any, positions: Any) -> torch.Tensor:
    """What is taken from ``(example, position, ...)``."""
    if how == "mean":
        return source[:, positions].mean(dim=0, keepdim=True)
    if how == "mean of all":
        return source.mean(dim=(0, 1), keepdim=True)
    if how == "rows":
        return source[torch.as_tensor(rows, device=source.device)][:, positions]
    return source[:, positions]


def embedded(given: dict[str, Any], known: dict[str, Any]) -> torch.Tensor:
    """The stream before layer 0 as the sum of its embeddings, some of them changed."""
    base = known["base"]
    parts = {name: base[(0, name)].clone() for name in ("embed", "pos_embed") if (0, name) in base}
    for name, positions, how, value in given["embedded"]:
        write_into(parts[name], [(slice(None), positions, slice(None), how, resolve(value, known))])
    return torch.stack(list(parts.values())).sum(0)[:, given["positions"]]


def changed_by(sender: list[Any], known: dict[str, Any]) -> torch.Tensor:
    """What the value of a path's sender changes by: ``(example, position, column)``."""
    columns, (run, at, window, sent) = sender[2], sender[3]
    change: torch.Tensor = (known["sources"][run][at] - known["base"][at])[:, window, columns]
    if sent is None:
        return change
    marks = torch.zeros(known["base"][at].shape[1], device=change.device, dtype=torch.bool)
    marks[sent] = True
    return change * marks[window, None]


def from_position(score: dict[str, Any], skip: int) -> dict[str, Any]:
    """The job of `score` without the first scored positions."""
    if not score:
        return score
    kernels = [
        (name, kernel, {key: value[:, skip:] for key, value in given.items()})
        for name, kernel, given in score["kernels"]
    ]
    return {**score, "kernels": kernels, "tokens": None if score["tokens"] is None else score["tokens"][:, skip:]}


def compared(known: dict[str, Any], logits: torch.Tensor | None) -> dict[str, Any]:
    """`known` with the base run's logits given to the kernels that compare with them."""
    return known if logits is None else {**known, "score": comparing(known["score"], {"logits": logits})}
