"""The models of the app, and what heads do on a prompt: as `capture` and the metrics say."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import xarray as xr

from headwise.errors import DeclarationError, ModelError, UnknownNameError
from headwise.interventions import Head, Layer, ZeroAblate
from headwise.metrics import prefix_matching, previous_token
from headwise.studies import Prompts, RepeatedTokens, capture, measure, predict
from headwise.studies.app import firing
from headwise.studies.storage.record import Record


def test_a_prompt_fires_as_capture_and_the_metrics_say(words_model):
    text = "apple banana cherry apple banana"
    fired = firing.fire(words_model, text)
    captured = capture(words_model, Prompts((text,)), [Layer(layer).pattern for layer in words_model.layers])
    for layer in words_model.layers:
        for head in words_model.heads:
            wanted = captured[f"L{layer}_pattern"].isel(example=0, head=head)
            np.testing.assert_array_equal(fired.pattern(Head(layer, head))["pattern"].isel(shown=0), wanted)
    measured = measure(words_model, Prompts((text,)), None, [prefix_matching, previous_token])
    for metric in (prefix_matching, previous_token):
        wanted = measured[metric.name].isel(example=0)
        np.testing.assert_allclose(fired.score(metric.name), wanted, atol=1e-6)
    pattern = fired.pattern(Head(1, 2))["pattern"].isel(shown=0)
    assert float(fired.score("token", 1)[1, 2]) == float(pattern[2:, 1].max())
    assert np.isnan(fired.score("token", 4)).all()
    assert fired.tokens == [text.split()]
    assert fired.differs == ""


def test_the_likeliest_tokens_with_and_without_parts(words_model):
    text = "apple banana cherry apple"
    found = firing.likely(words_model, text, " L0H3, L1.mlp_out;L0H3")
    assert found["condition"].values.tolist() == ["as it is", "without L0H3, L1.mlp_out"]
    for at, what in enumerate((None, ZeroAblate("L0H3") + ZeroAblate("L1.mlp_out"))):
        wanted = predict(words_model, text, what, top=8)
        np.testing.assert_allclose(found["prob"][at], wanted["prob"], atol=1e-6)
        np.testing.assert_array_equal(found["token"][at], wanted["token"])
    assert firing.likely(words_model, text, "")["condition"].values.tolist() == ["as it is"]


@pytest.mark.parametrize(
    ("without", "says"),
    [("L9H0", "L9H0"), ("nonsense", "nonsense"), ("L0H1 " * 21, "21 parts are to be left out: 20 at most")],
)
def test_parts_that_are_not_there_are_refused(words_model, without, says):
    with pytest.raises((DeclarationError, UnknownNameError), match=says):
        firing.likely(words_model, "apple banana apple", without)


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
    np.testing.assert_allclose(short.pattern(head)["pattern"], stored["pattern"].sel(shown=[name]))
    with pytest.raises(DeclarationError, match="cannot be shown"):
        firing.fire_study(words_model, xr.DataTree(xr.Dataset(attrs={"task": "{}"})))


def test_another_model_than_that_of_the_file_is_named(words_model):
    assert (
        "is not the model of the file" in firing.fire(words_model, "apple banana", {"weight_hash": "another"}).differs
    )
    assert firing.fire(words_model, "apple banana", {"weight_hash": "sample:another"}).differs == ""


def of(name, revision, **attrs):
    """What a result of a model says about itself."""
    return Record.from_attrs({"model": name, "model_revision": revision} | attrs)


@pytest.mark.parametrize(
    "name", ["../model", "/model", "model", "", "a/b/c", "~/b", "./b", "a/..", "a/b\0", "own/here"]
)
def test_a_file_cannot_make_the_app_open_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "here").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="--model FOLDER"):
        firing.Models().get(of(name, "main"))


def test_a_model_is_opened_once_for_all(monkeypatch, words_model):
    from headwise.interventions import load

    opened = []
    monkeypatch.setattr(load, "load", lambda name, remote, **at: opened.append((name, at)) or words_model)
    shared = firing.Models()
    threads = [threading.Thread(target=shared.get, args=(of("words-2l", "shipped"),)) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    shared.get(of("openai-community/gpt2", "607a30d"))
    shared.get(of("words-2l", "shipped", step=512))
    assert opened == [("words-2l", {}), ("openai-community/gpt2", {"revision": "607a30d"}), ("words-2l", {"step": 512})]
    assert shared.ready("openai-community/gpt2")
    assert not firing.Models().ready("openai-community/gpt2")


def test_prompts_wait_in_a_line_that_ends(monkeypatch, words_model):
    """A client that asks without end is told to wait; nothing is kept of what it asked."""
    monkeypatch.setattr(firing, "WAITING", 2)
    shared = firing.Models()
    monkeypatch.setattr(shared, "get", lambda *arguments: words_model)
    wait = pytest.raises(ModelError, match="2 prompts wait for a model already")
    with shared.using({}), shared.using({}), wait, shared.using({}):
        pass
    with shared.using({}) as model:
        assert model is words_model


def test_a_prompt_of_megabytes_is_refused_before_a_model_reads_it():
    with pytest.raises(DeclarationError, match="5000000 letters: at most 4000"):
        firing.fire(object(), "apple" * 1_000_000)


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
