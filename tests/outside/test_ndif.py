"""Against the real NDIF server (`make ndif`): its numbers are those of this machine."""

import itertools
import os
import shutil
import signal
import subprocess
import sys

import httpx
import numpy as np
import pytest
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.interventions import Add, Head, Knockout, Layer, MeanAblate, Patch, PathPatch, Scale, ZeroAblate
from headwise.interventions.models.locate import SHIPPED
from headwise.interventions.remote import patience, protocol
from headwise.metrics import accuracy, induction, kl, logit_diff, loss
from headwise.studies import InductionStudy, RepeatedTokens, capture, composition_scores, measure

HOST = os.environ.get("HEADWISE_NDIF")
STORE = os.environ.get("HEADWISE_NDIF_STORE")
UNTRUSTED = os.environ.get("HEADWISE_NDIF_UNTRUSTED")
pytestmark = [
    pytest.mark.ndif,
    pytest.mark.skipif(not HOST, reason="no NDIF server: `make ndif` starts one and runs this"),
]
LIMIT = int(os.environ.get("HEADWISE_NDIF_LIMIT", "600"))
"""Seconds that a test may take: the whole study, of jobs that run apart from the weights, takes minutes."""
TASK = RepeatedTokens(n=4, length=8)
WHAT = {
    "zero": ZeroAblate(Head(1, 2)),
    "mean": MeanAblate(Head(0, 3)),
    "steer": Add(Layer(1).resid_pre.at(-1), [0.1] * 64),
    "half": Scale(Head(1, 2), 0.5),
    "blind": Knockout(Head(1, 2), 9, 2),
    "pattern": Patch(Head(1, 2).pattern),
    "path": PathPatch(Head(0, 3), Head(1, 2).k),
    "two": ZeroAblate(Head(0, 1)) + Patch(Head(1, 2).v),
}
KILLED = """
import logging
import sys
logging.basicConfig(level=logging.INFO)
import headwise as hw
from headwise.interventions import Grid, Head, ZeroAblate
from headwise.metrics import loss
from headwise.studies import InductionStudy, RepeatedTokens, measure
heads = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(8))
model = hw.load("words-2l", remote=True)
model.identity
print("go", file=sys.stderr, flush=True)
measure(model, RepeatedTokens(n=64, length=25), heads, [loss], out=sys.argv[1], check=False)
"""


@pytest.fixture(autouse=True)
def _limit():
    """Ends a test that hangs, where it hangs."""

    def late(number, frame):
        pytest.fail(f"no end after {LIMIT} s")  # no Exception, which what waits for a server would take for a fault

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def same(found, wanted):
    assert set(found.data_vars) == set(wanted.data_vars)
    for name, values in wanted.data_vars.items():
        if values.dtype.kind in "fiu":
            np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=str(name))


@pytest.fixture
def there(monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", HOST)
    return hw.load("words-2l", remote=True)


@pytest.fixture(params=["trusted", "untrusted"])
def both(request, there, monkeypatch):
    """With a key that is trusted with the weights, and with one whose jobs run apart from them."""
    if request.param == "untrusted":
        with_key(monkeypatch, UNTRUSTED)
    return there


def with_key(monkeypatch, key):
    if not UNTRUSTED:
        pytest.skip("this server takes any key, as Postgres is not installed")
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", key)


@pytest.mark.parametrize("metrics", [[loss, accuracy, kl], [logit_diff], [induction]])
def test_numbers_are_those_of_this_machine(both, words_model, metrics):
    found = measure(both, TASK, WHAT, metrics)
    same(found, measure(words_model, TASK, WHAT, metrics))
    assert found.attrs["executed"] == HOST


def test_captured(both, words_model):
    sites = [Head(1, 2).pattern, Head(0, 1), Layer(0).resid_post, Head(1, 3).k.at([2, -1])]
    same(capture(both, TASK, sites), capture(words_model, TASK, sites))


def test_composition(both, words_model):
    same(composition_scores(both), composition_scores(words_model))


def test_the_study(both, words_model, request):
    study = InductionStudy(n=4, length=6, draws=2)
    found, wanted = study.run(both), study.run(words_model)
    assert found.attrs["heads"] == wanted.attrs["heads"]
    missing = {"estimates"} if "untrusted" in request.node.name else set()
    assert set(wanted.children) - set(found.children) == missing
    for name, node in found.children.items():
        same(node.dataset, wanted[name].dataset)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (None, "wants a key, and nnsight found none: Missing or invalid API key"),
        ("my-secret", "refuses the key that nnsight found: Invalid API key format: '<key>'"),
        ("5a1f0e5c-7c0f-4d0e-9b59-3c0ffee0c0de", "refuses the key that nnsight found: Invalid API key (403)"),
    ],
)
def test_a_key_that_is_missing_or_refused(there, monkeypatch, key, words, tmp_path, caplog):
    with_key(monkeypatch, key)
    with pytest.raises(hw.errors.ServerError) as caught:
        measure(there, TASK, WHAT, [loss], out=tmp_path / "out.nc")
    assert words in str(caught.value)
    assert "`nnsight login` or set NDIF_API_KEY" in str(caught.value)
    assert "\n" not in str(caught.value)
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not key or key not in str(caught.value) + caplog.text + str(kept)


