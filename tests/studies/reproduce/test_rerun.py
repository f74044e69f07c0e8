"""rerun: the same numbers again, and what it says where they are not, or where nothing can be repeated."""

import io
import json
import re
import sys

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import DeclarationError, HeadwiseError, ModelError, ResultError
from headwise.interventions import Add, Grid, Head, Layer, MeanAblate, Patch, ResampleAblate, ZeroAblate
from headwise.interventions.declare import codec
from headwise.metrics import Card, Metric, accuracy, induction, kl, logit_diff, loss, self_attention
from headwise.studies import InductionStudy, Prompts, RepeatedTokens, capture, compare_estimates, measure
from headwise.studies.analyses.ablation import sets_against_controls
from headwise.studies.analyses.composition import composition_scores
from headwise.studies.cli.main import main
from headwise.studies.report.report import write_report
from headwise.studies.reproduce.agreement import compare
from headwise.studies.reproduce.rerun import rerun
from tests.oracles.planted import planted_model

TASK = RepeatedTokens(n=3, length=6)
TEXT = Prompts(
    ["apple banana cherry apple", "red green red"],
    answers=["banana", "green"],
    distractors=["cherry", "blue"],
    corrupted=["cherry banana apple cherry", "blue green blue"],
)


def every_head(model, make):
    return Grid(lambda layer, head: make(Head(layer, head)), layer=model.layers, head=model.heads)


def qkv(model):
    return Grid(lambda component, head: Patch(Head(1, head).site(component)), component=["q", "v"], head=model.heads)


MEASURED = {
    "baseline": lambda model: measure(model, TASK, None, [loss, induction]),
    "one": lambda model: measure(model, TASK, ZeroAblate(Head(0, 3)), [kl, self_attention]),
    "names": lambda model: measure(
        model, TASK, {"a": MeanAblate(Head(0, 3)), "b": Add(Layer(1).resid_pre.at(-1), [0.1] * 64)}, [loss, accuracy]
    ),
    "heads": lambda model: measure(model, TASK, every_head(model, ResampleAblate), [loss], per_position=True),
    "qkv": lambda model: measure(model, TASK, qkv(model), [logit_diff], base="corrupted"),
    "positions": lambda model: measure(
        model, TASK, Grid(lambda position: Patch(Layer(1).resid_pre.at(position)), position=range(12)), [logit_diff]
    ),
    "integrated": lambda model: measure(
        model, TASK, every_head(model, ZeroAblate), [loss], estimator="integrated", steps=3
    ),
    "gradient": lambda model: measure(model, TASK, every_head(model, ZeroAblate), [loss], estimator="gradient"),
    "text": lambda model: measure(model, TEXT, every_head(model, ZeroAblate), [loss, logit_diff]),
    "captured": lambda model: capture(model, TASK, [Head(1, 2).pattern, Layer(0).mlp_out], run="corrupted"),
    "estimates": lambda model: compare_estimates(model, TASK, every_head(model, ZeroAblate), loss, steps=2),
}


