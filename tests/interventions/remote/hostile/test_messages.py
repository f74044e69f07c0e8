"""Messages of a hostile server on a websocket: without end, too large, or on jobs of others."""

import io
import pickle
import struct
import time
import zipfile

import pytest
from nnsight.schema.response import ResponseModel, Status

from headwise.interventions.remote import listener
from headwise.interventions.remote.listener import Listener
from tests.support.hostile_server import (
    PIECE,
    Hostile,
    Peak,
    archive,
    frame,
    packed,
    status,
    upgraded,
)
from tests.support.loopback import KEY
from tests.support.refused import ALLOWED, FACTS, ends, linux


# The websocket.
def listened(server):
    """A listener on a server, after the server has done with it."""
    made = Listener(server.host, KEY)
    until = time.monotonic() + 20
    while made.open and time.monotonic() < until:
        time.sleep(0.02)
    return made


def opened(then, session=b'{"session_id": "1"}'):
    """A websocket that is opened, and then anything."""

    def route(connection, head, body):
        upgraded(connection, head)
        connection.sendall(frame(session))
        then(connection)

    return route


@pytest.mark.parametrize("how", ["declared", "fragments", "ping between"])
def test_a_message_without_an_end(hostile, how):
    def then(connection):
        if how == "declared":
            server.give(connection, frame(b"", declared=2**62))
        for number in range(16 * 400):
            piece = frame(PIECE, opcode=0 if number else 1, fin=0)
            server.give(connection, PIECE if how == "declared" else piece)
            if how == "ping between":
                server.give(connection, b"\x89\x00")

    server = hostile(subscribe=opened(then))
    made = listened(server)
    assert not made.open
    assert "subscribe" not in ends(server).ended
    assert server.taken < ALLOWED * 2**20


def test_a_message_byte_by_byte(hostile, monkeypatch):
    monkeypatch.setattr(listener, "SILENT", 1.0)
    monkeypatch.setattr(listener, "PACE", 2.0**30, raising=False)

    def then(connection):
        connection.sendall(frame(b"", declared=1000))
        until = time.monotonic() + 15
        while time.monotonic() < until:
            connection.sendall(b" ")
            time.sleep(0.05)

    server = hostile(subscribe=opened(then))
    made = listened(server)
    assert not made.open
    assert "subscribe" not in ends(server).ended


SESSIONS = [
    b'{"session_id": "' + b"x" * 10**6 + b'"}',
    b'{"session_id": "a\\u001b"}',
    b"[" * 10**5,
    b'{"session_id": [1]}',
]


@pytest.mark.parametrize("session", SESSIONS, ids=["long", "odd", "deep", "list"])
def test_a_websocket_with_a_strange_number(hostile, session):
    server = hostile(packed({"results": FACTS}), subscribe=opened(lambda connection: time.sleep(0.2), session))
    assert listened(server).session == ""
    assert server.host in listener.WITHOUT


@pytest.mark.parametrize("how", ["body", "headers", "number", "slowly"])
def test_a_websocket_that_is_never_open(hostile, how):
    """The thread ends, and what it was told ends with it."""

    def route(connection, head, body):
        if how == "number":
            upgraded(connection, head)
            server.give(connection, frame(b"", declared=2**62))
        elif how == "body":
            server.give(connection, b"HTTP/1.1 403 No\r\nContent-Length: 99999999999\r\n\r\n")
        else:
            server.give(connection, b"HTTP/1.1 101 Yes\r\n")
        until = time.monotonic() + 30
        while time.monotonic() < until:
            server.give(connection, b"X: x\r\n" * (1 if how == "slowly" else 5000))
            time.sleep(0.1 if how == "slowly" else 0.01)

    server = hostile(subscribe=route)
    Listener(server.host, KEY)
    assert "subscribe" not in ends(server, 15).ended


def test_words_on_jobs_of_others_are_forgotten(hostile):
    def then(connection):
        connection.sendall(frame(status("RUNNING", "ours")))
        for number in range(3000):
            connection.sendall(frame(status("RUNNING", f"other{number}", description="x" * 1000)))
        connection.sendall(frame(status("COMPLETED", "ours", "http://127.0.0.1/1")))
        time.sleep(1.0)

    server = hostile(subscribe=opened(then))
    made = Listener(server.host, KEY)
    made.expect("ours", 1000)
    until = time.monotonic() + 20
    while (made.heard("ours") is None or made.heard("ours").status != Status.COMPLETED) and time.monotonic() < until:
        time.sleep(0.02)
    assert made.heard("ours").status == Status.COMPLETED
    assert len(made._heard) < 10
    assert len(made._fresh) < 10
    made.close()


@linux
@pytest.mark.parametrize("kind", ["member", "memo", "text", "description"])
def test_a_message_that_gets_larger(kind):
    peak = Peak()
    if kind == "member":
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packing:
            packing.writestr("archive/data.pkl", b"\x80\x04B" + struct.pack("<I", 2**29) + bytes(2**29) + b".")
        content, opcode, peak = made.getvalue(), 2, Peak()
    elif kind == "memo":
        content, opcode = archive(b"\x80\x04Nr\xff\xff\xff\x0f."), 2
    elif kind == "text":
        content, opcode = b'{"id": "1", "status": "RUNNING", "data": [' + b"[]," * 10**7 + b"1]}", 1
    else:
        content, opcode = status("RUNNING", "1", description="x" * 10**6), 1
    try:
        response = listener._read(opcode, content)
    except (ValueError, TypeError, pickle.UnpicklingError):
        response = None
    assert response is None or len(response.description) < 20_000
    assert peak.grown < ALLOWED


def test_a_message_with_a_result_is_read():
    given = ResponseModel(id="1", status=Status.COMPLETED, description="done", data=b"\x00\xff" * 70_000)
    found = listener._read(2, given.pickle())
    assert (found.id, found.status, found.description, found.data) == ("1", Status.COMPLETED, "done", given.data)


def test_a_websocket_goes_through_what_stands_between(hostile, monkeypatch):
    """A proxy is asked to connect; one whose answer has no end is left."""
    seen = []

    def connect(connection, head, body):
        seen.append(head)
        server.give(connection, b"HTTP/1.1 200 Yes\r\n\r\n")
        inner = b""
        while b"\r\n\r\n" not in inner:
            inner += connection.recv(4096)
        upgraded(connection, inner.decode())
        connection.sendall(frame(b'{"session_id": "1"}'))
        time.sleep(0.5)

    class Proxy(Hostile):
        def _serve(self, connection):
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1)
            with connection:
                connect(connection, head.decode(), b"")

    server = Proxy()
    monkeypatch.setenv("http_proxy", f"http://who:word@127.0.0.1:{server.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    made = Listener("http://ndif.example:8001", "")
    assert made.session == "1"
    assert seen[0].startswith("CONNECT ndif.example:8001 ")
    assert "Basic d2hvOndvcmQ=" in seen[0]
    made.close()
    server.close()
