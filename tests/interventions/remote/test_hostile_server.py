"""What a malicious or broken server, proxy or network can do: nothing but end a call with a line."""

import io
import pickle
import socket
import struct
import sys
import threading
import time
import traceback
import zipfile

import httpx
import numpy as np
import pytest
import torch
from nnsight.schema.config import CONFIG
from nnsight.schema.response import ResponseModel, Status

import headwise as hw
from headwise.errors import ServerError
from headwise.interventions.remote import listener, patience, protocol, queue, reaching, refusals
from headwise.interventions.remote.listener import Listener
from headwise.interventions.traced import server_jobs
from headwise.metrics import induction, loss
from headwise.studies import RepeatedTokens, capture, composition_scores, measure
from tests.support import remote_client
from tests.support.hostile_server import (
    PIECE,
    Hostile,
    Peak,
    answer,
    archive,
    bomb,
    endless,
    frame,
    packed,
    status,
    trickle,
    upgraded,
)
from tests.support.loopback import KEY

TASK = RepeatedTokens(n=2, length=6)
ALLOWED = 100
"""Megabytes that a client may take of what it did not ask for."""
FACTS = {"dtype": "float32", "device": "cpu", "weights": [], "buffers": [], "modules": {}}
FACTS["fingerprint"] = torch.ones(3, 8, 4, dtype=torch.float64)
linux = pytest.mark.skipif(sys.platform != "linux", reason="the most memory that a process had is known on Linux only")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Waiting for what never comes ends soon, and no server is known yet."""
    monkeypatch.setattr(patience, "PAUSES", (0.02, 0.1))
    monkeypatch.setattr(patience, "GIVE_UP", 0.3)
    monkeypatch.setattr(patience, "LOST", 0.3)
    monkeypatch.setattr(protocol, "READ", 1.0)
    monkeypatch.setattr(protocol, "TAKE", 1.0, raising=False)
    monkeypatch.setattr(listener, "OPENING", 1.0)
    monkeypatch.setattr(listener, "WITHOUT", set())
    monkeypatch.setattr(reaching, "REACH", 2.0)
    monkeypatch.setattr(reaching, "REACHED", set())


@pytest.fixture
def hostile(monkeypatch):
    """Makes a hostile server, to which nnsight is set."""
    made = []

    def make(result=b"", /, **routes):
        made.append(Hostile(result, **routes))
        monkeypatch.setattr(CONFIG.API, "HOST", made[0].host)
        monkeypatch.setattr(CONFIG.API, "APIKEY", KEY)
        return made[-1]

    yield make
    for one in made:
        one.close()


def refused():
    """What is said of a server whose answer cannot be used: an error of ours, in a line."""
    with pytest.raises(hw.errors.HeadwiseError) as caught:
        hw.load("words-2l", remote=True).identity  # noqa: B018
    told = str(caught.value)
    assert "\n" not in told
    assert len(told) < 1000
    assert KEY not in "".join(traceback.format_exception(caught.value))
    return told


def met(at):
    """A server that does so there: a job may have been taken all the same, and can be asked for."""
    assert hw.load("words-2l", remote=True).dtype == "float32" if at == "request" else refused()


def ends(server, seconds=20):
    """Wait until a server sees that its client has gone, or has done all that it wanted."""
    until = time.monotonic() + seconds
    while any(one.name.startswith("headwise") for one in threading.enumerate()):
        assert time.monotonic() < until, "a thread is left"
        time.sleep(0.02)
    return server


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


# Results that unpack, expand or declare more than they hold.


def reduced(what, arguments):
    """A pickle of a call."""
    module, name = what.split()
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


def saved(pickled, *members, method=zipfile.ZIP_STORED):
    import zstandard

    return zstandard.ZstdCompressor().compress(archive(pickled, members, method))


def expanded(count):
    """A tensor of any size over a single number."""
    facts = FACTS | {"fingerprint": torch.ones(1, 1, 1, dtype=torch.float64).expand(1, 1, count)}
    buffer = io.BytesIO()
    torch.save({"results": facts}, buffer)
    assert len(buffer.getvalue()) < 10_000
    return packed({"results": facts})


def tensor_pickle(count):
    """A tensor of float64 whose numbers are in a member, as torch would write it."""
    made = io.BytesIO()
    torch.save({"results": FACTS | {"fingerprint": torch.zeros(1, dtype=torch.float64)}}, made)
    content = zipfile.ZipFile(made).read("archive/data.pkl")
    one = b"K\x01tq"  # where the number 1 stands as the size of the storage
    assert one in content
    return content.replace(b"K\x01tq", b"J" + struct.pack("<i", count) + b"tq", 1)


BOMBS = {
    "a frame": lambda: bomb(1024),
    "a frame that does not say how large it is": lambda: bomb(1024, unsized=True),
    "a member": lambda: saved(tensor_pickle(2**27), ("data/0", bytes(2**30)), method=zipfile.ZIP_DEFLATED),
    "a tensor": lambda: expanded(2**23),
    "a call": lambda: saved(reduced("__builtin__ bytearray", b"J" + struct.pack("<i", 2**30) + b"\x85")),
    "a legacy tensor": lambda: saved(reduced("torch FloatTensor", b"J" + struct.pack("<i", 2**28) + b"\x85")),
    "a memo": lambda: saved(b"\x80\x02Nr\xff\xff\xff\x0f."),
    "many members": lambda: saved(b"\x80\x02}.", *((f"{number:x}", b"") for number in range(200_000))),
    "many lists": lambda: saved(b"\x80\x02](" + b"]" * 2_500_000 + b"e."),
}


@linux
@pytest.mark.parametrize("kind", BOMBS)
def test_a_result_that_gets_larger(hostile, kind):
    hostile(BOMBS[kind]())
    peak = Peak()
    assert "a result of http://127.0.0.1" in refused()
    assert peak.grown < 4 * ALLOWED


def test_a_window_that_is_too_long():
    import zstandard

    long = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    ).compressobj()
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        protocol.plain.decompressed(long.compress(bytes(2**20)) + long.flush(), 2**30)


def test_a_frame_has_what_it_may_have_and_no_more():
    from headwise.interventions.remote import plain

    assert plain.decompressed(bomb(1), 2**20) == bytes(2**20)
    with pytest.raises(plain.Oversize):
        plain.decompressed(bomb(1), 2**20 - 1)


LAUGHS = b"\x80\x02}(" + b"\x86".join([b"K\x01K\x01", *[b"q\x00h\x00"] * 60]) + b"\x86K\x01u."
"""A key that is a pair of the same pair of the same pair, which takes for ever to hash."""


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}"
        + b"("
        + b"\x86".join([b"K\x01K\x01"] + [b"q\x00h\x00"] * 60)
        + b"\x86K\x01u.",  # a key that is laughed at
        b"\x80\x02]q\x00h\x00a.",  # a list in itself
        b"\x80\x02(l.",
        b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02\x86.",
        b"\x80\x02.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00abc.",
    ],
)
def test_data_that_is_not_plain(hostile, pickled):
    hostile(saved(pickled))
    assert "cannot be read" in refused()


def test_what_torch_saves_is_read_as_it_was():
    from headwise.interventions.remote import plain

    random = np.random.RandomState(0)
    whole = torch.from_numpy(random.standard_normal((6, 5, 4)))
    given = {
        "a": whole,
        "b": whole.float(),
        "part": whole.float()[1:, ::2, 1:].transpose(0, 2),
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "plain": [1, -(2**40), 2.5, True, None, "text", "ü" * 300, (1, "x"), {"y": []}, (), 2**70],
    }
    made = io.BytesIO()
    torch.save(given, made)
    found = plain.read(made.getvalue())
    assert found["plain"] == given["plain"]
    for name in ("a", "b", "part", "one", "none"):
        assert found[name].dtype == given[name].dtype
        assert torch.equal(found[name], given[name])


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "f" * 10**6},
        {"dtype": "\x1b[31mfloat32"},
        {"dtype": None},
        {"device": ["cpu"]},
        {"attention": 3},
        {"configuration": DEEP},
        {"configuration": "[]"},
        {"configuration": '{"n_layer": ' + "[" * 900 + "]" * 900 + "}"},
        {"configuration": '{"n_layer": "' + "x" * 900_000 + '"}'},
        {"weights": [["w", [1], "torch.float32", "1"]]},
        {"weights": [["w" * 10**6, [1], "torch.float32", 1]]},
        {"weights": 3},
        {"modules": {"a": ["b"]}},
        {"modules": []},
        {"fingerprint": FACTS["fingerprint"].float()},
        {"fingerprint": FACTS["fingerprint"][:2]},
        {"fingerprint": [1.0]},
    ],
)
def test_facts_that_make_no_sense(hostile, change):
    hostile(packed({"results": FACTS | change}))
    told = refused()
    assert "a result of http" in told or "words-2l has another configuration" in told


@pytest.mark.parametrize("results", [None, [], {}, "text", {"fingerprint": FACTS["fingerprint"]}])
def test_results_that_are_none(hostile, results):
    hostile(packed({"results": results}))
    refused()


# What a job gives is what it was asked for.


@pytest.fixture
def wanted(words_model):
    return measure(words_model, TASK, None, [loss])


@pytest.mark.parametrize(
    "how", ["broadcast", "rows", "fewer", "more", "double", "renamed", "shapes", "negative", "extra"]
)
def test_values_that_were_not_asked_for(server, monkeypatch, how, wanted):
    """A run whose loss comes as one number was spread over all examples, without a word."""
    there = hw.load("words-2l", remote=True)
    there.identity  # noqa: B018
    server.fault("tamper", how)
    with pytest.raises(ServerError, match=r"a result of http://127.0.0.1:\d+ cannot be read: "):
        measure(there, TASK, None, [loss], check=False)
    found = measure(there, TASK, None, [loss], check=False)
    np.testing.assert_allclose(found["baseline_loss"], wanted["baseline_loss"], rtol=1e-6)


@pytest.mark.parametrize("act", ["capture", "composition", "check", "estimate"])
def test_other_jobs_are_looked_at_too(server, act):
    there = hw.load("words-2l", remote=True)
    there.identity  # noqa: B018
    server.fault("tamper", "double")
    heads = {"zero": remote_client.ZeroAblate(remote_client.Head(1, 2))}
    with pytest.raises(ServerError, match=r"a result of .* cannot be read: it does not hold the"):
        {
            "capture": lambda: capture(there, TASK, [remote_client.Head(1, 2)], check=False),
            "composition": lambda: composition_scores(there, check=False),
            "check": lambda: measure(there, TASK, heads, [loss]),
            "estimate": lambda: measure(there, TASK, heads, [loss], estimator="gradient", check=False),
        }[act]()


@pytest.mark.parametrize("positions", [False, True])
def test_the_bound_of_a_result_is_its_own_size(server, words_model, positions, monkeypatch):
    """What is asked for fits, with little room; twice as much does not."""
    found = []
    real = queue.RemoteJob.taken

    def watched(job, results):
        found.append(job.most)
        return real(job, results)

    monkeypatch.setattr(queue.RemoteJob, "taken", watched)
    there = hw.load("words-2l", remote=True)
    grid = {
        f"{layer}.{head}": remote_client.ZeroAblate(remote_client.Head(layer, head))
        for layer in range(2)
        for head in range(8)
    }
    given = {"per_position": positions, "check": False}
    same = measure(there, TASK, grid, [loss, induction], **given)
    wanted = measure(words_model, TASK, grid, [loss, induction], **given)
    np.testing.assert_allclose(same["loss"], wanted["loss"], rtol=1e-6, atol=1e-6)
    assert max(found[1:]) < protocol.ROOM + 2**20


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
