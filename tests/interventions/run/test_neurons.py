"""Neurons, and what attention and MLPs read: beside all else that a pass writes, and where rows join it.

That each component of each family is read and written right, `test_families` sees.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError, ModelError
from headwise.interventions import Add, Grid, Head, Layer, MeanAblate, Neuron, Patch, Scale, ZeroAblate, selfcheck
from headwise.interventions.models import family
from headwise.interventions.plan.writes import STAGES
from headwise.metrics import induction, kl, loss
from headwise.studies import Prompts, capture, measure, plan, rerun
from tests.interventions.run.test_planned import check, named
from tests.oracles import planned_cases as cases
from tests.oracles import raw_families, raw_hooks
from tests.support.families import TASK

FAMILIES = ["two layers", "pythia", "llama", "neox, one after the other"]


def world(name, *metrics):
    return cases.World(name, "sdpa", TASK, "clean", metrics or (loss,))


def beside(layer):
    """Writes in attention and in the MLP of one layer, in one condition."""
    inner = [ZeroAblate(Neuron(layer, 3)), Patch(Layer(layer).mlp_in), Scale(Neuron(layer, 2).mlp_pre.at([7, 9]), -2.0)]
    outer = [
        ZeroAblate(Layer(layer).attn_in.at([2, 8])),
        ZeroAblate(Head(layer, 0).k),
        Patch(Head(layer, 1).pattern.at([6, 10])),
        ZeroAblate(Head(layer, 1)),
        Scale(Layer(layer).attn_out, 0.5),
        Scale(Layer(layer).resid_pre, 1.5),
        MeanAblate(Layer(layer).mlp_out.at(range(3, 6))),
    ]
    yield from (one + other for one in inner for other in outer)
    yield from inner + outer
    yield sum(inner) + Add(Neuron(layer, 5), 2.0)


PATTERNS = [(name, metrics) for name in FAMILIES[:2] for metrics in ((induction, loss), (induction,))]


@pytest.mark.parametrize(("name", "metrics"), [*((name, (loss,)) for name in FAMILIES), *PATTERNS], ids=str)
def test_beside_attention_in_one_layer(name, metrics):
    """In one pass with the same in another layer, and with the neurons that come before."""
    there = world(name, *metrics)
    last = there.shape.layers - 1
    several = [*beside(0), *beside(last), ZeroAblate(Neuron(0, 3)) + ZeroAblate(Neuron(last, 4))]
    check(there, several, named(several))


@pytest.mark.parametrize("name", FAMILIES)
def test_from_a_late_position_on(name):
    """Keys and values of positions before the first changed one are those of the base run."""
    there = world(name)
    sites = [Layer(1).attn_in, Layer(0).attn_in, Layer(1).mlp_in, Layer(0).mlp_pre, Neuron(0, 3).mlp_post]
    several = [ZeroAblate(site.at(at)) for site in sites for at in (8, 9)]
    check(there, several, named(several), overhead=0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_norm_that_changes_nothing_is_not_the_stream(name):
    """What attention and MLP read is written to; the stream that goes past them is not."""
    module = raw_hooks.random_gpt2(2, 2, 6, 40, 24) if name in cases.MODELS else raw_families.random_model(name)
    for block in module.get_submodule(hw.load(module).family.blocks):
        for norm in {"ln_1", "ln_2", "input_layernorm", "post_attention_layernorm"} & {*dict(block.named_children())}:
            setattr(block, norm, torch.nn.Identity())
    model = hw.load(module)
    what = {"in": ZeroAblate(Layer(0).attn_in), "read": Scale(Layer(1).mlp_in, 2.0)}
    found = measure(model, TASK, what, [loss], check=False)["loss"].values
    batch = TASK.draw(model)
    (group,) = batch.groups()
    targets = torch.as_tensor(batch.facts("clean", group).targets)[..., None]
    for row, (layer, part, factor) in enumerate([(0, 0, 0.0), (1, 1, 2.0)]):
        block = module.get_submodule(model.family.blocks)[layer]
        norm = block.get_submodule(model.family.modules[("norm_1", "norm_2")[part]])
        handle = norm.register_forward_hook(lambda _module, given, made, factor=factor: given[0].clone() * factor)
        with torch.no_grad():
            logits = module(torch.as_tensor(batch.runs["clean"]), use_cache=False).logits[:, list(group.scored)]
        handle.remove()
        wanted = -logits.log_softmax(-1).gather(-1, targets)[..., 0].mean(-1)
        np.testing.assert_allclose(found[row], wanted.numpy(), atol=1e-4, rtol=1e-5)


STARTS = {
    Layer(1).attn_in: "attn_in",
    Layer(1).mlp_in: "mlp_in",
    Layer(1).mlp_pre: "mlp_pre",
    Neuron(1, 3).mlp_pre: "mlp_pre",
    Neuron(1, 3).at(8): "mlp_post",
}


@pytest.mark.parametrize(("site", "stage"), STARTS.items(), ids=map(str, STARTS))
def test_nothing_before_a_change_is_computed_again(site, stage):
    made = plan(cases.model("two layers", "sdpa"), TASK, ZeroAblate(site), [loss], timed=False)
    (one,) = (one for chunk in made.chunks for one in chunk.passes)
    assert [(join.layer, STAGES[join.stage]) for join in one.joins] == [(1, stage)]
    assert f"         1  {stage} " in str(made)


def test_a_neuron_takes_less_than_its_mlp_and_that_less_than_its_layer():
    model = cases.model("two layers", "sdpa")
    sites = [Neuron(1, 3), Layer(1).mlp_in, Layer(1).attn_in, Layer(0).attn_in]
    cost = [plan(model, TASK, ZeroAblate(site), [loss], timed=False).cost().passes for site in sites]
    assert sorted(cost) == cost
    assert len({*cost}) == len(cost)


@pytest.mark.parametrize("layer", [0, 1])
def test_every_neuron_of_a_layer_is_what_plain_passes_say(words_model, layer):
    """Planned together, against one forward pass with one hook for each."""
    task = hw.RepeatedTokens(n=2, length=6)
    grid = Grid(lambda neuron: ZeroAblate(Neuron(layer, neuron)), neuron=words_model.neurons)
    assert plan(words_model, task, grid, loss, timed=False).cost().share < 0.8
    found = measure(words_model, task, grid, loss)["loss"]
    assert found.sizes == {"neuron": 128, "example": 2}
    batch = task.draw(words_model)
    (group,) = batch.groups()
    tokens, scored = torch.as_tensor(batch.runs["clean"]), list(group.scored)
    targets = tokens[:, [at + 1 for at in scored]]
    after = words_model.module.transformer.h[layer].mlp.c_proj
    for neuron in words_model.neurons:

        def without(module, given, neuron=neuron):
            changed = given[0].clone()
            changed[..., neuron] = 0
            return (changed,)

        hook = after.register_forward_pre_hook(without)
        try:
            with torch.no_grad():
                logits = words_model.module(tokens, use_cache=False).logits[:, scored]
        finally:
            hook.remove()
        wanted = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].mean(-1)
        np.testing.assert_allclose(found.sel(neuron=neuron), wanted, atol=1e-5, err_msg=f"L{layer}N{neuron}")


def test_many_neurons_have_one_dim_and_labels(tmp_path):
    """A sweep is stored, found and measured again; its numbers are those of each neuron alone."""
    model = hw.load("words-2l")
    task = hw.RepeatedTokens(n=2, length=6)
    assert [*model.neurons] == [*range(128)]
    grid = Grid(lambda layer, neuron: ZeroAblate(Neuron(layer, neuron)), layer=[1], neuron=model.neurons[:6])
    found = measure(model, task, grid, [loss, kl], out=tmp_path / "neurons.nc")
    assert found["loss"].dims == ("layer", "neuron", "example")
    assert "changed most by L1N" in str(hw.summary(found))
    for neuron in (0, 5):
        alone = measure(model, task, ZeroAblate(f"L1N{neuron}"), [loss, kl])
        np.testing.assert_allclose(found["kl"].sel(layer=1, neuron=neuron), alone["kl"], atol=1e-6)
    assert float(found["kl"].max()) > 0
    opened = hw.open_result(tmp_path / "neurons.nc")
    assert hw.from_json(opened.attrs["interventions"]).axes == grid.axes
    assert rerun(tmp_path / "neurons.nc").agrees


def test_capture_of_neurons_at_labels():
    model = hw.load("words-2l")
    task = Prompts(["apple banana cherry apple", "banana apple cherry"], labels={"end": (3, 2)})
    found = capture(model, task, [Layer(0).mlp_post, Neuron(0, 7).mlp_post.at("end"), "L1N2.mlp_pre at 0"])
    whole = found["L0_mlp_post"]
    assert whole.dims == ("example", "position", "neuron")
    assert whole["neuron"].values.tolist() == [*model.neurons]
    wanted = [float(whole.sel(example=0, position=3, neuron=7)), float(whole.sel(example=1, position=2, neuron=7))]
    assert found["L0N7_mlp_post_at_end"].values[:, 0].tolist() == wanted
    assert found["L1N2_mlp_pre_at_0"].shape == (2, 1)


def test_writes_to_neurons_are_compared_before_they_are_measured():
    """An MLP with arithmetic of its own is called as a whole by most sweeps, and not by those that go inside."""
    module = raw_hooks.random_gpt2(3, 2, 6, 40, 20)
    mlp = module.transformer.h[1].mlp

    class Louder(type(mlp)):
        def forward(self, value):
            return 1.5 * super().forward(value)

    mlp.__class__ = Louder
    model = hw.load(module)
    assert float(hw.effect(measure(model, TASK, ZeroAblate(Layer(1).mlp_out), [loss]), "loss").max()) != 0
    with pytest.raises(ModelError) as caught:
        measure(model, TASK, ZeroAblate(Neuron(0, 1)), [loss])
    told = str(caught.value)
    assert told.startswith("self-check of GPT2LMHeadModel failed: seen (")
    assert "(a write to mlp_in of layer 1 moves them elsewhere by" in told
    assert "wrong numbers for attn_in, mlp_in, mlp_pre and mlp_post of this model; check=False measures all" in told
    assert selfcheck.inner_failures(cases.model("two layers", "sdpa")) == []


@pytest.mark.parametrize("name", ["llama", "pythia"])
def test_nothing_fails_inside_of_families(name):
    assert selfcheck.inner_failures(cases.model(name, "sdpa")) == []


def test_an_mlp_that_the_table_does_not_take_apart_has_no_neurons(monkeypatch):
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    gpt2 = family.FAMILIES["gpt2"]
    modules = {name: path for name, path in gpt2.modules.items() if name != "act"}
    family.register(replace(gpt2, modules=modules))
    model = hw.load(raw_hooks.random_gpt2(2, 2, 4, 40, 20))
    for ask in (lambda: measure(model, TASK, ZeroAblate(Neuron(0, 1))), lambda: capture(model, TASK, Layer(0).mlp_pre)):
        with pytest.raises(DeclarationError, match="does not say where the pre, act and down of its MLPs are"):
            ask()
    whole = measure(model, TASK, {"in": ZeroAblate(Layer(0).mlp_in), "out": ZeroAblate(Layer(0).mlp_out)}, [loss])
    assert np.isfinite(whole["loss"]).all()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: ZeroAblate(Neuron(0, 128)), "L0N128 mlp_post: words-2l has neurons 0 to 127"),
        (lambda: Add(Neuron(0, 1), [1, 2]), "L0N1 mlp_post of words-2l takes one number, got 2"),
        (lambda: Add(Layer(0).mlp_pre, [1.0]), "L0 mlp_pre of words-2l takes 128 numbers, got 1"),
        (lambda: ZeroAblate("L0N1") + Patch(Layer(0).mlp_post), "two edits of one place: "),
    ],
)
def test_what_is_not_there_is_refused(what, message):
    with pytest.raises(DeclarationError) as caught:
        measure(hw.load("words-2l"), TASK, what())
    assert message in str(caught.value)
