"""Direct logit attribution against sources taken out of the stream, one by one, by plain hooks."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError
from tests.oracles import raw_families
from tests.oracles.raw_direct import shares, shares_inside
from tests.oracles.raw_hooks import random_gpt2

TASK = hw.RepeatedTokens(n=3, length=5, seed=2)
QUICK = ("pythia", "llama", "gpt-neo", "gemma")


def names(model):
    kept = ["embed", "pos_embed"] if model.family.name in ("gpt2", "gpt_neo") else ["embed"]
    for layer in model.layers:
        kept += [f"L{layer}H{head}" for head in model.heads] + [f"L{layer}.mlp"]
    return [*kept, "bias"]


def check(module, task=TASK, of="logit_diff"):
    model = hw.load(module)
    batch = task.draw(model)
    tokens = torch.tensor(batch.runs["clean"])
    plus = torch.tensor(batch.targets)
    minus = torch.tensor(batch.distractors)
    wanted, whole = shares(module, tokens, plus, minus)
    ds = hw.direct_logit_attribution(model, task, of, per_position=True)
    assert ds["attribution"].dims == ("source", "example", "position")
    assert ds["source"].values.tolist() == names(model) == list(wanted)
    for name, value in wanted.items():
        expected = np.where(batch.scored, value.numpy(), np.nan)
        np.testing.assert_allclose(ds["attribution"].sel(source=name), expected, atol=2e-4, err_msg=name)
    summed = ds["attribution"].sum("source").where(ds["whole"].notnull())
    np.testing.assert_allclose(summed, ds["whole"], atol=1e-4)
    np.testing.assert_allclose(ds["whole"], np.where(batch.scored, whole.numpy(), np.nan), atol=2e-4)


def check_inside(module, task=TASK):
    """The neurons of the last layer and the keys of its last head; they sum to the shares of the MLP and the head."""
    model = hw.load(module)
    batch, layer, head = task.draw(model), model.layers[-1], model.heads[-1]
    tokens, plus, minus = (torch.tensor(one) for one in (batch.runs["clean"], batch.targets, batch.distractors))
    wanted = shares_inside(module, tokens, plus, minus, layer, head)
    ds = hw.direct_logit_attribution(model, task, parts=[hw.Layer(layer), hw.Head(layer, head)], per_position=True)
    assert ds["source"].values.tolist() == list(wanted)
    expected = np.stack([np.where(batch.scored, value.numpy(), np.nan) for value in wanted.values()])
    np.testing.assert_allclose(ds["attribution"], expected, atol=2e-4)
    assert np.nanmax(np.abs(expected[: model.shape.d_mlp])) > 1e-2
    assert np.nanmax(np.abs(expected[model.shape.d_mlp + 1 :])) > 1e-2
    whole = hw.direct_logit_attribution(model, task, per_position=True)
    np.testing.assert_array_equal(ds["whole"], whole["whole"])
    of_mlp = ds["layer"].notnull() & ds["kind"].isin(["neuron", "bias"])
    for some, name in ((of_mlp, f"L{layer}.mlp"), (ds["kind"] == "key", f"L{layer}H{head}")):
        summed = ds["attribution"].where(some, drop=True).sum("source", skipna=False)
        np.testing.assert_allclose(summed, whole["attribution"].sel(source=name), atol=1e-4)


FAMILIES = [pytest.param(one, marks=() if one in QUICK else pytest.mark.heavy) for one in raw_families.MODELS]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_of_every_family(name):
    check(raw_families.random_model(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_and_keys_of_every_family(name):
    check_inside(raw_families.random_model(name))


def test_the_parts_of_gpt2():
    check(random_gpt2(3, 4, 8, 40, 30))
    check_inside(random_gpt2(3, 4, 8, 40, 30))


def test_the_mean_over_positions_is_the_logit_difference_that_is_measured(words_model):
    task = hw.RepeatedTokens(n=4, length=12)
    ds = hw.direct_logit_attribution(words_model, task)
    measured = hw.measure(words_model, task, None, "logit_diff")["logit_diff"]
    assert ds["attribution"].dims == ("source", "example")
    np.testing.assert_allclose(ds["whole"], measured, atol=1e-4)
    np.testing.assert_allclose(ds["attribution"].sum("source"), measured, atol=1e-4)
    assert ds["attribution"].mean("example").idxmax("source").item().startswith("L1H")  # an induction head
    where = ds.sel(source="L1H2")
    assert (int(where["layer"]), int(where["head"]), str(where["kind"].values)) == (1, 2, "head")
    assert ds["attribution"].attrs["units"] == "logit"


def test_of_the_answer_alone_and_of_a_direction(words_model):
    task = hw.RepeatedTokens(n=2, length=6)
    batch = task.draw(words_model)
    logits = words_model.module(torch.tensor(batch.runs["clean"])).logits.detach()
    answer = logits.gather(-1, torch.tensor(batch.targets)[..., None])[..., 0].numpy()
    ds = hw.direct_logit_attribution(words_model, task, "logit", per_position=True)
    np.testing.assert_allclose(ds["whole"], np.where(batch.scored, answer, np.nan), atol=1e-4)
    np.testing.assert_allclose(ds["attribution"].sum("source", skipna=False), ds["whole"], atol=1e-4)
    direction = words_model.module.lm_head.weight[7].detach().numpy()
    ds = hw.direct_logit_attribution(words_model, task, direction, per_position=True)
    np.testing.assert_allclose(ds["whole"], np.where(batch.scored, logits[..., 7].numpy(), np.nan), atol=1e-4)
    np.testing.assert_allclose(ds["attribution"].sum("source", skipna=False), ds["whole"], atol=1e-4)


def test_prompts_of_several_lengths(words_model):
    task = hw.Prompts(
        ["apple banana cherry apple", "dog cat dog"], answers=["banana", "cat"], distractors=["cherry", "dog"]
    )
    ds = hw.direct_logit_attribution(words_model, task)
    np.testing.assert_allclose(ds["whole"], hw.measure(words_model, task, None, "logit_diff")["logit_diff"], atol=1e-4)
    np.testing.assert_allclose(ds["attribution"].sum("source"), ds["whole"], atol=1e-4)


def test_some_neurons_and_keys_of_prompts_of_several_lengths(words_model):
    task = hw.Prompts(
        ["apple banana cherry apple", "dog cat dog"], answers=["banana", "cat"], distractors=["cherry", "dog"]
    )
    neurons = [hw.Neuron(1, 5), hw.Neuron(0, 17), "L1N2"]
    ds = hw.direct_logit_attribution(words_model, task, parts=[*neurons, "L1H2"])
    names = ["L1N5", "L1N2", "L0N17", *(f"L1H2 from {key}" for key in range(4))]
    assert ds["source"].values.tolist() == names
    assert ds["neuron"].values.tolist() == [5, 2, 17, -1, -1, -1, -1]
    assert ds["key"].values.tolist() == [-1, -1, -1, 0, 1, 2, 3]
    every = hw.direct_logit_attribution(words_model, task, parts=[hw.Layer(0), hw.Layer(1)])["attribution"]
    np.testing.assert_allclose(ds["attribution"][:3], every.sel(source=names[:3]), atol=1e-6)
    keys = ds["attribution"][3:]
    assert keys.isnull().values.tolist() == [[False, False]] * 3 + [[False, True]]
    whole = hw.direct_logit_attribution(words_model, task)["attribution"].sel(source="L1H2")
    np.testing.assert_allclose(keys.sum("source"), whole, atol=1e-4)
    assert keys.idxmax("source").values.tolist() == ["L1H2 from 1", "L1H2 from 1"]  # after the earlier copy


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ("L5", "words-2l has layers 0 to 1"),
        (hw.Neuron(0, 999), "words-2l has neurons 0 to 127"),
        ([hw.Layer(0), hw.Neuron(0, 3)], "Neuron(0, 3) is named twice, by its layer too"),
        (["L0H1", hw.Head(0, 1)], "Head(0, 1) is named twice"),
        ("L0H1.k", "Head(0, 1).k cannot be looked into: possible are layers such as Layer(0)"),
        ([], "parts: name at least one"),
    ],
)
def test_parts_that_cannot_be_are_refused(words_model, parts, says):
    with pytest.raises(DeclarationError) as caught:
        hw.direct_logit_attribution(words_model, TASK, parts=parts)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("task", "of", "says"),
    [
        (hw.Prompts(["dog cat dog"]), "logit_diff", "distractors"),
        (TASK, "prob", "of='prob': possible are 'logit_diff' and 'logit', or a direction of 64 numbers"),
        (TASK, [1.0, 2.0], "a direction of 64 numbers"),
        (hw.Prompts(["dog"], answers=["cat dog"], distractors=["red"]), "logit_diff", "several tokens"),
    ],
)
def test_what_cannot_be_is_refused(words_model, task, of, says):
    with pytest.raises(DeclarationError, match=says):
        hw.direct_logit_attribution(words_model, task, of)
