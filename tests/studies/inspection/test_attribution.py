"""Direct logit attribution against sources taken out of the stream, one by one, by plain hooks."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError
from tests.oracles import raw_families
from tests.oracles.raw_direct import shares
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


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one in QUICK else pytest.mark.heavy) for one in raw_families.MODELS]
)
def test_the_parts_of_every_family(name):
    check(raw_families.random_model(name))


def test_the_parts_of_gpt2():
    check(random_gpt2(3, 4, 8, 40, 30))


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