@pytest.fixture(scope="module")
def files(words_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    return {name: hw.write_netcdf(make(words_model), folder / f"{name}.nc") for name, make in MEASURED.items()}


def changed(path, target, change):
    """A copy of a file, changed."""
    tree = hw.open_result(path, load=True)
    change(tree)
    return hw.write_netcdf(tree, target)


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_is_measured_again(files, name):
    found = rerun(files[name])
    stored = hw.open_result(files[name], load=True)
    assert found.agrees, str(found)
    numeric = [str(key) for key, one in stored.variables.items() if one.dtype.kind in "biuf"]
    assert set(found.differences) == set(numeric)
    assert found.largest <= 1e-6
    assert found.only_in_one == {}
    assert found.notes == ()


def test_a_study_is_done_again(words_model, tmp_path):
    study = InductionStudy(n=4, length=8, draws=3, threshold=0.3)
    path = hw.write_netcdf(study.run(words_model), tmp_path / "study.nc")
    said = []
    found = rerun(path, progress=said.append)
    assert found.agrees, str(found)
    assert found.largest <= 1e-6
    assert {"heads/induction", "sets/p_accuracy", "estimates/patching/estimate", "ablation/loss"} <= {
        *found.differences
    }
    assert found.notes == ()
    assert said[0] == "opening words-2l"
    assert "every head ablated" in said


def test_one_changed_number_is_named_with_its_size_and_place(files, tmp_path):
    def change(tree):
        tree["loss"].values[1, 2, 0, 8] += 0.25

    found = rerun(changed(files["heads"], tmp_path / "changed.nc", change))
    assert not found.agrees
    assert list(found.beyond) == ["loss"]
    assert found.differences["loss"] == pytest.approx(0.25)
    assert {size for name, size in found.differences.items() if name != "loss"} == {0.0}
    assert "1 of 576 values differ, by 0.25 at most (at layer 1, head 2, example 0, position 8)" in str(found)
    assert "does not agree" in str(found)
    assert rerun(tmp_path / "changed.nc", tolerance=0.3).agrees


def test_it_is_ready_for_json(files, tmp_path):
    def change(tree):
        tree["baseline_loss"].values[0, 0] = np.nan

    told = json.loads(
        json.dumps(rerun(changed(files["baseline"], tmp_path / "a.nc", change)).to_dict(), allow_nan=False)
    )
    assert told["agrees"] is False
    assert told["beyond"].keys() == {"baseline_loss"}
    assert told["tolerance"] == 1e-6
    assert told["differences"]["baseline_induction"] == 0


def test_text_shapes_missing_values_and_missing_variables_count():
    old = xr.Dataset(
        {
            "same": ("x", [1.0, np.nan, np.inf]),
            "text": ("x", ["a", "b", "c"]),
            "gap": ("x", [1.0, np.nan, 2.0]),
            "shape": ("x", [1.0, 2.0, 3.0]),
            "turned": (("x", "y"), np.arange(6.0).reshape(3, 2)),
            "large": ("x", [1e6, 1.0, 0.0]),
            "gone": ("x", [0, 1, 2]),
        },
        coords={"x": [0, 1, 2]},
    )
    new = old.drop_vars(["gone", "shape"]).assign(
        text=("x", ["a", "d", "e"]),
        gap=("x", [1.0, 5.0, 2.0]),
        shape=("z", [1.0, 2.0]),
        turned=old["turned"].T,
        large=("x", [1e6 + 0.5, 1.0, 0.0]),
        more=("x", [0.0, 0.0, 0.0]),
    )
    trees = [xr.DataTree.from_dict({"/": xr.Dataset(), "/part": one}) for one in (old, new)]
    found = compare(*trees, "old.nc")
    assert found.beyond == {
        "part/text": "2 of 3 texts differ (at x 1): 'd' instead of 'b'",
        "part/gap": "1 of 3 values are missing or infinite in one only (at x 1): 5 instead of nan",
        "part/shape": "has (z 2) instead of (x 3)",
    }
    assert found.only_in_one == {"part/gone": "the file", "part/more": "the repetition"}
    assert found.differences == {"part/x": 0.0, "part/same": 0.0, "part/turned": 0.0, "part/large": 0.5}
    assert compare(*trees, tolerance=1e-7).beyond.keys() == {"part/text", "part/gap", "part/shape", "part/large"}
    assert "only in the file: part/gone" in str(found)


def own(words):
    """A measurement's attributes, changed."""

    def change(tree):
        for name, value in words.items():
            if value is None:
                del tree.attrs[name]
            else:
                tree.attrs[name] = value

    return change


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"schema_version": "99"}, ResultError, r"newer headwise \(schema 99; this one reads up to 1\)"),
        ({"schema_version": None, "dtype": None}, ResultError, r"has no attribute schema_version and dtype"),
        ({"task": None}, ResultError, r"no attribute task of a measurement"),
        ({"metrics": '["loss", "mine"]'}, ResultError, r"the metric mine is one of your own.*accuracy"),
        ({"task": '{"repr": "MyTask(3)"}'}, ResultError, r"its task is one of your own, MyTask\(3\)"),
        ({"interventions": '{"type": "Mine"}'}, ResultError, r"unknown type 'Mine'"),
        ({"interventions": "{"}, ResultError, r"not JSON"),
        ({"metrics": "{"}, ResultError, r"not JSON"),
        ({"metrics": "3"}, ResultError, r"what it declares cannot be read"),
        ({"interventions": '{"type": "mapping"}'}, ResultError, r"what it declares cannot be read"),
        ({"task": "[1]"}, ResultError, r"its task is no task"),
        ({"interventions": "7"}, ResultError, r"cannot measure 7"),
        ({"study": '{"type": "MyStudy"}'}, ResultError, r"unknown type 'MyStudy' in JSON: possible are InductionStudy"),
        ({"estimator": "guess"}, ResultError, r"its estimator 'guess' is not known"),
        ({"metrics": '["accuracy"]'}, ResultError, r"has no baseline_accuracy"),
        (
            {"weight_hash": "0123"},
            ModelError,
            r"words-2l is not the model of the file: weights 0123 then, [0-9a-f]{16} now",
        ),
        ({"tokenizer_hash": "0123"}, ModelError, r"words-2l is not the model of the file: tokenizer 0123 then"),
        ({"model": "words-9l"}, ModelError, r"no model is called 'words-9l'"),
        ({"model_revision": "memory"}, ResultError, r"a module in memory, words-2l: give it as rerun"),
        ({"model_revision": "local", "model": "../elsewhere"}, ResultError, r"measured on the folder \.\./elsewhere"),
    ],
)
def test_what_cannot_be_repeated_is_said(files, tmp_path, words, error, message):
    path = changed(files["baseline"], tmp_path / "changed.nc", own(words))
    with pytest.raises(error, match=message) as told:
        rerun(path)
    assert "\n" not in str(told.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ResultError, match="there is no file"):
        rerun(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("hello")
    with pytest.raises(ResultError, match="no NetCDF file"):
        rerun(tmp_path / "text.nc")
    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(tmp_path / "foreign.nc")
    with pytest.raises(ResultError, match="has no attribute schema_version"):
        rerun(tmp_path / "foreign.nc")
    with pytest.raises(ResultError, match="tolerance=nan"):
        rerun(tmp_path / "foreign.nc", tolerance=float("nan"))


def test_a_metric_of_ones_own_is_named(words_model, tmp_path):
    mine = Metric(Card("mine", "my metric", "1", (0.0, 1.0)), "logits", loss.kernel, loss.prepare)
    path = hw.write_netcdf(measure(words_model, TASK, None, [loss, mine]), tmp_path / "mine.nc")
    with pytest.raises(ResultError, match="the metric mine is one of your own"):
        rerun(path)


def test_a_model_in_memory_is_given_and_other_weights_are_noted(tmp_path):
    model = hw.load(planted_model())
    path = hw.write_netcdf(measure(model, TASK, every_head(model, ZeroAblate), [loss]), tmp_path / "planted.nc")
    assert rerun(path, model=model).agrees
    other = planted_model()
    other.lm_head.weight.data.mul_(1.5)
    found = rerun(path, model=hw.load(other))
    assert not found.agrees
    assert re.search("another model: weights [0-9a-f]{16} then, [0-9a-f]{16} now", found.notes[0])
    assert found.differences["loss"] > 1e-3


def test_a_folder_beside_the_file_is_found_and_asked_for(words_model, tmp_path, monkeypatch):
    words_model.module.save_pretrained(tmp_path / "mine")
    words_model.tokenizer.save_pretrained(tmp_path / "mine")
    model = hw.load(tmp_path / "mine")
    path = hw.write_netcdf(measure(model, TASK, None, [loss]), tmp_path / "mine.nc")
    with pytest.raises(ResultError, match=rf"asks to open the model in the folder {tmp_path}/mine: .*yes=True"):
        rerun(path)
    asked = []
    assert rerun(path, yes=lambda text: asked.append(text) or True).agrees
    assert asked == [f"{path} asks to open the model in the folder {tmp_path}/mine"]
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "mine.nc")
    with pytest.raises(ResultError, match="files do not keep where folders are"):
        rerun(moved, yes=True)
    assert rerun(moved, model=tmp_path / "mine").agrees
    assert main(["rerun", str(moved), "--model", str(tmp_path / "mine")]) == 0
    monkeypatch.chdir(tmp_path)
    assert rerun(moved, yes=True).agrees
    assert main(["rerun", str(moved)]) == 1
    assert main(["rerun", str(moved), "--yes"]) == 0


