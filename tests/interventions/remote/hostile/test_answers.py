"""Answers of a hostile server, proxy or network: without end, byte by byte, odd or too large."""

import socket
import threading
import time

import httpx
import pytest
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.interventions.remote import protocol, queue, reaching, refusals
from headwise.interventions.traced.passes import server_jobs
from tests.support.hostile_server import (
    Hostile,
    Peak,
    answer,
    endless,
    packed,
    status,
    trickle,
)
from tests.support.loopback import KEY
from tests.support.refused import ALLOWED, FACTS, ends, linux, refused


def met(at):
    """A server that does so there: a job may have been taken all the same, and can be asked for."""
    assert hw.load("words-2l", remote=True).dtype == "float32" if at == "request" else refused()


def test_a_server_that_does_its_work_is_believed(hostile):
    """What the others are compared with."""
    hostile(packed({"results": FACTS}))
    assert hw.load("words-2l", remote=True).dtype == "float32"


# Answers without an end, in bytes and in time.
@pytest.mark.parametrize("at", ["ping", "request", "response", "result"])
@pytest.mark.parametrize("begin", [b'{"id": "', b"["])
def test_an_answer_without_an_end(hostile, at, begin):
    server = hostile(packed({"results": FACTS}), **{at: endless(lambda: server, 400, begin)})
    met(at)
    assert at not in ends(server).ended
    assert server.taken < ALLOWED * 2**20


@pytest.mark.parametrize("at", ["ping", "request", "response", "result"])
@pytest.mark.parametrize(
    ("begin", "one"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "chunks", "header", "continue"],
)
def test_an_answer_byte_by_byte(hostile, at, begin, one):
    """Each byte is in time; the whole never comes."""
    server = hostile(packed({"results": FACTS}), **{at: trickle(begin, one, 15.0)})
    met(at)
    assert at not in ends(server).ended


def test_a_job_that_is_taken_byte_by_byte(hostile, monkeypatch):
    """A server that reads as slowly as that."""

    class Slow(Hostile):
        def _serve(self, connection):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            if connection.recv(4, socket.MSG_PEEK) == b"GET ":
                return super()._serve(connection)
            with connection:
                until = time.monotonic() + 15
                while connection.recv(100):
                    time.sleep(0.01)
                    if time.monotonic() > until:
                        self.ended.append("request")
                        return None

    server = Slow()
    monkeypatch.setattr(CONFIG.API, "HOST", server.host)
    monkeypatch.setattr(reaching, "REACHED", {server.host})
    monkeypatch.setattr(protocol, "serialize_session", lambda *given: bytes(2**24))
    monkeypatch.setattr(queue, "serialize_session", lambda *given: bytes(2**24))
    monkeypatch.setattr(protocol, "PACE", 2.0**24, raising=False)
    refused()
    assert "request" not in server.ended
    server.close()


def test_a_wish_to_stop_is_heard_while_an_answer_trickles(hostile, monkeypatch):
    monkeypatch.setattr(protocol, "READ", 30.0)
    server = hostile(response=trickle(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" ", 20.0))

    def say(text):
        if any(head.startswith("GET /response") for head in server.heads):
            raise KeyboardInterrupt

    there = hw.load("words-2l", remote=True)
    job = there.job("facts", server_jobs.facts, {}, dict, 2**20)
    with pytest.raises(KeyboardInterrupt):
        list(there.queue.run([job], say))
    assert "response" not in ends(server, 10).ended


@pytest.mark.parametrize("code", [101, 304, 307, 599, 999])
def test_codes_that_mean_nothing(hostile, code):
    where = "Location: http://127.0.0.1:1/elsewhere"
    hostile(response=lambda connection, head, body: answer(connection, code, b"" if code == 304 else b"odd", where))
    assert "words-2l" in refused() or "gives no answer" in refused()


@pytest.mark.parametrize("extra", ["Retry-After: 1000000000", "Retry-After: -1", "X: " + "x" * 10**6])
def test_headers_that_mean_nothing(hostile, extra):
    hostile(response=lambda connection, head, body: answer(connection, 429, b"later", extra))
    assert "gives no answer" in refused()


@linux
def test_a_body_that_unpacks_to_more(hostile):
    """An encoding that was not asked for is not undone."""
    import gzip

    encoded = gzip.compress(bytes(300 * 2**20), 1)
    hostile(response=lambda connection, head, body: answer(connection, 200, encoded, "Content-Encoding: gzip"))
    peak = Peak()
    assert "gives no answer" in refused()
    assert peak.grown < ALLOWED


def test_json_as_deep_as_the_sea(hostile):
    deep = b"[" * 500_000
    server = hostile(request=lambda connection, head, body: answer(connection, 400, deep))
    assert "refuses a job on words-2l" in refused()
    server.routes = {"response": lambda connection, head, body: answer(connection, 200, deep)}
    assert "does not speak as NDIF does" in refused()


@pytest.mark.parametrize(
    "text",
    ["<!--" * 400_000, "<" * 1_500_000, "<style>" * 200_000, "Traceback\n" + "x." * 700_000],
    ids=["comments", "tags", "styles", "traceback"],
)
def test_a_reason_as_long_as_a_book(hostile, text):
    hostile(
        response=lambda connection, head, body: answer(
            connection, 200, status("ERROR", "1", description=f"{text}CUDA out of memory")
        )
    )
    assert "words-2l failed on" in refused()
    assert len(refusals.explain_refusal("host", "words-2l", 400, text, KEY)) < 1000


def test_a_number_that_is_none(hostile):
    hostile(
        request=lambda connection, head, body: answer(connection, 200, status("RECEIVED", "../../faults?" + "x" * 9))
    )
    assert "cannot be read" in refused() or "gives no answer" in refused()


"""A key that is a pair of the same pair of the same pair, which takes for ever to hash."""


def test_httpx_still_takes_what_is_asked_of_it():
    """A guard: the deadline of a question holds for what httpx does in all its steps, names looked up as well."""
    from headwise.interventions.remote import asking

    gone = threading.Event()

    def hangs(*given, **more):
        gone.wait(20)
        raise socket.gaierror("no such name")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", hangs)
        with pytest.raises(httpx.TimeoutException):
            asking.fetch("GET", "http://ndif.example/ping", most=10, silent=0.2, seconds=0.2)
        gone.set()
