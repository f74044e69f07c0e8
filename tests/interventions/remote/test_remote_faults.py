"""What goes wrong with a server is survived or told in a line; nothing is lost or run twice, and no key is told."""

import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import httpx
import numpy as np
import pytest
from nnsight.schema.config import CONFIG
from nnsight.schema.response import ResponseModel, Status

import headwise as hw
from headwise.errors import ServerError, ServerWarning
from headwise.interventions.remote import listener, patience, protocol, queue, reaching, run, status_line
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, measure
from headwise.studies.output.progress import Progress, Stopped
from headwise.studies.storage.unfinished import keeping
from tests.support import remote_client
from tests.support.loopback import KEY, Loopback

TASK = RepeatedTokens(n=2, length=6)
JOBS = 4
LARGE = "413 Request Entity Too Large"


@pytest.fixture
def small_jobs(server, monkeypatch):
    """Several jobs in a sweep, and the server's books from here on."""
    monkeypatch.setattr(run, "ROWS", 32)
    monkeypatch.setattr(patience, "LOST", 1.5)
    monkeypatch.setattr(patience, "STILL", 1.0)
    begun = len(server.executed())
    return lambda: server.executed()[begun:]


@pytest.fixture
def asked(server, monkeypatch):
    """No websocket: what becomes of jobs is asked for."""
    monkeypatch.setattr(listener, "WITHOUT", {server.host})


@pytest.fixture(scope="session")
def wanted(words_model):
    return remote_client.sweep(words_model, None)


def swept(out=None):
    return remote_client.sweep(hw.load("words-2l", remote=True), out)


def wait_for(reached, seconds=60):
    """Until something is so; a failure where it does not come."""
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, "it was not reached in time"
        time.sleep(0.02)


def same(found, wanted):
    for name in (name for name in wanted.data_vars if wanted[name].dtype.kind in "fiu"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("at", "how"),
    [
        ("request", "drop"),
        ("received", "drop"),
        ("received", "502"),
        ("received", "500"),
        ("request", "500"),
        ("request", "503"),
        ("request", "429"),
        ("response", "drop"),
        ("response", "500"),
        ("response", "503"),
        ("result", "drop"),
        ("result", "503"),
        ("request", "delay"),
        ("response", "delay"),
        ("execute", "delay"),
    ],
)
def test_what_passes_is_survived(server, small_jobs, wanted, tmp_path, at, how):
    server.fault(at, how, times=2, seconds=0.3)
    same(swept(tmp_path / "out.nc"), wanted)
    keys = small_jobs()
    assert len(keys) == len(set(keys)) == 1 + JOBS
    assert not (tmp_path / "out.nc.parts").exists()


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


def listening():
    return [one.name for one in threading.enumerate() if one.name == "headwise listener"]


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


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("how", ["refused", "kept"])
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


@pytest.mark.parametrize(("at", "how"), [("request", "drop"), ("received", "drop"), ("received", "502")])
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


@pytest.mark.parametrize(
    ("at", "how", "detail", "told"),
    [
        ("request", "401", "Missing or invalid API key.", "get one at https://login.ndif.us, then run `nnsight login`"),
        ("request", "400", "Client nnsight version 0.8.1 is below the minimum supported 0.9.0.", "nnsight.compare()"),
        ("request", "413", "too large", "give a smaller batch_size"),
        (
            "request",
            "413",
            f"<html>\r\n<head><title>{LARGE}</title></head>\r\n<body></body></html>",
            f"{LARGE} (413); give",
        ),
        (
            "request",
            "403",
            "<html>\n<style>p {}\n</style>\n<h1>Blocked</h1>\n</html>",
            "or what stands before it, refuses a job on words-2l: Blocked (403)",
        ),
        ("request", "400", "Unsupported conversion of tensor", "words-2l: Unsupported conversion of tensor (400)"),
        ("request", "422", "no such thing", "refuses a job on words-2l: no such thing (422)"),
        ("response", "401", "Missing or invalid API key.", "run `nnsight login` or set NDIF_API_KEY"),
        (
            "execute",
            "error",
            "Could not deploy this model. Repository Not Found",
            "words-2l cannot be had on http://127.0.0.1",
        ),
        ("execute", "error", "The model architecture on this server doesn't match", "words-2l is built otherwise on"),
        ("execute", "error", "Your job exceeded the execution timeout of 60s.", "give a smaller batch_size"),
        ("execute", "error", "Replica was evicted. Please try again later.", "the same call goes on"),
        ("execute", "error", "Traceback (most recent call last):\n  File x\nValueError: odd", "ValueError: odd"),
        (
            "execute",
            "error",
            "Traceback (most recent call last):\n  File 'architecture_utils.py'\nValueError: odd\nand more",
            "a job on words-2l failed on http://127.0.0.1",
        ),
        (
            "execute",
            "error",
            "Traceback (most recent call last):\n  File x\nModuleNotFoundError: No module named 'mine.parts'",
            "`nnsight.register('mine')`",
        ),
        ("execute", "error", "", "it gives no reason"),
    ],
)
def test_what_does_not_pass_is_told_in_a_line(server, asked, at, how, detail, told):
    server.fault(at, how, detail=detail)
    with pytest.raises(ServerError) as caught:
        swept()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [f"{KEY}\n", f" {KEY}", f"{KEY[:9]} {KEY[9:]}", f"\u201c{KEY}\u201d"])
