"""The mean difference of two runs, against plain hooks; steering with it, and what files say of it."""

import json

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError, UnknownNameError
from tests.oracles import raw_families, raw_paths
from tests.oracles.raw_hooks import random_gpt2
from tests.oracles.raw_paths import Place

TASK = hw.RepeatedTokens(n=3, length=5, seed=2)
QUICK = ("pythia", "qwen3")


def wanted(module, batch, place, runs=("clean", "corrupted"), positions=None):
    """The mean over every scored (or given) position of every prompt, one after the other."""
    raw = raw_paths if module.config.model_type == "gpt2" else raw_families
    means = []
    for run in runs:
        vectors = []
        for number, length in enumerate(batch.lengths):
            value = raw.read(module, torch.tensor(batch.runs[run][number : number + 1, :length]), place)[0]
            places = np.flatnonzero(batch.scored[number]) if positions is None else positions
            vectors += [value[at].double() for at in places]
        means.append(torch.stack(vectors).mean(0).numpy())
    return means[0] - means[1]


def check(module):
    model = hw.load(module)
    batch, last, largest = TASK.draw(model), model.layers[-1], 0.0
    for site, place in (
        (hw.Layer(last).resid_pre, Place(last, "resid_pre")),
        (hw.Head(last, 1).z, Place(last, "z", 1)),
        (hw.Head(last, 0).k, Place(last, "k", 0)),
        (hw.Head(0, 1).head_out, Place(0, "head_out", 1)),
        (hw.Layer(last).mlp_post, Place(last, "mlp_post")),
    ):
        found = hw.difference(model, TASK, site)
        expected = wanted(module, batch, place)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        largest = max(largest, np.abs(expected).max())
        assert hw.Add(site, found).vector == tuple(map(float, found.values))
    assert largest > 1e-3


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one in QUICK else pytest.mark.heavy) for one in raw_families.MODELS]
)
def test_every_family(name):
    check(raw_families.random_model(name))


def test_gpt2():
    check(random_gpt2(2, 4, 8, 40, 30))


def test_several_layers_given_positions_and_prompts_of_several_lengths(words_model):
    task = hw.Prompts(
        ["apple banana cherry apple", "dog cat dog"],
        answers=["banana", "cat"],
        runs={"other": ["cherry banana cherry dog", "cat red dog"]},
    )
    batch, sites = task.draw(words_model), [hw.Layer(layer).resid_post for layer in (1, 0)]
    every = hw.difference(words_model, task, sites, ("other", "clean"))
    assert every.dims == ("layer", "d_model")
    assert every["layer"].values.tolist() == [1, 0]
    for layer in (0, 1):
        place = Place(layer, "resid_post")
        expected = wanted(words_model.module, batch, place, ("other", "clean"))
        np.testing.assert_allclose(every.sel(layer=layer), expected, atol=1e-5)
    at = hw.difference(words_model, task, "L0.resid_post at 0, 2", ("other", "clean"))
    expected = wanted(words_model.module, batch, Place(0, "resid_post"), ("other", "clean"), (0, 2))
    np.testing.assert_allclose(at, expected, atol=1e-5)
    last = hw.difference(words_model, task, "L0.resid_post at -1", ("other", "clean"))
    expected = wanted(words_model.module, batch, Place(0, "resid_post"), ("other", "clean"), (-1,))
    np.testing.assert_allclose(last, expected, atol=1e-5)


def test_one_steers_with_it_and_the_file_says_where_it_is_from(words_model, tmp_path):
    every = hw.difference(words_model, TASK, [hw.Layer(layer).resid_pre for layer in words_model.layers])
    what = {
        "add": hw.Add("L1.resid_pre", every.sel(layer=1)),
        "away": hw.ProjectOut(hw.Layer(1).resid_pre, every.sel(layer=1)),
        "by hand": hw.Add("L1.resid_pre", every.sel(layer=1).values),
        "neuron": hw.Add("L0N3", hw.difference(words_model, TASK, "L0N3")),
    }
    assert what["add"] == what["by hand"]
    assert what["by hand"].origin == ""
    origin = what["add"].origin
    assert origin.startswith("clean - corrupted at resid_pre of layers 0 and 1, words-2l ")
    assert origin.endswith(f", {TASK!r}, layer 1")
    assert what["away"].origin == origin
    ds = hw.measure(words_model, TASK, what, "loss")
    np.testing.assert_array_equal(ds["loss"].sel(condition="add"), ds["loss"].sel(condition="by hand"))
    assert abs(hw.effect(ds, "loss")).max("example").min() > 1e-3
    path = hw.write_netcdf(ds, tmp_path / "steered.nc")
    assert origin in hw.open_result(path).attrs["interventions"]
    again = hw.from_json(hw.to_json(what["add"]))
    assert again == what["add"]
    assert again.origin == origin
    hw.write_netcdf(every.to_dataset(promote_attrs=True), tmp_path / "vector.nc")
    stored = hw.open_result(tmp_path / "vector.nc")
    assert stored.attrs["model"] == "words-2l"
    assert hw.Add("L1.resid_pre", stored["difference"].sel(layer=1)).origin == origin


@pytest.mark.parametrize(
    ("site", "runs", "says"),
    [
        ("L1H2.pattern", ("clean", "corrupted"), "the difference of patterns is no vector"),
        ("L1.z", ("clean", "clean"), "give two that differ"),
        (["L1.z", "L0.resid_pre"], ("clean", "corrupted"), "several differ in their layer, and in nothing else"),
        (["L1.z", "L1.z"], ("clean", "corrupted"), "several differ in their layer"),
        ([], ("clean", "corrupted"), "name at least one site"),
        ("L7.z", ("clean", "corrupted"), "words-2l has layers 0 to 1"),
    ],
)
def test_what_has_no_difference_is_refused(words_model, site, runs, says):
    with pytest.raises(DeclarationError) as caught:
        hw.difference(words_model, TASK, site, runs)
    assert says in str(caught.value)


def test_a_run_that_is_not_there_and_a_vector_of_other_dims(words_model):
    with pytest.raises(UnknownNameError, match="the task has the runs clean and corrupted"):
        hw.difference(words_model, TASK, "L0.z", ("clean", "other"))
    every = hw.difference(words_model, TASK, "L1.z")
    with pytest.raises(DeclarationError) as caught:
        hw.Add("L1H2", every)
    assert str(caught.value) == (
        "L1H2 z: a vector there has the dims (d_head), and this array has (head, d_head): choose with .sel, or take "
        "the mean of the others"
    )
    assert len(hw.Add("L1H2", every.sel(head=2)).vector) == words_model.shape.d_head


def test_its_file_is_no_capture(words_model, tmp_path):
    away = hw.difference(words_model, TASK, "L1.resid_pre")
    path = hw.write_netcdf(away, tmp_path / "away.nc")
    ds = hw.open_result(path, load=True)
    np.testing.assert_array_equal(ds["difference"], away)
    assert json.loads(ds.attrs["difference"])["runs"] == ["clean", "corrupted"]
    (entry,) = hw.Results(tmp_path)
    assert entry.study == "data"