def test_other_versions_are_noted(files, tmp_path):
    def change(tree):
        versions = json.loads(tree.attrs["versions"]) | {"torch": "1.0"}
        tree.attrs |= {"versions": json.dumps(versions), "device": "cuda:0"}

    found = rerun(changed(files["baseline"], tmp_path / "old.nc", change))
    assert found.agrees
    assert found.notes[0].startswith("torch: 1.0 then, ")
    assert found.notes[1] == "device: cuda:0 then, cpu now"
    assert "note: torch: 1.0 then" in str(found)


CONTRADICTIONS = [
    ({"n": 10**9}, r"n, the number of prompts, must be at most 1000000, got 1000000000"),
    ({"n": 10**6}, r"asks for 1000000 prompts and holds 3: it contradicts itself"),
    ({"n": 4}, r"asks for 4 prompts and holds 3"),
    ({"length": 10**9}, r"the half length, must be at most 1000000, got 1000000000"),
    ({"seed": 10**9 * 5}, r"a seed must be at most 4294967295"),
    ({"n": int("9" * 4000)}, r"n, the number of prompts, must be at most 1000000"),
]


@pytest.mark.parametrize(("more", "message"), CONTRADICTIONS)
@pytest.mark.parametrize("name", ["baseline", "captured"])
def test_a_file_that_asks_for_more_than_it_holds_is_refused_before_anything(
    files, tmp_path, monkeypatch, name, more, message
):
    """Before a model is opened, and before a prompt is drawn."""
    from headwise.interventions import load

    def change(tree):
        tree.attrs["task"] = json.dumps(json.loads(tree.attrs["task"]) | more)

    path = changed(files[name], tmp_path / "large.nc", change)
    for place, what in ((load, "load"), (RepeatedTokens, "draw")):
        monkeypatch.setattr(place, what, lambda *given, **more: pytest.fail("it was opened, or drawn"))
    with pytest.raises(ResultError, match=message) as told:
        rerun(path)
    assert "\n" not in str(told.value)


