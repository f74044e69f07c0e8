"""A folder as somebody hostile would pack it, given to every command in one process whose memory is bounded."""

import contextlib
import io
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import netCDF4
import numpy as np
import pytest

import headwise as hw
from headwise.interventions.base import memory
from headwise.studies import Results, open_result
from headwise.studies.catalogue.summary import summary
from headwise.studies.cli.main import main
from headwise.studies.report.report import write_report
from headwise.studies.storage import netcdf
from tests.support import hostile

LIMIT_SECONDS = 60
"""For one command on one file: much more than it takes, to notice what hangs."""
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Letters that steer a terminal, beside the end of a line and a tab."""
LINE = re.compile(r"(opening [^\n]*\n)?headwise: [^\n]+\n")
CHILD = """
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
except ImportError:
    pass
from tests.studies.catalogue import test_hostile
test_hostile.run_all(sys.argv[1])
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return hostile.build(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module", params=["some commands", pytest.param("every command", marks=pytest.mark.heavy)])
def ran(request, packed, tmp_path_factory):
    """What commands said of every file of the folder: all in one process, which lives until the end.

    Of those that draw and compute, each good file gets every one, and each other file one or every one.
    """
    before = packed.untouched()
    listed = tmp_path_factory.mktemp("said") / "calls.json"
    calls = [["results", "ls", str(packed.folder)], ["results", "ls", str(packed.folder), "--json"]]
    calls += [["results", "query", str(packed.folder), "loss"]]
    for number, name in enumerate(packed.files()):
        path = str(packed.folder / name)
        variable = packed.good.get(name, "loss")
        out = str(listed.with_name("out"))
        calls += [["results", "show", path], ["results", "query", path, variable]]
        more = [["results", "show", path, "--json"], ["plot", path, variable, "-o", f"{out}.html"]]
        more += [["report", path, "-o", f"{out}-report.html"], ["rerun", path]]
        few = request.param == "some commands" and name not in packed.good
        calls += [more[number % len(more)]] if few else more
    listed.write_text(json.dumps(calls))
    log = listed.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(listed)], stdout=file, stderr=subprocess.STDOUT, timeout=1500
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    assert packed.untouched() == before
    return [tuple(one) for one in json.loads(listed.with_suffix(".said").read_text())]


def run_all(path):
    """Run the calls that are listed in a file, and write down what each said: status, output, error and seconds."""
    found = []
    for call in json.loads(Path(path).read_text()):
        print(call, flush=True)
        out, err = io.StringIO(), io.StringIO()
        began = time.monotonic()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main(call)
        except BaseException as error:
            status = repr(error)
        found.append((call, status, out.getvalue(), err.getvalue(), time.monotonic() - began))
    Path(path).with_suffix(".said").write_text(json.dumps(found))


def test_every_command_ends_with_an_answer_or_a_line(ran, packed):
    wrong = []
    for call, status, _, err, seconds in ran:
        if status not in (0, 1) or "Traceback" in err or seconds > LIMIT_SECONDS:
            wrong.append((call, status, err[-300:], seconds))
        elif status == 1 and not LINE.fullmatch(err):
            wrong.append((call, status, err[-300:]))
    assert not wrong, f"{len(wrong)} of {len(ran)}: {wrong[:10]}"


def test_the_good_are_listed_with_every_bad_one_beside_its_reason(packed):
    results = Results(packed.folder)
    listed = {entry.path for entry in results}
    assert set(packed.good) <= listed
    assert listed - set(packed.good) <= {*hostile.ODD_BUT_LISTED, "whole.nc.parts"}
    problems = {one.path: one.reason for one in results.problems}
    assert set(packed.bad) == set(problems)
    assert all(problems.values())
    frame = results.frame
    assert len(frame) == len(results)
    assert frame.set_index("path").loc["below/good.nc", "step"] == 100
    assert len(results.select(where="date >= '2026-01-01' and size > 0", model="small")) >= len(packed.good) - 1
    again = Results(packed.folder)  # from the cache
    assert (again.entries, again.problems) == (results.entries, results.problems)


