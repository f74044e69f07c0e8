"""Norms of attention-weighted values, against vectors that are written out one by one."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError, UnknownNameError
from headwise.studies.catalogue.summary import summary
from tests.oracles import raw_families
from tests.oracles.raw_direct import Parts
from tests.oracles.raw_hooks import random_gpt2
from tests.oracles.raw_paths import Place

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


def test_under_interventions():
    module = random_gpt2(2, 4, 8, 40, 30)
    model, tokens = hw.load(module), torch.tensor(TASK.draw(hw.load(module)).runs["clean"])
    cases = {
        "clean": (None, []),
        "earlier head": (hw.ZeroAblate("L0H1"), [(Place(0, "z", 1), torch.zeros_like)]),
        "values": (hw.Scale("L1H2.v", 2.0), [(Place(1, "v", 2), lambda old: 2 * old)]),
        "output": (hw.ZeroAblate("L1H2"), []),  # which comes after the values were moved
    }
    ds = hw.weighted_value_norms(model, TASK, what={name: edit for name, (edit, _) in cases.items()})
    assert ds["norm"].dims == ("condition", "layer", "head", "example", "query", "key")
    for name, (_, changes) in cases.items():
        parts = Parts(module, tokens, changes)
        for layer in model.layers:
            wanted = torch.stack([parts.moved(layer, head).detach().norm(dim=-1) for head in model.heads])
            np.testing.assert_allclose(ds["norm"].sel(condition=name, layer=layer), wanted, atol=1e-5, err_msg=name)
    changed = abs(ds["norm"] - ds["norm"].sel(condition="clean")).max(["head", "example", "query", "key"])
    assert (changed.sel(layer=1) > 1e-3).values.tolist() == [False, True, True, False]
    each = hw.Grid(lambda head: hw.ZeroAblate(hw.Head(0, head)), head=[1, 3])
    by_head = hw.weighted_value_norms(model, TASK, [1], what=each)["norm"]
    assert by_head.dims == ("head", "layer", "read_head", "example", "query", "key")
    np.testing.assert_allclose(by_head.sel(head=1), ds["norm"].sel(condition="earlier head", layer=[1]), atol=1e-6)


def test_it_is_kept_and_repeated(words_model, tmp_path):
    what = {"clean": None, "without": hw.ZeroAblate("L0H3")}
    ds = hw.weighted_value_norms(words_model, TASK, layers=1, what=what)
    hw.write_netcdf(ds, tmp_path / "norms.nc")
    assert hw.rerun(tmp_path / "norms.nc").agrees
    assert "how much each of 8 heads moves in the clean run, under 2 conditions" in str(summary(tmp_path / "norms.nc"))
    report = hw.write_report(tmp_path / "norms.nc", tmp_path / "norms.html")
    assert "How much does each head move" in report.read_text()
    moved = ds["norm"].sum("key").mean(["condition", "example", "query"])
    best = int(moved.argmax("head")[0])
    said = f"to a position, most is moved by L1H{best} {float(moved[0, best]):.3g},"
    assert said in str(summary(tmp_path / "norms.nc"))


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
