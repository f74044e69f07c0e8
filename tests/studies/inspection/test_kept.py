"""What looks inside a model, stored: listed, said in sentences, repeated, reported."""

import json

import numpy as np
import pytest

import headwise as hw
from headwise.errors import ResultError
from headwise.studies.cli.main import main
from headwise.studies.inspection.findings import findings
from headwise.studies.reproduce.recipe import recipe
from headwise.studies.storage.record import kind_of

PROMPTS = ["apple banana cherry apple", "dog cat dog"]
WHAT = {"clean": None, "without L0H3": hw.ZeroAblate("L0H3")}


@pytest.fixture(scope="module")
def looks(words_model):
    task = hw.RepeatedTokens(n=2, length=5)
    direction = np.linspace(-1, 1, words_model.shape.d_model)
    return {
        "predict": hw.predict(words_model, PROMPTS, WHAT, top=3),
        "predict every": hw.predict(words_model, PROMPTS[0], top=2, positions="all"),
        "predict some": hw.predict(words_model, PROMPTS, hw.ZeroAblate("L1H2"), top=2, positions=range(2)),
        "logit_lens": hw.logit_lens(words_model, task, top=2, metrics=["loss"]),
        "logit_lens last": hw.logit_lens(words_model, PROMPTS, top=2, positions=-1),
        "direct_logit_attribution": hw.direct_logit_attribution(words_model, task, per_position=True),
        "direct_logit_attribution corrupted": hw.direct_logit_attribution(
            words_model, task, direction, run="corrupted"
        ),
        "logit_lens under": hw.logit_lens(words_model, PROMPTS, what=WHAT, top=2, positions=-1),
        "direct_logit_attribution under": hw.direct_logit_attribution(words_model, task, what=WHAT),
    }


def test_each_is_repeated_to_the_last_bit(looks, tmp_path):
    for name, ds in looks.items():
        assert kind_of(ds.attrs) == name.split()[0]
        path = tmp_path / f"{name}.nc"
        hw.write_netcdf(ds, path)
        found = hw.rerun(path)
        assert found.agrees, (name, found)
        assert found.largest == 0.0, name
        assert set(found.only_in_one) == set(), name


def test_a_changed_number_and_a_changed_token_are_found(looks, tmp_path):
    ds = looks["predict"].copy(deep=True)
    ds["prob"][0, 1, 2] += 0.5
    ds["token"][1, 0, 0] = "pear"
    hw.write_netcdf(ds, tmp_path / "said.nc")
    found = hw.rerun(tmp_path / "said.nc")
    assert not found.agrees
    assert set(found.beyond) == {"prob", "token"}
    assert found.differences["prob"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"top": 101}, "top"),
        ({"top": 3, "positions": -1, "remote": True}, None),
    ],
)
def test_a_file_sets_no_other_options(looks, tmp_path, changed, says):
    ds = looks["predict"].assign_attrs(predict=json.dumps(changed))
    hw.write_netcdf(ds, tmp_path / "said.nc")
    if says is None:
        assert hw.rerun(tmp_path / "said.nc").agrees
    else:
        with pytest.raises(hw.errors.HeadwiseError, match=says):
            hw.rerun(tmp_path / "said.nc")


def test_a_metric_of_ones_own_cannot_be_brought_back(looks, tmp_path):
    options = json.loads(looks["logit_lens"].attrs["logit_lens"]) | {"metrics": ["mine"]}
    hw.write_netcdf(looks["logit_lens"].assign_attrs(logit_lens=json.dumps(options)), tmp_path / "lens.nc")
    with pytest.raises(ResultError, match="the metric mine is one of your own"):
        hw.rerun(tmp_path / "lens.nc")


def test_the_lines_of_a_report_do_it_again(looks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, ds in looks.items():
        hw.write_netcdf(ds, "stored.nc")
        space = {}
        exec(recipe(ds.attrs, ds, "stored.nc").python, space)
        for variable, values in ds.data_vars.items():
            np.testing.assert_array_equal(space["ds"][variable].values, values.values, err_msg=f"{name} {variable}")


def test_sentences_say_the_numbers(looks):
    said = looks["predict"]
    first, second, *_ = findings(said)
    probs = said["prob"].sel(condition="clean").isel(example=0).values
    tokens = said["token"].sel(condition="clean").isel(example=0).values
    assert first == (
        f"after “{PROMPTS[0]}”, clean: {tokens[0]} {probs[0]:.2g}, {tokens[1]} {probs[1]:.2g} and "
        f"{tokens[2]} {probs[2]:.2g}"
    )
    assert second.startswith(f"after “{PROMPTS[0]}”, without L0H3: ")
    lens = looks["logit_lens"]
    ids = lens["token_id"].isel(rank=0)
    same = int((ids.sel(layer=0) == ids.sel(layer=1)).sum())
    assert findings(lens)[1] == f"the stream after layer 0 says what the last says at {same} of 8 places"
    (parts,) = findings(looks["direct_logit_attribution"])
    mean = looks["direct_logit_attribution"].mean(["example", "position"])
    best = mean["attribution"].to_series().abs().idxmax()
    share = float(mean["attribution"].sel(source=best))
    assert f"is {float(mean['whole']):.3g}; of 21 parts, most is written by {best} {share:+.3g}" in parts


def test_they_are_listed_and_shown(looks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("predict", "logit_lens", "direct_logit_attribution"):
        hw.write_netcdf(looks[name], tmp_path / "results" / f"{name}.nc")
    assert sorted(hw.Results("results").frame["study"]) == ["direct_logit_attribution", "logit_lens", "predict"]
    assert main(["results", "show", "results/predict.nc"]) == 0
    shown = capsys.readouterr().out
    assert "Predictions of words-2l" in shown
    assert "the 3 likeliest tokens in the clean run, under 2 conditions" in " ".join(shown.split())
    assert "without L0H3" in shown


def test_they_have_reports(looks, tmp_path):
    for name, ds in looks.items():
        text = hw.write_report(ds, tmp_path / f"{name}.html").read_text()
        assert text.count("<figure") >= 1, name
        assert "hw.rerun" in text or "headwise rerun" in text
    text = (tmp_path / "predict.html").read_text()
    assert "What does the model say next?" in text
    assert text.count("<figure") == 2  # a prompt each