def test_a_study_that_asks_for_more_than_it_holds_is_refused(words_model, tmp_path):
    path = hw.write_netcdf(InductionStudy(n=4, length=8, draws=3).run(words_model), tmp_path / "study.nc")
    wrong = {
        "n": (32, "asks for 32 prompts and holds 4"),
        "length": (25, "asks for 50 tokens in each prompt and holds 16"),
        "untrained": (40, "asks for 40 untrained models and holds 20"),
        "draws": (10**9, "draws must be at most 100000"),
    }
    for name, (value, message) in wrong.items():

        def change(tree, name=name, value=value):
            tree.attrs["study"] = json.dumps(json.loads(tree.attrs["study"]) | {name: value})

        with pytest.raises(ResultError, match=message):
            rerun(changed(path, tmp_path / "large.nc", change))

    def long(tree):
        tree.attrs["study"] = json.dumps(json.loads(tree.attrs["study"]) | {"draws": 10**5})

    asked = []
    with pytest.raises(
        ResultError, match=r"up to \d\.\de\+\d+ floating-point operations: .*rerun\(..., yes=True\) or --yes"
    ):
        rerun(changed(path, tmp_path / "long.nc", long), yes=asked.append)
    assert re.search(r"long.nc asks for 4 prompts times 120\d\d\d\d conditions on words-2l", asked[0])


