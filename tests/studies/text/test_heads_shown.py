"""What heads do on text as pictures, as a report, and again."""

import argparse
import dataclasses

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, ResultError
from headwise.studies import plots
from headwise.studies.cli import text
from headwise.studies.plots.text.heads import SIGNS
from headwise.studies.text.claims import CLAIMS, NONE
from headwise.studies.text.price import price_heads
from headwise.studies.text.windows import windows

from .test_heads import code, random_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a random model and text of its own, and the result of one call on it."""
    path = tmp_path_factory.mktemp("model")
    model = random_model(2, 4)
    model.module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    (path / "held_out").mkdir()
    for seed in range(3):
        (path / "held_out" / f"{seed}.py.txt").write_text(code(seed))
    ds = hw.text_heads(hw.load(path), n=12, threshold=0.02, alpha=0.6, controls=2, check=False)
    return path, ds, hw.write_netcdf(ds, path / "heads.nc")


def test_each_claim_has_a_sign():
    assert [*SIGNS] == [*CLAIMS]


def test_a_cell_for_each_head_in_the_colour_of_its_name(saved):
    _, ds, _ = saved
    drawn = plots.heads_on_text(ds, title="names")
    boxes = [part for part in drawn if isinstance(part, hv.Rectangles)]
    found = {str(name): {*one["name"]} for one in boxes for name in {*one["called"]}}
    for name in {*ds["called"].values.ravel()}:
        places = np.argwhere(ds["called"].values == name)
        assert found[str(name)] == {f"L{layer}H{head}" for layer, head in places}
    gap = (ds["score"] - ds["control_score"]).mean("unit").min("control")
    for one in boxes:
        for row in one.dframe().itertuples():
            here = gap.sel(layer=int(row.name[1]), head=int(row.name[3]))
            expected = np.nan if row.called == NONE else float(here.sel(claim=row.called))
            np.testing.assert_allclose(row.margin, expected)
    assert len({*found}) >= 2
    hv.render(drawn, backend="bokeh")
    assert [type(part) for part in plots.picture(ds)] == [type(part) for part in drawn]


def text_pattern():
    weights = np.tril(np.ones((5, 5)))
    weights[4] = [0.0, 0.7, 0.05, 0.15, 0.1]
    tokens = ["f", "(", "a", ",\n  ", ")"]
    return xr.Dataset(
        {"pattern": (("query", "key"), weights / weights.sum(1, keepdims=True))},
        coords={"token": ("position", tokens), "position": range(5), "query": range(5), "key": range(5)},
    )


def test_attention_in_the_text_itself():
    drawn = plots.attention_in_text(text_pattern(), query=-1)
    tokens, own = (part for part in drawn if isinstance(part, hv.Rectangles))
    table = tokens.dframe()
    assert table["left"].tolist() == [0, 1, 2, 3, 0, 2]
    assert table["right"].tolist() == [1, 2, 3, 4, 2, 3]
    assert table["token"].tolist() == ["f", "(", "a", ",\n  ", ",\n  ", ")"]
    assert table["position"].tolist() == [0, 1, 2, 3, 3, 4]
    np.testing.assert_allclose(table["weight"], [0.0, 0.7, 0.05, 0.15, 0.15, 0.1])
    assert [round(value) for value in table["top"]] == [0, 0, 0, 0, 1, 1]
    assert own.dframe()[["left", "right"]].values.tolist() == [[2, 3]]
    (arcs,) = (part for part in drawn if isinstance(part, hv.Path) and not isinstance(part, hv.Contours))
    assert [one["weight"] for one in arcs.data] == [0.7, 0.15]
    assert [(float(one["x"][0]), float(one["x"][-1])) for one in arcs.data] == [(2.5, 1.5), (2.5, 1.0)]
    (written,) = (part for part in drawn if isinstance(part, hv.Labels))
    assert written.dframe()["text"].tolist() == ["f", "(", "a", ",", ")"]
    hv.render(drawn, backend="bokeh")
    with pytest.raises(DeclarationError, match="positions 0 to 4"):
        plots.attention_in_text(text_pattern(), query=5)


def test_a_report_says_what_heads_are_called(saved, tmp_path):
    _, ds, file = saved
    page = hw.write_report(file, tmp_path / "heads.html").read_text()
    named = int((ds["called"] != NONE).sum())
    assert f"{named} of 8 heads have a name" in page
    for name in {*ds["called"].values.ravel()} - {NONE}:
        assert f"called {name} (" in page
    at = 0
    one = ds.isel(ablated=at).sel(place=str(ds["helps_with"].sel(claim=ds["ablated"][at]).values))
    rise = float((one["loss_without"] - one["loss_whole"]).mean("window"))
    assert f"changes by {rise:+.3f} nats" in page
    assert "headwise rerun heads.nc" in page


def test_it_is_repeated_on_the_text_of_the_model(saved, tmp_path):
    path, _, file = saved
    assert hw.rerun(file, model=path).agrees
    (path / "held_out" / "0.py.txt").write_text(code(5))
    with pytest.raises(ResultError, match="is not the one that the result was made on"):
        hw.rerun(file, model=path)


def test_text_from_elsewhere_is_not_read_for_a_file(saved, tmp_path):
    path, ds, _ = saved
    file = hw.write_netcdf(ds.assign_attrs(text="/somewhere"), tmp_path / "elsewhere.nc")
    with pytest.raises(ResultError, match="its text lies outside the model"):
        hw.rerun(file, model=path)


def test_the_command_writes_and_says_what_heads_do(saved, tmp_path, monkeypatch, capsys):
    path, _, _ = saved
    monkeypatch.setattr(text, "HEAD_CONTROLS", 0)
    options = argparse.Namespace(text=None, context=32, n=32, seed=0)
    said = text._heads(hw.load(path), options, tmp_path / "text.nc")
    assert capsys.readouterr().out == ""
    ds = hw.open_result(tmp_path / "text-heads.nc", load=True)
    named = int((ds["called"] != NONE).sum())
    assert said["findings"][0].startswith(f"{named} of 8 heads have a name")
    assert [*said["called"].values()] == ds["called"].values.ravel().tolist()
    assert [said["file"], said["report"]] == [str(tmp_path / f"text-heads.{end}") for end in ("nc", "html")]
    assert (tmp_path / "text-heads.html").stat().st_size > 10_000


def test_it_is_priced_by_what_it_runs(saved):
    path, _, _ = saved
    model, text = hw.load(path), str(path / "held_out")
    asked = {"context": 32, "n": 20, "seed": 0}
    study = hw.TextInduction(text, context=32, n=4, pairs=2)
    plan = price_heads(study.plan(model, timed=False), model, text, **asked, controls=3, timed=False)
    assert [*plan.heads] == ["claims", "claims ablated"]
    cut = windows(model, text, 32, 20, 0)
    plain = hw.plan(model, cut, None, ["loss"]).cost().forward
    assert plan.heads["claims"].forwards == hw.plan(model, cut, None, ["first_token"]).cost().total / plain
    sets = plan.heads["claims ablated"].forwards / len(CLAIMS)
    pair = hw.MeanAblate("L1H0") + hw.MeanAblate("L1H1")
    block = dataclasses.replace(cut, tokens=cut.tokens[:16])
    one, two = (hw.plan(model, block, [pair] * n, ["loss"]).cost().total / plain for n in (1, 2))
    # the pair, the only other pair of layer 1, and three over all layers, which may begin in layer 0
    assert one + 4 * (two - one) <= sets
    assert sets <= 16 * (1 + 1 + 3) + 16 + 32  # no more than plain passes: sets, the run, the reference
    assert "every head does in 20 windows; ablated: two heads for each of 11 claims" in str(plan)
    bare = price_heads(study.plan(model, timed=False), model, text, **asked, controls=0, timed=False)
    assert [*bare.heads] == ["claims"]
    assert "plain forward passes" in plan.line
