"""The key goes to nobody in clear and follows nobody elsewhere; results are fetched where they may lie."""

import socket

import pytest
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.errors import ServerError
from tests.support.hostile_server import (
    Hostile,
    answer,
    packed,
    status,
)
from tests.support.loopback import KEY
from tests.support.refused import FACTS, refused


# Where the key goes, and where a client is sent.
@pytest.fixture
def names(monkeypatch):
    """Every name leads to this machine; those that were looked up."""
    asked = []
    real = socket.getaddrinfo

    def found(host, *given, **more):
        asked.append(host.decode() if isinstance(host, bytes) else host)
        return real("127.0.0.1", *given, **more)

    monkeypatch.setattr(socket, "getaddrinfo", found)
    return asked


@pytest.mark.parametrize(
    "name", ["ndif.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.1", "2130706433"]
)
def test_the_key_goes_to_nobody_in_clear(hostile, names, monkeypatch, name):
    server = hostile(packed({"results": FACTS}))
    monkeypatch.setattr(CONFIG.API, "HOST", f"http://{name}:{server.port}")
    told = refused()
    assert "in clear" in told
    assert "HEADWISE_ALLOW_HTTP=1" in told
    assert "https://" in told
    assert not server.heads
    monkeypatch.setenv("HEADWISE_ALLOW_HTTP", "1")
    if name == "ndif.example":
        monkeypatch.setattr(
            Hostile,
            "_response",
            lambda self, connection, head, body: answer(
                connection, 200, status("COMPLETED", "1", f"http://{name}:{self.port}/result/1")
            ),
        )
        assert hw.load("words-2l", remote=True).dtype == "float32"
        assert any(KEY in head for head in server.heads)


def test_without_a_key_there_is_nothing_to_keep(hostile, names, monkeypatch):
    server = hostile(packed({"results": FACTS}))
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    monkeypatch.setattr(CONFIG.API, "HOST", f"http://ndif.example:{server.port}")
    monkeypatch.setattr(
        Hostile,
        "_response",
        lambda self, connection, head, body: answer(
            connection, 200, status("COMPLETED", "1", f"http://ndif.example:{self.port}/result/1")
        ),
    )
    assert hw.load("words-2l", remote=True).dtype == "float32"


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "127.9.9.9"])
def test_the_key_goes_to_this_machine(hostile, names, monkeypatch, name):
    server = hostile(packed({"results": FACTS}))
    monkeypatch.setattr(CONFIG.API, "HOST", f"http://{name}:{server.port}")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # and not to what stands between this machine and others
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert hw.load("words-2l", remote=True).dtype == "float32"


@pytest.mark.parametrize(
    "host",
    [
        "http://127.0.0.1@evil.example",
        "http://127.0.0.1:80@evil.example",
        "https://user:word@api.ndif.us",
        "http://evil.example#@127.0.0.1",
        "http://evil.example\\@127.0.0.1",
        "http://evil.example?@127.0.0.1",
        "https://api.ndif.us/\x1b[31m",
    ],
)
def test_an_address_that_two_readers_take_for_two_hosts(monkeypatch, names, host):
    monkeypatch.setattr(CONFIG.API, "HOST", host)
    with pytest.raises(ServerError, match="is no address of a server"):
        hw.load("words-2l", remote=True)
    assert not names


@pytest.mark.parametrize("at", ["request", "response", "subscribe"])
def test_the_key_follows_nobody_elsewhere(hostile, at):
    other = Hostile()
    where = f"http://127.0.0.1:{other.port}/there"
    where = where.replace("http", "ws") if at == "subscribe" else where
    hostile(
        packed({"results": FACTS}),
        **{at: lambda connection, head, body: answer(connection, 302, b"", f"Location: {where}")},
    )
    if at == "subscribe":
        assert hw.load("words-2l", remote=True).dtype == "float32"
    else:
        refused()
    assert not other.heads
    other.close()


PLACES = [
    "http://metadata.example/latest",
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.1.evil.example/x",
    "http://127.0.0.1@evil.example/x",
    "https://user:word@evil.example/x",
    "https://evil.example\\@s3.example/x",
    "https://evil.example/x\r\nndif-api-key: x",
    "file:///etc/passwd",
    "data:text/plain,x",
    "//evil.example/x",
    "ftp://127.0.0.1/x",
    "https://evil.example/" + "x" * 10**5,
    "1234",
    ["http://127.0.0.1/x"],
    {"a": 1},
    7,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: str(place)[:30])
def test_a_result_that_is_said_to_be_elsewhere(hostile, names, place):
    hostile(response=lambda connection, head, body: answer(connection, 200, status("COMPLETED", "1", place)))
    assert "cannot be read: it is said to be" in refused()
    assert set(names) <= {"127.0.0.1"}


@pytest.mark.parametrize(
    ("host", "place", "fits"),
    [
        ("https://api.ndif.us", "https://s3.us-east-1.amazonaws.com/ndif/1.pt?X-Amz-Signature=1%2F2&a=b@c", True),
        ("https://api.ndif.us", "https://api.ndif.us/result/1", True),
        ("https://api.ndif.us", "http://api.ndif.us/result/1", False),
        ("https://api.ndif.us", "http://s3.amazonaws.com/1", False),
        ("https://api.ndif.us", "http://127.0.0.1/1", False),
        ("https://api.ndif.us", "https://127.0.0.1/1", False),
        ("https://api.ndif.us", "https://127.1/1", False),
        ("https://api.ndif.us", "https://0x7f000001/1", False),
        ("https://api.ndif.us", "https://[::1]/1", False),
        ("https://api.ndif.us", "https://[::ffff:127.0.0.1]/1", False),
        ("https://api.ndif.us", "https://169.254.169.254/1", False),
        ("https://api.ndif.us", "https://localhost:8443/1", False),
        ("http://127.0.0.1:5001", "http://127.0.0.1:5002/bucket/1", True),
        ("http://localhost:5001", "http://127.0.0.1:5002/bucket/1", True),
        ("http://127.0.0.1:5001", "http://10.0.0.5/1", False),
        ("http://ndif.lan:5001", "http://ndif.lan:9000/1", True),
        ("http://ndif.lan:5001", "http://minio.lan:9000/1", False),
        ("http://ndif.lan:5001", "https://minio.lan:9000/1", True),
        ("http://ndif.lan:5001", "http://127.0.0.1:9000/1", False),
    ],
)
def test_where_results_are_fetched(host, place, fits):
    from headwise.interventions.remote.asking import unsafe

    assert bool(unsafe(place, host)) != fits
