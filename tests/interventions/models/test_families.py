"""Model families against raw hooks: every site and intervention, sweeps, patterns, gradients, costs, self-checks."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headwise as hw
from headwise.interventions import (
    Add,
    Grid,
    Head,
    Layer,
    MeanAblate,
    Neuron,
    Patch,
    PathPatch,
    ProjectOut,
    ResampleAblate,
    Scale,
    ZeroAblate,
    selfcheck,
)
from headwise.interventions.plan.cost import forward_flops
from headwise.metrics import induction, logit_diff, loss
from headwise.studies import RepeatedTokens, capture, measure, plan
from tests.interventions.plan.test_cost import counted, grids
from tests.interventions.run.test_planned import asked, check, named
from tests.oracles import planned_cases as cases
from tests.oracles import raw_families, raw_variants
from tests.oracles.raw_paths import Place
from tests.support.families import FEW, NAMES, OFTEN, TASK
from tests.support.heavy import heavy_but_few


def world(name, metrics=(loss,), base="clean"):
    return cases.World(name, "sdpa", TASK, base, metrics)


def sites(there, whole=True, turn=None):
    """Every component in the first and in the last layer, whole and by head, at all and at some positions.

    With a turn, each at one of these choices of positions: another one in each turn.
    """
    chosen, number = (None, (2, 9), (8,)), 0
    for layer, component in product(sorted({0, there.shape.layers - 1}), there.components):
        if "embed" in component and layer:
            continue
        number += 1
        every = turn is None and component not in ("attn_in", "mlp_in", *cases.PER_NEURON)  # these: see test_neurons
        for at in chosen if every else [chosen[(number + (turn or 0)) % 3]]:
            if whole or component not in cases.PER_HEAD:
                yield cases.placed(Layer(layer).site(component), at)
            if component in cases.PER_HEAD:
                yield cases.placed(Head(layer, there.heads(component) - 1).site(component), at)
            if component in cases.PER_NEURON:
                yield cases.placed(Neuron(layer, there.shape.d_mlp - 1).site(component), at)


def check_all(there, several):
    check(there, several, named(several))


@pytest.mark.parametrize("name", FEW)
def test_ablations_and_scalings_equal_raw_hooks(name):
    there = world(name)
    several = [ZeroAblate(site) for site in sites(there)]
    several += [Scale(site, -0.5) for site in sites(there, turn=0)]
    several += [MeanAblate(site) for site in sites(there, turn=1)]
    over = [one for one in sites(there, turn=2) if one.component != "pattern"]
    several += [MeanAblate(site, ("example", "position")) for site in over]
    several += [ResampleAblate(site, seed=2) for site in sites(there, turn=0)]
    check_all(there, several)


BACK = ("pythia", "qwen3")
"""Families of which the corrupted run is patched into the clean one in `make test`; the others in `make test-heavy`."""


@pytest.mark.parametrize(
    ("name", "base", "source"),
    [
        *heavy_but_few(NAMES, ["clean"], ["corrupted"], often=[(name, "clean", "corrupted") for name in OFTEN]),
        *heavy_but_few(NAMES, ["corrupted"], ["clean"], often=[(name, "corrupted", "clean") for name in BACK]),
    ],
)
def test_patches_equal_raw_hooks(name, base, source):
    there = world(name, (loss, logit_diff), base)
    check_all(there, [Patch(site, source) for site in sites(there, turn=None if base == "clean" else 1)])


@pytest.mark.parametrize("name", FEW)
def test_additions_and_projections_equal_raw_hooks(name):
    there, random = world(name), np.random.RandomState(0)
    places = [one for one in sites(there, whole=False, turn=2) if one.component != "pattern"]
    several = [Add(one, random.standard_normal(cases.width(one, there.shape))) for one in places]
    places = [one for one in sites(there, whole=False, turn=0) if one.component not in ("pattern", "head_out")]
    several += [ProjectOut(one, random.standard_normal(cases.width(one, there.shape))) for one in places]
    check_all(there, several)


@pytest.mark.parametrize("name", FEW)
def test_paths_equal_raw_hooks(name):
    there = world(name)
    last = there.shape.layers - 1
    ends = ["logits", *([Head(last, 0).q, Head(last, 0).k, Head(last, there.heads("v") - 1).v] if last else [])]
    senders = [Head(0, 1).z, Layer(0).attn_out, Layer(0).mlp_out, Head(0, 0).z.at([3, 8])]
    several = [
        PathPatch(sender, end, through_mlps=through) for sender in senders for end in ends for through in (True, False)
    ]
    check_all(there, several)


@pytest.mark.parametrize("name", NAMES)
@given(st.randoms(use_true_random=True))
@settings(max_examples=8)  # hundreds of all families: test_planned, heavy
def test_planned_is_naive(name, random):
    there = cases.world(random, [name])
    several = [cases.condition(random, there) for _ in range(random.choice([1, 4, 8]))]
    check(there, several, asked(random, several), random.random() < 0.5, **cases.layout(random))


@pytest.mark.parametrize("name", NAMES)
@given(st.randoms(use_true_random=True))
@settings(max_examples=3)
def test_one_edit_everywhere_is_naive(name, random):
    there = cases.world(random, [name])
    several = cases.family(random, there)
    check(there, several, asked(random, several), random.random() < 0.5, **cases.layout(random))


@pytest.mark.parametrize("name", FEW)
def test_capture_equals_raw_hooks(name, model):
    tokens = torch.as_tensor(TASK.draw(model).runs["clean"])
    for layer in model.layers:
        for component in world(name).components:
            if "embed" in component and layer:
                continue
            by_head = component in cases.PER_HEAD
            heads = [Head(layer, head) for head in range(world(name).heads(component))] if by_head else []
            asked = [Layer(layer).site(component), *(head.site(component) for head in heads)]
            found = capture(model, TASK, asked)
            whole = found[f"L{layer}_{component}"].values
            if component not in cases.PER_HEAD:
                wanted = raw_families.read(model.module, tokens, Place(layer, component)).numpy()
                np.testing.assert_allclose(whole, wanted, atol=1e-5)
                if component in cases.PER_NEURON:
                    one = capture(model, TASK, Neuron(layer, 3).site(component))[f"L{layer}N3_{component}"]
                    assert one.dims == ("example", "position")
                    np.testing.assert_array_equal(one.values, whole[..., 3])
                continue
            for head in heads:
                wanted = raw_families.read(model.module, tokens, Place(layer, component, head.head)).numpy()
                axis = 1 if component == "pattern" else 2
                np.testing.assert_allclose(whole.take(head.head, axis), wanted, atol=1e-5)
                np.testing.assert_allclose(found[f"{head}_{component}"].values, wanted, atol=1e-5)


def test_patterns_are_the_models_own_attention_weights(model):
    """From what is captured before the softmax, by hand, and as captured."""
    tokens = torch.as_tensor(TASK.draw(model).runs["clean"])
    query, key = ("q_rot", "k_rot") if model.shape.rotary else ("q", "k")
    places = torch.arange(tokens.shape[1])
    for layer, weights in enumerate(raw_families.own_weights(model.module, tokens)):
        window = model.shape.window(layer) or 1000
        hidden = (places > places[:, None]) | (places[:, None] - places >= window)
        for head in model.heads:
            wanted = weights[:, head].numpy()
            own = [Head(layer, head).site(query), model.read_by(Head(layer, head), key), Head(layer, head).pattern]
            found = capture(model, TASK, own)
            q, k = (torch.as_tensor(found[str(one).replace(" ", "_")].values) for one in own[:2])
            cap = getattr(model.module.config, "attn_logit_softcapping", None)
            scores = raw_variants.capped(q @ k.transpose(1, 2) * model.scaling(layer), cap)
            scores = scores.masked_fill(hidden, -torch.inf)
            made = raw_families.weights(model.module, layer, head, scores).detach()
            np.testing.assert_allclose(made, wanted, atol=1e-5)
            np.testing.assert_allclose(found[f"L{layer}H{head}_pattern"].values, wanted, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_self_checks_are_silent(name, implementation):
    assert selfcheck.failures(cases.model(name, implementation)) == []


@pytest.mark.parametrize(("name", "dtype"), heavy_but_few(NAMES, ["bfloat16", "float16"]))
def test_rounding_is_no_failure(name, dtype):
    if name == "gpt-oss":
        pytest.skip("rounding chooses other experts")
    assert selfcheck.failures(hw.load(raw_families.random_model(name), dtype=dtype)) == []


def differences(model):
    """The mean logit difference of each prompt, from logits."""
    batch = TASK.draw(model)
    (group,) = batch.groups()
    facts = batch.facts("clean", group)
    ids = [torch.as_tensor(one)[..., None] for one in (facts.targets, facts.distractors)]

    def score(logits):
        target, distractor = (logits[:, list(group.scored)].gather(-1, one)[..., 0] for one in ids)
        return (target - distractor).mean(-1)

    return score


def test_gradient_estimates_equal_autograd(name, model):
    there = world(name, (logit_diff,))
    tokens, other = (torch.as_tensor(TASK.draw(model).runs[run]) for run in ("clean", "corrupted"))
    score = differences(model)
    several = [Patch(one) for one in sites(there, whole=False, turn=0) if one.component not in ("embed", "pos_embed")]
    base = measure(model, TASK, None, [logit_diff])["baseline_logit_diff"].sel(run="clean").values
    found = measure(model, TASK, named(several), [logit_diff], estimator="gradient")["logit_diff"].values
    for row, edit in enumerate(several):
        place = Place(edit.site.layer, str(edit.site.component), edit.site.part, edit.site.positions)
        old, slope = raw_families.slope(model.module, tokens, score, place)
        wanted = ((raw_families.read(model.module, other, place) - old) * slope).flatten(1).sum(1)
        np.testing.assert_allclose(found[row] - base, wanted.numpy(), atol=1e-5, rtol=1e-4, err_msg=str(edit))


@pytest.mark.parametrize(
    ("component", "name", "kind"),
    heavy_but_few(
        ["k", "q_rot", "k_rot", "pattern", "z", "head_out"], ["llama", "pythia", "qwen3"], [ZeroAblate, Patch]
    ),
)
def test_integrated_estimates_equal_autograd(name, model, component, kind):
    """All heads of a layer, which move together; key-value heads where the component is of those."""
    tokens, other = (torch.as_tensor(TASK.draw(model).runs[run]) for run in ("clean", "corrupted"))
    heads = model.kv_heads if component in raw_families.OF_KEYS else model.heads
    grid = Grid(lambda layer, head: kind(Head(layer, head).site(component)), layer=[0, 1], head=heads)
    found = hw.effect(measure(model, TASK, grid, [logit_diff], estimator="integrated", steps=4), "logit_diff").values
    for layer in (0, 1):
        places = [Place(layer, component, head, None) for head in heads]
        news = [raw_families.read(model.module, other, place) * (kind is Patch) for place in places]
        wanted = raw_families.integrated_estimate(model.module, tokens, differences(model), places, news, steps=4)
        np.testing.assert_allclose(found[layer], torch.stack(wanted).numpy(), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "pythia"])
def test_integrated_estimates_of_parts_add_up_to_what_is_exact(name, model):
    errors = []
    exact = hw.effect(measure(model, TASK, ZeroAblate(Layer(1).z), [loss]), "loss").values
    for steps in (2, 64):
        grid = Grid(lambda head: ZeroAblate(Head(1, head)), head=model.heads)
        parts = hw.effect(measure(model, TASK, grid, [loss], estimator="integrated", steps=steps), "loss")
        errors.append(np.abs(parts.sum("head").values - exact).max())
    assert errors[1] < 5e-3
    assert errors[1] < errors[0]
    assert np.abs(exact).max() > 0.1


@pytest.mark.parametrize(("name", "metrics"), heavy_but_few(NAMES, [[loss], [logit_diff], [induction, loss]]), ids=str)
def test_the_plan_counts_what_runs(name, model, metrics):
    if name == "gpt-oss":
        pytest.skip("torch does not count what experts do")
    task = RepeatedTokens(n=2, length=7)
    alone = counted(lambda: measure(model, task, None, metrics, runs="all", check=False))
    for grid in grids(model):
        made = plan(model, task, grid, metrics, timed=False).cost()
        found = counted(lambda grid=grid: measure(model, task, grid, metrics, check=False)) - alone
        sources = forward_flops(model.shape, 2, 14)
        assert found == pytest.approx(made.passes, rel=0.05, abs=0.02 * sources), grid


def test_a_plain_forward_pass_is_counted_right(name, model):
    if name == "gpt-oss":
        pytest.skip("torch does not count what experts do")
    tokens = torch.zeros((3, 11), dtype=torch.long)
    with torch.no_grad():
        found = counted(lambda: model.module(tokens, use_cache=False))
    assert found == pytest.approx(forward_flops(model.shape, 3, 11), rel=0.02)
