"""Half precision is allowed, and says how far it is from float32; CPU, CUDA and MPS go one way."""

import json

import numpy as np
import pytest
import raw_hooks
import torch

import headwise as hw
from headwise.interventions import Grid, Head, Knockout, Layer, Patch, ZeroAblate
from headwise.metrics import accuracy, induction, loss
from headwise.studies import RepeatedTokens, measure

TASK = RepeatedTokens(n=3, length=6, seed=1)
WHAT = {
    "zero": ZeroAblate(Head(0, 1)),
    "k": Patch(Head(1, 2).k),
    "pattern": Patch(Head(1, 0).pattern),
    "out": Knockout(Head(0, 3), 7, 2),
    "late": Patch(Layer(1).resid_pre.at(9)),
}


def module():
    return raw_hooks.random_gpt2(2, 4, 8, 60, 40)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_near_numbers_and_says_how_near(dtype):
    exact = measure(hw.load(module()), TASK, WHAT, [loss, accuracy, induction])
    found = measure(hw.load(module(), dtype=dtype), TASK, WHAT, [loss, accuracy, induction])
    step = {"bfloat16": 2**-7, "float16": 2**-10}[dtype]
    scale = float(exact["loss"].max())
    np.testing.assert_allclose(found["loss"], exact["loss"], atol=4 * step * scale)
    assert found["loss"].dtype == np.float32
    deviation = json.loads(found.attrs["float32_deviation"])
    rounded = hw.load(module(), dtype=dtype).module.float()  # the weights as rounded, in float32
    wanted = measure(hw.load(rounded), TASK, None, [loss, induction])
    for name in ("loss", "induction"):
        difference = np.abs(found[f"baseline_{name}"] - wanted[f"baseline_{name}"]).max()
        assert deviation[name] == pytest.approx(float(difference), rel=1e-3)
        assert deviation[name] > 0
    assert "float32_deviation" not in exact.attrs


def test_a_neighbour_does_not_change_how_attention_is_rounded():
    """A knocked-out condition in the same pass sends no other row through another kernel."""
    model, one = hw.load(module(), dtype="bfloat16"), ZeroAblate(Layer(0).resid_pre.at(2))
    out = Knockout(Head(1, 1), 8, 2)
    alone, beside = (measure(model, TASK, {"one": one, "two": two}, [loss])["loss"] for two in (one, one + out))
    np.testing.assert_array_equal(alone.sel(condition="one"), beside.sel(condition="one"))
    assert (alone.sel(condition="two") != beside.sel(condition="two")).any()


def test_no_memory_for_a_float32_copy_loses_nothing(monkeypatch):
    from headwise.interventions import deviation

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = hw.load(module(), dtype="bfloat16")
    monkeypatch.setattr(deviation, "load", full)
    assert json.loads(measure(model, TASK, WHAT, [loss]).attrs["float32_deviation"]) == {"loss": None}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_estimates_in_half_precision(dtype):
    grid = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(4))
    exact = measure(hw.load(module()), TASK, grid, [loss], estimator="gradient")
    found = measure(hw.load(module(), dtype=dtype), TASK, grid, [loss], estimator="gradient")
    change = hw.effect(exact, "loss").mean("example")
    off = hw.effect(found, "loss").mean("example") - change
    assert float(np.abs(off).max()) < 0.1 * float(np.abs(change).max())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("estimator", ["exact", "gradient"])
def test_cuda_gives_the_numbers_of_the_cpu(estimator):
    what = {name: one for name, one in WHAT.items() if estimator == "exact" or name != "out"}
    found = [
        measure(hw.load(module(), device=device), TASK, what, [loss], estimator=estimator)["loss"]
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(*found, atol=1e-3)