def test_good_results_beside_bad_ones_give_their_right_numbers(ran, packed):
    results = Results(packed.folder)
    for name, variable in packed.good.items():
        np.testing.assert_array_equal(
            hw.open_result(packed.folder / name, load=True)[variable].mean("example"), hostile.LOSS
        )
        values = open_result(packed.folder / name)[variable]
        np.testing.assert_array_equal(values.mean("example"), hostile.LOSS)
        frame = results.select(where=f"path == '{name}'").table(variable)
        np.testing.assert_array_equal(frame["value"], hostile.LOSS.ravel())
        np.testing.assert_array_equal(frame["effect"], hostile.LOSS.ravel() - 1.0)
    said = {tuple(call): (status, out) for call, status, out, *_ in ran}
    for name, variable in packed.good.items():
        path = str(packed.folder / name)
        for call in (["results", "show", path], ["results", "query", path, variable], ["report", path]):
            (status, out) = next(each for made, each in said.items() if [*made][: len(call)] == call)
            assert status == 0, call
        assert "4.5" in said["results", "query", path, variable][1]
        assert out.endswith("MB\n")


def test_nothing_that_steers_a_terminal_is_printed(ran):
    wrong = [
        (call, stream[max(0, found.start() - 40) : found.end() + 10])
        for call, _, *streams, _ in ran
        for stream in streams
        if (found := STEERS.search(stream))
    ]
    assert not wrong, f"{len(wrong)}: {wrong[:5]}"


def test_the_app_shows_what_is_good_and_says_why_it_does_not_show_the_rest(packed, caplog):
    pytest.importorskip("panel")
    from headwise.studies.app import text
    from headwise.studies.app.firing import Models
    from headwise.studies.app.folder import Folder
    from headwise.studies.app.selection import Selection
    from headwise.studies.app.session import Session

    folder = Folder(packed.folder)
    listed = folder.files()
    names = [one.name for one in listed if not one.reason]
    assert {*packed.good} <= {*names} <= {*packed.good, *hostile.ODD_BUT_LISTED}
    assert {*packed.bad} <= {one.name for one in listed if one.reason}
    assert not STEERS.search(text.files(listed, folder.name))
    said = {}
    for name in names:
        session = Session(folder, Models(None), Selection(result=name))
        session.roots()
        session.open(names)
        said[name] = session.grid_note.object
        shown = " ".join(str(one.object) for one in (session.grid_note, session.heading, session.facts))
        assert not STEERS.search(shown), name
        if name in packed.good:
            assert session.tree is not None
            assert session.head.options == [f"L{layer}H{head}" for layer in range(2) for head in range(2)], name
            assert "warn" not in said[name], name
    assert re.search("huge-variable.nc: the variable .* there is room for", said["huge-variable.nc"])
    assert not caplog.records


@pytest.mark.parametrize("name", ["linked.nc", "letters.nc"])
def test_a_foreign_folder_of_parts_is_left_alone(packed, name):
    from headwise.studies.storage.unfinished import keeping

    before = packed.untouched()
    own = {str(one): one.is_file() and one.read_bytes() for one in (packed.folder / "letters.nc.parts").rglob("*")}
    with contextlib.suppress(hw.errors.HeadwiseError), keeping(packed.folder / name, resume=False):
        pass
    assert packed.untouched() == before
    after = {str(one): one.is_file() and one.read_bytes() for one in (packed.folder / "letters.nc.parts").rglob("*")}
    assert {name: held for name, held in after.items() if name in own} == own


@pytest.mark.parametrize("name", ["huge-variable.nc", "huge-text.nc"])
def test_what_a_file_declares_is_checked_before_it_is_read(packed, name):
    path = packed.folder / name
    opened = open_result(path)
    assert opened["small"] == 3.0
    assert "small" in str(summary(path))
    few = opened["loss"][:2] if name == "huge-text.nc" else opened["loss"][:2, :3]
    assert few.load().shape == few.shape  # a selection is read as ever
    shape = r"layer 200000 x head 200000" if name == "huge-variable.nc" else r"row 10000000"
    for ask in (
        lambda: opened["loss"].load(),
        lambda: opened.load(),
        lambda: hw.open_result(path, load=True),
        lambda: summary(path) and Results(path.parent).select(where=f"path == '{name}'").table("loss"),
        lambda: Results(path.parent).select(where=f"path == '{name}'").combine(variable="loss"),
    ):
        said = rf"loss.*{shape}.* takes [\d,.]+ GiB, and there is room for [\d.]+ GiB|the table of loss, with 4\d+ rows"
        with pytest.raises(hw.errors.ResultError, match=said):
            ask()


