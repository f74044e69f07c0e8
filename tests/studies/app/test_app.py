"""The app: what it knows without a browser, and a real headless Chromium that clicks through it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from urllib.parse import quote

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, ModelError, ResultError, UnknownNameError
from headwise.interventions import Grid, Head, Layer, ZeroAblate
from headwise.metrics import accuracy, bootstrap_interval, induction, loss, prefix_matching, previous_token
from headwise.studies import InductionStudy, Prompts, RepeatedTokens, capture, measure
from headwise.studies.app import firing, head_facts, variables
from headwise.studies.app import text as words
from headwise.studies.app.folder import Folder, Listed
from headwise.studies.app.selection import Selection
from tests.support import browser

needs_panel = pytest.mark.skipif(importlib.util.find_spec("panel") is None, reason="Panel is not installed")
needs_browser = pytest.mark.skipif(
    importlib.util.find_spec("panel") is None or browser.found() is None,
    reason="the app in a browser needs Panel and Chromium",
)
STUDY, SWEEP = "a-study.nc", "sweeps/zero.nc"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words_model):
    """A study, a measurement in a folder, and files that are no results."""
    place = tmp_path_factory.mktemp("app") / "results"
    hw.write_netcdf(InductionStudy(n=4, length=8, draws=3).run(words_model), place / STUDY)
    heads = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=words_model.layers, head=words_model.heads)
    hw.write_netcdf(measure(words_model, RepeatedTokens(n=4, length=8), heads, [loss, accuracy]), place / SWEEP)
    (place / "torn.nc").write_bytes((place / STUDY).read_bytes()[:2000])
    (place / "<b>noise.nc").write_bytes(b"no NetCDF at all")
    xr.Dataset({"rain": ("day", [1.0, 2.0])}).to_netcdf(place / "weather.nc")
    (place / "notes.txt").write_text("not a result")
    secret = place.parent / "secret.nc"
    secret.write_bytes((place / STUDY).read_bytes())
    (place / "link.nc").symlink_to(secret)
    return place


@pytest.fixture(scope="module")
def tree(folder):
    return Folder(folder).open(STUDY)


def named(tree, key):
    return next(one for one in variables.variables(tree) if one.key == key)


# What is in the folder


def test_results_are_listed_and_every_other_file_says_why_it_is_none(folder):
    listed = {one.name: one.reason for one in Folder(folder).files()}
    assert {name for name, reason in listed.items() if not reason} == {STUDY, SWEEP}
    assert set(listed) == {STUDY, SWEEP, "torn.nc", "<b>noise.nc", "weather.nc", "link.nc"}
    assert "outside" in listed["link.nc"]
    assert "headwise" in listed["weather.nc"]


@pytest.mark.parametrize(
    "name",
    [
        "../secret.nc",
        "./a-study.nc",
        "sweeps/../a-study.nc",
        "sweeps/../../secret.nc",
        "/etc/passwd",
        "a-study",
        "a-study.nc\0",
        "\0",
        "",
        ".",
        "..",
        "notes.txt",
        "A-STUDY.NC",
        "%2e%2e/secret.nc",
    ],
)
def test_only_names_of_the_listing_are_opened(folder, name):
    with pytest.raises(UnknownNameError, match="is called"):
        Folder(folder).open(name)


def test_absolute_paths_are_refused_even_of_files_in_the_folder(folder):
    with pytest.raises(UnknownNameError, match="is called"):
        Folder(folder).open(str(folder / STUDY))


@pytest.mark.parametrize("name", ["link.nc", "torn.nc", "weather.nc", "<b>noise.nc"])
def test_files_that_are_no_results_are_refused_with_their_reason(folder, name):
    with pytest.raises(ResultError, match="cannot be shown"):
        Folder(folder).open(name)


def test_a_file_replaced_by_a_link_is_refused(folder, tmp_path, monkeypatch):
    place = tmp_path / "results"
    place.mkdir()
    (place / "x.nc").symlink_to(folder / STUDY)
    opened = Folder(place)
    monkeypatch.setattr(Folder, "files", lambda self: [Listed("x.nc")])  # as it was when the folder was listed
    with pytest.raises(ResultError, match="leads out of the folder"):
        opened.open("x.nc")


def test_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.nc")
    with pytest.raises(ResultError, match="cannot be shown"):
        Folder(tmp_path).open("pipe.nc")


def test_a_file_is_read_once_and_again_when_it_changes(folder, tmp_path):
    path = tmp_path / "one.nc"
    path.write_bytes((folder / STUDY).read_bytes())
    opened = Folder(tmp_path)
    assert opened.open("one.nc") is opened.open("one.nc")
    before = opened.open("one.nc")
    path.write_bytes((folder / SWEEP).read_bytes())
    assert "loss" in opened.open("one.nc").to_dataset()
    assert before is not opened.open("one.nc")


def test_a_result_is_whole_in_memory_and_the_same(tree, folder):
    variables = [(node.path, name, one) for node in tree.subtree for name, one in node.to_dataset().variables.items()]
    assert [(path, name) for path, name, one in variables if not one._in_memory] == []
    with xr.open_datatree(folder / STUDY) as stored:
        xr.testing.assert_identical(tree, stored)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ResultError, match="does not exist"):
        Folder(tmp_path / "nowhere")


# What can be drawn, and what is known of a head


def test_variables_by_head_are_offered_with_their_other_dims(tree):
    one = named(tree, "ablation/loss")
    assert one.shows == ("change", "value", "share")
    assert dict(one.others) == {
        "ablation": ("zero", "mean", "resample"),
        "example": ("mean of all", "0", "1", "2", "3"),
    }
    keys = {one.key for one in variables.variables(tree)}
    assert {"heads/induction", "heads/q_induction", "patching/noising", "words/prefix_matching"} <= keys
    assert not {"heads/role", "heads/induction_low", "behaviour/loss"} & keys
    assert variables.usual(variables.variables(tree)).key == "heads/induction"


def test_values_are_effects_values_and_shares(tree):
    ds, one = tree["ablation"].to_dataset(), named(tree, "ablation/loss")
    wanted = hw.effect(ds, "loss").sel(ablation="mean").mean("example")
    found = variables.values(tree, one, "change", {"ablation": "mean"})
    xr.testing.assert_allclose(found.drop_vars("ablation", errors="ignore"), wanted.drop_vars("ablation"))
    assert found.name == "effect_loss"
    single = variables.values(tree, one, "value", {"ablation": "resample", "example": "2"})
    np.testing.assert_array_equal(single, ds["loss"].sel(ablation="resample", example=2))
    share = variables.values(tree, one, "share", {})
    np.testing.assert_allclose(share, hw.normalized(ds, "loss").sel(ablation="zero"))
    with pytest.raises(UnknownNameError, match="it has zero, mean and resample"):
        variables.values(tree, one, "value", {"ablation": "knockout"})
    with pytest.raises(UnknownNameError, match="possible are value"):
        variables.values(tree, named(tree, "heads/induction"), "change", {})


def test_heads_that_were_only_looked_at_make_a_grid_too(words_model):
    ds = measure(words_model, RepeatedTokens(n=2, length=6), None, [induction])
    tree = xr.DataTree(ds)
    one = named(tree, "baseline_induction")
    assert dict(one.others) == {"run": ("clean", "corrupted"), "example": ("mean of all", "0", "1")}
    wanted = ds["baseline_induction"].sel(run="corrupted").mean("example").values
    np.testing.assert_allclose(variables.values(tree, one, "value", {"run": "corrupted"}), wanted)
    assert head_facts.scores(tree, Head(1, 2))[0].value == pytest.approx(
        float(ds["baseline_induction"].sel(run="clean", read_layer=1, read_head=2).mean())
    )


def test_facts_of_a_head_are_those_of_the_file(tree):
    head = Head(1, 2)
    assert head_facts.role(tree, head) == "induction"
    heads, ablation = (tree[name].to_dataset().sel(layer=1, head=2) for name in ("heads", "ablation"))
    scores = {one.name: one for one in head_facts.scores(tree, head)}
    assert scores["induction"].value == pytest.approx(float(heads["induction"].mean()))
    assert scores["induction"].low == pytest.approx(float(heads["induction_low"]))
    assert scores["induction"].chance == pytest.approx(float(heads["chance_induction"].mean()))
    assert {"previous_token", "duplicate_token", "first_token", "self"} <= set(scores)
    effects = {(one.metric, one.condition): one for one in head_facts.effects(tree, head)}
    assert {condition for metric, condition in effects if metric == "loss"} == {"zero", "mean", "resample"}
    change = hw.effect(tree["ablation"].to_dataset(), "loss").sel(layer=1, head=2, ablation="zero").mean()
    assert effects["loss", "zero"].mean == pytest.approx(float(change))
    assert effects["loss", "zero"].low == pytest.approx(float(ablation["loss_effect_low"].sel(ablation="zero")))
    assert effects["loss", "zero"].unit == "nat"
    assert head_facts.role(tree, Head(7, 0)) == ""
    assert head_facts.scores(tree, Head(7, 0)) == head_facts.effects(tree, Head(7, 0)) == []


def test_effects_of_a_sweep_get_intervals_of_their_own(folder):
    tree = Folder(folder).open(SWEEP)
    (one,) = [one for one in head_facts.effects(tree, Head(0, 3)) if one.metric == "loss"]
    change = hw.effect(tree.to_dataset(), "loss").sel(layer=0, head=3)
    assert one.mean == pytest.approx(float(change.mean()))
    low, high = bootstrap_interval(change.values)
    assert (one.low, one.high) == (pytest.approx(float(low)), pytest.approx(float(high)))
    assert one.low < one.mean < one.high
    assert head_facts.partners(tree, Head(0, 3)) == {}
    assert head_facts.stored_patterns(tree) is None


def test_partners_are_the_strongest_of_other_layers_on_either_side():
    score = np.full((1, 3, 2, 3, 2), np.nan)
    score[0, 0, :, 1, 0], score[0, 1, 0, 2, :] = [0.2, 0.7], [0.4, 0.3]
    dims = ("kind", "sender_layer", "sender_head", "receiver_layer", "receiver_head")
    coords = {dim: range(3) if dim.endswith("layer") else range(2) for dim in dims[1:]}
    ds = xr.Dataset(
        {"composition": (dims, score), "floor_mean": ("kind", [0.1]), "floor_sd": ("kind", [0.2])},
        coords=coords | {"kind": ["k"]},
    )
    found = head_facts.partners(xr.DataTree(ds), Head(1, 0), top=2)
    assert [(str(one.head), one.score) for one in found["from", "k"]] == [("L0H1", 0.7), ("L0H0", 0.2)]
    assert [(str(one.head), one.score) for one in found["into", "k"]] == [("L2H0", 0.4), ("L2H1", 0.3)]
    assert found["from", "k"][0].deviations == pytest.approx(3.0)
    assert set(head_facts.partners(xr.DataTree(ds), Head(0, 0))) == {("into", "k")}


def large(layers=2, heads=2, labels=2, long="x"):
    """A file that a page could not bear: many heads, many labels, long texts."""
    return xr.DataTree(
        xr.Dataset(
            {
                "loss": (
                    ("layer", "head", "step"),
                    np.zeros((layers, heads, labels)),
                    {"long_name": long, "units": long},
                )
            },
            coords={"layer": range(layers), "head": range(heads), "step": [f"{long}{n}" for n in range(labels)]},
        )
    )


def test_what_a_page_cannot_bear_is_not_offered():
    tree = large(layers=1000, heads=100)
    (one,) = variables.variables(tree)
    with pytest.raises(DeclarationError, match="100000 heads: at most 20000 can be drawn"):
        variables.heads(tree, one)
    assert len(variables.heads(large(100, 200), named(large(100, 200), "loss"))) == 20_000
    (one,) = variables.variables(large(labels=30_000))
    assert len(one.others["step"]) == 1000
    assert one.others["step"][999] == "x999"
    assert float(variables.values(large(labels=30_000), one, "value", {"step": "x999"}).sum()) == 0.0
    (one,) = variables.variables(large(long="\u202e" + "y" * 5_000_000))
    assert len(one.label) < 300
    assert "\u202e" not in one.label
    assert len(variables.variables(xr.DataTree(xr.Dataset({f"v{n}": large()["loss"] for n in range(1500)})))) == 1000


def test_texts_of_megabytes_are_cut():
    long = "\u202e\x1b[31m<b>" + "y" * 5_000_000
    score, effect = head_facts.Score(long, long, 0.5, 0.4, 0.6, 0.1), head_facts.Effect(long, long, long, 0.5, 0.4, 0.6)
    shown = words.scores_table([score]) + words.effects_table([effect]) + words.prompt_heading(long)
    shown += words.heading("L0H0", long) + words.note(long) + words.files([Listed(long, long)] * 5000, long)
    assert len(shown) < 200_000
    assert not {"\u202e", "\x1b"} & set(shown)
    assert "<b>y" not in shown
    assert "and 4900 more" in shown


def test_only_so_many_effects_are_computed(monkeypatch):
    """A file of 100,000 conditions does not keep the page."""
    asked = []
    monkeypatch.setattr(head_facts, "bootstrap_interval", lambda numbers: asked.append(len(numbers)) or (0.0, 1.0))
    shape = (1, 1, 100_000, 2)
    ds = xr.Dataset(
        {
            "loss": (("layer", "head", "step", "example"), np.zeros(shape)),
            "baseline_loss": (("run", "example"), np.zeros((1, 2))),
        },
        coords={"layer": [0], "head": [0], "run": ["clean"]},
        attrs={"base": "clean"},
    )
    assert len(head_facts.effects(xr.DataTree(ds), Head(0, 0))) == len(asked) == head_facts.MOST


# The model


def test_a_prompt_fires_as_capture_and_the_metrics_say(words_model):
    text = "apple banana cherry apple banana"
    fired = firing.fire(words_model, text)
    captured = capture(words_model, Prompts((text,)), [Layer(layer).pattern for layer in words_model.layers])
    for layer in words_model.layers:
        for head in words_model.heads:
            wanted = captured[f"L{layer}_pattern"].isel(example=0, head=head)
            np.testing.assert_array_equal(fired.pattern(layer, head)["pattern"].isel(shown=0), wanted)
    measured = measure(words_model, Prompts((text,)), None, [prefix_matching, previous_token])
    for metric in (prefix_matching, previous_token):
        wanted = measured[f"baseline_{metric.name}"].isel(run=0, example=0)
        np.testing.assert_allclose(fired.score(metric.name), wanted, atol=1e-6)
    pattern = fired.pattern(1, 2)["pattern"].isel(shown=0)
    assert float(fired.score("token", 1)[1, 2]) == float(pattern[2:, 1].max())
    assert np.isnan(fired.score("token", 4)).all()
    assert fired.tokens == [text.split()]
    assert fired.differs == ""


def test_nothing_matches_where_no_token_comes_back(words_model):
    assert np.isnan(firing.fire(words_model, "apple banana cherry").score("prefix_matching")).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "type a prompt first"),
        (" \t ", "type a prompt first"),
        ("apple", "one token"),
        ("apple xyzzy apple", "'xyzzy' is not in the vocabulary"),
        ("apple " * 129, "129 tokens|at most"),
    ],
)
def test_prompts_that_cannot_be_run_say_why(words_model, text, said):
    with pytest.raises(DeclarationError, match=said):
        firing.fire(words_model, text)


def test_prompts_of_the_study_are_those_that_were_measured(tree, words_model):
    fired = firing.fire_study(words_model, tree)
    drawn = RepeatedTokens(n=4, length=8).draw(words_model)
    assert [list(one) for one in fired.ids] == [list(row) for row in drawn.runs["clean"][:3]]
    short = firing.fire_study(words_model, tree, short=True)
    stored = tree["patterns"].to_dataset()
    assert short.tokens[0] == [str(token) for token in stored["token"].values]
    name = str(stored["shown"].values[0])
    head = Head.parse(name)
    np.testing.assert_allclose(short.pattern(head.layer, head.head)["pattern"], stored["pattern"].sel(shown=[name]))
    with pytest.raises(DeclarationError, match="cannot be shown"):
        firing.fire_study(words_model, xr.DataTree(xr.Dataset(attrs={"task": "{}"})))


def test_another_model_than_that_of_the_file_is_named(words_model):
    assert (
        "is not the model of the file" in firing.fire(words_model, "apple banana", {"weight_hash": "another"}).differs
    )
    assert firing.fire(words_model, "apple banana", {"weight_hash": "sample:another"}).differs == ""


@pytest.mark.parametrize(
    "name", ["../model", "/model", "model", "", "a/b/c", "~/b", "./b", "a/..", "a/b\0", "own/here"]
)
def test_a_file_cannot_make_the_app_open_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "here").mkdir(parents=True)
    with pytest.raises(ModelError, match="--model FOLDER"):
        firing.Models().get(name, "main")


def test_a_model_is_opened_once_for_all(monkeypatch, words_model):
    from headwise.interventions import load

    opened = []
    monkeypatch.setattr(load, "load", lambda name, revision, remote: opened.append((name, revision)) or words_model)
    shared = firing.Models()
    threads = [threading.Thread(target=shared.get, args=("words-2l", "shipped")) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    shared.get("openai-community/gpt2", "607a30d")
    assert opened == [("words-2l", None), ("openai-community/gpt2", "607a30d")]
    assert shared.ready("openai-community/gpt2")
    assert not firing.Models().ready("openai-community/gpt2")


def test_prompts_wait_in_a_line_that_ends(monkeypatch, words_model):
    """A client that asks without end is told to wait; nothing is kept of what it asked."""
    monkeypatch.setattr(firing, "WAITING", 2)
    shared = firing.Models()
    monkeypatch.setattr(shared, "get", lambda *arguments: words_model)
    with shared.using({}):
        second = threading.Thread(target=lambda: shared.using({}).__enter__().shape)
        second.daemon = True
        second.start()
        while shared._line._value:
            time.sleep(0.001)
        with pytest.raises(ModelError, match="2 prompts wait for a model already"), shared.using({}):
            pass
    second.join(60)


def test_a_prompt_of_megabytes_is_refused_before_a_model_reads_it():
    with pytest.raises(DeclarationError, match="5000000 letters: at most 4000"):
        firing.fire(object(), "apple" * 1_000_000)


# The address of the page


def test_the_model_of_a_result_of_a_server_stays_there(monkeypatch, words_model):
    from headwise.interventions import load

    asked = []
    monkeypatch.setattr(load, "load", lambda name, **options: asked.append((name, options)) or words_model)
    for name, executed in (("openai-community/gpt2", "https://api.ndif.us"), ("words-2l", "https://api.ndif.us")):
        with firing.Models().using({"model": name, "model_revision": "main", "executed": executed}):
            pass
    with firing.Models().using({"model": "openai-community/gpt2", "model_revision": "main", "executed": "local"}):
        pass
    assert [(name, options["remote"]) for name, options in asked] == [
        ("openai-community/gpt2", True),
        ("words-2l", False),
        ("openai-community/gpt2", False),
    ]


def test_a_selection_comes_back_from_its_address():
    one = Selection(
        "a b.nc", "ablation/loss", "change", "L1H2", "short", "apple & pear? é", "token", "3", {"run": "x=y"}
    )
    assert Selection.from_query(one.to_query()) == one
    assert Selection().to_query() == ""
    assert Selection.from_query("?nonsense=1&head=L1H2&head=L0H1") == Selection(head="L0H1")
    assert Selection.from_query("?" + "&".join(f"a{n}=1" for n in range(99))) == Selection()
    assert len(Selection.from_query("?prompt=" + "a" * 9999).prompt) == 2000


# Words


def test_texts_of_files_are_escaped():
    assert "<b>noise" not in words.files([Listed("ok.nc"), Listed("<b>noise.nc", "<i>why</i>")], "results")
    assert "<i>" not in words.files([Listed("<b>noise.nc", "<i>why</i>")], "<i>results")
    assert "<script>" not in words.heading("L0H0", "<script>")
    score = head_facts.Score("x", "<script>", 0.5, 0.4, 0.6, 0.1)
    effect = head_facts.Effect("<script>", "<script>", "<script>", 0.5, 0.4, 0.6)
    assert "<script>" not in words.scores_table([score]) + words.effects_table([effect]) + words.prompt_heading(
        "<script>"
    )


def test_intervals_are_drawn_where_their_numbers_are():
    drawn = words.interval(0.5, 0.25, 0.75, 0.0, 1.0, mark=0.0)
    assert 'cx="50.00%"' in drawn
    assert 'x1="27.00%" x2="73.00%"' in drawn
    assert 'x1="4.00%" x2="4.00%"' in drawn
    assert words.interval(np.nan, 0, 0, 0, 1, mark=None) == ""


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0.39, 0.26, 0.54), "+0.390</td><td class=n>+0.26 to +0.54"),
        ((-0.0001, -0.00301, 0.0), "-0.00010</td><td class=n>-0.0030 to 0.0000"),
        ((0.2, np.nan, np.nan), "+0.200</td><td class=n>–"),
    ],
)
def test_effects_are_written_with_as_many_digits_as_they_need(numbers, said):
    assert said in words.effects_table([head_facts.Effect("zero", "loss", "nat", *numbers)])


def test_an_empty_folder_says_what_makes_a_result():
    assert "headwise induction --out results/" in words.files([], "results")
    assert "No file in results can be shown" in words.files([Listed("a.nc", "torn")], "results")


# The server


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """The app in a process of its own; gives the address of its page."""
    if importlib.util.find_spec("panel") is None:
        pytest.skip("Panel is not installed")
    yield from serving(folder, tmp_path_factory.mktemp("elsewhere"))


def serving(folder, elsewhere, *more):
    call = ", ".join(["sys.argv[1]", "port=0", "show=False", *more])
    code = f"import sys; from headwise.studies.app import serve; serve({call})"
    with (elsewhere / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", code, folder], cwd=elsewhere, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            line = process.stdout.readline()
            assert "http://" in line, (elsewhere / "errors").read_text()
            yield line[line.index("http://") :].split()[0]
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
        assert "Traceback" not in (elsewhere / "errors").read_text()


def test_it_listens_on_loopback_only(served):
    port = int(served.rsplit(":", 1)[1].strip("/"))
    own = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in own - {"127.0.0.1"}:
        if address.startswith("127."):
            continue
        with socket.socket() as probe:
            assert probe.connect_ex((address, port)) != 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    "path",
    [
        "../secret.nc",
        "a-study.nc",
        "static/../../secret.nc",
        "static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "static/extensions/panel/../../../../../../etc/passwd",
        "components/os/path/__file__/..%2f..%2fetc/passwd",
        "admin",
        "rest/session_info",
    ],
)
def test_no_file_can_be_fetched(served, path):
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(served + path):
        pass
    assert refused.value.code in (400, 403, 404)
    refused.value.close()


async def closed(wire):
    """Close a connection, at this end too."""
    wire.close()
    await asyncio.sleep(0.05)
    wire.stream.close()


def websocket(served, origin):
    """Status of opening a session from a page of `origin`."""
    from tornado.httpclient import HTTPClientError, HTTPRequest
    from tornado.websocket import websocket_connect

    async def tried():
        request = HTTPRequest(served.replace("http", "ws") + "ws", headers={"Origin": origin})
        try:
            await closed(await websocket_connect(request, subprotocols=["bokeh", "no-token"]))
        except HTTPClientError as error:
            return error.code
        return 101

    return asyncio.run(tried())


def test_pages_from_elsewhere_cannot_open_a_session(served):
    port = served.rsplit(":", 1)[1].strip("/")
    assert websocket(served, "http://evil.example") == 403
    assert websocket(served, f"http://evil.example:{port}") == 403
    assert websocket(served, f"http://localhost:{int(port) + 1}") == 403


@needs_panel
def test_names_are_those_it_is_reached_under():
    from headwise.studies.app import gate

    assert gate.names_of("127.0.0.1", 80) == ["127.0.0.1:80", "localhost:80"]
    assert gate.names_of("10.1.2.3", 80) == ["10.1.2.3:80"]
    assert gate.names_of("fe80::1", 80) == ["[fe80::1]:80"]
    assert {"127.0.0.1:80", f"{socket.gethostname().lower()}:80"} <= set(gate.names_of("0.0.0.0", 80))
    assert gate.names_of("127.0.0.1", 81, ["Lab.Example", "lab.example:8080", "[::1]"]) == [
        "127.0.0.1:81",
        "[::1]:80",
        "lab.example:80",
        "lab.example:8080",
        "localhost:81",
    ]
    for name in ("*", "http://lab.example", "a b", "", "lab.example/", "user@lab.example", "[::1", "a:999999"):
        with pytest.raises(DeclarationError, match="as the address bar shows it"):
            gate.names_of("127.0.0.1", 80, [name])


def answer(served, head, path="/", method="GET"):
    """Status, head and text of the answer to a request with just these lines in its head."""
    port = int(served.rsplit(":", 1)[1].strip("/"))
    with socket.create_connection(("127.0.0.1", port), timeout=60) as wire:
        closing = [] if path == "/ws" else ["Connection: close"]
        wire.sendall("\r\n".join([f"{method} {path} HTTP/1.1", *head, *closing, "", ""]).encode("latin-1"))
        whole = b""
        while piece := wire.recv(65536):
            whole += piece
            if path == "/ws" and b"\r\n\r\n" in whole:
                break
    head, _, body = whole.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode("latin-1"), body.decode(errors="replace")


UPGRADE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Protocol: bokeh, none",
)
STRANGERS = {
    "another name": ["Host: evil.example:{port}"],
    "another name, no port": ["Host: evil.example"],
    "a name that ends in ours": ["Host: 127.0.0.1.evil.example:{port}"],
    "a name that begins with ours": ["Host: localhost.evil.example:{port}"],
    "another port": ["Host: 127.0.0.1:1"],
    "no port": ["Host: 127.0.0.1"],
    "a user": ["Host: 127.0.0.1:{port}@evil.example"],
    "a user in front": ["Host: evil.example@127.0.0.1:{port}"],
    "a trailing dot": ["Host: localhost.:{port}"],
    "another address of loopback": ["Host: 127.0.0.2:{port}"],
    "a number": ["Host: 2130706433:{port}"],
    "an IPv6 address": ["Host: [::1]:{port}"],
    "all": ["Host: 0.0.0.0:{port}"],
    "a wildcard": ["Host: *:{port}"],
    "two names": ["Host: 127.0.0.1:{port}", "Host: evil.example:{port}"],
    "two names in one": ["Host: 127.0.0.1:{port}, evil.example:{port}"],
    "no name": [],
    "an empty name": ["Host: "],
    "forwarded": ["Host: evil.example:{port}", "X-Forwarded-Host: 127.0.0.1:{port}", "Forwarded: host=localhost"],
    "a matching origin": ["Host: evil.example:{port}", "Origin: http://evil.example:{port}"],
}


@pytest.mark.parametrize("case", STRANGERS)
def test_another_name_than_those_it_is_served_as_gets_nothing(served, case):
    """DNS rebinding: a page of another site whose name leads here gets no page, no file, no token and no session."""
    port = served.rsplit(":", 1)[1].strip("/")
    head = [line.format(port=port) for line in STRANGERS[case]]
    places = ("/", "/static/js/bokeh.min.js", "/favicon.ico", "/autoload.js?bokeh-autoload-element=a", "/metadata")
    for path in places if "name" in case else ("/",):
        status, _, body = answer(served, head, path)
        assert status in (400, 421)
        assert "token" not in body
        assert "Bokeh" not in body
    assert answer(served, [*head, *UPGRADE], "/ws")[0] in (400, 403, 421)
    if case == "another name":
        assert answer(served, head, "/", "POST")[0] == 421
        said = answer(served, head)[2]
        assert said == (
            f"the app is not served as evil.example:{port}, only as 127.0.0.1:{port}, localhost:{port}: "
            f"start it with --allow evil.example:{port} for more\n"
        )


def test_an_address_in_the_request_line_is_no_way_around_the_name(served):
    port = served.rsplit(":", 1)[1].strip("/")
    for target in (f"http://127.0.0.1:{port}/", f"http://evil.example:{port}/", "//evil.example/", "*", "/../"):
        status, _, body = answer(served, [f"Host: 127.0.0.1:{port}"], target)
        assert status in (400, 404)
        assert "token" not in body


def test_its_own_names_get_the_page_however_they_are_written(served):
    port = served.rsplit(":", 1)[1].strip("/")
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LocalHost:{port}"):
        status, head, body = answer(served, [f"Host: {host}"], "/favicon.ico")
        assert status == 200
    status, head, body = answer(served, [f"Host: 127.0.0.1:{port}"])
    assert status == 200
    assert '"token"' in body
    for line in ("X-Frame-Options: DENY", "frame-ancestors 'none'", "Referrer-Policy: no-referrer", "nosniff"):
        assert line in head


@pytest.mark.parametrize(
    ("site", "mode", "dest", "status"),
    [
        ("cross-site", "no-cors", "script", 403),
        ("cross-site", "navigate", "iframe", 403),
        ("same-site", "cors", "empty", 403),
        ("cross-site", "navigate", "document", 200),
        ("same-origin", "no-cors", "script", 200),
        ("none", "navigate", "document", 200),
    ],
)
def test_other_sites_can_link_to_it_and_no_more(served, site, mode, dest, status):
    port = served.rsplit(":", 1)[1].strip("/")
    fetch = [f"Sec-Fetch-Site: {site}", f"Sec-Fetch-Mode: {mode}", f"Sec-Fetch-Dest: {dest}"]
    assert answer(served, [f"Host: 127.0.0.1:{port}", *fetch], "/favicon.ico")[0] == status


def test_what_puts_it_into_other_pages_is_not_served(served):
    port = served.rsplit(":", 1)[1].strip("/")
    for path in ("/autoload.js?bokeh-autoload-element=a", "/metadata", "/components/panel", "/static", "/index.html"):
        assert answer(served, [f"Host: 127.0.0.1:{port}", "Origin: http://evil.example"], path)[0] == 404


@needs_panel
def test_a_further_name_is_allowed_by_name(folder, tmp_path):
    for served in serving(folder, tmp_path, 'allow=["lab.example"]'):
        assert answer(served, ["Host: lab.example"], "/favicon.ico")[0] == 200
        assert answer(served, ["Host: lab.example:81"], "/favicon.ico")[0] == 421
        assert websocket(served, "https://lab.example") == 101
        assert websocket(served, "http://evil.example") == 403


def test_a_session_needs_what_a_page_was_given(served):
    """A made-up token, and one that another server signed, open no session."""
    from bokeh.util.token import generate_jwt_token, generate_session_id

    made_up = generate_jwt_token("mine")
    foreign = generate_jwt_token(generate_session_id("key", signed=True), "key", signed=True)
    for token in (made_up, foreign, "none"):
        assert said_first(served, token) is None
    assert answer(served, [f"Host: {served.split('/')[2]}"], "/?bokeh-session-id=mine")[0] == 403
    body = answer(served, [f"Host: {served.split('/')[2]}"])[2]
    token = json.loads(body[body.index('{"token":') :].partition("}")[0].partition(",")[0] + "}")["token"]
    assert "ACK" in said_first(served, token)


def said_first(served, token, *messages):
    """What a session answers first, and after these messages; None where the connection is closed."""
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import websocket_connect

    async def tried():
        request = HTTPRequest(served.replace("http", "ws") + "ws", headers={"Origin": served.strip("/")})
        wire = await websocket_connect(request, subprotocols=["bokeh", token])
        said = await wire.read_message()
        for message in messages:
            with contextlib.suppress(Exception):  # closed meanwhile
                await wire.write_message(message)
        while messages and said is not None:
            said = await wire.read_message()
        await closed(wire)
        return said

    return asyncio.run(asyncio.wait_for(tried(), 60))


@contextlib.contextmanager
def in_this_process(folder, **options):
    """The app in a thread; gives the server and its address."""
    from headwise.studies.app import server

    ready, stop = threading.Event(), {}

    async def run():
        stop["loop"], stop["event"] = asyncio.get_running_loop(), asyncio.Event()
        stop["server"], stop["url"] = server._server(Folder(folder), firing.Models(), "127.0.0.1", 0, **options)
        stop["server"].start()
        ready.set()
        await stop["event"].wait()
        stop["server"].stop()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(60)
        yield stop["server"], stop["url"]
    finally:
        stop["loop"].call_soon_threadsafe(stop["event"].set)
        thread.join(60)


def at_once(served, count):
    """The answers to so many requests of a page at the same moment."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: answer(served, [f"Host: {served.split('/')[2]}"]), range(count)))


