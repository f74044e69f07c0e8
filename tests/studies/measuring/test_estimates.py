"""Estimates beside what is exact: numbers against scipy, planted misses, a linear model, and saturated attention."""

import json

import numpy as np
import pytest
import xarray as xr
from scipy import stats

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions import Grid, Head, Knockout, Layer, Patch, Scale, ZeroAblate
from headwise.metrics import accuracy, logit_diff, loss
from headwise.studies import RepeatedTokens, compare_estimates, measure
from headwise.studies.analyses.estimate_verdicts import on_estimates, verdict
from headwise.studies.measuring.compare import agreement
from headwise.studies.measuring.effects import condition_names
from tests.interventions.run.test_gradients import linear_model
from tests.oracles.planted import INDUCTION, LENGTH, PREVIOUS

TASK = RepeatedTokens(n=6, length=7, seed=2)
EDGES = hw.EdgePatches(["input->a0.h3<v>", "a0.h3->a1.h1<k>", "m1->logits", "a1.h1->logits", "m0->a1.h0<v>", "m0->m1"])


def effects(values, spread=0.1, examples=16):
    """(component, layer, head, example) whose mean over examples is `values`, with noise that sums to 0."""
    noise = np.random.default_rng(0).normal(size=(*values.shape, examples))
    noise -= noise.mean(-1, keepdims=True)
    return xr.DataArray(
        values[..., None] + spread * noise,
        dims=("component", "layer", "head", "example"),
        coords={"component": ["q", "k", "v"], "layer": [0, 1], "head": range(4)},
        attrs={"long_name": "change in loss", "units": "nat"},
    )


BASELINE = xr.DataArray(np.full(16, 2.0), dims="example", attrs={"long_name": "loss, no intervention", "units": "nat"})


@pytest.fixture
def built():
    """24 effects of which two are 0 and two planted misses; the estimate "good" is off by little, "bad" by much."""
    random = np.random.default_rng(1)
    exact = random.normal(size=(3, 2, 4))
    exact[0, 0, :2] = 0.0
    exact[2, 1, 3], exact[1, 0, 2] = 5.0, -4.0
    good = exact + random.normal(scale=0.05, size=exact.shape)
    bad = good.copy()
    bad[2, 1, 3], bad[1, 0, 2] = -1.0, 0.5
    return agreement(effects(exact), {"good": effects(good), "bad": effects(bad)}, BASELINE), exact, good, bad


def test_agreement_equals_scipy_and_counting(built):
    ds, exact, good, bad = built
    np.testing.assert_allclose(ds["exact"], exact, atol=1e-12)
    np.testing.assert_allclose(ds["estimate"].sel(estimator="bad"), bad, atol=1e-12)
    p = stats.ttest_1samp(effects(exact).values, 0, axis=-1).pvalue
    clear = stats.false_discovery_control(np.maximum(p, 2.0**-15).ravel()).reshape(p.shape) <= 0.05
    assert 15 < clear.sum() < 23
    for name, estimate in (("good", good), ("bad", bad)):
        here = ds.sel(estimator=name)
        np.testing.assert_allclose(here["rank_correlation"], stats.spearmanr(estimate, exact, axis=None).statistic)
        right = sum(np.sign(e) == np.sign(x) for e, x in zip(estimate[clear], exact[clear], strict=True))
        np.testing.assert_allclose(here["sign_agreement"], right / clear.sum())
        np.testing.assert_allclose(here["largest_miss"], np.abs(estimate - exact).max())
    assert float(ds["sign_agreement"].sel(estimator="good")) == 1.0
    assert float(ds["baseline"]) == 2.0