def test_steps_are_bounded(files, tmp_path):
    path = changed(files["integrated"], tmp_path / "a.nc", own({"estimator": "integrated, 1000000000 steps"}))
    with pytest.raises(ResultError, match=r"its estimator 'integrated, 1000000000 steps' is not known"):
        rerun(path)
    path = changed(files["integrated"], tmp_path / "b.nc", own({"estimator": "integrated, 100000000 steps"}))
    with pytest.raises(ResultError, match=r"steps, of the integrated estimate, must be at most 10000"):
        rerun(path)
    path = changed(files["estimates"], tmp_path / "c.nc", own({"steps": 10**9}))
    with pytest.raises(ResultError, match=r"steps, of the integrated estimate, must be at most 10000"):
        rerun(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: RepeatedTokens(n=10**9),
        lambda model: RepeatedTokens(length=10**9).draw(model),
        lambda model: RepeatedTokens(seed=10**10),
        lambda model: RepeatedTokens(tokens=(0, 10**9)).draw(model),
        lambda model: InductionStudy(n=10**9),
        lambda model: InductionStudy(length=10**9).run(model),
        lambda model: InductionStudy(draws=10**9),
        lambda model: InductionStudy(untrained=10**9),
        lambda model: measure(model, TASK, ZeroAblate(Head(0, 0)), loss, estimator="integrated", steps=10**9),
        lambda model: compare_estimates(model, TASK, ZeroAblate(Head(0, 0)), loss, steps=10**9),
        lambda model: composition_scores(model, draws=10**9),
        lambda model: sets_against_controls(model, TASK, {"one": [Head(0, 0)]}, draws=10**9),
    ],
)
def test_what_nobody_can_compute_is_refused_at_once(words_model, make):
    with pytest.raises(HeadwiseError, match=r"must be at most|length can be 2 to|has the token ids|10000000"):
        make(words_model)


def test_prompts_that_do_not_fit_in_memory_are_refused(words_model, monkeypatch):
    from headwise.interventions.base import memory

    monkeypatch.setattr(memory, "free_memory", lambda: 10**9)
    told = r"n=1000000 prompts of 50 tokens takes 4\.7 GiB, and there is room for 0\.9 GiB at once: take fewer"
    with pytest.raises(DeclarationError, match=told):
        RepeatedTokens(n=10**6).draw(words_model)


@pytest.mark.parametrize(
    "name",
    [
        "/etc",
        "~/models",
        "../../etc",
        "..",
        ".",
        "\\\\server\\share\\model",
        "C:\\model",
        "a/b/c",
        "a/../b",
        "",
        "\x1b[2J",
    ],
)
def test_a_path_in_a_file_is_never_followed(files, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "in").mkdir()
    path = changed(files["baseline"], tmp_path / "in" / "a.nc", own({"model": name, "model_revision": "main"}))
    with pytest.raises(ResultError, match=r"names the model .*, which is no shipped one and no Hub id"):
        rerun(path, yes=True)
    local = changed(files["baseline"], tmp_path / "in" / "b.nc", own({"model": name, "model_revision": "local"}))
    with pytest.raises(ResultError, match="files do not keep where folders are"):
        rerun(local, yes=True)


def test_a_revision_that_is_a_path_is_refused(files, tmp_path):
    path = changed(
        files["baseline"], tmp_path / "a.nc", own({"model": "owner/name", "model_revision": "../../../etc/passwd"})
    )
    with pytest.raises(ResultError, match=r"names the revision '\.\./\.\./\.\./etc/passwd', which no model has"):
        rerun(path, yes=True)