@needs_panel
def test_many_pages_at_once_are_made_or_told_to_wait(folder, monkeypatch):
    """Fifty readers at once: those for whom a page can be made in time get one, the others are told when to come."""
    from headwise.studies.app import gate, session

    made = []

    def slow(*arguments):
        made.append(time.monotonic())
        time.sleep(0.1)
        return session.template(session.look.EMPTY, "results", files=session.html("<p>a page</p>"))

    monkeypatch.setattr(session, "page", slow)
    monkeypatch.setattr(gate, "GUESS", 0.1)
    monkeypatch.setattr(gate, "PATIENCE", 1.5)
    with in_this_process(folder) as (server, served):
        found = at_once(served, 50)
        counts = {status: [one for one in found if one[0] == status] for status in (200, 503)}
        assert len(counts[200]) + len(counts[503]) == 50
        assert len(counts[200]) == len(made) >= 1
        assert len(counts[503]) >= 50 - 1.5 / 0.1
        for _, head, body in counts[503]:
            seconds = int(head.split("Retry-After: ")[1].split()[0])
            assert f"tries again by itself in {seconds} seconds" in body
            assert f'content="{seconds}"' in body
        monkeypatch.setattr(gate, "SESSIONS", len(made) + 1)
        assert [one[0] for one in at_once(served, 1) + at_once(served, 1)] == [200, 503]
        assert len(server.get_sessions("/")) == len(made) == gate.SESSIONS