def test_coordinates_are_checked_before_they_are_read(packed):
    with pytest.raises(
        hw.errors.ResultError, match=r"the variable layer \(layer 100000000000\) takes [\d,.]+ GiB, and"
    ):
        open_result(packed.folder / "huge-index.nc")


def test_what_is_small_in_the_file_and_large_in_memory_is_no_harm(packed):
    values = open_result(packed.folder / "zeros.nc")["loss"]
    assert (packed.folder / "zeros.nc").stat().st_size < 200_000
    assert values.nbytes == 32_000_000
    assert float(values.sum()) == 0.0


def test_a_damaged_chunk_is_told_when_it_is_asked_for(packed):
    opened = open_result(packed.folder / "corrupt.nc")
    np.testing.assert_array_equal(opened["baseline_loss"].mean("example"), [1.0, 5.0])
    with pytest.raises(hw.errors.ResultError, match=r"corrupt.nc cannot be read: NetCDF: HDF error"):
        opened["loss"].load()


def test_a_large_attribute_or_very_many_groups_are_refused(tmp_path, monkeypatch):
    import headwise.studies.storage.reading as reading_module

    monkeypatch.setattr(reading_module, "LONGEST", 10_000)
    hostile.measured(comment="x" * 10_001).to_netcdf(tmp_path / "long.nc")
    with pytest.raises(hw.errors.ResultError, match="its attribute comment has 10001 letters, possible are 10000"):
        open_result(tmp_path / "long.nc")
    monkeypatch.setattr(netcdf, "IMAGE", 0)  # as of a large file, which is not read as bytes
    with netCDF4.Dataset(tmp_path / "many.nc", "w") as file:
        for number in range(netcdf.MOST + 1):
            file.createGroup(f"g{number}")
    with pytest.raises(
        hw.errors.ResultError, match=r"many\.nc cannot be read: it holds more than 5000 groups and variables"
    ):
        open_result(tmp_path / "many.nc")


@pytest.mark.parametrize("kind", ["a measurement", pytest.param("a study", marks=pytest.mark.heavy)])
def test_odd_attributes_give_a_line_and_never_end_a_listing(tmp_path, kind):
    """A drawn sample of each attribute with each odd value; all of them were tried by hand."""
    variable, folder = ("loss", tmp_path / "odd") if kind == "a measurement" else ("ablation/loss", tmp_path / "odd")
    folder.mkdir()
    (hostile.measured() if kind == "a measurement" else hostile.studied()).to_netcdf(folder / "good.nc")
    pairs = [(name, odd) for name in hostile.SAID for odd in hostile.ODD]
    made = []
    for name, odd in [*random.Random(0).sample(pairs, 12), ("seconds", "text"), ("model", "several numbers")]:
        path = folder / f"{name} {odd}.nc".replace(",", "")
        if hostile.with_attribute(folder / "good.nc", path, name, hostile.ODD[odd]):
            made.append(path)
    results = Results(folder)
    assert len(results) + len(results.problems) == len({*made}) + 1
    assert "good.nc" in results
    assert len(results.frame) == len(results)
    assert len(results.select(where="size > 1 and date >= '2026-01-01' and step != 3")) > 5
    for shown in (repr(results), results._repr_html_(), *map(str, results.problems)):
        shown.encode()
    frame = results.table(variable, sort="-value")
    good = frame[frame["file"] == "good.nc"]
    np.testing.assert_array_equal(sorted(good["value"]), sorted(hostile.LOSS.ravel()))
    for dim in ("model", "seed", "step"):
        with pytest.raises(hw.errors.HeadwiseError):
            results.combine(dim, variable=variable)
    wrong = []
    for number, path in enumerate(made):
        said = [_said(summary, path), _said(lambda one: summary(one)._repr_html_(), path), _said(open_result, path)]
        said += [_said(lambda one: write_report(open_result(one), tmp_path / "report.html"), path)] * (number % 10 == 0)
        wrong += [one for one in said if "\n" in one]
    assert not wrong


