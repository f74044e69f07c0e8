"""Norms of attention-weighted values, against vectors that are written out one by one."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError, UnknownNameError
from tests.oracles import raw_families
from tests.oracles.raw_direct import Parts
from tests.oracles.raw_hooks import random_gpt2

TASK = hw.RepeatedTokens(n=2, length=5, seed=2)
QUICK = ("gpt-neo", "qwen3")


def check(module):
    model = hw.load(module)
    ds = hw.weighted_value_norms(model, TASK)
    assert ds["norm"].dims == ("layer", "head", "example", "query", "key")
    parts = Parts(module, torch.tensor(TASK.draw(model).runs["clean"]))
    for layer in model.layers:
        for head in model.heads:
            wanted = parts.moved(layer, head).detach().norm(dim=-1)
            np.testing.assert_allclose(ds["norm"].sel(layer=layer, head=head), wanted, atol=1e-5)
            assert float(wanted.max()) > 1e-3


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one in QUICK else pytest.mark.heavy) for one in raw_families.MODELS]
)
def test_every_family(name):
    check(raw_families.random_model(name))


def test_gpt2():
    check(random_gpt2(2, 4, 8, 40, 30))


def test_some_layers_of_prompts_of_several_lengths(words_model):
    task = hw.Prompts(["apple banana cherry apple", "dog cat dog"])
    every, one = hw.weighted_value_norms(words_model, task), hw.weighted_value_norms(words_model, task, 1)
    assert one["layer"].values.tolist() == [1]
    np.testing.assert_array_equal(one["norm"], every["norm"].sel(layer=[1]))
    gone = every["norm"].isnull().any(["layer", "head"])
    assert not gone.sel(example=0).any()
    assert gone.sel(example=1).values.tolist() == [[False, False, False, True]] * 3 + [[True] * 4]
    assert (every["norm"].sel(example=0, query=1, key=[2, 3]) == 0).all()  # later keys
    induction = every["norm"].sel(layer=1, head=2, example=0, query=3)
    assert int(induction.argmax("key")) == 1  # what comes after the earlier apple


def test_what_cannot_be_is_refused(words_model):
    with pytest.raises(DeclarationError, match="words-2l has layers 0 to 1"):
        hw.weighted_value_norms(words_model, TASK, layers=[0, 4])
    with pytest.raises(DeclarationError, match="give layers that differ"):
        hw.weighted_value_norms(words_model, TASK, layers=[1, 1])
    with pytest.raises(UnknownNameError, match="the task has the runs"):
        hw.weighted_value_norms(words_model, TASK, run="other")