@needs_panel
def test_a_page_that_says_too_much_is_cut_off(folder, monkeypatch):
    """Messages, and pieces of one that never ends, are bounded; so are the connections to one session."""
    from headwise.studies.app import gate, session

    monkeypatch.setattr(
        session, "page", lambda *_: session.template(session.look.EMPTY, "results", files=session.html("<p></p>"))
    )
    endless = json.dumps({"msgid": "1", "msgtype": "PATCH-DOC", "num_buffers": 10**9})
    with in_this_process(folder) as (_, served):
        body = at_once(served, 1)[0][2]
        token = json.loads(body[body.index('{"token":') :].partition("}")[0].partition(",")[0] + "}")["token"]
        assert said_first(served, token, "a" * (gate.MESSAGE + 1)) is None
        pieces = [endless, "{}", json.dumps({"events": []}), *([json.dumps({"id": "1"}), b"a" * 900_000] * 6)]
        assert said_first(served, token, *pieces) is None
        assert answer(served, [f"Host: {served.split('/')[2]}", "Content-Length: 999999999"], "/", "POST")[0] in (
            400,
            413,
        )


@needs_panel
def test_what_cannot_be_served_is_said_in_words(folder, tmp_path):
    from headwise.studies.app import serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DeclarationError, match=f"port {port} is in use"):
            serve(folder, port=port, show=False)
    with pytest.raises(DeclarationError, match="give a number"):
        serve(folder, port=70000, show=False)
    with pytest.raises(DeclarationError, match=r"cannot listen at 203\.0\.113\.1"):
        serve(folder, address="203.0.113.1", port=0, show=False)
    with pytest.raises(ResultError, match="does not exist"):
        serve(tmp_path / "nowhere", show=False)