def _said(question, path):
    """The error of a question to a file, one of ours; empty where there is an answer that can be shown."""
    try:
        str(question(path)).encode()
    except hw.errors.HeadwiseError as error:
        return str(error)
    return ""


def test_a_listing_goes_on_whatever_a_file_makes_of_it(tmp_path, monkeypatch):
    from headwise.studies.catalogue import index

    for name in ("a.nc", "b.nc", "c.nc"):
        hostile.measured().to_netcdf(tmp_path / name)
    look = index.row_of

    def fails(relative, *given, **more):
        if relative == "b.nc":
            raise RecursionError("too deep\nfor words")
        return look(relative, *given, **more)

    monkeypatch.setattr(index, "row_of", fails)
    results = Results(tmp_path)
    assert [one.path for one in results] == ["a.nc", "c.nc"]
    assert [str(one) for one in results.problems] == ["b.nc: it cannot be looked at: too deep for words"]


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("step", "9" * 5000, "its step has 5000 digits"),
        (
            "task",
            json.dumps(hostile.TASK | {"seed": 10**30}),
            "its seed is no whole number of at most 92233720",
        ),
        ("model", np.arange(3), "its attribute model is no text: [0, 1, 2]"),
        ("versions", '{"headwise": "\\ud800"}', "its attribute versions is no JSON"),
        ("created", "0001-01-01T00:00:00", "its attribute created is no date from 1970 on"),
        ("created", "9999-12-31T23:59:59-23:59", "its attribute created is no date from 1970 on"),
        ("study", hostile.DEEP, "its attribute study is no JSON"),
        ("study", '{"type": ["x"]}', "its attribute type of the study is no text: ['x']"),
    ],
)
def test_a_field_that_no_table_can_hold_is_a_problem_of_its_file(tmp_path, attribute, value, reason):
    hostile.measured().to_netcdf(tmp_path / "good.nc")
    assert hostile.with_attribute(tmp_path / "good.nc", tmp_path / "odd.nc", attribute, value)
    results = Results(tmp_path)
    assert [one.path for one in results] == ["good.nc"]
    assert results.problems[0].reason.startswith(reason)
    assert len(results.frame) == 1


def test_a_forged_cache_brings_nothing_into_the_listing(tmp_path):
    hostile.measured().to_netcdf(tmp_path / "good.nc")
    right = Results(tmp_path).entries
    cache = tmp_path / ".headwise-index.json"
    told = json.loads(cache.read_text())
    for field, value in (("seed", 10**30), ("model", ["x"]), ("date", "year 0"), ("model", "\ud800"), ("size", True)):
        forged = json.loads(json.dumps(told))
        forged["files"]["good.nc"]["row"][field] = value
        cache.write_text(json.dumps(forged))
        results = Results(tmp_path)
        assert results.entries == right, field
        assert len(results.frame) == 1


@pytest.mark.parametrize("command", ["plot", "report"])
def test_what_takes_more_to_draw_than_to_read_is_priced(tmp_path, monkeypatch, capsys, command):
    """8 kB on the disk, 0.9 GB as numbers, and much more as a picture."""
    path = tmp_path / "big.nc"
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("layer", 120_000)
        file.createDimension("head", 1000)
        file.createVariable("loss", "f8", ("layer", "head"), chunksizes=(1000, 1000), zlib=True)
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * 2**30)
    given = [str(path), "loss", "-o", str(tmp_path / "a.html")] if command == "plot" else [str(path)]
    assert main([command, *given]) == 1
    assert re.search(r"takes 10\.\d GiB, and there is room for 1\.5 GiB", capsys.readouterr().err)