def test_the_worst_misses_are_the_planted_ones(built):
    ds, exact, _, bad = built
    here = ds.sel(estimator="bad")
    assert here["worst"].values[:2].tolist() == ["L1H3 v", "L0H2 k"]
    np.testing.assert_allclose(here["worst_miss"].values[:2], [-6.0, 4.5])
    np.testing.assert_allclose(np.abs(here["worst_miss"]), np.sort(np.abs(bad - exact).ravel())[::-1][:5])
    order = np.argsort(-np.abs(exact), axis=None)[:5]
    found = set(order) & set(np.argsort(-np.abs(bad), axis=None)[:5])
    assert float(here["strongest_found"]) == len(found) / 5 < 1
    assert float(ds["strongest_found"].sel(estimator="good")) == 1.0


def test_what_is_rounding_or_noise_is_no_effect():
    """Equal for all prompts, an effect of 1e-6 would pass any t-test; of many around 0, a few would by chance."""
    exact = np.zeros((3, 2, 4))
    exact[1, 1] = 1e-6
    ds = agreement(effects(exact, spread=0.0), {"estimate": effects(-exact, spread=0.0)}, BASELINE)
    assert (ds["exact_q"] == 1).all()
    assert np.isnan(ds["sign_agreement"]).all()
    assert np.isnan(ds["rank_correlation"]).all()
    exact[1, 1] = 1e-3
    ds = agreement(effects(exact, spread=0.0), {"estimate": effects(-exact, spread=0.0)}, BASELINE)
    assert int((ds["exact_q"] <= 0.05).sum()) == 4
    assert ds["sign_agreement"].item() == 0.0
    assert ds["rank_correlation"].item() == pytest.approx(-1)
    noisy = agreement(effects(exact, spread=1.0), {"estimate": effects(-exact, spread=1.0)}, BASELINE)
    assert np.isnan(noisy["sign_agreement"]).all()


def test_names_of_conditions():
    grid = xr.DataArray(
        np.zeros((2, 2, 1)), dims=("component", "layer", "position"), coords={"component": ["q", "k"], "position": [7]}
    )
    assert condition_names(grid)[1].tolist() == [["k layer 0 position 7"], ["k layer 1 position 7"]]
    heads = xr.DataArray(np.zeros((1, 1, 2)), dims=("ablation", "layer", "head"), coords={"ablation": ["zero"]})
    assert condition_names(heads).ravel().tolist() == ["L0H0 zero", "L0H1 zero"]
    named = xr.DataArray(np.zeros(2), dims="condition", coords={"condition": ["pair", "prev"]})
    assert condition_names(named).tolist() == ["pair", "prev"]
    assert condition_names(xr.DataArray(1.0)).item() == "the intervention"


def test_a_linear_model_is_estimated_exactly():
    """Logits are linear in the stream after the last block, so every slope is the same everywhere."""
    grid = Grid(
        lambda factor, position: Scale(Layer(0).resid_post.at(position), factor), factor=[0, 2, 3], position=[7, 8, 9]
    )
    ds = compare_estimates(hw.load(linear_model()), TASK, grid, logit_diff, steps=3)
    assert ds["estimate"].dims == ("estimator", "factor", "position")
    np.testing.assert_allclose(ds["rank_correlation"], 1.0)
    np.testing.assert_allclose(ds["largest_miss"], 0.0, atol=1e-5)
    np.testing.assert_allclose(ds["strongest_found"], 1.0)
    assert float(np.abs(ds["exact"]).max()) > 0.1
    assert [verdict(ds.sel(estimator=name)) for name in ("gradient", "integrated")] == ["all", "all"]