def test_without_panel_it_says_how_to_get_it(folder, monkeypatch):
    from headwise.studies.app import serve

    monkeypatch.setitem(sys.modules, "panel", None)
    with pytest.raises(DeclarationError, match=r"pip install 'headwise\[app\]'"):
        serve(folder, show=False)


# In a browser

FIGURES = """
window.figures = () => {
  const found = [], seen = new Set();
  const walk = view => {
    if (seen.has(view)) return;
    seen.add(view);
    if (view.model.type == "Figure") found.push(view);
    for (const child of view.child_views ?? []) walk(child);
    for (const child of Object.values(view._child_views ?? {})) if (child && child.model) walk(child);
    if (view._child_views instanceof Map) for (const child of view._child_views.values()) walk(child);
  };
  for (const view of Bokeh.index.roots) walk(view);
  return found;
};
window.sourceOf = (view, column) => view.model.renderers.map(one => one.data_source).find(one => column in one.data);
window.rootOf = view => { let one = view; while (one.parent) one = one.parent; return one.model.name; };
window.inside = name => figures().find(view => rootOf(view) == name);
window.grid = name => {
  const view = inside(name), data = sourceOf(view, "name").data;
  return Array.from(data.name, (one, at) => [one, data.value[at]]);
};
window.marked = name => {
  const one = inside(name).model.renderers.map(one => one.data_source).find(one => one.name == "picked head");
  return [one.data.layer[0], one.data.head[0]];
};
window.pattern = name => {
  const data = sourceOf(inside(name), "weight").data;
  return Object.fromEntries(Array.from(data.weight, (weight, at) => [`${data.query[at]} ${data.key[at]}`, weight]));
};
window.near = (found, wanted) => Object.entries(wanted).every(([at, number]) => at in found && (number === null
  ? !(found[at] === found[at] && found[at] !== null) : Math.abs(found[at] - number) <= 1e-6 + 5e-5 * Math.abs(number)));
window.axisOf = name => {
  const axis = inside(name).model.below.find(one => one.major_label_overrides);
  return Array.from(axis.major_label_overrides instanceof Map ? axis.major_label_overrides.values()
    : Object.values(axis.major_label_overrides));
};
window.titleOf = name => { const one = inside(name).model.title; return one ? one.text : ""; };
window.cellAt = (name, layer, head) => {
  const view = inside(name), box = view.canvas_view.el.getBoundingClientRect();
  view.el.scrollIntoView({block: "center"});
  const now = view.canvas_view.el.getBoundingClientRect();
  return [now.left + view.frame.x_scale.compute(head), now.top + view.frame.y_scale.compute(layer)];
};
window.deep = selector => {
  const found = [];
  const walk = root => {
    found.push(...root.querySelectorAll(selector));
    for (const one of root.querySelectorAll("*")) if (one.shadowRoot) walk(one.shadowRoot);
  };
  walk(document);
  return found;
};
window.box = label => deep("label").filter(one => one.textContent.trim() == label)
  .map(one => one.getRootNode().querySelector("select, input")).find(one => one && one.checkVisibility());
window.choose = (label, text) => {
  const one = box(label), option = Array.from(one.options).find(each => each.textContent.trim() == text);
  one.value = option.value;
  one.dispatchEvent(new Event("change"));
};
window.words = () => deep("p, h1, h2, h3, li, summary").map(one => one.textContent).join("\\n");
window.idle = () => Bokeh.documents.length > 0 && Bokeh.documents[0].is_idle && Bokeh.index.roots.length > 0;
true
"""


