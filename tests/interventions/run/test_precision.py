"""Half precision is allowed, and says how far it is from float32; CPU, CUDA and MPS go one way."""

import json

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.interventions import Grid, Head, Knockout, Layer, Patch, ZeroAblate
from headwise.metrics import accuracy, induction, loss
from headwise.studies import RepeatedTokens, capture, measure
from headwise.studies.analyses.heads import describe_heads
from tests.oracles import raw_hooks

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
    calibration = json.loads(found.attrs["float32_deviation"])
    rounded = hw.load(module(), dtype=dtype).module.float()  # the weights as rounded, in float32
    wanted = measure(hw.load(rounded), TASK, ZeroAblate(Head(0, 0)), [loss, induction])
    for name in ("loss", "induction"):
        difference = np.abs(found[f"baseline_{name}"] - wanted[f"baseline_{name}"]).max()
        assert calibration[name] == pytest.approx(float(difference), rel=1e-3)
        assert calibration[name] > 0
    assert "float32_deviation" not in exact.attrs


def test_a_neighbour_does_not_change_how_attention_is_rounded():
    """A knocked-out condition in the same pass sends no other row through another kernel."""
    model, one = hw.load(module(), dtype="bfloat16"), ZeroAblate(Layer(0).resid_pre.at(2))
    out = Knockout(Head(1, 1), 8, 2)
    alone, beside = (measure(model, TASK, {"one": one, "two": two}, [loss])["loss"] for two in (one, one + out))
    np.testing.assert_array_equal(alone.sel(condition="one"), beside.sel(condition="one"))
    assert (alone.sel(condition="two") != beside.sel(condition="two")).any()


def test_no_memory_for_a_float32_copy_loses_nothing(monkeypatch):
    from headwise.interventions import calibration

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = hw.load(module(), dtype="bfloat16")
    monkeypatch.setattr(calibration, "load", full)
    assert json.loads(measure(model, TASK, WHAT, [loss]).attrs["float32_deviation"]) == {"loss": None}


@pytest.mark.parametrize("when", ["copy", "passes", "elsewhere"])
def test_no_memory_while_comparing_with_float32_loses_nothing(monkeypatch, when):
    """Wherever it runs out: the copy fits, and its passes do not."""
    from headwise.interventions import calibration

    def full(given, *rest):
        if when == "passes" and given.dtype == "float32":
            raise RuntimeError("CUDA error: out of memory")
        if when == "elsewhere":
            raise ValueError("something else")
        return before(given, *rest)

    model, before = hw.load(module(), dtype="bfloat16"), calibration.run_unmodified
    wanted = measure(model, TASK, WHAT, [loss])
    monkeypatch.setattr(calibration, "run_unmodified", full)
    if when == "copy":
        monkeypatch.setattr(calibration, "load", lambda *given, **more: (_ for _ in ()).throw(MemoryError()))
    if when == "elsewhere":
        with pytest.raises(ValueError, match="something else"):
            measure(model, TASK, WHAT, [loss])
        return
    found = measure(model, TASK, WHAT, [loss])
    assert json.loads(found.attrs["float32_deviation"]) == {"loss": None}
    np.testing.assert_array_equal(found["loss"], wanted["loss"])


def in_float64(model, queries, layer=1, head=0):
    """Loss with the pattern of a head at some queries taken from the corrupted run, by hooks, in double precision."""
    batch = TASK.draw(hw.load(model))
    runs = {run: torch.as_tensor(tokens) for run, tokens in batch.runs.items()}
    pattern = raw_hooks.activation(model, runs["corrupted"], "pattern", layer)[:, head]
    v = raw_hooks.activation(model, runs["clean"], "v", layer)[:, :, head]
    other = raw_hooks.activation(model, runs["clean"], "z", layer).clone()
    other[:, :, head] = pattern @ v
    edit = raw_hooks.patch_edit(other, "z", layer, head, tuple(queries))
    logits = raw_hooks.run(model, runs["clean"], [edit]).log_softmax(-1)
    (group,) = batch.groups()
    targets = torch.as_tensor(batch.facts("clean", group).targets)
    return -logits[:, list(group.scored)].gather(-1, targets[..., None])[..., 0].mean(-1).numpy()


@pytest.mark.parametrize("way", ["in memory", "loaded"])
def test_float64_is_float64_from_the_patterns_to_the_results(way):
    own = module().double()
    model = hw.load(own) if way == "in memory" else hw.load(module(), dtype="float64")
    queries = {"one": [7], "two": [7, 9], "many": list(range(3, 11)), "all": list(range(12))}
    what = {name: Patch(Head(1, 0).pattern.at(at)) for name, at in queries.items()}
    found = measure(model, TASK, what, [loss, accuracy, induction])
    assert found.attrs["dtype"] == "float64"
    assert "float32_deviation" not in found.attrs
    assert found["loss"].dtype == found["accuracy"].dtype == found["baseline_induction"].dtype == np.float64
    for name, at in queries.items():
        np.testing.assert_allclose(found["loss"].sel(condition=name), in_float64(own, at), rtol=1e-12)
    wanted = raw_hooks.activation(own, torch.as_tensor(TASK.draw(model).runs["clean"]), "pattern", 1)
    taken = capture(model, TASK, Head(1, 0).pattern)["L1H0_pattern"]
    np.testing.assert_allclose(taken, wanted[:, 0], rtol=1e-12)
    by_position = measure(model, TASK, what, [loss], per_position=True)["loss"].mean("position")
    np.testing.assert_allclose(by_position, found["loss"], rtol=1e-12)


def test_float64_goes_through_files_and_parts(tmp_path):
    model = hw.load(module(), dtype="float64")
    found = measure(model, TASK, WHAT, [loss], out=tmp_path / "double.nc")
    read = hw.open_result(tmp_path / "double.nc", load=True)
    assert read["loss"].dtype == np.float64
    np.testing.assert_array_equal(read["loss"], found["loss"])


def test_heads_of_a_float64_model_are_described():
    double, single = (describe_heads(hw.load(one), TASK) for one in (module().double(), module()))
    assert double["induction"].dtype == np.float64
    for name in ("induction", "untrained_induction", "p_induction"):
        np.testing.assert_allclose(double[name], single[name], atol=1e-6)
    assert (double["role"] == single["role"]).all()


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
