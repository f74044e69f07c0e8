"""Directions that are projected out, against plain hooks; what of them is possible, estimated and stored."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions import Head, Layer, Neuron, ProjectOut, ZeroAblate
from headwise.interventions.declare.codec import from_json, to_json
from headwise.metrics import logit_diff, loss
from headwise.studies import RepeatedTokens, measure
from tests.interventions.run.test_gradients import linear_model
from tests.interventions.run.test_paths import PER_HEAD, STREAM, TASK, check, places, runs, site
from tests.oracles import raw_paths
from tests.oracles.raw_paths import Place


def test_project_out_equals_raw_hooks(random_model):
    random, (tokens, _) = np.random.RandomState(1), runs(random_model)
    what, logits, shape = [], [], random_model.shape
    components = [one for one in PER_HEAD + STREAM if one != "head_out"]
    for place in (*places(random_model, components), Place(0, "mlp_post"), Place(shape.layers - 1, "mlp_pre")):
        wide = {"mlp_pre": shape.d_mlp, "mlp_post": shape.d_mlp}.get(place.component, shape.d_model)
        vector = 30 * random.standard_normal(shape.d_head if place.component in PER_HEAD else wide)
        what.append(ProjectOut(site(place), vector))
        logits.append(raw_paths.project_out(random_model.module, tokens, place, torch.tensor(vector)))
    check(random_model, what, logits)


def test_what_is_projected_out_is_gone_and_nothing_else(random_model):
    """Twice is once, the norm of the vector does not count, and of a vector alone nothing is left."""
    shape = random_model.shape
    first, place = np.eye(shape.d_model)[0], Layer(shape.layers - 1).mlp_out
    what = {
        "once": ProjectOut(place, first),
        "scaled": ProjectOut(place, -1e200 * first),
        "tiny": ProjectOut(place, 1e-300 * first),
        "all": sum(ProjectOut(place.at(at), first) for at in range(14)),
        "neuron": ProjectOut("L0N3", 5.0),
        "zero": ZeroAblate("L0N3"),
    }
    found = measure(random_model, TASK, what, [loss])["loss"].values
    for other in found[1:4]:
        np.testing.assert_allclose(other, found[0], rtol=1e-6)
    np.testing.assert_allclose(found[4], found[5], rtol=1e-6)


@pytest.mark.parametrize("estimator", ["gradient", "integrated"])
def test_its_estimate_is_exact_where_the_metric_is_linear_in_the_site(estimator):
    model, task = hw.load(linear_model()), RepeatedTokens(n=2, length=5)
    what = {"some": ProjectOut(Layer(0).mlp_out.at([7, 8]), range(8)), "all": ProjectOut(Layer(0).resid_post, [1] * 8)}
    exact = measure(model, task, what, logit_diff)["logit_diff"]
    found = measure(model, task, what, logit_diff, estimator=estimator, steps=2)["logit_diff"]
    np.testing.assert_allclose(found.values, exact.values, atol=1e-4, rtol=1e-4)
    assert np.abs(hw.effect(measure(model, task, what, logit_diff), "logit_diff")).min("example").max() > 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProjectOut(Head(0, 1).pattern, [1.0]), "L0H1 pattern: ProjectOut takes no pattern"),
        (lambda: ProjectOut(Head(0, 1).head_out, [1.0]), "possible are ProjectOut(Head(0, 1).z, ...), with d_head num"),
        (lambda: ProjectOut(Head(0, 1), [0.0, 0.0]), "L0H1 z: a vector of zeros has no direction"),
        (lambda: ProjectOut(Layer(0).z, [1.0]), "L0 z: ProjectOut takes one head"),
    ],
)
def test_what_has_no_direction_to_project_out_is_refused(make, message):
    with pytest.raises(DeclarationError) as caught:
        make()
    assert message in str(caught.value)


def test_it_is_stored_and_refused_by_its_width(small_model):
    one = ProjectOut(Neuron(0, 3).mlp_pre, 2.0) + ProjectOut(Layer(1).resid_pre.at(-1), [0.5] * 32)
    assert from_json(to_json(one)) == one
    assert "ProjectOut(site=Layer(1).resid_pre.at(-1), vector=<32 numbers of norm 2.828>)" in repr(one)
    with pytest.raises(DeclarationError, match=r"L0H1 z of .* takes 8 numbers, got 2"):
        measure(small_model, TASK, ProjectOut("L0H1", [1, 2]), [loss])
