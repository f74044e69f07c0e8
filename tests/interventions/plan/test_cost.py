"""The plan's arithmetic against torch's own count of operations."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headwise.interventions import Grid, Head, Knockout, Layer, Neuron, Patch, PathPatch, ZeroAblate
from headwise.interventions.plan.cost import forward_flops
from headwise.metrics import induction, logit_diff, loss
from headwise.studies import RepeatedTokens, measure, plan
from tests.support.heavy import heavy_but_few

TASK = RepeatedTokens(n=2, length=7)


def counted(work):
    """Operations of some work; the fused attention of CPUs is not counted by torch, so it is taken apart."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def grids(model):
    layers, heads = model.layers, model.heads
    yield Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=layers, head=heads)
    yield Grid(
        lambda part, layer, head: Patch(model.read_by(Head(layer, head), part)),
        part=["q", "k", "v"],
        layer=layers,
        head=heads,
    )
    yield Grid(lambda layer, at: Patch(Layer(layer).resid_pre.at(at)), layer=layers, at=range(14))
    yield Grid(lambda layer, head: Knockout(Head(layer, head), 9, 3), layer=layers, head=heads)
    yield Grid(lambda layer: Patch(Layer(layer).mlp_out) + Patch(Layer(layer).attn_out.at(5)), layer=layers)
    yield Grid(lambda part, layer: Patch(Neuron(layer, 3).site(part)), part=["mlp_pre", "mlp_post"], layer=layers)
    yield Grid(lambda part, layer: Patch(Layer(layer).site(part)), part=["attn_in", "mlp_in"], layer=layers)
    if len(layers) > 1:
        yield Grid(lambda head: PathPatch(Head(0, head), Head(len(layers) - 1, 0).k), head=heads)
        yield Grid(lambda head: PathPatch(Head(0, head), "logits", through_mlps=False), head=heads)


SHAPES = ["two layers", "deep and narrow", "one wide layer", "three layers"]


@pytest.mark.parametrize(
    ("random_model", "metrics"),
    heavy_but_few(SHAPES, [[loss], [logit_diff], [induction, loss]]),
    indirect=["random_model"],
    ids=str,
)
def test_the_plan_counts_what_runs(random_model, metrics):
    alone = counted(lambda: measure(random_model, TASK, None, metrics, runs="all", check=False))
    for grid in grids(random_model):
        made = plan(random_model, TASK, grid, metrics, timed=False).cost()
        found = counted(lambda grid=grid: measure(random_model, TASK, grid, metrics, check=False)) - alone
        sources = forward_flops(random_model.shape, 2, 14)
        assert found == pytest.approx(made.passes, rel=0.05, abs=0.02 * sources), grid


def test_a_plain_forward_pass_is_counted_right(random_model):
    tokens = torch.zeros((3, 11), dtype=torch.long)
    with torch.no_grad():
        found = counted(lambda: random_model.module(tokens, use_cache=False))
    assert found == pytest.approx(forward_flops(random_model.shape, 3, 11), rel=0.02)
