"""What a user meets first: imports that cost nothing, README's example, the wheel, the package's structure."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import headwise as hw

ROOT = Path(hw.__file__).parent


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


LIGHT = {
    "import headwise": "torch numpy xarray holoviews nnsight transformers",
    "import headwise as hw; dir(hw); hw.Grid, hw.Head, hw.ZeroAblate, hw.errors.ModelError, hw.shipped()": (
        "torch numpy xarray holoviews nnsight transformers"
    ),
    "from headwise.interventions import Grid, Head, ZeroAblate": "torch xarray holoviews nnsight",
    "import headwise as hw; hw.open_result, hw.Results, hw.table, hw.summary": "torch nnsight holoviews",
    "from headwise.studies import RepeatedTokens": "nnsight transformers holoviews",
    "import headwise as hw; hw.RepeatedTokens, hw.measure": "nnsight transformers holoviews",
    "from headwise.studies import measure, capture": "holoviews bokeh nnsight",
    "from headwise.studies import InductionStudy": "holoviews bokeh nnsight lightning",
}
"""Statements, and the packages that none of them imports, nor those before it."""


def test_imports_stay_lazy():
    """One after the other in one process: what one may not import, those before it may not either."""
    code = (
        "import json, sys\nfound = {}\n"
        "for statement, forbidden in json.loads(sys.argv[1]).items():\n    exec(statement)\n"
        "    found[statement] = [name for name in forbidden.split() if name in sys.modules]\n"
        "print(json.dumps(found))"
    )
    done = python(code, json.dumps(LIGHT))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {statement: [] for statement in LIGHT}


def test_help_imports_neither_torch_nor_holoviews():
    code = (
        "import sys\nfrom headwise.studies.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'holoviews', 'xarray', 'numpy') if name in sys.modules])"
    )
    done = python(code)
    assert done.stdout.strip().endswith("[]")
    assert "headwise induction --model openai-community/gpt2" in done.stdout


def test_every_public_name_resolves():
    for name in hw.__all__:
        assert getattr(hw, name) is not None
    assert re.fullmatch(r"\d+\.\d+\.\d+", hw.__version__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hw.nothing
    import headwise.studies as studies

    for name in studies.__all__:
        assert getattr(studies, name) is not None


def test_the_examples_of_cards_run(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    cards = [ROOT / "studies" / "training" / "code_card.md", *(ROOT / "models").glob("*/README.md")]
    for card in cards:
        (block,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
        space = {}
        exec(compile(block, str(card), "exec"), space)
        if "words-2l" in block:
            assert capsys.readouterr().out == "banana\n"
        else:
            said = eval(block.strip().splitlines()[-1], space)
            assert said["token"].values.ravel()[0] == " name"
    assert len(cards) == 3


def blocks():
    """The Python blocks of README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_example_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(compile(blocks()[0], "README.md", "exec"), space)
    assert space["ds"]["loss"].dims == ("layer", "head", "example")
    assert space["noised"]["logit_diff"].dims == ("component", "layer", "head", "example")
    assert space["noised"].attrs["direction"] == "noising"
    assert space["one"]["loss"].dims == ("condition", "example")
    (pattern,) = space["patterns"].data_vars.values()
    assert pattern.dims == ("example", "query", "key")
    assert (tmp_path / "ablation.nc").stat().st_size > 1000


def test_the_readme_measures_what_is_ones_own():
    space = {"hw": hw}
    exec(compile(blocks()[2], "README.md", "exec"), space)
    without = space["ds"]["loss"].sel(condition="without L1H2")
    np.testing.assert_array_equal(space["table"]["without L1H2"], without)
    assert (without > space["ds"]["loss"].sel(condition="as it is")).any()


