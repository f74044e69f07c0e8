"""Times interventions side by side in one run and prints ratios: ``make bench``. Writes ``benchmarks/results.json``.

The yardstick is the usual way of doing it: one plain forward pass of the Hugging Face module for each condition, with
nothing read and nothing changed. Rounds take turns (A B C, A B C, ...), so a machine that slows down slows all alike;
what is compared are medians. Same numbers first: a measurement that differs from its naive trace is no benchmark.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import nnsight
import numpy as np
import torch

import headwise as hw
from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, measure

ROUNDS = 7


def main() -> None:
    """Every head of ``words-2l`` zero-ablated, loss on the second half, with 4 and with 32 prompts."""
    model = hw.load("words-2l")
    conditions = [(layer, head) for layer in model.layers for head in model.heads]
    grid = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=model.layers, head=model.heads)
    found = {}
    for prompts in (4, 32):
        task = RepeatedTokens(n=prompts, length=25)
        batch = task.draw(model)
        (group,) = batch.groups()
        tokens = torch.as_tensor(batch.runs["clean"])
        targets = torch.as_tensor(batch.facts("clean", group).targets)
        scored = list(group.scored)

        def planned(task: RepeatedTokens = task) -> np.ndarray:
            return measure(model, task, grid, [loss], progress=False)["loss"].values.reshape(len(conditions), -1)

        def traces(tokens: torch.Tensor = tokens, targets: torch.Tensor = targets, scored: list = scored) -> np.ndarray:
            return np.stack([_trace(model, tokens, targets, scored, *place) for place in conditions])

        def plain(tokens: torch.Tensor = tokens) -> None:
            with torch.no_grad():
                for _ in conditions:
                    model.module(tokens, use_cache=False)

        difference = float(np.abs(planned() - traces()).max())
        if difference > 1e-4:
            raise SystemExit(f"not the same numbers: they differ by {difference}")
        plain()
        seconds: dict[str, list[float]] = {"headwise": [], "one trace each": [], "plain forward passes": []}
        for _ in range(ROUNDS):
            for name, work in zip(seconds, (planned, traces, plain), strict=True):
                begun = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - begun)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        found[f"{prompts} prompts"] = {
            "conditions": len(conditions),
            "largest difference": difference,
            "median seconds": medians,
            "ratio to plain forward passes": {
                name: value / medians["plain forward passes"] for name, value in medians.items()
            },
        }
        print(f"\nevery head of words-2l zero-ablated, {prompts} prompts of {tokens.shape[1]} tokens; ratio to plain")
        for name, value in medians.items():
            print(f"  {name:<22} {value / medians['plain forward passes']:5.2f}")
    path = Path(__file__).parent / "results.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\nwritten to {path.parent.name}/{path.name}; {torch.get_num_threads()} threads, medians of {ROUNDS} rounds")


def _trace(
    model: hw.Model, tokens: torch.Tensor, targets: torch.Tensor, scored: list, layer: int, head: int
) -> np.ndarray:
    """One hand-written nnsight trace, as a user would write it without headwise."""
    width = model.shape.d_head
    with torch.no_grad(), model.traced.trace(tokens, use_cache=False):
        z = model.traced.transformer.h[layer].attn.c_proj.input.clone()
        z[:, :, head * width : (head + 1) * width] = 0
        model.traced.transformer.h[layer].attn.c_proj.input = z
        logits = nnsight.save(model.traced.output.logits)
    chosen = logits[:, scored].log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return -chosen.mean(-1).numpy()


if __name__ == "__main__":
    main()