def test_a_key_that_cannot_be_sent(server, monkeypatch, given, caplog):
    monkeypatch.setattr(CONFIG.API, "APIKEY", given)
    with pytest.raises(
        ServerError, match=r"the key that nnsight found cannot be sent to .* set NDIF_API_KEY"
    ) as caught:
        swept()
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert KEY[:9] not in told
    assert "\n" not in str(caught.value)


def test_an_error_that_quotes_the_key(server, asked, monkeypatch):
    def broken(*given):
        raise httpx.ReadError(f"cannot send {'long ' * 58}{KEY}")

    monkeypatch.setattr(protocol.NdifRequest, "poll", broken)
    monkeypatch.setattr(patience, "GIVE_UP", 0.2)
    with pytest.raises(ServerError, match="gives no answer: cannot send") as caught:
        swept()
    assert KEY[:8] not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("given", ["api.ndif.us", "", "http://", "ftp://api.ndif.us", "http://api.ndif.us:port"])
def test_an_address_that_cannot_be_one(server, monkeypatch, given):
    monkeypatch.setattr(CONFIG.API, "HOST", given)
    with pytest.raises(ServerError, match=f"NDIF_HOST='{given}' is no address of a server: write it as in https://"):
        hw.load("words-2l", remote=True)


def test_an_address_may_end_in_a_slash(server, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", f"{server.host}/")
    assert hw.load("words-2l", remote=True).dtype == "float32"


@pytest.mark.parametrize("given", [None, "short", "9c1bb6aa-0000-4d0e-9b59-000000000000"])
def test_a_key_that_is_missing_or_refused(server, monkeypatch, given, tmp_path, caplog):
    monkeypatch.setattr(CONFIG.API, "APIKEY", given)
    with pytest.raises(hw.errors.HeadwiseError) as caught:
        swept(tmp_path / "out.nc")
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert ("wants a key, and nnsight found none" if given is None else "refuses the key") in told
    assert given is None or given not in told


def test_a_model_that_the_server_does_not_have(server, tmp_path, small_model):
    small_model.module.save_pretrained(tmp_path)
    tokens = hw.load("words-2l").tokenizer
    there = hw.load(tmp_path, remote=True, tokenizer=tokens)
    with pytest.raises(ServerError, match=r"cannot be had on .*Repository Not Found.*nnsight\.status\(\)"):
        measure(there, TASK, None, [loss])


@pytest.fixture
def first(server, monkeypatch):
    """A process that has not reached any server yet, and is in a hurry."""
    monkeypatch.setattr(reaching, "REACHED", set())
    monkeypatch.setattr(reaching, "REACH", 1.0)


def lines_said(capfd):
    return capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("key", [KEY, None])
def test_a_server_that_is_not_there(first, monkeypatch, key):
    monkeypatch.setattr(CONFIG.API, "HOST", "http://127.0.0.1:1")
    monkeypatch.setattr(CONFIG.API, "APIKEY", key)
    begun = time.monotonic()
    with pytest.raises(
        ServerError,
        match=r"http://127\.0\.0\.1:1 cannot be reached: .*Connection refused; see whether this machine is on the "
        r"network and NDIF_HOST names a server that is there",
    ) as caught:
        swept()
    assert time.monotonic() - begun < 10
    assert "\n" not in str(caught.value)
    assert ("set NDIF_API_KEY" in str(caught.value)) == (key is None)


def unreached(monkeypatch, host, caplog):
    """What is said of a server that never answers, and that it is said in time."""
    monkeypatch.setattr(CONFIG.API, "HOST", host)
    monkeypatch.setattr(status_line, "QUIET_SECONDS", 0.3)
    there = hw.load("words-2l", remote=True)
    begun = time.monotonic()
    with pytest.raises(ServerError, match=f"{host} cannot be reached: no answer within 1 seconds; see whether"):
        measure(there, TASK, None, [loss])
    assert time.monotonic() - begun < 3
    assert "waiting for the server" not in caplog.text


def test_a_server_that_takes_a_connection_and_never_answers(first, monkeypatch, caplog, capfd):
    caplog.set_level("INFO", "headwise")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"http://127.0.0.1:{silent.getsockname()[1]}"
        unreached(monkeypatch, host, caplog)
    (line,) = lines_said(capfd)
    assert line.startswith(f"{host}: connecting, after "), "where there is no terminal, it is said in a line"


def test_a_name_that_is_looked_up_without_end(first, monkeypatch, caplog, capfd):
    gone = threading.Event()

    def hangs(*given, **more):
        gone.wait(20)
        raise socket.gaierror("no such name")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", hangs)
        unreached(patch, "https://ndif.example", caplog)
        gone.set()
    assert all("waiting for the server" not in line for line in lines_said(capfd))


@pytest.mark.parametrize("how", ["502", "503"])
def test_a_server_that_what_stands_before_it_does_not_reach(first, server, how):
    server.fault("ping", how, times=20)
    with pytest.raises(ServerError, match=f"cannot be reached: what stands before it answers {how}; see whether"):
        swept()


@pytest.mark.parametrize("how", ["404", "500", "page"])
def test_any_other_answer_is_one(first, server, small_jobs, wanted, how):
    server.fault("ping", how)
    same(swept(), wanted)


def test_a_server_that_was_reached_is_waited_for(server, small_jobs, asked, wanted, caplog, capfd, monkeypatch):
    caplog.set_level("INFO", "headwise")
    monkeypatch.setattr(status_line, "QUIET_SECONDS", 0.1)
    there = hw.load("words-2l", remote=True)
    there.identity  # noqa: B018
    capfd.readouterr()
    server.stop()
    beside = threading.Timer(4.0, server.start)
    beside.start()
    same(remote_client.sweep(there, None), wanted)
    beside.join()
    assert "waiting for the server" in caplog.text
    said = lines_said(capfd)
    assert any("waiting for the server, after " in line for line in said)
    assert len(said) < 10, "not one for each question"


@pytest.mark.parametrize(("progress", "said"), [(None, True), (True, True), (False, False), (print, False)])
def test_where_there_is_no_terminal_a_line_is_said_now_and_then(server, monkeypatch, capfd, progress, said):
    monkeypatch.setattr(status_line, "QUIET_SECONDS", 0.2)
    there = hw.load("words-2l", remote=True)
    there.identity  # noqa: B018
    capfd.readouterr()
    server.fault("execute", "delay", seconds=1.5)
    measure(there, TASK, None, [loss], progress=progress, check=False)
    lines = [line for line in lines_said(capfd) if line.startswith(f"{server.host}: 1 running, after ")]
    assert bool(lines) == said
    assert len(lines) < 4


def environment(server):
    return os.environ | {"NDIF_HOST": server.host, "NDIF_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}


def client(server, out, kind="sweep"):
    return subprocess.Popen(
        [sys.executable, str(Path(remote_client.__file__)), str(out), kind],
        env=environment(server),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    "moment", [pytest.param(2, marks=pytest.mark.heavy), 3, pytest.param(5, marks=pytest.mark.heavy)]
)
def test_a_client_that_is_killed_finds_its_jobs(server, small_jobs, wanted, tmp_path, moment):
    """Killed when the server has run some of its jobs; the next client gets them all, and sends what was not sent."""
    out = tmp_path / "out.nc"
    server.fault("execute", "delay", times=1 + JOBS, seconds=0.5)
    process = client(server, out)
    wait_for(lambda: len(small_jobs()) >= moment)
    time.sleep(0.2 if moment <= JOBS else 0)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert out.is_file() or list((tmp_path / "out.nc.parts").glob("*.job"))
    same(swept(out), wanted)
    keys = small_jobs()
    assert len(keys) == len(set(keys)) == 2 + JOBS, "each call asks which model the server has"


@pytest.mark.heavy
def test_a_study_that_is_killed_twice_runs_nothing_twice(server, small_jobs, words_model, tmp_path):
    out = tmp_path / "out.nc"
    for many in (4, 12):
        server.fault("execute", "delay", times=many, seconds=0.3)
        process = client(server, out, "study")
        wait_for(lambda: len(small_jobs()) >= many)  # noqa: B023
        process.kill()
        process.communicate()
    server.quiet()
    found = remote_client.study(hw.load("words-2l", remote=True), out)
    keys = small_jobs()
    assert len(keys) == len(set(keys))
    wanted = remote_client.study(words_model, None)
    assert found.attrs["heads"] == wanted.attrs["heads"]
    for group in ("ablation", "sets", "patching", "composition"):
        same(found[group].to_dataset(), wanted[group].to_dataset())


def test_no_key_is_written_anywhere(server, small_jobs, tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    out = tmp_path / "out.nc"
    server.fault("execute", "error", detail=f"ValueError: somebody said {KEY}")
    with pytest.raises(ServerError) as caught:
        swept(out)
    server.fault("execute", "delay", times=3, seconds=0.3)
    server.fault("response", "503", times=2, detail=f"{KEY} has to wait")
    begun = len(small_jobs())
    process = client(server, out)
    wait_for(lambda: len(small_jobs()) >= begun + 2)
    process.kill()
    told = process.communicate()[0] + "".join(traceback.format_exception(caught.value))
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    swept(out)
    kept += b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    told += caplog.text + "".join(capfd.readouterr())
    assert KEY not in told
    assert KEY.encode() not in kept
    assert b"executed" in kept


def test_how_jobs_are_doing_is_told(server, small_jobs, caplog, capfd):
    caplog.set_level("INFO", "headwise")
    server.fault("execute", "delay", times=1 + JOBS, seconds=0.4)
    swept()
    told = [record.getMessage() for record in caplog.records if record.name == "headwise.remote"]
    assert any("1 running" in line for line in told)
    assert any("queued" in line for line in told)
    with Progress("measuring", True) as bar:
        bar.say("2 queued, 1 running")
        assert bar.bar.tasks[0].description == "measuring (2 queued, 1 running)"
        bar.update(1, 4)
        bar.say("1 running")
        assert bar.bar.tasks[0].description == "measuring (1 running)"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_while(monkeypatch, act):
    """What a terminal shows meanwhile."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setattr(status_line, "QUIET_SECONDS", 0.0)
        act()
    return terminal.getvalue()


def test_how_jobs_are_doing_is_shown_where_there_is_no_bar(server, monkeypatch):
    server.fault("execute", "delay", seconds=0.5)
    shown = shown_while(monkeypatch, lambda: hw.load("words-2l", remote=True).identity)
    assert f"\r{server.host}: 1 running" in shown
    assert shown.endswith(" \r"), "it is taken away"


@pytest.mark.parametrize("progress", [False, lambda done, total: None])
def test_nothing_is_shown_where_no_bar_is_wanted(server, monkeypatch, progress):
    there = hw.load("words-2l", remote=True)
    assert shown_while(monkeypatch, lambda: measure(there, TASK, None, [loss], progress=progress)) == ""


def test_jobs_are_written_down_without_more_than_is_needed(server, tmp_path, monkeypatch):
    seen = []
    real = queue.JobQueue._send

    def watched(self, *given):
        real(self, *given)
        seen.extend(json.loads(path.read_text()) for path in (tmp_path / "out.nc.parts").glob("*.job"))

    monkeypatch.setattr(queue.JobQueue, "_send", watched)
    swept(tmp_path / "out.nc")
    assert {name for record in seen for name in record} == {
        "id",
        "host",
        "model",
        "state",
        "sent",
    }


def test_two_servers_do_not_share_jobs(server, small_jobs, wanted, tmp_path):
    """What is written down for one server is not asked of another."""
    folder = next(iter(server.config["models"]))
    other = Loopback(tmp_path / "other", {folder: folder}).start()
    try:
        out = tmp_path / "out.nc"
        server.fault("execute", "delay", times=3, seconds=1.0)
        process = client(server, out)
        wait_for(lambda: len(small_jobs()) >= 2)
        process.kill()
        process.communicate()
        CONFIG.API.HOST = other.host
        same(swept(out), wanted)
        assert len(other.executed("passes")) == JOBS
    finally:
        other.stop()