def test_the_readme_looks_inside():
    space = {"hw": hw}
    exec(compile(blocks()[3], "README.md", "exec"), space)
    dla, inside, found = (space[name] for name in ("dla", "inside", "found"))
    np.testing.assert_allclose(dla["attribution"].sum("source"), dla["whole"], atol=1e-4)
    np.testing.assert_allclose(inside["attribution"].sum("source"), dla["attribution"].sel(source="L1.mlp"), atol=1e-4)
    near = found["L1H2_pattern"].isel(query=23, key=12).mean("example")
    assert near.sel(condition="clean") > 0.9 > 0.2 > near.sel(condition="without L0H3")
    assert found["logits_at_m1"].dims[:2] == ("condition", "example")
    assert space["top"]["token"].sel(condition="clean", rank=0).values.tolist() == ["banana"]
    assert float(space["ov"]["copying"]) == 1.0
    assert float(space["qk"]["prefix_matching"]) < 0.2 < 0.99 < float(space["k"]["prefix_matching"])


def test_the_readme_studies_real_text():
    space = {"hw": hw}
    block = blocks()[4].replace("n=32", "n=6, pairs=24").replace("n=256", "n=12")
    exec(compile(block, "README.md", "exec"), space)
    gains = space["found"]["gains"].to_dataset()
    assert float(gains["mean_low"].sel(gain="net_gain")) > 0.3
    assert str(space["named"]["called"].sel(layer=1, head=6).item()) == "induction"


def test_the_readme_finds_a_circuit():
    space = {"hw": hw}
    block = (
        blocks()[5]
        .replace("n=32, length=25", "n=4, length=8")
        .replace('"logit_diff").run', '"logit_diff", draws=1).run')
    )
    exec(compile(block, "README.md", "exec"), space)
    assert len(space["circuit"]) == 33
    kept = space["kept"]["logit_diff"].mean() / space["kept"]["baseline_logit_diff"].sel(run="clean").mean()
    assert 0.5 < float(kept) < 1
    assert {"curve", "circuit", "nodes", "inclusion"} <= {*space["study"].children}


def test_the_page_on_circuits_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "circuits.md").read_text()
    space = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        few = block.replace("n=32, length=25", "n=4, length=8")
        few = few.replace('"logit_diff").run', '"logit_diff", draws=1).run')
        exec(compile(few, "circuits.md", "exec"), space)
    assert space["circuit"] == hw.Circuit.top(space["edges"].mean("example"), n=33)
    assert (tmp_path / "circuit.html").is_file()
    assert {*space["study"].children} <= {*re.findall(r"^\| `(\w+)`", page, re.MULTILINE)} | {"numbers"}
    assert hw.from_json((tmp_path / "task.json").read_text()) == space["own"]
    last = {"by label": space["last"], "by number": hw.Circuit(space["circuit"], positions=[4])}
    by_label, by_number = hw.measure(space["model"], space["own"], last, "logit_diff")["logit_diff"].values
    np.testing.assert_array_equal(by_label, by_number)
    m = hw.measure(space["model"], space["task"], space["circuit"], "logit_diff")
    np.testing.assert_allclose(space["f"], hw.normalized(m, "logit_diff"), atol=1e-6)
    assert 0.5 < float(space["f"]) < 1


def test_the_script_that_looks_inside_runs_as_written():
    from headwise import Head, Neuron, ZeroAblate

    model, task = hw.load("words-2l"), hw.RepeatedTokens(n=8, length=12)
    top = hw.predict(model, ["apple banana cherry apple"], top=5)
    what = {"clean": None, "without L0H3": ZeroAblate(Head(0, 3))}
    without = hw.capture(model, task, [Head(1, 2).pattern], what=what)
    dla = hw.direct_logit_attribution(model, task)
    lens = hw.logit_lens(model, task, top=3)
    ov, qk = hw.head_circuits(model, Head(1, 2))
    one = hw.measure(model, task, ZeroAblate(Neuron(0, 17)), "loss")
    assert top["prob"].dims == top["token"].dims == top["logit"].dims == ("example", "rank")
    assert without["L1H2_pattern"].dims == ("condition", "example", "query", "key")
    assert dla["attribution"].dims == ("source", "example")
    heads = [f"L{layer}{part}" for layer in (0, 1) for part in (*(f"H{head}" for head in range(8)), ".mlp")]
    assert dla["source"].values.tolist() == ["embed", "pos_embed", *heads, "bias"]
    assert lens["token"].dims == ("layer", "example", "position", "rank")
    assert {"source_token", "output_token", "eigenvalue_real", "copying"} <= {*ov}
    assert "prefix_matching" in qk
    changed = one["loss"] - one["baseline_loss"].sel(run="clean")
    assert 0 < float(abs(changed).mean()) < 1  # a neuron does something, and little