class Page:
    """The app in a tab."""

    def __init__(self, tab, address):
        self.tab, self.address = tab, address

    def open(self, query=""):
        self.tab.open(self.address + query)
        self.tab.wait("document.readyState == 'complete' && Bokeh.documents.length && Bokeh.documents[0].is_idle")
        self.tab.evaluate(FIGURES)
        return self

    def head(self, name):
        """Wait until a head is shown."""
        self.tab.wait(f"deep('h2').some(one => one.textContent.startsWith({json.dumps(name)}))", f"the heading {name}")

    def click(self, part, layer, head):
        self.tab.click(*self.tab.evaluate(f"cellAt({json.dumps(part)}, {layer}, {head})"))

    def shows(self, part, wanted):
        """Wait until a head grid shows these numbers, ``(layer, head)``; pictures keep five digits."""
        wanted = np.asarray(wanted, dtype=float)
        cells = np.ndenumerate(wanted)
        numbers = {str(Head(*at)): None if np.isnan(value) else float(value) for at, value in cells}
        script = f"near(Object.fromEntries(grid({json.dumps(part)})), {json.dumps(numbers)})"
        self.tab.wait(script, f"the numbers {numbers} in {part}")

    def attends(self, part, name, wanted):
        """Wait until a picture shows this pattern, ``(query, key)``, of this head."""
        wanted = np.asarray(wanted, dtype=float)
        numbers = {
            f"{query} {key}": float(wanted[query, key])
            for query, key in zip(*np.tril_indices_from(wanted), strict=True)
        }
        script = f"near(pattern({json.dumps(part)}), {json.dumps(numbers)})"
        self.tab.wait(f"titleOf({json.dumps(part)}).startsWith({json.dumps(name)}) && {script}", f"{name} in {part}")

    def choose(self, label, text):
        self.tab.wait(f"box({json.dumps(label)})")
        self.tab.evaluate(f"choose({json.dumps(label)}, {json.dumps(text)})")

    def prompt(self, text):
        """Type a prompt in place of the one that is there, and press Enter."""
        self.tab.evaluate("box('Prompt').focus(); box('Prompt').select()")
        self.tab.type(text)
        self.tab.press("Enter")

    def says(self, text):
        self.tab.wait(f"words().includes({json.dumps(text)})", f"the words {text!r}")


