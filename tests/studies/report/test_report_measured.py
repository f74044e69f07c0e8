"""The report of a measurement, and of anything else: sentences, tables and lines that are right."""

import json
import re
import shlex

import holoviews as hv
import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, ResultError
from headwise.interventions import Add, Grid, Head, Knockout, Layer, MeanAblate, Patch, PathPatch, Scale, ZeroAblate
from headwise.metrics import accuracy, bootstrap_interval, induction, logit_diff, loss, self_attention
from headwise.studies import Prompts, RepeatedTokens, capture, compare_estimates, measure
from headwise.studies.analyses.estimate_verdicts import NAMES, VERDICTS, verdict
from headwise.studies.output import phrases
from headwise.studies.plots import along
from headwise.studies.report.changes import baseline, changes
from headwise.studies.report.report import CORRUPTIONS, write_report
from headwise.studies.reproduce.agreement import compare
from headwise.studies.reproduce.recipe import WRITTEN, recipe
from headwise.studies.reproduce.rerun import rerun
from tests.support.pages import check_whole, code, shown

TASK = RepeatedTokens(n=3, length=6)
TEXT = Prompts(["apple banana cherry apple", "red green red"], answers=["banana", "green"])


def heads(layers=2, heads=8):
    return Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(layers), head=range(heads))


def qkv():
    return Grid(
        lambda component, layer, head: Patch(Head(layer, head).site(component), "clean"),
        component=["q", "k", "v"],
        layer=range(2),
        head=range(8),
    )


def resid():
    return Grid(lambda layer, position: Patch(Layer(layer).resid_pre.at(position)), layer=[0, 1], position=[3, 4, 7])


MIXED = {
    "steer": Add(Layer(1).resid_pre.at(-1), [0.25] * 4 + [0.0] * 60),
    "both": MeanAblate(Head(0, 3)) + Scale(Head(1, 2), 0.5),
    "blind": Knockout(Head(1, 2), 7, (1, 2)),
    "path": PathPatch(Head(0, 3), [Head(1, 2).k, "logits"], through_mlps=False),
}
SETS = {"L1": ZeroAblate(Head(1, 1)) + ZeroAblate(Head(1, 2)), "L0H3": ZeroAblate(Head(0, 3))}
MADE = {
    "baseline": lambda model: measure(model, TASK, None, [loss, induction]),
    "one": lambda model: measure(model, TASK, ZeroAblate(Head(0, 3)), [loss, self_attention]),
    "mapping": lambda model: measure(model, TASK, {"half": Scale(Head(1, 2), 0.5), "z": ZeroAblate(Head(0, 3))}, loss),
    "from the file": lambda model: measure(model, TASK, MIXED, [loss, accuracy]),
    "qkv": lambda model: measure(model, TASK, qkv(), [logit_diff], base="corrupted"),
    "resid": lambda model: measure(model, TASK, resid(), [logit_diff, loss]),
    "by position": lambda model: measure(model, TASK, heads(), [loss], per_position=True),
    "attention": lambda model: measure(model, TASK, heads(), [induction]),
    "one prompt": lambda model: measure(model, RepeatedTokens(n=1, length=6), heads(), [loss]),
    "text": lambda model: measure(model, TEXT, heads(), [loss]),
    "integrated": lambda model: measure(model, TASK, heads(), [loss], estimator="integrated", steps=2),
    "controls": lambda model: measure(model, TASK, SETS, [loss, accuracy], controls=4),
    "captured": lambda model: capture(model, TASK, [Head(1, 2).pattern, Layer(0).mlp_out.at(-1)]),
    "estimates": lambda model: compare_estimates(model, TASK, heads(), loss, steps=2),
}


