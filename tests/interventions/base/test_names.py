"""Names and texts that a file would refuse, cut or change are refused before any pass; files are the oracle."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, check_name, check_text
from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import Metric, loss
from headwise.studies import Prompts, RepeatedTokens, capture, measure
from headwise.studies.analyses.ablation import sets_against_controls
from tests.oracles import raw_hooks

TASK = RepeatedTokens(n=2, length=4, seed=1)
NAMES = [
    *("a/b", "/", "", " a", "a ", "a b", "1a", "_a", "-a", ".a", ".", "..", "+a", "~a", "#", "(a)", "a(b)", "'", "a,b"),
    *("a\n", "a\tb", "a\0b", "a\0", "\0", "a\x7f", "a\x01", "a.b", "a@b", "a:b", "a\\b", "a-b", "a'b", " ", "a%"),
    *("é", "e\u0301", "\u212b", "日本", "ﬁ", "a\u00a0", "\u200b", "\U0001f600", "\ud800", "x" * 200, "é" * 150),
]
TEXTS = ["", "a\0b", "\0", "a\0", " a ", "a\n", "\x01", "\r\n", "é", "e\u0301", "\U0001f600", "a/b", "nan", "\ufeffa"]


def survives(dataset, path):
    """Whether a dataset comes back from a file as it was."""
    try:
        dataset.to_netcdf(path, engine="netcdf4")
        with xr.open_dataset(path, engine="netcdf4") as read:
            return bool(read.load().identical(dataset))
    except (ValueError, RuntimeError, OSError):
        return False


def allowed(check, *given):
    try:
        check(*given)
    except DeclarationError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_allowed_where_a_file_takes_it(name, tmp_path):
    found = allowed(check_name, name, "the name")
    as_dim, as_variable = xr.Dataset({"v": ((name,), [1.0])}), xr.Dataset({name: ("t", [1.0])})
    taken = survives(as_dim, tmp_path / "dim.nc") and survives(as_variable, tmp_path / "variable.nc")
    assert found == ((taken and len(name) < 150) or name == "x" * 200)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_text_is_allowed_where_a_file_keeps_it(text, tmp_path):
    coords = {"c": np.array([text, "other"], dtype=object)}
    assert allowed(check_text, text, "the text") == survives(xr.Dataset(coords=coords), tmp_path / "text.nc")
    assert not allowed(check_text, "\ud800", "the text")


@pytest.fixture
def model():
    """A model whose passes are counted."""
    module = raw_hooks.random_gpt2(2, 4, 8, 60, 40)
    opened = hw.load(module)
    opened.module.passes = []
    opened.module.transformer.register_forward_pre_hook(lambda module, given: opened.module.passes.append(1))
    return opened


def named(name, **card):
    return replace(loss, card=replace(loss.card, name=name, **card))


def swept(name, values=(0, 1)):
    return Grid(lambda **axis: ZeroAblate(Head(0, 0)), **{name: values})


ONE = ZeroAblate(Head(0, 1))
REFUSED = {
    "two conditions that a file makes one": (
        lambda model: measure(model, TASK, {"a\0b": ONE, "a\0c": ONE}),
        r"the name of the condition 'a\x00b' has a NUL, at which files cut it: possible is any text without one",
    ),
    "an axis with a slash": (
        lambda model: measure(model, TASK, swept("a/b")),
        "the grid axis 'a/b' has a '/': possible are letters, digits, _ and, inside, most other signs",
    ),
    "an axis without a name": (lambda model: measure(model, TASK, swept("")), "the grid axis '' is empty"),
    "a control character": (lambda model: measure(model, TASK, swept("a\tb")), r"'a\tb' has a control character"),
    "a space at the end": (lambda model: measure(model, TASK, swept("a ")), "the grid axis 'a ' ends with a space"),
    "a label": (
        lambda model: measure(model, TASK, swept("way", ("a\0", "a"))),
        r"label of axis 'way' 'a\x00' has a NUL",
    ),
    "a number": (lambda model: measure(model, TASK, swept("at", (2**63, 1))), "a file holds numbers below 2**63"),
    "a coordinate": (
        lambda model: measure(model, TASK, swept("token_id")),
        "a grid axis cannot be called 'token_id': results use example, query, key, run",
    ),
    "a metric's name": (lambda model: measure(model, TASK, ONE, named("a/b")), "the metric 'a/b' has a '/'"),
    "a metric called like a dim": (
        lambda model: measure(model, TASK, ONE, named("position")),
        "a metric cannot be called 'position': results use baseline_position, condition, example, head, key, layer,",
    ),
    "a metric called like a coordinate": (
        lambda model: measure(model, TASK, ONE, named("token")),
        "a metric cannot be called 'token'",
    ),
    "a metric called like the baseline of another": (
        lambda model: measure(model, TASK, ONE, [loss, named("baseline_loss")]),
        "a metric cannot be called 'baseline_loss': results use baseline_baseline_loss, baseline_loss, condition",
    ),
    "a metric's units": (lambda model: measure(model, TASK, ONE, named("mine", units="n\0t")), "has a NUL"),
    "an axis called like a metric": (
        lambda model: measure(model, TASK, swept("loss")),
        "a grid axis cannot be called 'loss' here: a variable or dim of the result is",
    ),
    "a run": (
        lambda model: measure(model, Prompts(["1 2 3"], runs={"a\0b": ["1 2 4"]}), ONE),
        r"the name of the run 'a\x00b' has a NUL",
    ),
    "a run of a task of one's own": (
        lambda model: capture(model, Own(), Head(0, 0)),
        r"the run 'a\x00b' has a NUL",
    ),
    "a set": (
        lambda model: sets_against_controls(model, TASK, {"a\0b": [Head(0, 0)]}),
        r"the name of the set 'a\x00b' has a NUL",
    ),
}


class Own:
    """A task whose runs have names that no file can hold."""

    def draw(self, model):
        drawn = TASK.draw(model)
        return replace(drawn, runs=dict(drawn.runs) | {"a\0b": drawn.runs["clean"]})

    reference = draw


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_file_can_hold_is_refused_before_any_pass(model, case):
    run, message = REFUSED[case]
    with pytest.raises(DeclarationError) as raised:
        run(model)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert model.module.passes == []


def test_names_that_files_take_come_back(model, tmp_path):
    what = Grid(lambda **axis: ZeroAblate(Head(0, 0)), **{"a b": ("x/y", " é "), "日本": (0, 1)})
    metric = Metric(replace(loss.card, name="my.loss (é)"), "logits", loss.kernel, loss.prepare)
    path = tmp_path / "named.nc"
    found = measure(model, TASK, what, metric, out=path)
    with xr.open_dataset(path) as read:
        assert read["my.loss (é)"].dims == ("a b", "日本", "example")
        assert read["a b"].values.tolist() == ["x/y", " é "]
        np.testing.assert_array_equal(read["my.loss (é)"], found["my.loss (é)"])


def test_nul_in_a_token_is_shown_and_its_id_stays(model, tmp_path, monkeypatch):
    texts = {token: f"{token}\0a" if token % 2 else f"{token}\0b" for token in range(60)}
    monkeypatch.setattr(type(model), "token_text", lambda self, ids: [texts[int(token)] for token in ids])
    hw.write_netcdf(measure(model, TASK, ONE), tmp_path / "tokens.nc")
    read = hw.open_result(tmp_path / "tokens.nc", load=True)
    ids = TASK.draw(model).runs["clean"]
    np.testing.assert_array_equal(read["token_id"], ids)
    assert read["token"].values.tolist() == [[texts[token].replace("\0", "␀") for token in row] for row in ids.tolist()]