@pytest.fixture(scope="module")
def chromium():
    if browser.found() is None:
        pytest.skip("no Chromium is installed")
    with browser.Browser() as one:
        yield one


@pytest.fixture
def page(chromium, served):
    """A page in a tab of its own; afterwards, nothing may have left the machine or gone wrong."""
    tab = chromium.tab()
    yield Page(tab, served)
    own = (served, served.replace("http", "ws"), "data:", f"blob:{served}", "about:")
    assert [one for one in tab.requests if not one.startswith(own)] == []
    assert tab.errors == []
    tab.close()


@needs_browser
def test_a_click_on_a_head_shows_its_pattern_from_the_file(page, tree):
    stored = tree["patterns"].to_dataset()
    wanted = tree["heads"]["induction"].mean("example")
    best = Head(*np.unravel_index(int(wanted.values.argmax()), wanted.shape))
    page.open().head(str(best))
    page.shows("grid", wanted)
    name = next(str(one) for one in stored["shown"].values if str(one) != str(best))
    head = Head.parse(name)
    page.click("grid", head.layer, head.head)
    page.head(name)
    page.attends("pattern", name, stored["pattern"].sel(shown=name).transpose("query", "key"))
    page.tab.wait(f"marked('grid').join() == '{head.layer},{head.head}'")
    page.tab.wait(f"location.search.includes('head={name}')")
    page.says("From the file.")
    page.says("Change of loss (nat) without it")
    change = hw.effect(tree["ablation"].to_dataset(), "loss").sel(layer=head.layer, head=head.head, ablation="zero")
    assert f"{change.mean():+.3f}" in page.tab.evaluate("deep('td').map(one => one.textContent)")


