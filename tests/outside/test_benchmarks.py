"""The benchmarks compare like with like: same numbers from each contender; the README changes between marks only."""

import json

import numpy as np
import pytest

from benchmarks.cases import CASES, make_job, sample
from benchmarks.contenders import CONTENDERS, REFERENCE, Contender
from benchmarks.race import TOLERANCE, operations, race
from benchmarks.table import CLOSE, OPEN, apart_from_identity, between_marks, tables, write_readme

ROWS = {"ablation": 16, "qkv": 48, "resid": 100, "neurons": 128, "edges": 310, "scores": 48}
INSTALLED = ["plain", "headwise", "hooks", "nnsight"]
BY_HOOKS = ["plain", "headwise", "hooks"]
"""Who does edges."""


@pytest.fixture(scope="module", params=CASES)
def job(request):
    return make_job(request.param, "words-2l", 2)


def test_same_numbers(job):
    found = race(job, INSTALLED, rounds=1, size=None)
    names = BY_HOOKS if job.case.name == "edges" else INSTALLED
    assert list(found["contenders"]) == names
    assert found["rows of the answer"] == ROWS[job.case.name]
    for name in names[1:]:
        assert found["contenders"][name]["largest difference"] <= TOLERANCE
    assert found["spread of the values"] > 100 * TOLERANCE  # far more than what is taken for rounding


def test_a_sample_gives_the_same_rows_as_the_whole(job):
    places = sample(job.places, 5)
    rows = [job.places.index(place) for place in places]
    assert rows == sorted(set(rows))
    assert len(rows) == 5
    for name in (BY_HOOKS if job.case.name == "edges" else INSTALLED)[1:]:
        run = CONTENDERS[name].ready(job)
        np.testing.assert_allclose(run(places), run(job.places)[rows], atol=1e-5)


def test_other_numbers_end_the_run_with_the_name(monkeypatch):
    job = make_job("scores", "words-2l", 2)
    right = CONTENDERS[REFERENCE].ready(job)
    monkeypatch.setattr(
        "benchmarks.plain.prepare_wrong", lambda job: lambda places: right(places) + 0.01, raising=False
    )
    monkeypatch.setitem(CONTENDERS, "wrong", Contender("wrong", "Wrong", "plain", "torch", "prepare_wrong"))
    with pytest.raises(SystemExit, match=r"wrong does not give the same numbers as torch hooks: they differ by 0\.01"):
        race(job, [*INSTALLED, "wrong"], rounds=1, size=None)


def test_who_cannot_take_part_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "absent", Contender("absent", "Absent", "absent", "no_such_package"))
    found = race(make_job("scores", "words-2l", 2), [*INSTALLED, "absent"], rounds=1, size=None)
    assert found["left out"] == {"absent": "no_such_package is not installed"}


def test_operations_of_a_plain_pass_are_those_of_its_matrices():
    job = make_job("scores", "words-2l", 2)
    positions = job.clean.numel()
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 857  # two layers of attention and MLP, and the logits
    attention = 2 * 2 * (8 * 50 * 50 * 8) * len(job.clean)  # scores and their sum of values, in two layers
    assert operations(job, "plain") == 2 * (positions * weights + attention)


def test_the_cost_of_telling_models_apart_is_given_in_plain_passes():
    found = race(make_job("scores", "words-2l", 2), INSTALLED, rounds=3, size=None)
    plain, whole = (found["contenders"][name]["median seconds"] for name in ("plain", "headwise"))
    telling = found["identity"]["median seconds"]
    assert 0 < telling < whole
    apart = apart_from_identity(found)
    assert apart == pytest.approx(((whole - telling) / plain, telling / plain))
    results = {"machine": "", "threads": 1, "versions": {}, "races": [found]}
    assert f"| {apart[0]:.2f} (+ {apart[1]:.2f}) |" in tables(results)


def test_the_readme_changes_between_the_marks_only(tmp_path):
    found = race(make_job("scores", "words-2l", 2), INSTALLED, rounds=1, size=None)
    found["contenders"]["headwise"]["peak MiB"] = 12.3
    results = {"machine": "2 CPU cores", "threads": 1, "versions": {"torch": "2"}, "tolerance": 1e-4, "races": [found]}
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{OPEN}\nold\n{CLOSE}\nafter\n")
    write_readme(readme, json.loads(json.dumps(results)))
    before, _, rest = readme.read_text().partition(OPEN)
    written, _, after = rest.partition(CLOSE)
    assert (before, after) == ("before\n", "\nafter\n")
    assert "old" not in written
    assert written.strip() == tables(results)
    assert "| words-2l | 2 |" in written
    assert "| 12 |" in written
    assert between_marks(readme.read_text(), tables(results)) == readme.read_text()
    with pytest.raises(SystemExit, match="README lacks"):
        between_marks("no marks", "new")
