"""A websocket that is cut, late or never opened: what becomes of jobs is found all the same."""

import pickle

import pytest
from nnsight.schema.response import ResponseModel, Status

import headwise as hw
from headwise.errors import ServerError, ServerWarning
from headwise.interventions.remote import listener, patience
from headwise.metrics import loss
from headwise.studies import measure
from tests.support import remote_client
from tests.support.heavy import heavy_but_few
from tests.support.remote_sweeps import JOBS, TASK, listening, same, swept

LATE = ["QUEUED", "DISPATCHED"]


@pytest.mark.parametrize("late", LATE)
def test_a_late_status_after_the_end_is_not_heard(server, small_jobs, wanted, late):
    """Two processes of a server speak of a job, and the one that is late speaks last."""
    begun = len(server.lines("late"))
    server.fault("late", late, times=1 + JOBS)
    same(swept(), wanted)
    assert len(server.lines("late")) == begun + 1 + JOBS
    assert len(small_jobs()) == len(set(small_jobs())) == 1 + JOBS
    assert not listening()


@pytest.mark.parametrize(("late", "how"), heavy_but_few(LATE, ["refused", "kept"]))
def test_a_late_status_in_the_place_of_the_end(server, small_jobs, wanted, tmp_path, monkeypatch, caplog, late, how):
    """Where a job is asked for, its result cannot be had any more: it is sent again, aloud, and not waited for."""
    caplog.set_level("INFO", "headwise")
    monkeypatch.setattr(listener, "WITHOUT", set())
    if how == "refused":
        server.fault("subscribe", "403", times=9)
    begun = len(server.executed("passes"))
    there = hw.load("words-2l", remote=True)
    there.identity  # noqa: B018
    server.fault("late", late, skip=int(how == "kept"))  # where the first job asks which model the server has
    told = rf"job \w+ is lost \(it is said to be {late.lower()}, and a job that was sent after it has run\)"
    with pytest.warns(ServerWarning, match=told) as warned:
        same(remote_client.sweep(there, tmp_path / "out.nc" if how == "kept" else None), wanted)
    assert len(warned) == 1
    keys = server.executed("passes")[begun:]
    assert len(keys) == JOBS + 1
    assert len(set(keys)) == JOBS
    assert not listening()


@pytest.mark.parametrize("how", ["refused", "kept"])
def test_a_late_status_of_a_single_job(server, small_jobs, words_model, tmp_path, monkeypatch, caplog, how):
    """Nothing is sent after it, by which it could be told: something is."""
    caplog.set_level("INFO", "headwise")
    monkeypatch.setattr(listener, "WITHOUT", set())
    if how == "refused":
        server.fault("subscribe", "403", times=9)
    there = hw.load("words-2l", remote=True)
    there.identity  # noqa: B018
    begun = [len(server.executed(what)) for what in ("passes", "marker")]
    server.fault("late", "QUEUED", skip=int(how == "kept"))
    out = tmp_path / "one.nc" if how == "kept" else None
    with pytest.warns(ServerWarning, match="is said to be queued, and a job that was sent after it has run"):
        found = measure(there, TASK, None, [loss], out=out, check=False)
    same(found, measure(words_model, TASK, None, [loss]))
    assert [len(server.executed(what)) for what in ("passes", "marker")] == [begun[0] + 2, begun[1] + 1]
    assert "queued without news" in caplog.text
    assert not listening()


def test_a_job_that_waits_long_is_not_sent_again(server, small_jobs, wanted, tmp_path, monkeypatch):
    """Others are before it: what is sent after it does not run before it either."""
    monkeypatch.setattr(patience, "STILL", 0.3)
    monkeypatch.setattr(patience, "LOST", 0.3)
    there = hw.load("words-2l", remote=True)
    there.identity  # noqa: B018
    begun = len(server.executed("passes"))
    server.fault("execute", "delay", seconds=4.0)
    same(remote_client.sweep(there, tmp_path / "out.nc"), wanted)
    keys = server.executed("passes")[begun:]
    assert len(keys) == len(set(keys)) == JOBS


def test_a_status_that_stands_still_for_ever(server, monkeypatch, tmp_path):
    monkeypatch.setattr(patience, "STANDS", 1.0)
    there = hw.load("words-2l", remote=True)
    there.identity  # noqa: B018
    server.fault("execute", "delay", seconds=3.0)
    with pytest.raises(ServerError, match=r"has said nothing new of a job on words-2l for .*; what was sent to it"):
        measure(there, TASK, None, [loss], out=tmp_path / "out.nc")
    monkeypatch.setattr(patience, "STANDS", 60.0)
    same(measure(there, TASK, None, [loss], out=tmp_path / "out.nc"), measure(there, TASK, None, [loss]))


def test_a_websocket_that_is_cut(server, small_jobs, wanted):
    """What was to be heard on it is asked for, as long as a job may be unknown, and then sent again, aloud."""
    there = hw.load("words-2l", remote=True)
    there.identity  # noqa: B018
    begun = len(server.executed("passes"))
    server.fault("execute", "cut", seconds=0.3)
    told = r"is lost \(the connection that it was to answer on was cut\): it is sent again"
    with pytest.warns(ServerWarning, match=told):
        same(remote_client.sweep(there, None), wanted)
    assert len(set(server.executed("passes")[begun:])) == JOBS
    assert not listening()


def test_a_websocket_that_is_cut_does_nothing_to_jobs_that_are_kept(server, small_jobs, wanted, tmp_path):
    server.fault("execute", "cut", seconds=0.3, times=2)
    same(swept(tmp_path / "out.nc"), wanted)
    assert len(small_jobs()) == len(set(small_jobs())) == 1 + JOBS


@pytest.mark.parametrize("fault", [{"how": "403"}, {"how": "delay", "seconds": 3.0}])
def test_a_websocket_that_is_not_opened(server, small_jobs, wanted, monkeypatch, fault):
    monkeypatch.setattr(listener, "WITHOUT", set())
    monkeypatch.setattr(listener, "OPENING", 0.3)
    server.fault("subscribe", **fault)
    same(swept(), wanted)
    assert {server.host} == listener.WITHOUT, "it is tried once"
    assert len(small_jobs()) == len(set(small_jobs())) == 1 + JOBS


@pytest.mark.parametrize(
    ("at", "how"), [("received", "drop"), *heavy_but_few(["request", "received"], ["drop", "502"], often=[])]
)
def test_an_answer_that_is_lost_beside_a_websocket(server, small_jobs, wanted, at, how):
    server.fault(at, how, times=2)
    same(swept(), wanted)
    assert len(small_jobs()) == len(set(small_jobs())) == 1 + JOBS


def test_a_job_that_is_lost_beside_a_websocket(server, small_jobs, wanted):
    server.fault("execute", "lose")
    with pytest.warns(ServerWarning, match="it is sent again"):
        same(swept(), wanted)


def test_a_large_result_is_heard_of_and_fetched(server, small_jobs, wanted):
    server.fault("deliver", "by address", times=1 + JOBS)
    server.fault("result", "503", times=2)
    same(swept(), wanted)
    assert len(small_jobs()) == len(set(small_jobs())) == 1 + JOBS


def test_what_is_heard_is_read_as_plain_data(server, monkeypatch):
    class Shell:
        def __reduce__(self):
            return (print, ("run",))

    frame = ResponseModel(id="1", status=Status.COMPLETED, data=Shell()).pickle()
    with pytest.raises(pickle.UnpicklingError, match="which is not plain data"):
        listener._read(2, frame)