@needs_browser
def test_the_pattern_of_any_other_head_is_computed(page, tree, words_model):
    shown = {str(name) for name in tree["patterns"]["shown"].values}
    head = next(Head(0, one) for one in words_model.heads if str(Head(0, one)) not in shown)
    page.open()
    page.click("grid", head.layer, head.head)
    page.says("Computed now, on the prompt of the file.")
    captured = capture(words_model, RepeatedTokens(n=1, length=8), [head.pattern])[f"{head}_pattern"].isel(example=0)
    page.attends("pattern", str(head), captured)
    page.choose("Attention on", "prompt 2 of the study")
    page.says("Computed now, on a prompt that was measured.")
    captured = capture(words_model, RepeatedTokens(n=4, length=8), [head.pattern])[f"{head}_pattern"].isel(example=1)
    page.attends("pattern", str(head), captured)
    page.tab.wait("location.search.includes('pattern=1')")


@needs_browser
def test_another_variable_and_another_label_change_the_grid(page, tree):
    ds = tree["ablation"].to_dataset()
    page.open()
    page.choose("Variable", named(tree, "ablation/loss").label)
    page.tab.wait("box('Ablation')")
    page.shows("grid", hw.effect(ds, "loss").sel(ablation="zero").mean("example"))
    page.choose("Ablation", "mean")
    page.tab.wait("location.search.includes('at.ablation=mean')")
    page.shows("grid", hw.effect(ds, "loss").sel(ablation="mean").mean("example"))
    page.choose("Show", "value")
    page.tab.wait("location.search.includes('show=value')")
    page.shows("grid", ds["loss"].sel(ablation="mean").mean("example"))


