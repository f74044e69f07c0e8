"""Estimates of edge scores: what each estimator asks of a trace, on which examples at a time, and what has none.

The traces are in `traced/edges`; `gradients` runs them, as it runs the estimates of other interventions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ...errors import DeclarationError
from ..declare.components import Component
from ..declare.edges import edge_of
from ..declare.graph import Graph
from ..declare.paths import PathPatch
from ..declare.sites import Site
from ..plan.passes import ExampleChunk
from ..plan.plan import Plan
from ..traced.specs import EdgeEstimateSpec, ReadSite, RunSpec
from .activations import point_of

BYTES = 4
WITH_SLOPES = 6
"""Tensors that a stream is kept in on the way back, its slopes among them."""


def places_of_conditions(plan: Plan) -> torch.Tensor:
    """Where the edge of each condition is among all edges of the model, in their order in `Graph`."""
    place = {edge: number for number, edge in enumerate(Graph.of(plan).edges)}
    paths = [edit for edits in plan.conditions for edit in edits if isinstance(edit, PathPatch)]
    return torch.tensor([place[edge_of(path)] for path in paths])


def check_edges_estimable(plan: Plan, estimator: str) -> None:
    """Refuse a model that an estimator of edge scores cannot take.

    Parameters
    ----------
    plan : Plan
        Its conditions are edges.
    estimator : str

    Raises
    ------
    DeclarationError
        The text says what is possible.
    """
    shape = plan.shape
    if shape.called:
        raise DeclarationError(
            f"estimator={estimator!r}: {plan.model} runs by its own blocks, in which receivers have no streams of "
            "their own; a family whose table describes it has estimates of edges"
        )
    if estimator == "relp" and (why := shape.missing(Component.mlp_pre)):
        raise DeclarationError(f"estimator='relp': in {plan.model}, {why}; possible are the other estimators")
    if estimator == "atp*" and shape.joint_norms:
        raise DeclarationError(
            f"estimator='atp*': in {plan.model} a norm of q and k runs over all heads at once, so that no pattern is "
            "made anew for one head alone; possible are the other estimators"
        )


def runs_read(plan: Plan, runs: list[RunSpec]) -> list[RunSpec]:
    """The runs of a chunk, with what an estimate of edges reads of the base run and of the one that edges carry."""
    wanted = [(0, "resid_pre"), *map(point_of, senders_read(plan))]
    return [{**run, "points": wanted if run["name"] in (plan.base, source_of(plan)) else run["points"]} for run in runs]


def source_of(plan: Plan) -> str | None:
    """The run whose values the edges carry; None for means over the reference draw."""
    return next(edit.run for edits in plan.conditions for edit in edits if isinstance(edit, PathPatch))


def senders_read(plan: Plan) -> list[Site]:
    """What all senders write."""
    of_layers = [Site(part, layer) for layer in range(plan.shape.layers) for part in (Component.z, Component.mlp_out)]
    return [Site(Component.embed, 0), *of_layers]


def described_edges(plan: Plan, chunk: ExampleChunk, estimator: str, steps: int | None) -> EdgeEstimateSpec:
    """Describe an estimate of all edges for the examples of a chunk, as `estimates.estimated` takes it.

    Parameters
    ----------
    plan : Plan
    chunk : ExampleChunk
    estimator : str
    steps : int, optional
        Of the estimators that take some.

    Returns
    -------
    EdgeEstimateSpec
    """
    moved: list[ReadSite] = [(0, "embed")]
    if estimator == "eap-ig-activations":
        moved += [(layer, point) for layer in range(plan.shape.layers) for point in ("z", "mlp_out")]
    shares = [(step + 0.5) / (steps or 1) for step in range(steps or 1)]
    runs: list[tuple[ReadSite | None, float]] = [(unit, share) for unit in moved for share in shares]
    shape, length = plan.shape, plan.groups[chunk.group].length
    of_row = length * BYTES * (WITH_SLOPES * shape.d_model + 2 * shape.qkv_width + 3 * shape.heads * length)
    return {
        "source": source_of(plan),
        "scored": list(plan.groups[chunk.group].scored),
        "runs": runs if estimator.startswith("eap-ig") else [(None, 0.0)],
        "drops": estimator == "atp*",
        "patterns": estimator == "atp*",
        "ruled": estimator == "relp",
        "rows": max(1, plan.budget // 4 // of_row),
    }


def chunks_of_edges(plan: Plan, estimator: str) -> Iterator[ExampleChunk]:
    """Examples in chunks for which what all senders change, and a layer on the way back, can be held."""
    shape = plan.shape
    senders, receivers = 1 + shape.layers * (shape.heads + 1), shape.heads + 2 * shape.kv_heads
    copies = 1 + 2 * shape.layers * (estimator == "atp*")
    streams = 2 * senders + 2 * shape.layers + WITH_SLOPES * receivers + 3 * copies
    for number, group in enumerate(plan.groups):
        of_position = shape.d_model * streams + WITH_SLOPES * (shape.d_mlp + shape.heads * group.length)
        of_logits = WITH_SLOPES * len(group.scored) * plan.columns
        held = max(1, plan.budget // 2 // (BYTES * (group.length * of_position + of_logits)))
        some = next(chunk for chunk in plan.chunks if chunk.group == number)
        for start in range(0, len(group.examples), held):
            yield replace(some, examples=(start, min(start + held, len(group.examples))), passes=())
