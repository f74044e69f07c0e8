"""Results of a hostile server: larger than they say, no plain data, or not what was asked for."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import ServerError
from headwise.interventions.remote import protocol, queue
from headwise.metrics import induction, loss
from headwise.studies import RepeatedTokens, capture, composition_scores, measure
from tests.support import remote_client
from tests.support.hostile_server import (
    Peak,
    archive,
    bomb,
    packed,
)
from tests.support.refused import ALLOWED, FACTS, linux, refused

TASK = RepeatedTokens(n=2, length=6)


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
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.heavy if kind.startswith("many ") else ()) for kind in BOMBS]
)
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