@needs_browser
def test_a_typed_prompt_fires_the_heads(page, words_model):
    text = "lion tiger bear lion tiger"
    page.open().prompt(text)
    page.tab.wait("!!inside('fires')")
    measured = measure(words_model, Prompts((text,)), None, [prefix_matching, previous_token])
    wanted = {
        name: measured[f"baseline_{name}"].isel(run=0, example=0) for name in ("prefix_matching", "previous_token")
    }
    page.shows("fires", wanted["prefix_matching"])
    page.click("fires", 0, 3)
    page.head("L0H3")
    captured = capture(words_model, Prompts((text,)), [Head(0, 3).pattern])["L0H3_pattern"].isel(example=0)
    page.attends("live", "L0H3", captured)
    for part in ("fires", "grid"):
        page.tab.wait(f"marked('{part}').join() == '0,3'")
    assert set(page.tab.evaluate("axisOf('live')")) == set(text.split())
    page.choose("Show attention to", "the token before")
    page.tab.wait("location.search.includes('fires=previous_token')")
    page.shows("fires", wanted["previous_token"])
    page.choose("Show attention to", "one token")
    page.choose("Token", "1: tiger")
    page.tab.wait("location.search.includes('token=1')")
    whole = capture(words_model, Prompts((text,)), [Layer(layer).pattern for layer in words_model.layers])
    largest = np.stack([whole[f"L{layer}_pattern"][0, :, 2:, 1].max("query") for layer in words_model.layers])
    page.shows("fires", largest)


@needs_browser
def test_prompts_that_cannot_be_run_are_answered_in_words(page):
    page.open().prompt("apple xyzzy apple")
    page.says("'xyzzy' is not in the vocabulary of words-2l")
    page.prompt("apple")
    page.says("this prompt is one token")
    page.prompt("apple " * 200)
    page.says("at most")
    page.prompt("   ")
    page.says("type a prompt first")
    page.prompt("apple banana cherry")
    page.says("No token of this prompt comes back")
    page.prompt("apple banana apple")
    page.tab.wait("!!inside('live')")


@needs_browser
def test_a_link_opens_what_it_names(page, words_model):
    text = "sun moon sun"
    page.open(
        f"?result={quote(SWEEP)}&variable=accuracy&show=value&head=L0H5&prompt={quote(text)}&fires=previous_token"
    )
    page.head("L0H5")
    page.tab.wait("marked('grid').join() == '0,5'")
    assert page.tab.evaluate("box('Result set').value") == SWEEP
    page.tab.wait("!!inside('live')")
    assert page.tab.evaluate("box('Prompt').value") == text
    measured = measure(words_model, Prompts((text,)), None, [previous_token])["baseline_previous_token"]
    page.shows("fires", measured.isel(run=0, example=0))


@needs_browser
def test_a_link_to_what_is_not_there_still_opens(page):
    page.open("?result=../secret.nc&variable=nothing&head=L9H9&pattern=99&at.example=77")
    page.says("There is no")
    page.head("L1")


@needs_browser
def test_a_measurement_is_shown_too_with_the_prompts_it_was_measured_on(page, folder, words_model):
    page.open(f"?result={quote(SWEEP)}&head=L1H1")
    page.head("L1H1")
    ds = Folder(folder).open(SWEEP).to_dataset()
    page.shows("grid", hw.effect(ds, "loss").mean("example"))
    captured = capture(words_model, RepeatedTokens(n=4, length=8), [Head(1, 1).pattern])["L1H1_pattern"].isel(example=0)
    page.attends("pattern", "L1H1", captured)
    page.says("This file holds no composition scores.")


@needs_browser
def test_tabs_do_not_share_what_is_chosen(page, chromium, served):
    page.open("?head=L0H1").head("L0H1")
    other = Page(chromium.tab(), served).open("?head=L1H0")
    other.head("L1H0")
    other.click("grid", 0, 6)
    other.head("L0H6")
    page.click("grid", 0, 2)
    page.head("L0H2")
    assert "L0H6" in other.tab.evaluate("words()")
    other.tab.close()


@needs_browser
def test_everything_can_be_reached_with_the_keyboard(page):
    page.open()
    reached = []
    for _ in range(40):
        page.tab.press("Tab")
        reached.append(
            page.tab.evaluate(
                "(() => { let one = document.activeElement; while (one.shadowRoot && one.shadowRoot.activeElement)"
                " one = one.shadowRoot.activeElement; const label = one.getRootNode().querySelector('label');"
                " return one.tagName == 'BUTTON' ? one.textContent.trim() : label ? label.textContent.trim() : ''; })()"
            )
        )
    assert {"Result set", "Variable", "Example", "Head", "Attention on", "Prompt", "Run"} <= set(reached)
    assert any(one.startswith("L0H") for one in reached)  # partners
    before = page.tab.evaluate("box('Head').value")
    page.tab.evaluate("box('Head').focus()")
    page.tab.press("ArrowDown")
    page.tab.wait(f"box('Head').value != {json.dumps(before)}")
    page.head(page.tab.evaluate("box('Head').selectedOptions[0].textContent"))


@needs_browser
def test_a_partner_is_one_click_away_and_back_goes_back(page, tree):
    page.open("?head=L1H2").head("L1H2")
    best = head_facts.partners(tree, Head(1, 2))["from", "k"][0].head
    page.tab.evaluate(f"deep('button').find(one => one.textContent.startsWith('{best}')).click()")
    page.head(str(best))
    page.tab.wait(f"location.search.includes('head={best}')")
    page.tab.evaluate("history.back()")
    page.tab.wait("typeof deep == 'undefined' && Bokeh.documents.length && Bokeh.documents[0].is_idle")
    page.tab.evaluate(FIGURES)
    page.head("L1H2")


@needs_browser
def test_bad_files_are_named_with_their_reasons(page):
    page.open()
    page.says("4 files cannot be shown")
    page.says("<b>noise.nc")
    page.says("weather.nc")


@needs_browser
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    page.tab.size(width, 800, touch=width < 600)
    page.open("?prompt=apple%20banana%20apple%20banana").tab.wait("!!inside('live')")
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
def test_an_empty_folder_says_what_to_do(chromium, tmp_path):
    (tmp_path / "results").mkdir()
    for served in serving(tmp_path / "results", tmp_path):
        session = Page(chromium.tab(), served).open()
        session.says("There is no result in results yet.")
        assert session.tab.errors == []
        session.tab.close()


@needs_browser
def test_sessions_go_with_their_tabs(chromium, folder, monkeypatch):
    from headwise.studies.app import session as pages

    kept = []

    class Watched(pages.Session):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(weakref.ref(self))

    monkeypatch.setattr(pages, "Session", Watched)
    with in_this_process(folder, unused=4000) as (server, url):
        session = Page(chromium.tab(), url).open()
        assert len(server.get_sessions("/")) == len(kept) == 1
        session.click("grid", 0, 4)
        session.head("L0H4")
        session.tab.close()
        other = chromium.tab()
        other.open("about:blank")
        asked = time.monotonic()
        while (server.get_sessions("/") or kept[0]() is not None) and time.monotonic() - asked < 60:
            gc.collect()
            other.evaluate("new Promise(done => setTimeout(done, 50))")
        assert server.get_sessions("/") == []
        assert kept[0]() is None
        other.close()
