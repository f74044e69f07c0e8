"""Faults of a server that pass: jobs are asked for again, sent again or made smaller, and none runs twice."""

import signal
import threading
import time

import pytest

import headwise as hw
from headwise.errors import ServerError, ServerWarning
from headwise.interventions.remote import patience, protocol
from headwise.interventions.remote.job import JobState, RemoteJob
from headwise.interventions.remote.patience import Patience
from headwise.studies.output.progress import Stopped
from headwise.studies.storage.unfinished import keeping
from tests.support import remote_client
from tests.support.heavy import heavy_but_few
from tests.support.remote_sweeps import JOBS, client, listening, same, swept, wait_for

PASSES = {
    "request": ("drop", "500", "503", "429", "delay"),
    "received": ("drop", "502", "500"),
    "response": ("drop", "500", "503", "delay"),
    "result": ("drop", "503"),
    "execute": ("delay",),
}
OFTEN = [
    ("request", "429"),
    ("received", "502"),
    ("response", "500"),
    ("result", "drop"),
    ("execute", "delay"),
    ("request", "503"),
]


@pytest.mark.parametrize(
    ("at", "how"),
    [
        param
        for at, hows in PASSES.items()
        for param in heavy_but_few([at], hows, often=[one for one in OFTEN if one[0] == at])
    ],
)
def test_what_passes_is_survived(server, small_jobs, wanted, tmp_path, at, how):
    server.fault(at, how, times=2, seconds=0.3)
    same(swept(tmp_path / "out.nc"), wanted)
    keys = small_jobs()
    assert len(keys) == len(set(keys)) == 1 + JOBS
    assert not (tmp_path / "out.nc.parts").exists()


@pytest.mark.heavy
def test_waiting_ends_when_it_is_asked_to(server, small_jobs, wanted, tmp_path):
    """Ctrl-C while jobs wait at the server: they go on there, and the same call fetches them."""
    out = tmp_path / "out.nc"
    server.fault("execute", "delay", times=1 + JOBS, seconds=0.7)
    process = client(server, out)
    wait_for(lambda: len(small_jobs()) >= 2)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=20)[0]
    assert "Stopped: stopped" in told
    assert list((tmp_path / "out.nc.parts").glob("*.job"))
    same(swept(out), wanted)
    assert len(small_jobs()) == len(set(small_jobs())) == 2 + JOBS, "each call asks which model the server has"


@pytest.mark.heavy
def test_listening_ends_when_it_is_asked_to(server, small_jobs):
    server.fault("execute", "delay", times=1 + JOBS, seconds=0.7)
    process = client(server, "")
    wait_for(lambda: len(small_jobs()) >= 2)
    time.sleep(0.3)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "Stopped: stopped" in process.communicate(timeout=20)[0]
    assert time.monotonic() - begun < 10


def test_a_call_that_fails_leaves_no_thread(server, small_jobs):
    server.fault("execute", "error", detail="ValueError: odd")
    with pytest.raises(ServerError) as caught:
        swept()
    assert caught.value.__traceback__ is not None  # which holds what was not finished
    assert not listening()


def test_what_was_sent_is_told_of_when_nothing_is_finished(tmp_path):
    def stopped(record):
        with keeping(tmp_path / "out.nc", True) as shards:
            shards.note_job("0123456789abcdef", record)
            raise KeyboardInterrupt

    with pytest.raises(
        KeyboardInterrupt, match="jobs that were sent go on at the server, and the same call finds them again"
    ):
        stopped({"id": "1", "state": "sent"})
    with pytest.raises(KeyboardInterrupt) as caught:
        stopped({"dtype": "float32"})
    assert not isinstance(caught.value, Stopped)


def test_a_job_that_is_lost_again_and_again(server, small_jobs, wanted, tmp_path):
    server.fault("execute", "delay", seconds=0.0)  # the job that asks which model the server has
    server.fault("execute", "lose", times=9)
    begun = len(server.lines("lost"))
    with (
        pytest.warns(ServerWarning, match="it is sent again"),
        pytest.raises(ServerError, match=r"has lost a job on words-2l 2 times \(the server does not know it\)"),
    ):
        swept(tmp_path / "out.nc")
    assert len(server.lines("lost")) >= begun + 2
    assert list((tmp_path / "out.nc.parts").glob("*.job"))
    server.quiet()
    with pytest.warns(ServerWarning, match="it is sent again"):
        same(swept(tmp_path / "out.nc"), wanted)


def test_results_that_are_never_kept(server, small_jobs, asked):
    server.fault("result", "404", times=9)
    with pytest.warns(ServerWarning), pytest.raises(ServerError, match=r"2 times .*its result is no longer kept"):
        swept()
    assert len(small_jobs()) == 2


def test_a_server_that_fails_for_ever(server, monkeypatch, tmp_path):
    monkeypatch.setattr(patience, "GIVE_UP", 0.5)
    monkeypatch.setattr(patience, "LOST", 0.2)
    server.fault("request", "500", times=40)
    with pytest.raises(ServerError, match="gives no answer: it answers 500: told to answer 500; what was sent"):
        swept(tmp_path / "out.nc")


