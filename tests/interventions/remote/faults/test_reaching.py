"""A server that cannot be reached is told of at once; one that was reached before is waited for."""

import socket
import threading
import time

import pytest
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.errors import ServerError
from headwise.interventions.remote import reaching, status_line
from headwise.metrics import loss
from headwise.studies import measure
from tests.support import remote_client
from tests.support.loopback import KEY
from tests.support.remote_sweeps import TASK, lines_said, same, swept


@pytest.fixture
def first(server, monkeypatch):
    """A process that has not reached any server yet, and is in a hurry."""
    monkeypatch.setattr(reaching, "REACHED", set())
    monkeypatch.setattr(reaching, "REACH", 1.0)


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
