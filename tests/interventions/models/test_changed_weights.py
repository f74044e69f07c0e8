"""Weights that change are seen, rounding is not taken for a change, and results hold what a model was."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, ResultWarning
from headwise.interventions import Head
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, Results, capture, composition_scores, measure, rerun
from tests.support.changed_models import TASK, WHAT, of_configuration, stopped_or_done, through_data


def stepped(kind):
    def step(module):
        optimiser = kind(module.parameters(), lr=1e-2, fused=True)
        module(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimiser.step()

    return step


def through_numpy(module):
    module.transformer.h[1].mlp.c_fc.weight.detach().numpy()[0, 0] += 0.5


def embedding_of_another_token(module):
    """Which the prompt of the fingerprint does not hold: its weights are not those of the unembedding here."""
    seen = set(np.random.RandomState(0).randint(0, 40, (1, 8)).ravel().tolist())
    others = [token for token in range(40) if token not in seen]
    module.transformer.wte.weight.data[others] *= 2


WEIGHTS = {
    "fused AdamW": stepped(torch.optim.AdamW),
    "fused SGD": stepped(torch.optim.SGD),
    "through .data": through_data,
    "through a NumPy view": through_numpy,
    "embeddings that the fingerprint does not see": embedding_of_another_token,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_change_without_a_trace_are_read_anew(name, tmp_path):
    module = of_configuration("gpt2")
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    model, out = hw.load(module), tmp_path / "out.nc"
    before = model.weight_hash
    old = measure(model, TASK, WHAT, [loss], out=out)
    WEIGHTS[name](module)
    assert model.weight_hash != before
    wanted = measure(hw.load(copy.deepcopy(module)), TASK, WHAT, [loss])
    assert abs(wanted["loss"] - old["loss"]).max() > 1e-3
    in_memory = measure(model, TASK, WHAT, [loss])
    assert in_memory.attrs["weight_hash"] == wanted.attrs["weight_hash"]
    with pytest.warns(ResultWarning, match=r"another model than the one in hand: weights \w+ then, \w+ now"):
        found = measure(model, TASK, WHAT, [loss], out=out)
    xr.testing.assert_equal(found, wanted)
    assert found.attrs["weight_hash"] == wanted.attrs["weight_hash"] != before


def test_a_hook_whose_code_says_nothing_is_seen_by_what_the_model_computes(tmp_path, monkeypatch):
    """The fingerprint refuses: all facts are the same here, and the numbers are not."""
    module = of_configuration("gpt2")
    module.transformer.h[0].mlp.act.register_forward_hook(lambda act, given, made: made * np.factor_of_this_test)
    monkeypatch.setattr(np, "factor_of_this_test", 1.0, raising=False)
    model, out = hw.load(module), tmp_path / "out.nc"
    stopped_or_done(module, out, False)
    monkeypatch.setattr(np, "factor_of_this_test", 1.5)
    wanted = measure(model, TASK, WHAT, [loss])
    with pytest.warns(ResultWarning, match="with another model than the one in hand: what it computes on"):
        found = measure(model, TASK, WHAT, [loss], out=out, batch_size=4)
    np.testing.assert_allclose(found["loss"], wanted["loss"], atol=1e-6)
    monkeypatch.setattr(np, "factor_of_this_test", 2.0)
    wanted = measure(model, TASK, WHAT, [loss])
    with pytest.warns(ResultWarning, match="(?i)it is computed again"):
        found = measure(model, TASK, WHAT, [loss], out=out, batch_size=4)
    np.testing.assert_allclose(found["loss"], wanted["loss"], atol=1e-6)


def test_rounding_is_the_same_model(tmp_path):
    """One thread or two, eager or fused attention change the last bits only, and what is finished is used."""
    module = of_configuration("gpt2")
    stopped_or_done(module, tmp_path / "out.nc", False)
    kept = sorted(path.name for path in (tmp_path / "out.nc.parts").glob("*.nc"))
    torch.set_num_threads(2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stopped_or_done(module, tmp_path / "out.nc", False)
    finally:
        torch.set_num_threads(1)
    assert set(kept) <= {path.name for path in (tmp_path / "out.nc.parts").glob("*.nc")}


def test_every_result_holds_the_configuration(tmp_path):
    model = hw.load(of_configuration("gpt2", layer_norm_epsilon=0.25))
    made = [
        measure(model, TASK, WHAT, [loss]),
        capture(model, TASK, Head(0, 0)),
        composition_scores(model),
    ]
    for number, result in enumerate(made):
        stored = hw.open_result(hw.write_netcdf(result, tmp_path / f"{number}.nc"), load=True)
        assert json.loads(stored.attrs["configuration"])["layer_norm_epsilon"] == 0.25
        assert stored.attrs["weight_hash"] == model.weight_hash
        assert {"module_hash", "buffer_hash", "fingerprint"} <= stored.attrs.keys()
    assert "_name_or_path" not in made[0].attrs["configuration"]


def test_rerun_tells_what_is_different_from_what_is_not_known(tmp_path):
    first, second = of_configuration("gpt2"), of_configuration("gpt2", layer_norm_epsilon=0.5)
    path = hw.write_netcdf(measure(hw.load(first), TASK, WHAT, [loss]), tmp_path / "first.nc")
    same = rerun(path, model=hw.load(first))
    assert same.agrees
    assert not [note for note in same.notes if "another model" in note or "unknown" in note]
    found = rerun(path, model=hw.load(second))
    assert not found.agrees
    assert any("layer_norm_epsilon 1e-05 then, 0.5 now" in note for note in found.notes), found.notes
    older = hw.open_result(path, load=True)
    for name in ("configuration", "module_hash", "buffer_hash", "fingerprint", "attention"):
        del older.attrs[name]
    path = hw.write_netcdf(older, tmp_path / "older.nc")
    again = rerun(path, model=hw.load(first))
    assert again.agrees
    (note,) = [note for note in again.notes if "unknown" in note]
    assert note.startswith("the file does not say which configuration, modules, buffers and fingerprint its model had")
    assert not [note for note in again.notes if "another model" in note]


def test_seeds_of_two_models_do_not_stand_side_by_side(tmp_path):
    for seed, more in enumerate([{}, {}, {"layer_norm_epsilon": 0.5}]):
        task = RepeatedTokens(n=4, length=6, seed=seed)
        result = measure(hw.load(of_configuration("gpt2", **more)), task, WHAT, [loss])
        hw.write_netcdf(result, tmp_path / f"{seed}.nc")
    results = Results(tmp_path)
    with pytest.raises(
        DeclarationError, match=r"from different models: configuration \(layer_norm_epsilon 1e-05 in 0.nc"
    ):
        results.combine(dim="seed")
    (tmp_path / "2.nc").unlink()
    assert Results(tmp_path).combine(dim="seed").sizes["seed"] == 2