@pytest.mark.parametrize("at", ["request", "response"])
def test_a_page_of_the_network_in_place_of_an_answer(server, small_jobs, asked, wanted, tmp_path, at):
    server.fault(at, "page", times=6 if at == "response" else 1)
    same(swept(tmp_path / "out.nc"), wanted)
    assert len(small_jobs()) == len(set(small_jobs())) == 1 + JOBS


def test_a_result_that_holds_nothing(server, small_jobs, wanted, tmp_path):
    server.fault("deliver", "empty")
    with pytest.raises(ServerError, match=r"a result of .* cannot be read: it is said to be complete, and holds noth"):
        swept(tmp_path / "out.nc")
    same(swept(tmp_path / "out.nc"), wanted)


def test_a_job_that_takes_long_to_be_taken(server, small_jobs, wanted, monkeypatch):
    """The server takes it after the question has ended, longer after it was sent than a job is waited for."""
    monkeypatch.setattr(protocol, "TAKE", 1.6)
    server.fault("request", "delay", seconds=2.0)
    same(swept(), wanted)
    assert len(small_jobs()) == len(set(small_jobs())) == 1 + JOBS


def test_a_question_that_hangs_does_not_hold_up_the_others(server, small_jobs, asked, wanted, monkeypatch, caplog):
    caplog.set_level("INFO", "headwise")
    monkeypatch.setattr(protocol, "READ", 0.3)
    server.fault("response", "delay", seconds=5.0)
    same(swept(), wanted)
    assert "waiting for the server" in caplog.text


def test_a_lost_job_is_sent_again(server, small_jobs, asked, wanted):
    server.fault("execute", "lose")
    with pytest.warns(ServerWarning, match=r"job \w+ is lost \(the server does not know it\): it is sent again"):
        same(swept(), wanted)
    assert len(small_jobs()) == len(set(small_jobs())) == 1 + JOBS


@pytest.mark.parametrize("how", ["403", "404"])
def test_a_result_that_is_no_longer_kept_is_computed_again(server, small_jobs, asked, wanted, how):
    server.fault("result", how)
    with pytest.warns(ServerWarning, match="its result is no longer kept"):
        same(swept(), wanted)
    assert len(small_jobs()) == 2 + JOBS


def test_a_server_that_starts_again(server, small_jobs, wanted, tmp_path):
    """What it had not finished is lost with it, and sent again; what it had finished is fetched."""
    server.fault("execute", "delay", times=1 + JOBS, seconds=0.7)
    begun, before = len(server.lines("executed")), []

    def restart():
        wait_for(lambda: len(small_jobs()) >= 3)
        time.sleep(0.2)
        server.stop()
        before.extend(line for line in server.lines("executed")[begun:] if line["what"] != "marker")
        server.start()

    beside = threading.Thread(target=restart)
    beside.start()
    with pytest.warns(ServerWarning, match="it is sent again"):
        found = swept(tmp_path / "out.nc")
    beside.join()
    same(found, wanted)
    cut = {line["id"] for line in server.lines("interrupted")}
    ended = [line["key"] for line in before if line["id"] not in cut]  # a job that it was at has begun, no more
    keys = ended + small_jobs()[len(before) :]
    assert len(keys) == len(set(keys)) == 1 + JOBS


def test_running_out_of_memory_there_makes_smaller_passes(server, small_jobs, wanted):
    there = hw.load("words-2l", remote=True)
    there.identity  # noqa: B018
    begun = len(small_jobs())
    server.fault("execute", "error", times=2, detail="Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory.")
    same(remote_client.sweep(there, None), wanted)
    keys = small_jobs()[begun:]
    assert len(keys) == len(set(keys)) == JOBS, "what had been finished ran again"


def test_a_job_that_does_nothing_is_not_waited_for(server, monkeypatch):
    """The last answer comes after a marker was sent, which nobody answers: the call ends all the same."""
    queue = hw.load("words-2l", remote=True).queue
    steps, waits = iter(["not yet", "not yet", "an answer"]), []

    def step(state, call):
        said = "not yet" if state.marker else next(steps)
        return None if said == "not yet" else (said,)

    def wait(call, until):
        assert len(waits) < 2, "it waits with nothing to wait for"
        waits.append(until)
        return {"job"}

    monkeypatch.setattr(queue, "_step", step)
    monkeypatch.setattr(Patience, "wants_marker", lambda call, active: not any(state.marker for state in active))
    monkeypatch.setattr(Patience, "wait", wait)
    job = RemoteJob("job", None, {})
    monkeypatch.setattr(queue, "_found", lambda job, ledger: JobState(job, "job", "sent", 0.1, ledger))
    assert list(queue.run([job])) == [(0, "an answer")]
    assert len(waits) == 2
