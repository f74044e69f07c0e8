"""A client that is killed finds its jobs again, nothing runs twice, and no key is written anywhere."""

import json
import signal
import time
import traceback

import pytest
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.errors import ServerError
from headwise.interventions.remote import queue
from tests.support import remote_client
from tests.support.loopback import KEY, Loopback
from tests.support.remote_sweeps import JOBS, client, same, swept, wait_for


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


def test_no_key_is_written_anywhere(server, tmp_path, monkeypatch, caplog, capfd):
    """Neither while jobs are under way, nor where one fails, nor in what is there in the end."""
    caplog.set_level("DEBUG")
    out, kept, real = tmp_path / "out.nc", [], queue.JobQueue._send

    def look(*given):
        kept.extend(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    def sent(self, *given):
        real(self, *given)
        look()

    monkeypatch.setattr(queue.JobQueue, "_send", sent)
    server.fault("execute", "error", detail=f"ValueError: somebody said {KEY}")
    with pytest.raises(ServerError) as caught:
        swept(out)
    server.fault("response", "503", times=2, detail=f"{KEY} has to wait")
    swept(out)
    look()
    told = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    assert KEY not in told
    assert not [one for one in kept if KEY.encode() in one]
    assert any(b'"state": "sent"' in one for one in kept), "what was written down of jobs was looked at"
    assert any(b"executed" in one for one in kept)


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


@pytest.mark.heavy
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
