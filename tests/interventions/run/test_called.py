"""Blocks that are called give what blocks that are laid open give, cost what is counted, and refuse the rest."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import headwise as hw
from headwise.errors import DeclarationError, HeadwiseError, ModelError
from headwise.interventions import Add, Grid, Head, Knockout, Layer, MeanAblate, Neuron, Patch, PathPatch, ZeroAblate
from headwise.interventions.base.shape import Group
from headwise.interventions.models import family
from headwise.interventions.models.finding import find_parts
from headwise.interventions.plan.plan import make_plan
from headwise.metrics import induction, loss
from headwise.studies import RepeatedTokens, capture, logit_lens, measure, plan
from tests.interventions.plan.test_cost import counted
from tests.oracles import raw_families
from tests.support.architectures import build

TASK = RepeatedTokens(n=3, length=6, seed=3)


@pytest.fixture
def both(request, monkeypatch):
    """A model that is laid open, and the same weights called."""
    laid_open = hw.load(raw_families.random_model(request.param))
    monkeypatch.setattr(family, "FAMILIES", {})
    called = hw.load(raw_families.random_model(request.param))
    assert called.shape.called
    assert not laid_open.shape.called
    return laid_open, called


TWO = pytest.mark.parametrize("both", ["qwen3", "pythia"], indirect=True)


def conditions(model):
    last = model.shape.layers - 1
    yield ZeroAblate(Head(0, 1))
    yield MeanAblate(Head(last, 0).v)
    yield Patch(Head(last, 1).q.at([2, 7])) + ZeroAblate(Layer(0).mlp_out)
    yield Patch(Neuron(0, 3).mlp_post) + Add(Layer(last).attn_out.at(4), np.linspace(-1, 1, model.shape.d_model))
    yield Add(Layer(last).resid_post.at(-2), np.linspace(-1, 1, model.shape.d_model))
    yield Patch(Layer(last).mlp_in.at(5)) + Patch(Layer(last).attn_in)
    yield ZeroAblate(Layer(0).embed.at(3))
    if not model.shape.parallel:
        yield Patch(Layer(last).resid_mid.at(5))


@TWO
def test_called_blocks_give_what_laid_open_ones_give(both):
    what = {str(number): one for number, one in enumerate(conditions(both[0]))}
    one, two = (measure(model, TASK, what, loss, per_position=True) for model in both)
    np.testing.assert_allclose(two["loss"], one["loss"], atol=1e-5)
    sites = [Layer(0).resid_post, Head(1, 0).k, Layer(1).attn_in, "logits"]
    one, two = (capture(model, TASK, sites, what=what) for model in both)
    for name in one.data_vars:
        np.testing.assert_allclose(two[name], one[name], atol=2e-5, err_msg=name)
    one, two = (logit_lens(model, TASK, metrics=loss) for model in both)
    np.testing.assert_allclose(two["loss"], one["loss"], atol=1e-5)


@TWO
@pytest.mark.parametrize("estimator", ["gradient", "integrated"])
def test_estimates_of_called_blocks_are_those_of_laid_open_ones(both, estimator):
    what = {str(number): one for number, one in enumerate(conditions(both[0])) if len(one.edits()) == 1}
    one, two = (measure(model, TASK, what, loss, estimator=estimator) for model in both)
    np.testing.assert_allclose(two["loss"], one["loss"], atol=1e-5)


@pytest.mark.parametrize("name", ["glm4", "bloom", "cohere2"])
def test_the_plan_counts_what_runs_in_called_blocks(name):
    model = hw.load(build(name, 1))
    alone = counted(lambda: measure(model, TASK, None, loss, runs="all", check=False))
    for grid in (
        Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=model.layers, head=model.heads),
        Grid(lambda layer: Patch(Layer(layer).resid_post), layer=model.layers),
    ):
        planned = plan(model, TASK, grid, loss, timed=False)
        assert "blocks             called: whole ones run, from the first layer that a condition" in repr(planned)
        made = planned.cost()
        found = counted(lambda grid=grid: measure(model, TASK, grid, loss, check=False)) - alone
        assert found == pytest.approx(made.passes, rel=0.05)


def test_every_head_of_a_called_gpt2_small_takes_little_more_than_half_of_plain_passes():
    with torch.device("meta"):
        shape = find_parts(GPT2LMHeadModel(GPT2Config()).eval(), "gpt2", "a test").counts
    heads = [ZeroAblate(Head(layer, head)).edits() for layer in range(12) for head in range(12)]
    groups = [Group((0, 1, 2, 3), 50, tuple(range(25, 49)))]
    made = make_plan(heads, model="gpt2", shape=shape, groups=groups, runs=["clean"], base="clean")
    assert shape.work == 24 * 768**2
    assert made.cost().share == pytest.approx(0.528, abs=0.001)


def test_what_called_blocks_do_not_have_is_refused_before_any_pass():
    model = hw.load(build("glm4", 0))
    assert [str(one) for one in model.sites] == (
        [
            "embed",
            "resid_pre",
            "attn_in",
            "q",
            "k",
            "v",
            "z",
            "attn_out",
            "resid_mid",
            "mlp_in",
            "mlp_pre",
            "mlp_post",
            "mlp_out",
            "resid_post",
        ]
    )
    pattern = "has no pattern: attention does not give its weights; with attn_implementation='eager' most do"
    for what, metrics, text in (
        (Knockout(Head(0, 1), 5, 2), loss, pattern),
        (None, induction, pattern),
        (ZeroAblate(Head(0, 0).head_out), loss, "has no head_out: its blocks are called"),
        (PathPatch(Head(0, 0), "logits"), loss, "paths go through parts of blocks, and those of .* are called whole"),
    ):
        with pytest.raises(DeclarationError, match=text):
            measure(model, TASK, what, metrics)
    for work in (hw.circuit_scores, hw.composition_scores, lambda one: hw.direct_logit_attribution(one, TASK)):
        with pytest.raises(ModelError, match=r"needs blocks that are laid open, and those of .* are called: no table"):
            work(model)


def test_patterns_of_called_blocks_are_those_that_eager_attention_gives():
    module = build("smollm3", 0)
    module.set_attn_implementation("eager")
    model, tokens = hw.load(module), torch.as_tensor(TASK.draw(hw.load(build("smollm3", 0))).runs["clean"])
    with torch.no_grad():
        wanted = module(tokens, output_attentions=True, use_cache=False).attentions
    found = capture(model, TASK, [Layer(0).pattern, Head(1, 2).pattern])
    np.testing.assert_allclose(found["L0_pattern"], wanted[0], atol=1e-6)
    np.testing.assert_allclose(found["L1H2_pattern"], wanted[1][:, 2], atol=1e-6)
    kept = []
    out = module.model.layers[0].self_attn.o_proj
    hook = out.register_forward_pre_hook(lambda _, given: kept.append(given[0]) or torch.zeros_like(given[0]))
    with torch.no_grad():
        ablated = module(tokens, output_attentions=True, use_cache=False).attentions[1]
    hook.remove()
    under = capture(model, TASK, Layer(1).pattern, what=ZeroAblate(Layer(0).z))
    np.testing.assert_allclose(under["L1_pattern"], ablated, atol=1e-6)
    for what in (Knockout(Head(0, 1), 5, 2), Patch(Head(0, 1).pattern)):
        with pytest.raises(DeclarationError, match=r"pattern of .* can be read, and not written: its blocks are"):
            measure(model, TASK, what, loss)
    queries = TASK.draw(model).runs["clean"].shape[1] // 2
    half = wanted[1][:, :, queries:].numpy()
    score = np.stack([half[:, :, at, at + 1] for at in range(queries)]).mean(0)
    found = measure(model, TASK, None, induction)["baseline_induction"].sel(run="clean", layer=1)
    np.testing.assert_allclose(found.transpose("example", ...).values, score, atol=1e-6)


def test_blocks_without_attention_have_a_stream_and_no_heads():
    model = hw.load(build("mamba", 0))
    assert [*model.heads] == []
    assert {"resid_pre", "resid_post"} <= {*model.sites}
    found = measure(model, TASK, Patch(Layer(1).resid_pre), loss)
    corrupted = measure(model, TASK, None, loss, runs="all")["baseline_loss"].sel(run="corrupted")
    np.testing.assert_allclose(found["loss"].squeeze(), corrupted, atol=1e-5)
    with pytest.raises(HeadwiseError, match="has no z: its blocks have no attention that headwise can find"):
        measure(model, TASK, ZeroAblate(Head(0, 0)), loss)