def test_the_readme_explains_a_plan_as_it_is(monkeypatch, capsys):
    from headwise.interventions.run import memory

    monkeypatch.setattr(memory, "budget", lambda device: memory.DEFAULT_BUDGET)
    space = {}
    exec(compile(blocks()[1], "README.md", "exec"), space)
    assert set(space["ds"]["condition"].values) == {"steer", "half", "blind", "pattern", "path", "direct"}
    assert space["fast"]["logit_diff"].dims == ("layer", "position", "example")
    printed = capsys.readouterr().out.strip().splitlines()
    shown = re.search(r"```\n(words-2l: .*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1).splitlines()
    timed = [line.startswith("time ") for line in shown]
    assert timed == [line.startswith("time ") for line in printed]
    untimed = [[line for line, skip in zip(lines, timed, strict=True) if not skip] for lines in (printed, shown)]
    assert untimed[0] == untimed[1]


def test_the_readme_reads_a_study_back(tmp_path, monkeypatch, words_study):
    monkeypatch.chdir(tmp_path)
    hw.write_netcdf(words_study, "results/induction-words-2l.nc")
    block = blocks()[6]
    space = {}
    exec(compile(block, "README.md", "exec"), space)
    assert space["tree"]["heads"]["induction"].dims == ("layer", "head", "example")
    groups = re.search(r"# groups: ([a-z ]+)", block).group(1).split()
    assert set(groups) <= set(space["tree"].children)
    exec(compile(blocks()[7], "README.md", "exec"), space)
    (entry,) = space["results"]
    assert (entry.model, entry.study) == ("words-2l", "InductionStudy")
    table = space["results"].table("ablation/loss", where="effect > 0.5 and layer >= 1", sort="-effect", top=10)
    assert set(table["name"]) == {"L1H0", "L1H1", "L1H2"}
    assert table["effect"].is_monotonic_decreasing


@pytest.mark.filterwarnings("ignore")  # those of Lightning are not ours
@pytest.mark.parametrize("steps", [30, pytest.param(400, marks=pytest.mark.heavy)])
def test_the_readme_measures_while_a_model_is_trained(tmp_path, monkeypatch, steps):
    monkeypatch.chdir(tmp_path)
    space = {"hw": hw}
    exec(compile(blocks()[9].replace("400", str(steps)), "README.md", "exec"), space)
    formation, shipped = space["formation"], space["shipped"]
    assert formation["induction"].dims == ("step", "layer", "head", "example")
    assert formation["step"].values.tolist() == list(hw.log_spaced(steps, 12))
    assert shipped.sizes["step"] == 23
    best = shipped["induction"].mean("example").max(("layer", "head"))
    assert best.sel(step=0) < 0.2 < 0.9 < best.sel(step=2000)


def test_the_readme_writes_what_can_be_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(compile(blocks()[0], "README.md", "exec"), space)
    exec(compile(blocks()[8], "README.md", "exec"), space)
    wanted = space["ds"]["loss"]
    xr.testing.assert_equal(xr.load_dataset("results/heads.nc")["loss"], wanted)
    exec(compile(blocks()[10], "README.md", "exec"), space)
    xr.testing.assert_allclose(xr.load_dataset("results/many.nc")["loss"], wanted, atol=1e-6)


def test_the_wheel_holds_exactly_the_package_and_its_data(tmp_path):
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools puts what an earlier build left there too
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        f"headwise/{path.relative_to(ROOT)}"
        for path in [
            *ROOT.glob("*.py"),
            *(p for d in ("interventions", "metrics", "studies") for p in (ROOT / d).rglob("*.py")),
        ]
    }
    data = {f"headwise/{path.relative_to(ROOT)}" for path in (ROOT / "models").rglob("*") if path.is_file()}
    shipped = {"studies/training/code_card.md", "studies/dynamics/formation.nc", "py.typed"}
    assert names == sources | data | {f"headwise/{name}" for name in shipped}