def test_it_holds_what_measure_gives_with_units_and_sources(small_model, tmp_path):
    grid = Grid(lambda layer, head: Patch(Head(layer, head)), layer=small_model.layers, head=small_model.heads)
    ds = compare_estimates(small_model, TASK, grid, logit_diff, steps=4)
    exact = hw.effect(measure(small_model, TASK, grid, logit_diff), "logit_diff").mean("example")
    np.testing.assert_allclose(ds["exact"], exact, atol=1e-6)
    for name in ("gradient", "integrated"):
        one = measure(small_model, TASK, grid, logit_diff, estimator=name, steps=4)
        np.testing.assert_allclose(
            ds["estimate"].sel(estimator=name), hw.effect(one, "logit_diff").mean("example"), atol=1e-6
        )
    assert ds["estimate"].attrs["units"] == ds["worst_miss"].attrs["units"] == "logit"
    assert ds["estimate"].attrs["long_name"] == "change in logit difference, target minus distractor, estimated"
    assert "Kramár et al. 2024" in ds["estimate"].attrs["references"]
    assert all(ds[name].attrs["units"] == "1" for name in ("exact_q", "rank_correlation", "sign_agreement"))
    assert (ds.attrs["direction"], ds.attrs["steps"]) == ("noising", 4)
    assert json.loads(ds.attrs["estimators"]) == ["gradient", "integrated"]
    assert json.loads(ds.attrs["interventions"])["type"] == "Grid"
    ds.to_netcdf(tmp_path / "estimates.nc")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "estimates.nc"), ds)


def test_an_exact_measurement_is_used_again(small_model, monkeypatch):
    what = {"zero": ZeroAblate(Head(0, 1)), "patch": Patch(Head(1, 2).k)}
    exact = measure(small_model, TASK, what, [loss, logit_diff])
    whole = compare_estimates(small_model, TASK, what, loss)
    from headwise.interventions.run import engine

    def never(*arguments):
        raise AssertionError("the exact effects were measured again")

    monkeypatch.setattr(engine, "run_plan", never)
    again = compare_estimates(small_model, TASK, what, loss, exact=exact)
    xr.testing.assert_allclose(again, whole)
    (one,) = compare_estimates(small_model, TASK, what, loss, estimators=["gradient"], exact=exact)["estimate"].values
    np.testing.assert_array_equal(one, whole["estimate"].values[0])


def test_what_moves_together_shares_what_it_does(small_model):
    """The integrated estimate of a head alone is not that of the same head in a grid; the gradient's is the same."""
    grid = Grid(lambda head: ZeroAblate(Head(0, head)), head=small_model.heads)
    alone, together = (compare_estimates(small_model, TASK, what, loss) for what in (ZeroAblate(Head(0, 1)), grid))
    one, other = (
        ds["estimate"].sel(estimator=["gradient", "integrated"]).values for ds in (alone, together.sel(head=1))
    )
    assert one[0] == pytest.approx(other[0], abs=1e-6)
    assert abs(one[1] - other[1]) > 1e-4


def test_one_condition_has_no_rank_and_a_largest_miss(small_model):
    ds = compare_estimates(small_model, TASK, ZeroAblate(Head(0, 1)), loss)
    assert ds["exact"].dims == ()
    assert np.isnan(ds["rank_correlation"]).all()
    np.testing.assert_allclose(ds["largest_miss"], np.abs(ds["estimate"] - ds["exact"]))
    assert ds["worst"].values.ravel().tolist() == ["the intervention"] * 2


