"""What does not pass is told in a line: errors of a server, keys, addresses, models that it does not have."""

import traceback

import httpx
import pytest
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.errors import ServerError
from headwise.interventions.remote import patience, protocol
from headwise.metrics import loss
from headwise.studies import measure
from tests.support.loopback import KEY
from tests.support.remote_sweeps import TASK, swept

LARGE = "413 Request Entity Too Large"


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
