"""Gradient estimates: exact where the metric is linear in the site, with the sign worked by hand; and against hooks."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions import (
    Add,
    Grid,
    Head,
    Knockout,
    Layer,
    MeanAblate,
    Neuron,
    Patch,
    PathPatch,
    ResampleAblate,
    Scale,
    ZeroAblate,
)
from headwise.metrics import accuracy, induction, kl, logit_diff, loss, prob
from headwise.studies import Prompts, RepeatedTokens, measure
from tests.oracles import raw_hooks, raw_paths
from tests.oracles.raw_paths import Place

TASK = RepeatedTokens(n=3, length=6, seed=3)


def estimated(model, what, metrics, estimator="gradient", **options):
    return measure(model, TASK, what, metrics, estimator=estimator, **options)


def score(model, name):
    batch = TASK.draw(model)
    (group,) = batch.groups()
    facts = batch.facts("clean", group)
    targets, distractors = torch.as_tensor(facts.targets), torch.as_tensor(facts.distractors)

    def one(logits):
        there = logits[:, list(group.scored)]
        if name == "loss":
            return -there.log_softmax(-1).gather(-1, targets[..., None])[..., 0].mean(-1)
        both = [there.gather(-1, ids[..., None])[..., 0] for ids in (targets, distractors)]
        return (both[0] - both[1]).mean(-1)

    return one


def linear_model():
    """One layer whose final norm is an affine map: logits are linear in the stream after the last block."""
    module = raw_hooks.random_gpt2(1, 2, 4, 30, 16)

    class Affine(torch.nn.Module):
        def forward(self, value):
            return 2 * value + 1

    module.transformer.ln_f = Affine()
    return module


def test_the_sign_by_hand():
    """The logit difference is 2 * stream . (W[target] - W[distractor]): zeroing the stream takes all of it away."""
    module = linear_model()
    model = hw.load(module)
    task = Prompts(["3 4 5", "6 7 8"], answers=["9", "10"], distractors=["11", "12"])
    found = measure(model, task, ZeroAblate(Layer(0).resid_post), [logit_diff], estimator="gradient")
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    stream = raw_hooks.activation(module, tokens, "resid_post", 0)[:, -1]
    weight = module.lm_head.weight.detach()
    direction = weight[[9, 10]] - weight[[11, 12]]
    change = -2 * (stream * direction).sum(-1)
    base = ((2 * stream + 1) * direction).sum(-1)
    np.testing.assert_allclose(hw.effect(found, "logit_diff").values, change, rtol=1e-5)
    np.testing.assert_allclose(found["logit_diff"].values, base + change, rtol=1e-4, atol=1e-4)
    assert found.attrs["estimator"] == "gradient"


@pytest.mark.parametrize("estimator", ["gradient", "integrated"])
def test_exact_where_the_metric_is_linear_in_the_site(estimator):
    model = hw.load(linear_model())
    what = {
        "zero": ZeroAblate(Layer(0).resid_post),
        "mean": MeanAblate(Layer(0).mlp_out),
        "resampled": ResampleAblate(Layer(0).mlp_out.at([7, 9])),
        "patch": Patch(Layer(0).resid_post.at(8)),
        "add": Add(Layer(0).resid_post, np.ones(8)),
        "scale": Scale(Layer(0).mlp_out, 3.0),
    }
    exact = measure(model, TASK, what, [logit_diff])["logit_diff"]
    found = estimated(model, what, [logit_diff], estimator, steps=3)["logit_diff"]
    np.testing.assert_allclose(found.values, exact.values, atol=1e-4, rtol=1e-4)
    assert np.abs(exact.values - exact.values.mean(0)).max() > 0.1


PLACES = [
    Place(0, "resid_pre", None, (3, 7)),
    Place(1, "q", 1, None),
    Place(0, "k", 2, (2, 5)),
    Place(1, "v", 0, None),
    Place(0, "z", 3, None),
    Place(1, "pattern", 2, None),
    Place(0, "head_out", 1, None),
    Place(1, "attn_out", None, (8,)),
    Place(0, "resid_mid", None, None),
    Place(1, "attn_in", None, None),
    Place(0, "mlp_in", None, (4, 8)),
    Place(1, "mlp_pre", None, None),
    Place(0, "mlp_pre", 5, None),
    Place(0, "mlp_post", 9, (3, 7)),
    Place(0, "mlp_out", None, None),
    Place(1, "resid_post", None, None),
]


def site(place):
    whole = Layer(place.layer).site(place.component)
    kind = Neuron if place.component in raw_paths.PER_NEURON else Head
    one = whole if place.head is None else kind(place.layer, place.head).site(place.component)
    return one if place.positions is None else one.at(place.positions)


@pytest.mark.parametrize("name", ["loss", "logit_diff"])
@pytest.mark.parametrize("kind", [ZeroAblate, Patch])
def test_the_gradient_equals_that_of_raw_hooks(small_model, name, kind):
    metric = {"loss": loss, "logit_diff": logit_diff}[name]
    batch = TASK.draw(small_model)
    tokens, other = (torch.as_tensor(batch.runs[run]) for run in ("clean", "corrupted"))
    what = {str(number): kind(site(place)) for number, place in enumerate(PLACES)}
    found = hw.effect(estimated(small_model, what, [metric]), name).values
    module = small_model.module
    for row, place in zip(found, PLACES, strict=True):
        there = raw_paths.read(module, other, place)
        new = torch.zeros_like(there) if kind is ZeroAblate else there
        wanted = raw_paths.gradient_estimate(module, tokens, score(small_model, name), place, new)
        np.testing.assert_allclose(row, wanted.numpy(), atol=1e-4, rtol=1e-4, err_msg=str(place))


@pytest.mark.parametrize("component", ["z", "k", "pattern", "mlp_post"])
def test_the_integrated_estimate_equals_that_of_raw_hooks(small_model, component):
    """All heads of a layer move together, and so do neurons."""
    batch = TASK.draw(small_model)
    tokens, other = (torch.as_tensor(batch.runs[run]) for run in ("clean", "corrupted"))
    kind = Neuron if component == "mlp_post" else Head
    grid = Grid(lambda layer, head: Patch(kind(layer, head).site(component)), layer=range(2), head=range(4))
    found = hw.effect(estimated(small_model, grid, [loss], "integrated", steps=4), "loss").values
    for layer in range(2):
        places = [Place(layer, component, head, None) for head in range(4)]
        news = [raw_paths.read(small_model.module, other, place) for place in places]
        wanted = raw_paths.integrated_estimate(
            small_model.module, tokens, score(small_model, "loss"), places, news, steps=4
        )
        np.testing.assert_allclose(found[layer], torch.stack(wanted).numpy(), atol=2e-4, rtol=1e-3)


def test_the_integrated_estimate_adds_up_to_moving_all_at_once(small_model):
    grid = Grid(lambda head: ZeroAblate(Head(1, head)), head=range(4))
    parts = hw.effect(estimated(small_model, grid, [loss], "integrated", steps=64), "loss").sum("head")
    whole = hw.effect(measure(small_model, TASK, ZeroAblate(Layer(1).z), [loss]), "loss")
    np.testing.assert_allclose(parts, whole, atol=5e-3)


def test_sites_that_meet_move_apart(small_model):
    """Two conditions on one head in one grid: each as if it were alone."""
    what = {"zero": ZeroAblate(Head(0, 1)), "patch": Patch(Head(0, 1)), "some": Patch(Head(0, 1).at([2, 9]))}
    together = estimated(small_model, what, [loss], "integrated", steps=3)["loss"].values
    for row, one in zip(together, what.values(), strict=True):
        alone = estimated(small_model, one, [loss], "integrated", steps=3)["loss"].values
        np.testing.assert_allclose(row, alone, atol=1e-5)


def test_edits_of_another_kind_do_not_change_an_integrated_estimate(small_model):
    zero = {f"zero {head}": ZeroAblate(Head(0, head)) for head in range(4)}
    patch = {f"patch {head}": Patch(Head(0, head)) for head in range(4)}
    mixed = {name: (zero | patch)[name] for pair in zip(patch, zero, strict=True) for name in pair}
    alone = estimated(small_model, zero, [loss], "integrated", steps=3)["loss"]
    beside = estimated(small_model, mixed, [loss], "integrated", steps=3)["loss"].sel(condition=list(zero))
    np.testing.assert_allclose(beside, alone, atol=1e-5)


def test_conditions_that_change_nothing_are_the_baseline(small_model):
    for estimator in ("gradient", "integrated"):
        found = estimated(small_model, Patch(Layer(1).mlp_out.at(0)), [loss], estimator)
        np.testing.assert_array_equal(found["loss"], found["baseline_loss"].sel(run="clean"))


def test_more_conditions_than_are_held_at_once(small_model):
    what = {str(n): Patch(Head(n % 2, n % 4).at([n % 12])) for n in range(70)}
    found = estimated(small_model, what, [loss])["loss"]
    for name in ("0", "33", "69"):
        alone = estimated(small_model, what[name], [loss])["loss"]
        np.testing.assert_allclose(found.sel(condition=name), alone, atol=1e-5)


def test_estimates_of_a_composition_add_up(small_model):
    one, two = ZeroAblate(Head(0, 1)), Patch(Layer(1).mlp_out.at([7, 8]))
    effects = [hw.effect(estimated(small_model, what, [prob]), "prob").values for what in (one, two, one + two)]
    np.testing.assert_allclose(effects[2], effects[0] + effects[1], atol=1e-6)


def test_estimates_do_not_depend_on_the_batch_size_and_baselines_are_exact(small_model):
    grid = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(4))
    for estimator in ("gradient", "integrated"):
        one, two = (estimated(small_model, grid, [loss], estimator, batch_size=size) for size in (1, "auto"))
        np.testing.assert_allclose(one["loss"], two["loss"], atol=1e-5)
        exact = measure(small_model, TASK, grid, [loss])
        np.testing.assert_allclose(two["baseline_loss"], exact["baseline_loss"], atol=1e-6)
        assert two["loss"].dims == exact["loss"].dims


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        (
            ZeroAblate(Head(0, 1)),
            {"estimator": "fast"},
            "estimator='fast': possible are exact, gradient and integrated",
        ),
        (ZeroAblate(Head(0, 1)), {"steps": 0}, "steps, of the integrated estimate, must be 1 or more, got 0"),
        (ZeroAblate(Head(0, 1)), {"metrics": [accuracy]}, "accuracy has no gradient estimate: possible are metrics of"),
        (ZeroAblate(Head(0, 1)), {"metrics": [induction]}, "induction has no gradient estimate"),
        (ZeroAblate(Head(0, 1)), {"per_position": True}, "per_position=True: estimator='gradient' gives the mean"),
        (Knockout(Head(0, 1), 5, 2), {}, "Knockout(Head(0, 1), query=5, key=2) has no gradient estimate"),
        (ZeroAblate(Head(0, 1)), {"metrics": [kl]}, "kl is least at the base run, where its slope is 0"),
        (
            ZeroAblate(Layer(0).resid_post) + ZeroAblate(Layer(1).resid_pre),
            {},
            "write to one place one after the other, which has no gradient estimate",
        ),
        (
            PathPatch(Head(0, 1), "logits"),
            {},
            "has no gradient estimate: possible are ablations, Patch, Add, Scale",
        ),
    ],
)
def test_what_cannot_be_estimated_is_refused(small_model, what, options, message):
    with pytest.raises(DeclarationError) as caught:
        measure(small_model, TASK, what, **({"metrics": [loss], "estimator": "gradient"} | options))
    assert message in str(caught.value)