def test_a_model_that_is_not_there(there, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(SHIPPED / "words-2l", gone, ignore=shutil.ignore_patterns("checkpoints"))
    model = hw.load(str(gone), remote=True)
    shutil.rmtree(gone)
    with pytest.raises(hw.errors.ServerError, match=r"gone cannot be had on .*; `print\(nnsight.status\(\)\)` lists"):
        measure(model, TASK, WHAT, [loss])


def test_estimates_need_weights(there, monkeypatch):
    with_key(monkeypatch, UNTRUSTED)
    with pytest.raises(hw.errors.ServerError, match="apart from the weights, where nothing has a gradient"):
        measure(there, TASK, {"v": Patch(Head(1, 2).v)}, [loss], estimator="gradient")


def test_estimates(there, words_model):
    what = {"v": Patch(Head(1, 2).v)}
    same(*(measure(model, TASK, what, [loss], estimator="gradient") for model in (there, words_model)))


def test_a_late_status_in_the_place_of_the_end(both, words_model, monkeypatch, tmp_path):
    """As one of the server's processes does on a busy machine: then nothing leads to the result."""
    monkeypatch.setattr(patience, "STILL", 1.0)
    monkeypatch.setattr(patience, "LOST", 3.0)
    late = []
    real = protocol.NdifRequest.poll

    def poll(line):
        found = real(line)
        ended = found is not None and found.status == "COMPLETED"
        if not ended or len(late) == 2 or line.job_id in late:
            return found
        late.append(line.job_id)
        stored = httpx.get(f"{HOST}/response/{line.job_id}").json()
        stored |= {"status": "QUEUED", "description": "Moved to position 1 in Queue.", "data": None}
        signed = {"Authorization": "AWS test:not-looked-at"}
        httpx.put(f"{STORE}/responses/{line.job_id}.json", json=stored, headers=signed).raise_for_status()
        return real(line)

    monkeypatch.setattr(protocol.NdifRequest, "poll", poll)
    with pytest.warns(hw.errors.ServerWarning, match="is said to be queued, and a job that was sent after it has run"):
        found = measure(both, TASK, WHAT, [loss], out=tmp_path / "out.nc")
    assert late
    same(found, measure(words_model, TASK, WHAT, [loss]))


def test_a_killed_client_goes_on(there, tmp_path):
    out = tmp_path / "killed.nc"
    first = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stderr=subprocess.PIPE, text=True)
    lines = iter(first.stderr.readline, "")
    assert any(line == "go\n" for line in lines)
    sent = [line for line in itertools.islice((line for line in lines if "sent job" in line), 2)]
    assert len(sent) == 2, "which model it is, and the sweep"
    first.kill()
    first.wait()
    first.stderr.close()
    assert not out.is_file()
    again = subprocess.run([sys.executable, "-c", KILLED, str(out)], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert out.is_file()
    assert again.stderr.partition("\ngo\n")[2].count("sent job") == 1, "which model it is, and nothing of the sweep"
