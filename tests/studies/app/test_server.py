"""The server of the app: how many pages at once, how much each may send, and what it says where it cannot serve."""

from __future__ import annotations

import json
import socket
import sys
import time

import pytest

import headwise as hw
from headwise.errors import DeclarationError, ResultError
from tests.support.app import (
    answer,
    at_once,
    in_this_process,
    needs_panel,
    said_first,
)


@needs_panel
def test_many_pages_at_once_are_made_or_told_to_wait(folder, monkeypatch):
    """Fifty readers at once: those for whom a page can be made in time get one, the others are told when to come."""
    from headwise.studies.app import gate, session

    made = []

    def slow(*arguments):
        made.append(time.monotonic())
        time.sleep(0.1)
        return session.template(session.EMPTY, "results", files=session.html("<p>a page</p>"))

    monkeypatch.setattr(session, "page", slow)
    monkeypatch.setattr(gate, "GUESS", 0.1)
    monkeypatch.setattr(gate, "PATIENCE", 1.5)
    with in_this_process(folder) as (server, served):
        found = at_once(served, 50)
        counts = {status: [one for one in found if one[0] == status] for status in (200, 503)}
        assert len(counts[200]) + len(counts[503]) == 50
        assert len(counts[200]) == len(made) >= 1
        assert len(counts[503]) >= 50 - 1.5 / 0.1
        for _, head, body in counts[503]:
            seconds = int(head.split("Retry-After: ")[1].split()[0])
            assert f"tries again by itself in {seconds} seconds" in body
            assert f'content="{seconds}"' in body
        monkeypatch.setattr(gate, "SESSIONS", len(made) + 1)
        assert [one[0] for one in at_once(served, 1) + at_once(served, 1)] == [200, 503]
        assert len(server.get_sessions("/")) == len(made) == gate.SESSIONS


@needs_panel
def test_a_file_without_heads_names_the_command_that_shows_it(words_model, tmp_path):
    from headwise.studies.app.firing import Models
    from headwise.studies.app.folder import Folder
    from headwise.studies.app.selection import Selection
    from headwise.studies.app.session import Session

    hw.measure(words_model, hw.RepeatedTokens(n=1, length=4), {"mine": hw.ZeroAblate("L0H3")}, out=tmp_path / "mine.nc")
    shown = Session(Folder(tmp_path), Models(), Selection())
    shown.open(["mine.nc"])
    assert "no variable with a number for each head" in shown.grid_note.object
    assert "No head is in this file: headwise report mine.nc shows what it holds." in shown.heading.object


@needs_panel
def test_a_page_that_says_too_much_is_cut_off(folder, monkeypatch):
    """Messages, and pieces of one that never ends, are bounded; so are the connections to one session."""
    from headwise.studies.app import gate, session

    monkeypatch.setattr(
        session, "page", lambda *_: session.template(session.EMPTY, "results", files=session.html("<p></p>"))
    )
    endless = json.dumps({"msgid": "1", "msgtype": "PATCH-DOC", "num_buffers": 10**9})
    with in_this_process(folder) as (_, served):
        body = at_once(served, 1)[0][2]
        token = json.loads(body[body.index('{"token":') :].partition("}")[0].partition(",")[0] + "}")["token"]
        assert said_first(served, token, "a" * (gate.MESSAGE + 1)) is None
        pieces = [endless, "{}", json.dumps({"events": []}), *([json.dumps({"id": "1"}), b"a" * 900_000] * 6)]
        assert said_first(served, token, *pieces) is None
        assert answer(served, [f"Host: {served.split('/')[2]}", "Content-Length: 999999999"], "/", "POST")[0] in (
            400,
            413,
        )


@needs_panel
def test_what_cannot_be_served_is_said_in_words(folder, tmp_path):
    from headwise.studies.app import serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DeclarationError, match=f"port {port} is in use"):
            serve(folder, port=port, show=False)
    with pytest.raises(DeclarationError, match="give a number"):
        serve(folder, port=70000, show=False)
    with pytest.raises(DeclarationError, match=r"cannot listen at 203\.0\.113\.1"):
        serve(folder, address="203.0.113.1", port=0, show=False)
    with pytest.raises(ResultError, match="does not exist"):
        serve(tmp_path / "nowhere", show=False)


def test_without_panel_it_says_how_to_get_it(folder, monkeypatch):
    from headwise.studies.app import serve

    monkeypatch.setitem(sys.modules, "panel", None)
    with pytest.raises(DeclarationError, match=r"pip install 'headwise\[app\]'"):
        serve(folder, show=False)