@pytest.fixture(scope="module")
def stored(words_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    found = {}
    for name, make in MADE.items():
        ds = make(words_model)
        hw.write_netcdf(ds, folder / f"{name}.nc")
        found[name] = (ds, write_report(hw.open_result(folder / f"{name}.nc", load=True), folder / f"{name}.html"))
    return found


@pytest.mark.parametrize("name", MADE)
def test_every_measurement_has_a_whole_report(stored, name):
    ds, path = stored[name]
    text = path.read_text()
    outline = check_whole(text)
    assert path.stat().st_size < 5e6
    assert {"The answer", "What was run, and how to run it again", "How to run it again"} <= set(outline.headings)
    assert outline.figures >= 1
    assert ds.attrs["weight_hash"] in text
    assert "nan" not in shown(text).lower().split()


@pytest.mark.parametrize("name", MADE)
def test_the_printed_python_gives_the_same_numbers(stored, name, monkeypatch):
    ds, path = stored[name]
    command, python = code(path.read_text())
    monkeypatch.chdir(path.parent)
    space = {}
    exec(compile(python, path.name, "exec"), space)
    again = compare(xr.DataTree(ds), xr.DataTree(space["ds"]))
    assert again.agrees, str(again)
    assert again.largest <= 1e-6
    assert ("hw.open_result" in python) == (len(ds.attrs.get("sites") or ds.attrs["interventions"]) > WRITTEN)
    program, verb, file = shlex.split(command)
    assert (program, verb) == ("headwise", "rerun")
    assert rerun(file).agrees


def test_the_command_names_the_file_that_the_result_was_read_from(stored, tmp_path):
    ds, path = stored["one"]
    other = write_report(hw.open_result(path.with_suffix(".nc"), load=True), tmp_path / "other.html")
    assert code(other.read_text())[0] == "headwise rerun one.nc"
    assert str(path.parent) not in other.read_text()
    fresh = write_report(ds, tmp_path / "it's new.html")
    assert shlex.split(code(fresh.read_text())[0]) == ["headwise", "rerun", "it's new.nc"]


def test_the_answer_says_the_largest_changes_with_their_intervals(stored):
    ds, path = stored["one"]
    text = shown(path.read_text())
    values = hw.effect(ds, "loss").values.astype(float)
    low, high = bootstrap_interval(values)
    said = f"is {values.mean():+#.3g} nats, 95% interval {low:+#.3g} to {high:+#.3g}, from"
    assert f"The change of the next-token cross-entropy {said}" in text
    assert "Its 95% interval over 3 prompts excludes 0." in text
    assert "What does zero ablation of words-2l change in next-token cross-entropy and current-token score?" in text


def test_random_heads_stand_beside_what_was_asked_for(stored):
    ds, path = stored["controls"]
    html = path.read_text()
    assert "What else is in the file?" not in html
    text = shown(html)
    base = ds["baseline_loss"].sel(run="clean").astype(float)
    for control, words in (("same layers", "within the same layers"), ("all layers", "over all layers")):
        here = ds.sel(control=control, condition="L0H3")
        change = [float(np.mean([float(one) for one in here["loss_control"][at] - base])) for at in range(4)]
        mean, low, high = (f"{value:+#.3g}" for value in (np.mean(change), min(change), max(change)))
        p = (1 + sum(one >= float((here["loss"] - base).mean()) for one in change)) / 5
        assert f"{mean} nats {words} (4 sets, {low} to {high}; p = {p:.3f})" in text
    assert "Beside L0H3, as many random heads change the next-token cross-entropy on average by" in text
    assert html.count("Beside random heads, as a table") == 2
    row = re.search(r'random, all layers: mean.*?<th scope="row">L0H3</th>(.*?)</tr>', html)[1]
    assert f'<td class="n">{p:.3f}</td>' in row


def by_hand(values, base=None):
    """A measurement built by hand: one metric, effects as given, ``(head, example)``, on a baseline of 1."""
    values = np.asarray(values, dtype=float)
    base = np.ones(values.shape[1]) if base is None else np.asarray(base, dtype=float)
    attrs = {"long_name": "my metric, of mine", "units": "nat"}
    unchanged = attrs | {"long_name": "my metric, of mine, no intervention"}
    return xr.Dataset(
        {
            "mine": (("head", "example"), values + base, attrs),
            "baseline_mine": (("run", "example"), base[None], unchanged),
        },
        coords={"run": ["clean"], "head": np.arange(len(values))},
        attrs={"base": "clean", "interventions": '"by hand"'},
    )


def test_changes_beyond_noise_are_counted_as_they_are(tmp_path):
    random = np.random.RandomState(0)
    noise = random.normal(size=(5, 40))
    noise -= noise.mean(axis=1, keepdims=True)
    ds = by_hand(noise + np.array([[3.0], [-1.0], [0.5], [0.0], [0.02]]))
    ds["mine"][3] = ds["baseline_mine"].sel(run="clean")  # exactly nothing
    moved = changes(ds, "mine")
    assert moved.names == [f"head {number}" for number in range(5)]
    assert moved.mean == pytest.approx([3.0, -1.0, 0.5, 0.0, 0.02])
    assert moved.excludes.tolist() == [True, True, True, False, False]
    assert moved.sure.tolist() == [True, True, bool(moved.q[2] <= 0.05), False, False]
    assert moved.rounding.tolist() == [False, False, False, True, False]
    assert moved.q[3] == 1
    low, high = bootstrap_interval(noise + np.array([[3.0], [-1.0], [0.5], [0.0], [0.02]]))
    assert moved.low[[0, 1, 2, 4]] == pytest.approx(low[[0, 1, 2, 4]])
    assert moved.high[[0, 1, 2, 4]] == pytest.approx(high[[0, 1, 2, 4]])
    text = shown(write_report(ds, tmp_path / "mine.html").read_text())
    assert f"For 3 of 5 conditions the 95% interval over 40 prompts excludes 0, for {moved.sure.sum()} also" in text
    assert "The change of the my metric is largest for head 0 (+3.00 nats" in text
    assert "for 5 tests (Benjamini-Hochberg, false discovery rate 0.05)" in text
    assert "How to run it again" not in text.replace("how to run it again", "")


def test_few_prompts_are_not_taken_for_more_than_they_are(stored, tmp_path):
    text = shown(stored["by position"][1].read_text())
    assert re.search(
        r"for none also after correction for 16 tests .*? With so few prompts no p can be below 0.25", text
    )
    alone = shown(stored["one prompt"][1].read_text())
    assert "There is 1 prompt, so no interval: how much of this is chance is not known." in alone
    assert "95% interval over" not in alone
    nothing = shown(write_report(by_hand(np.full((3, 4), 1e-9)), tmp_path / "nothing.html").read_text())
    assert "No condition changes the my metric by more than rounding (at most 1.0e-09)." in nothing


def test_examples_without_a_value_are_left_out():
    ds = by_hand([[1.0, np.nan, 3.0, 5.0], [2.0, np.nan, np.nan, 4.0]])
    moved = changes(ds, "mine")
    assert moved.examples == 3
    assert moved.mean == pytest.approx([3.0, 3.0])
    low, high = bootstrap_interval(np.array([2.0, 4.0]))
    assert (moved.low[1], moved.high[1]) == (pytest.approx(float(low)), pytest.approx(float(high)))


def test_the_tables_hold_the_numbers(stored):
    ds, path = stored["qkv"]
    text = path.read_text()
    mean, share = hw.effect(ds, "logit_diff").mean("example"), hw.normalized(ds, "logit_diff")
    component, layer, head = np.unravel_index(int(np.abs(mean.values).argmax()), mean.shape)
    name = f"L{layer}H{head} {ds['component'].values[component]}"
    row = re.search(rf'<th scope="row">{name}</th>(.*?)</tr>', text)[1]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert float(cells[1]) == pytest.approx(float(mean[component, layer, head]), rel=0.005)
    assert float(cells[4]) == pytest.approx(float(share[component, layer, head]), abs=0.005)
    assert "The 20 largest of 48 changes" in text
    assert "28 further are in the file." in text
    before = baseline(ds, "logit_diff")
    assert before.names == ["clean", "corrupted"]
    assert before.mean == pytest.approx(ds["baseline_logit_diff"].mean("example").values)


def test_heads_that_were_looked_at_are_named(stored):
    ds, path = stored["attention"]
    moved = changes(ds, "induction")
    best = moved.at(moved.order()[0])
    change = hw.effect(ds, "induction").mean("example").sel(best)
    assert float(change) == pytest.approx(float(moved.mean[moved.order()[0]]))
    assert abs(float(change)) == pytest.approx(float(np.abs(hw.effect(ds, "induction").mean("example")).max()))
    name = f"L{best['layer']}H{best['head']}, read at L{best['read_layer']}H{best['read_head']}"
    assert f"is largest for {name} (" in shown(path.read_text())
    values = stored["baseline"][0]["baseline_induction"].sel(run="clean").mean("example")
    top = np.unravel_index(int(values.values.argmax()), values.shape)
    assert f"is highest for L{top[0]}H{top[1]} (" in shown(stored["baseline"][1].read_text())


def test_the_corruption_is_named(words_model, tmp_path):
    assert "In the corrupted run" not in shown(write_report(by_hand([[1.0, 2.0]]), tmp_path / "none.html").read_text())
    ds = measure(words_model, TASK, None, [loss], runs="all")
    for corrupt, words in CORRUPTIONS.items():
        ds.attrs["task"] = json.dumps(json.loads(ds.attrs["task"]) | {"corrupt": corrupt})
        text = shown(write_report(ds, tmp_path / f"{corrupt}.html").read_text())
        assert f"In the corrupted run, {words}." in text


def test_intervals_end_where_the_values_of_the_metric_do():
    shares = np.array([1.0, 1.0, 1.0, 0.9, 1.0, 0.2, 1.0, 1.0])
    ds = by_hand(np.zeros((1, 8)), shares)
    assert bootstrap_interval(shares)[1] > 1
    assert baseline(ds, "mine").high[0] == bootstrap_interval(shares)[1]
    ds["baseline_mine"].attrs["metric"] = "accuracy"
    assert (baseline(ds, "mine").low[0], baseline(ds, "mine").high[0]) == (bootstrap_interval(shares)[0], 1.0)
    curve = along(ds.drop_vars("mine"), "baseline_mine", "run")
    assert max(float(part.range(2)[1]) for part in curve if isinstance(part, hv.Area | hv.Segments)) <= 1.0
    ds["baseline_mine"] = ds["baseline_mine"] + 1.0  # of another metric that is called so
    assert baseline(ds, "mine").high[0] > 2


def test_a_report_is_written_of_a_file(stored, tmp_path):
    path = stored["one"][1]
    before = shown(path.read_text())
    assert hw.write_report(path.with_suffix(".nc")) == path
    assert shown(path.read_text()) == before
    there = hw.write_report(str(path.with_suffix(".nc")), tmp_path / "there.html")
    assert shown(there.read_text()) == before
    with pytest.raises(DeclarationError, match=r"not read from a file: say where its report goes, path="):
        hw.write_report(stored["one"][0])
    with pytest.raises(DeclarationError, match="no report of dict: possible are a Dataset, a DataTree, and the path"):
        hw.write_report({"loss": 1}, tmp_path / "a.html")
    with pytest.raises(ResultError, match=r"nothing\.nc"):
        hw.write_report(tmp_path / "nothing.nc")


def test_it_says_why_denoising_fails_where_it_does(words_model, tmp_path):
    why = "No patch restores the answer here: the first half of the corrupted run is other tokens"
    for corrupt in ("first", "cue"):
        task = RepeatedTokens(n=4, length=12, corrupt=corrupt)
        ds = measure(words_model, task, qkv(), [logit_diff], base="corrupted")
        text = shown(write_report(ds, tmp_path / f"{corrupt}.html").read_text())
        assert (why in text) == (corrupt == "first")


def test_prompts_of_token_ids_are_called_so(words_model, tmp_path):
    ds = measure(words_model, Prompts([[5, 9, 11, 5], [7, 8, 7, 8]], answers=[9, 7]), ZeroAblate(Head(0, 3)), loss)
    text = shown(write_report(ds, tmp_path / "ids.html").read_text())
    assert "with 2 prompts of token ids, such as 5 9 11 5." in text


def test_a_comparison_of_estimates_says_how_far_to_trust_them(stored):
    ds, path = stored["estimates"]
    text = path.read_text()
    assert check_whole(text).figures == 1
    told = [f"{NAMES[str(name)]} {VERDICTS[verdict(ds.sel(estimator=name))]}" for name in ds["estimator"].values]
    assert f"On 16 conditions, {'; '.join(told)}." in shown(text)
    row = re.search(r"<td>gradient</td><td class=\"n\">([-\d.]+)</td>", text)
    assert float(row[1]) == pytest.approx(float(ds["rank_correlation"].sel(estimator="gradient")), abs=0.005)


def test_estimates_are_called_estimates(stored):
    text = shown(stored["integrated"][1].read_text())
    assert "The estimated change of the next-token cross-entropy is largest for" in text
    assert "The changes are estimates from gradients (integrated, 2 steps), not measured ones" in text


@pytest.mark.parametrize(
    "grid",
    [
        heads(),
        resid(),
        qkv(),
        heads(1, 1),
        Grid(lambda source: Patch(Head(0, 1).k, source), source=["corrupted", "x's"]),
        Grid(lambda place: Patch(Layer(0).resid_pre.at(place)), place=[-1, -2]),
        Grid(lambda kind: {"zero": ZeroAblate, "mean": MeanAblate}[kind](Head(0, 1)), kind=["zero", "mean"]),
        Grid.of([("make", (0, 1))], [ZeroAblate(Head(0, 0)), ZeroAblate(Head(0, 1))]),
        Grid.of([("x): 1*0 #", (0, 1))], [ZeroAblate(Head(0, 0)), ZeroAblate(Head(0, 1))]),
        {"it's": ZeroAblate(Head(0, 0))},
        Add(Layer(1).resid_pre, [0.125] * 64),
    ],
)
@pytest.mark.parametrize("file", ["x.nc", 'it\'s "x".nc'])
def test_the_lines_bring_back_what_was_declared(grid, file, tmp_path, monkeypatch):
    task = RepeatedTokens(n=2, length=4)
    said = {"model": "words-2l", "metrics": '["loss"]', "base": "clean", "estimator": "exact"}
    said |= {"task": hw.to_json(task), "interventions": hw.to_json(grid)}
    ds = xr.Dataset({"baseline_loss": ("example", [0.0, 0.0])}, attrs=said)
    hw.write_netcdf(ds, tmp_path / file)
    lines = recipe(ds.attrs, ds, file).python.splitlines()
    assert ("hw.open_result" in "".join(lines)) == (len(said["interventions"]) > WRITTEN)
    made = [line for line in lines if line.startswith(("import ", "stored = ", "task = ", "what = "))]
    assert lines[-2:] == ["ds = hw.measure(model, task, what, [hw.metrics.loss])", 'hw.write_netcdf(ds, "again.nc")']
    monkeypatch.chdir(tmp_path)
    space = {}
    exec("\n".join(made), space)
    assert space["task"] == task
    assert space["what"] == grid


def test_someone_elses_result_is_shown_by_its_groups(tmp_path):
    random = np.random.RandomState(0)
    tree = xr.DataTree.from_dict(
        {
            "/first": xr.Dataset(
                {"score": (("layer", "head"), random.rand(3, 4), {"long_name": "a score", "units": "nat"})},
                attrs={"long_name": "what I asked first"},
            ),
            "/second/part": xr.Dataset({"text": ("x", ["a", "b"]), "gap": ("x", [np.nan, -2.0])}),
            "/empty": xr.Dataset(),
        }
    )
    tree.attrs["title"] = "My study"
    text = write_report(tree, tmp_path / "mine.html").read_text()
    outline = check_whole(text)
    assert outline.headings[:3] == ["My study", "The answer", "first"]
    assert {"What I asked first", "The group second/part"} <= set(outline.headings)
    assert "The group empty" not in outline.headings
    largest = tree["first"]["score"].values.max()
    assert f"{largest:#.3g}" in shown(text)
    assert re.search(r'<th scope="row">gap</th>.*?<td class="n">-2.00</td><td class="n">1</td>', text)
    assert "The result does not say what was run" in text
    assert outline.figures >= 1


def test_what_is_no_measurement_is_still_reported(stored, tmp_path):
    ds = stored["by position"][0]
    for name, odd in {
        "attrs": ds.drop_attrs(),
        "baseline": ds.drop_vars("baseline_loss"),
        "scalar": xr.Dataset({"a": 1.5, "b": ("x", np.array([], dtype=float))}),
        "nothing": xr.Dataset(),
        "more": ds.assign(mine=("layer", [1.0, 2.0]), words=("layer", ["a", "b"])),
    }.items():
        check_whole(write_report(odd, tmp_path / f"{name}.html").read_text())
    assert "What else is in the file?" in (tmp_path / "more.html").read_text()


@pytest.mark.parametrize(("value", "words"), [(-0.004, "0 points"), (0.5, "50 points"), (-0.01, "-1 point")])
def test_points_of_a_percentage(value, words):
    assert phrases.points(value) == words


def test_what_rounds_to_0_has_no_sign():
    given = ((-0.004, "+.2f"), (0.004, "+.2f"), (-0.006, "+.2f"), (-0.04, ".1f"), (1, "+.0f"))
    assert [phrases.rounded(*one) for one in given] == ["0.00", "0.00", "-0.01", "0.0", "+1"]