def test_a_hub_id_that_is_a_folder_here_is_asked_for(files, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    path = changed(files["baseline"], tmp_path / "a.nc", own({"model": "owner/name", "model_revision": "main"}))
    with pytest.raises(ResultError, match=rf"asks to open the model in the folder {tmp_path}/owner/name: .*--yes"):
        rerun(path)
    with pytest.raises(ModelError, match="owner/name"):  # agreed to, it is opened, and is no model
        rerun(path, yes=True)


def test_a_run_on_a_server_is_asked_for(files, tmp_path, monkeypatch, capsys):
    from headwise.interventions import load

    opened = []

    def opening(name, **options):
        opened.append((name, options))
        raise ModelError("stopped here")

    monkeypatch.setattr(load, "load", opening)
    path = changed(files["baseline"], tmp_path / "a.nc", own({"executed": "https://evil.example"}))
    with pytest.raises(ResultError, match=r"asks to run on the server that is set here, with your key, .* 'https"):
        rerun(path)
    with pytest.raises(ResultError, match="that is done only where you agree"):
        rerun(path, model="words-2l", yes=lambda text: False)
    assert main(["rerun", str(path)]) == 1
    assert "asks to run on the server that is set here" in capsys.readouterr().err
    assert opened == []
    with pytest.raises(ModelError, match="stopped here"):
        rerun(path, yes=True)
    assert main(["rerun", str(path), "--yes"]) == 1
    assert [options["remote"] for _, options in opened] == [True, True]


def test_at_a_terminal_it_is_asked(files, tmp_path, monkeypatch, capsys):
    from headwise.interventions import load

    def opening(name, **options):
        raise ModelError("stopped here")

    monkeypatch.setattr(load, "load", opening)
    path = changed(files["baseline"], tmp_path / "a.nc", own({"executed": "ndif"}))
    for answer, said in (("y\n", "stopped here"), ("\n", "nothing was run"), ("", "nothing was run")):
        keys, screen = io.StringIO(answer), io.StringIO()
        keys.isatty = screen.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", keys)
        monkeypatch.setattr(sys, "stderr", screen)
        assert main(["rerun", str(path)]) == 1
        assert "with your key, as it ran on 'ndif'.\nDo it? [y/N]" in screen.getvalue()
        assert said in screen.getvalue()


DEEP = "[" * 100_000 + "]" * 100_000
HALF = '"\\ud800"'
TEXTS = {"deep": DEEP, "half": HALF}
ATTRIBUTES = (
    "task",
    "interventions",
    "metrics",
    "versions",
    "configuration",
    "fingerprint",
    "conclusion",
    "model_shape",
)
ATTRIBUTES += ("float32_deviation", "seconds_by_stage", "study", "heads", "estimators", "sites")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_whatever_json_a_file_holds_rerun_and_report_come_to_an_end(files, tmp_path, capsys, name, text):
    path = changed(files["baseline"], tmp_path / "a.nc", own({name: TEXTS[text]}))
    told = ""
    try:
        assert rerun(path).agrees
    except HeadwiseError as error:
        told = str(error)
    assert "\n" not in told
    assert len(told) < 1000
    assert main(["report", str(path), "--out", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "words-2l" in page
    assert "Traceback" not in capsys.readouterr().err


def test_half_of_a_character_in_a_report(files, tmp_path):
    """Of a result in memory: what a file holds is decoded when it is read."""
    tree = hw.open_result(files["baseline"], load=True)
    tree.attrs |= {"title": "half \ud800 of one", "model": "words\udc80"}
    page = write_report(tree, tmp_path / "a.html").read_text(encoding="utf-8")
    assert "half " in page


def test_json_of_a_file_is_read_with_bounds():
    assert codec.read_json(json.dumps({"a": [1, "\U0001f600", "\\ud800"]})) == {"a": [1, "\U0001f600", "\\ud800"]}
    assert codec.read_json("[" * 100 + "]" * 100) is not None
    for text, message in (
        ("[" * 101 + "]" * 101, "more than 100 lists and objects within each other"),
        (DEEP, "more than 100 lists and objects within each other"),
        (HALF, "half of a character"),
        ('{"\\udc00": 1}', "half of a character"),
        ('["\ud800"]', "half of a character"),
        ("9" * 5000, "this is not JSON"),
        ("{", "this is not JSON"),
        (None, "this is not JSON but NoneType"),
        (b"[]", "this is not JSON but bytes"),
    ):
        with pytest.raises(DeclarationError, match=message):
            codec.read_json(text)


@pytest.mark.parametrize("revision", ["main", "local", "memory"])
def test_a_long_name_of_a_model_is_no_name(files, tmp_path, revision):
    def change(tree):
        tree.attrs |= {"model": "m" * 5000, "model_revision": revision}

    path = changed(files["captured"], tmp_path / "long.nc", change)
    with pytest.raises(ResultError) as caught:
        rerun(path, yes=True)
    assert len(str(caught.value)) < 600