def test_saturated_attention_hides_from_the_gradient(planted):
    """On the planted circuit all attention is saturated: patched keys take the answer away, and no slope shows it."""
    grid = Grid(
        lambda component, layer, head: Patch(Head(layer, head).site(component)),
        component=["k", "v"],
        layer=planted.layers,
        head=planted.heads,
    )
    ds = compare_estimates(planted, RepeatedTokens(n=32, length=LENGTH), grid, logit_diff, steps=32)
    layer, head = INDUCTION
    exact, estimate = (ds[name].sel(layer=layer, head=head) for name in ("exact", "estimate"))
    assert float(exact.sel(component="k")) < -10
    np.testing.assert_allclose(estimate.sel(component="k", estimator="gradient"), 0.0, atol=1e-4)
    gradient_v = float(estimate.sel(component="v", estimator="gradient"))
    assert gradient_v == pytest.approx(float(exact.sel(component="v")), rel=0.15)  # v acts without the softmax
    missed = [f"L{layer}H{head} k", f"L{PREVIOUS[0]}H{PREVIOUS[1]} v"]
    assert sorted(ds["worst"].sel(estimator="gradient").values[:2]) == sorted(missed)
    assert verdict(ds.sel(estimator="gradient")) == "rough"  # it sees v of the induction head, the largest effect


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"what": None},
            "nothing to compare: give an intervention, a list of them, a mapping of names to",
        ),
        ({"estimators": ()}, "estimators=(): name each once, possible are gradient and integrated"),
        ({"estimators": ["exact"]}, "estimators=['exact']: name each once, possible are gradient and integrated"),
        ({"estimators": ["gradient"] * 2}, "name each once, possible are gradient and integrated"),
        ({"estimators": ["fast"]}, "estimator='fast': possible are exact, gradient and integrated"),
        ({"metric": accuracy}, "accuracy has no gradient estimate: possible are metrics of logits"),
        ({"metric": "los"}, "there is no metric 'los': possible are accuracy"),
        (
            {"what": Grid(lambda place: ZeroAblate(Head(0, place)), place=[0, 1])},
            "a grid axis cannot be called 'place' here: a variable or dim of the result is",
        ),
        ({"steps": 0}, "steps, of the integrated estimate, must be 1 or more, got 0"),
        (
            {"what": Knockout(Head(0, 1), 5, 2)},
            "has no gradient estimate: possible are ablations, Patch, Add, Scale",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(small_model, options, message):
    asked = {"what": ZeroAblate(Head(0, 1)), "metric": loss} | options
    with pytest.raises((DeclarationError, hw.errors.UnknownNameError)) as caught:
        compare_estimates(small_model, TASK, **asked)
    assert message in str(caught.value)


def test_an_exact_measurement_of_something_else_is_refused(small_model):
    what = {"zero": ZeroAblate(Head(0, 1)), "patch": Patch(Head(1, 2).k)}
    exact = measure(small_model, TASK, what, loss)
    for other, message in (
        (exact.isel(condition=[0]), "exact holds 1 condition, 6 example: not the conditions and prompts to compare"),
        (exact.assign_coords(condition=["a", "b"]), "not the conditions and prompts to compare"),
        (measure(small_model, RepeatedTokens(n=6, length=7, seed=3), what, loss), "on other prompts, another run or"),
    ):
        with pytest.raises(DeclarationError, match=message):
            compare_estimates(small_model, TASK, what, loss, exact=other)
    with pytest.raises(hw.errors.UnknownNameError, match="no intervention was measured by 'logit_diff'"):
        compare_estimates(small_model, TASK, what, logit_diff, exact=exact)


def test_sentences_follow_the_numbers(built):
    ds = built[0].assign_coords(estimator=["gradient", "integrated"])
    (text,) = on_estimates(ds)
    clear = int((ds["exact_q"] <= 0.05).sum())
    assert text.startswith(
        "On 24 patches of q, k or v of single heads, the gradient at the run itself could have stood"
    )
    assert f"{clear} of {clear} signs right, 5 of the 5 strongest effects found" in text
    assert "The gradient integrated on the way to the changed values cannot be trusted and misses as much as a" in text
    assert "v of L1H3 missed most: -1.00 nats where +5.00 is exact" in text
    lost = ds.assign(rank_correlation=("estimator", [0.3, np.nan]), exact_q=ds["exact_q"] * 0 + 1)
    (text,) = on_estimates(lost)
    assert "the gradient at the run itself tells the large effects, and not the order or the sign" in text
    assert "(rank correlation 0.30, 5 of the 5 strongest" in text
    assert text.count("rank correlation") == 1
    assert "signs" not in text
    small = {name: ds[name] / 1000 for name in ("exact", "estimate", "largest_miss")}
    nothing = "cannot be judged: no effect is beyond noise, and none exceeds 0.005 nats"
    way = "The gradient integrated on the way to the changed values"
    said = f"the gradient at the run itself {nothing}. {way} {nothing}."
    assert on_estimates(lost.assign(small)) == [f"On 24 patches of q, k or v of single heads, {said}"]


@pytest.mark.parametrize(
    ("miss", "rank", "signs", "wanted"),
    [
        (1.0, 0.9, 1.0, "all"),
        (1.0, 0.9, np.nan, "all"),
        (1.0, 0.7, 1.0, "large"),
        (1.0, 0.9, 0.5, "large"),
        (2.0, 0.9, 1.0, "rough"),
        (5.0, 0.9, 1.0, "nothing"),  # as far off as a guess of 0 for the largest effect
    ],
)
def test_verdicts_by_the_largest_miss_then_order_and_sign(built, miss, rank, signs, wanted):
    here = built[0].isel(estimator=0)
    assert float(np.abs(here["exact"]).max()) == pytest.approx(5.0)
    assert verdict(here.assign(largest_miss=miss, rank_correlation=rank, sign_agreement=signs)) == wanted
    assert verdict(here.assign(exact=here["exact"] * 0, largest_miss=miss)) == "none"


def test_a_flat_slope_is_named_with_what_it_does_not_see(built):
    ds = built[0].assign_coords(estimator=["gradient", "integrated"])
    shares = xr.DataArray([0.1, 0.2, 0.4], dims="component", coords={"component": ["q", "k", "v"]})
    estimate = xr.concat([ds["exact"] * shares, ds["exact"]], ds["estimator"])
    text = on_estimates(ds.assign(estimate=estimate.transpose(*ds["estimate"].dims)))[-1]
    size = round(100 * float(np.abs(ds["exact"] * shares).sum() / np.abs(ds["exact"]).sum()))
    assert f"gradient estimates have {size}% of the size of the exact changes and integrated ones 100%" in text
    assert "at the run itself (loss 2.00 nats) the slope is flat" in text
    assert text.endswith("The gradient sees 10% of what q changes, 20% of what k changes and 40% of what v changes.")


def test_estimates_of_edges_are_those_of_edge_scores(words_model):
    ds = compare_estimates(words_model, TASK, EDGES, logit_diff)
    assert (ds["estimator"].values.tolist(), ds.attrs["steps"]) == (["eap", "eap-ig"], 5)

    def scores(estimator):
        found = hw.edge_scores(words_model, TASK, "logit_diff", estimator=estimator, edges=EDGES.edges)
        return found["score"].mean("example").sel(edge=ds["edge"]).values

    exact, estimates = scores("exact"), np.array([scores("eap"), scores("eap-ig")])
    np.testing.assert_allclose(ds["exact"], exact, atol=1e-5)
    np.testing.assert_allclose(ds["estimate"], estimates, atol=1e-5)
    worst = np.argmax(abs(estimates - exact), axis=1)
    assert ds["worst"].sel(place=1).values.tolist() == ds["edge"].values[worst].tolist()
    np.testing.assert_allclose(ds["rank_correlation"], [stats.spearmanr(one, exact)[0] for one in estimates])
    again = compare_estimates(
        words_model, TASK, EDGES, logit_diff, exact=measure(words_model, TASK, EDGES, logit_diff), estimators="relp"
    )
    np.testing.assert_array_equal(again["exact"], ds["exact"])
    assert "steps" not in again.attrs
    for given, says in (
        ({"estimators": ["gradient"]}, "'gradient' estimates interventions: possible of edges are exact, eap"),
        ({"estimators": ["exact"]}, "name each once, possible are eap, eap-ig, eap-ig-activations, atp"),
        ({"metric": accuracy}, "accuracy has no gradient estimate"),
    ):
        with pytest.raises(DeclarationError, match=says):
            compare_estimates(words_model, TASK, EDGES, **({"metric": logit_diff} | given))


def test_a_file_with_estimates_of_edges_is_repeated(words_model, tmp_path):
    file = hw.write_netcdf(compare_estimates(words_model, TASK, EDGES, logit_diff, steps=2), tmp_path / "edges.nc")
    assert hw.rerun(file).agrees
