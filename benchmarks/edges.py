"""Edges by hand with torch hooks: two forward passes for each, as the reference implementation of EAP-IG makes them.

The first pass is of the corrupted run, and keeps what the sender writes. In the second, of the clean run, the receiver
alone reads its stream with what the sender writes otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.cases import Job, Place

Run = Callable[[Sequence[Place]], np.ndarray]


class End(NamedTuple):
    """An end of an edge: ``input``, a head ``a``, its ``q``, ``k`` or ``v``, an MLP ``m``, or ``logits``."""

    kind: str
    layer: int = 0
    head: int = 0


def prepare(job: Job, module: PreTrainedModel) -> Run:
    """One edge after the other."""

    @torch.no_grad()
    def run(places: Sequence[Place]) -> np.ndarray:
        return job.table([job.value(_logits(job, module, *map(_end, place.what.split("->")))) for place in places])

    return run


def _end(name: str) -> End:
    if name in ("input", "logits"):
        return End(name)
    layer, head, which = re.fullmatch(r"[am](\d+)(?:\.h(\d+))?(?:<([qkv])>)?", name).groups()  # type: ignore[union-attr]
    return End(which or name[0], int(layer), int(head or 0))


def _logits(job: Job, module: PreTrainedModel, sender: End, receiver: End) -> torch.Tensor:
    """Logits of the clean run in which one edge carries the corrupted run."""
    assert job.source is not None
    with ExitStack() as hooks:
        sent = _sent(module, sender, hooks)
        module(job.source, use_cache=False)
    with ExitStack() as hooks:
        here = _sent(module, sender, hooks)
        _receive(module, receiver, lambda: _written(module, sender, sent[0] - here[0]), hooks)
        logits: torch.Tensor = module(job.clean, use_cache=False).logits
    return logits


def _sent(module: PreTrainedModel, sender: End, hooks: ExitStack) -> list[torch.Tensor]:
    """Gets what the sender writes, of a head its z."""
    body, found = module.transformer, []
    if sender.kind == "a":
        width = module.config.n_embd // module.config.n_head
        columns = slice(sender.head * width, (sender.head + 1) * width)
        holder = body.h[sender.layer].attn.c_proj
        handle = holder.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0][..., columns]))
    else:
        holder = body.wte if sender.kind == "input" else body.h[sender.layer].mlp
        handle = holder.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    hooks.callback(handle.remove)
    return found


def _written(module: PreTrainedModel, sender: End, change: torch.Tensor) -> torch.Tensor:
    """What a change of what the sender holds changes of the stream."""
    if sender.kind != "a":
        return change
    width = module.config.n_embd // module.config.n_head
    weight = module.transformer.h[sender.layer].attn.c_proj.weight
    return change @ weight[sender.head * width : (sender.head + 1) * width]


def _receive(module: PreTrainedModel, receiver: End, moved: Callable[[], torch.Tensor], hooks: ExitStack) -> None:
    """Let the receiver alone read a stream that has moved."""
    body = module.transformer
    if receiver.kind in ("m", "logits"):
        norm = body.ln_f if receiver.kind == "logits" else body.h[receiver.layer].ln_2
        hooks.callback(norm.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + moved(),)).remove)
        return
    block, size, stream = body.h[receiver.layer], module.config.n_embd, []
    start = "qkv".index(receiver.kind) * size + receiver.head * size // module.config.n_head
    columns = slice(start, start + size // module.config.n_head)

    def change(projection: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        other = block.ln_1.forward(stream[0] + moved())
        changed = output.clone()
        changed[..., columns] = other @ projection.weight[:, columns] + projection.bias[columns]
        return changed

    hooks.callback(block.ln_1.register_forward_pre_hook(lambda _module, inputs: stream.append(inputs[0])).remove)
    hooks.callback(block.attn.c_attn.register_forward_hook(change).remove)
