"""Who is let in to the app: names, origins, sessions."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request

import pytest

from headwise.errors import DeclarationError
from tests.support.app import (
    answer,
    in_this_process,
    needs_panel,
    said_first,
    websocket,
)


def test_it_listens_on_loopback_only(served):
    port = int(served.rsplit(":", 1)[1].strip("/"))
    own = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in own - {"127.0.0.1"}:
        if address.startswith("127."):
            continue
        with socket.socket() as probe:
            assert probe.connect_ex((address, port)) != 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    "path",
    [
        "../secret.nc",
        "a-study.nc",
        "static/../../secret.nc",
        "static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "static/extensions/panel/../../../../../../etc/passwd",
        "components/os/path/__file__/..%2f..%2fetc/passwd",
        "admin",
        "rest/session_info",
    ],
)
def test_no_file_can_be_fetched(served, path):
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(served + path):
        pass
    assert refused.value.code in (400, 403, 404)
    refused.value.close()


def test_pages_from_elsewhere_cannot_open_a_session(served):
    port = served.rsplit(":", 1)[1].strip("/")
    assert websocket(served, "http://evil.example") == 403
    assert websocket(served, f"http://evil.example:{port}") == 403
    assert websocket(served, f"http://localhost:{int(port) + 1}") == 403


@needs_panel
def test_names_are_those_it_is_reached_under():
    from headwise.studies.app import gate

    assert gate.names_of("127.0.0.1", 80) == ["127.0.0.1:80", "localhost:80"]
    assert gate.names_of("10.1.2.3", 80) == ["10.1.2.3:80"]
    assert gate.names_of("fe80::1", 80) == ["[fe80::1]:80"]
    assert {"127.0.0.1:80", f"{socket.gethostname().lower()}:80"} <= set(gate.names_of("0.0.0.0", 80))
    assert gate.names_of("127.0.0.1", 81, ["Lab.Example", "lab.example:8080", "[::1]"]) == [
        "127.0.0.1:81",
        "[::1]:80",
        "lab.example:80",
        "lab.example:8080",
        "localhost:81",
    ]
    for name in ("*", "http://lab.example", "a b", "", "lab.example/", "user@lab.example", "[::1", "a:999999"):
        with pytest.raises(DeclarationError, match="as the address bar shows it"):
            gate.names_of("127.0.0.1", 80, [name])


UPGRADE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Protocol: bokeh, none",
)


STRANGERS = {
    "another name": ["Host: evil.example:{port}"],
    "another name, no port": ["Host: evil.example"],
    "a name that ends in ours": ["Host: 127.0.0.1.evil.example:{port}"],
    "a name that begins with ours": ["Host: localhost.evil.example:{port}"],
    "another port": ["Host: 127.0.0.1:1"],
    "no port": ["Host: 127.0.0.1"],
    "a user": ["Host: 127.0.0.1:{port}@evil.example"],
    "a user in front": ["Host: evil.example@127.0.0.1:{port}"],
    "a trailing dot": ["Host: localhost.:{port}"],
    "another address of loopback": ["Host: 127.0.0.2:{port}"],
    "a number": ["Host: 2130706433:{port}"],
    "an IPv6 address": ["Host: [::1]:{port}"],
    "all": ["Host: 0.0.0.0:{port}"],
    "a wildcard": ["Host: *:{port}"],
    "two names": ["Host: 127.0.0.1:{port}", "Host: evil.example:{port}"],
    "two names in one": ["Host: 127.0.0.1:{port}, evil.example:{port}"],
    "no name": [],
    "an empty name": ["Host: "],
    "forwarded": ["Host: evil.example:{port}", "X-Forwarded-Host: 127.0.0.1:{port}", "Forwarded: host=localhost"],
    "a matching origin": ["Host: evil.example:{port}", "Origin: http://evil.example:{port}"],
}


@pytest.mark.parametrize("case", STRANGERS)
def test_another_name_than_those_it_is_served_as_gets_nothing(served, case):
    """DNS rebinding: a page of another site whose name leads here gets no page, no file, no token and no session."""
    port = served.rsplit(":", 1)[1].strip("/")
    head = [line.format(port=port) for line in STRANGERS[case]]
    places = ("/", "/static/js/bokeh.min.js", "/favicon.ico", "/autoload.js?bokeh-autoload-element=a", "/metadata")
    for path in places if "name" in case else ("/",):
        status, _, body = answer(served, head, path)
        assert status in (400, 421)
        assert "token" not in body
        assert "Bokeh" not in body
    assert answer(served, [*head, *UPGRADE], "/ws")[0] in (400, 403, 421)
    if case == "another name":
        assert answer(served, head, "/", "POST")[0] == 421
        said = answer(served, head)[2]
        assert said == (
            f"the app is not served as evil.example:{port}, only as 127.0.0.1:{port}, localhost:{port}: "
            f"start it with --allow evil.example:{port} for more\n"
        )


def test_an_address_in_the_request_line_is_no_way_around_the_name(served):
    port = served.rsplit(":", 1)[1].strip("/")
    for target in (f"http://127.0.0.1:{port}/", f"http://evil.example:{port}/", "//evil.example/", "*", "/../"):
        status, _, body = answer(served, [f"Host: 127.0.0.1:{port}"], target)
        assert status in (400, 404)
        assert "token" not in body


def test_its_own_names_get_the_page_however_they_are_written(served):
    port = served.rsplit(":", 1)[1].strip("/")
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LocalHost:{port}"):
        status, head, body = answer(served, [f"Host: {host}"], "/favicon.ico")
        assert status == 200
    status, head, body = answer(served, [f"Host: 127.0.0.1:{port}"])
    assert status == 200
    assert '"token"' in body
    for line in ("X-Frame-Options: DENY", "frame-ancestors 'none'", "Referrer-Policy: no-referrer", "nosniff"):
        assert line in head


@pytest.mark.parametrize(
    ("site", "mode", "dest", "status"),
    [
        ("cross-site", "no-cors", "script", 403),
        ("cross-site", "navigate", "iframe", 403),
        ("same-site", "cors", "empty", 403),
        ("cross-site", "navigate", "document", 200),
        ("same-origin", "no-cors", "script", 200),
        ("none", "navigate", "document", 200),
    ],
)
def test_other_sites_can_link_to_it_and_no_more(served, site, mode, dest, status):
    port = served.rsplit(":", 1)[1].strip("/")
    fetch = [f"Sec-Fetch-Site: {site}", f"Sec-Fetch-Mode: {mode}", f"Sec-Fetch-Dest: {dest}"]
    assert answer(served, [f"Host: 127.0.0.1:{port}", *fetch], "/favicon.ico")[0] == status


def test_what_puts_it_into_other_pages_is_not_served(served):
    port = served.rsplit(":", 1)[1].strip("/")
    for path in ("/autoload.js?bokeh-autoload-element=a", "/metadata", "/components/panel", "/static", "/index.html"):
        assert answer(served, [f"Host: 127.0.0.1:{port}", "Origin: http://evil.example"], path)[0] == 404


@needs_panel
def test_a_further_name_is_allowed_by_name(folder):
    with in_this_process(folder, allow=["lab.example"]) as (_, served):
        assert answer(served, ["Host: lab.example"], "/favicon.ico")[0] == 200
        assert answer(served, ["Host: lab.example:81"], "/favicon.ico")[0] == 421
        assert websocket(served, "https://lab.example") == 101
        assert websocket(served, "http://evil.example") == 403


def test_a_session_needs_what_a_page_was_given(served):
    """A made-up token, and one that another server signed, open no session."""
    from bokeh.util.token import generate_jwt_token, generate_session_id

    made_up = generate_jwt_token("mine")
    foreign = generate_jwt_token(generate_session_id("key", signed=True), "key", signed=True)
    for token in (made_up, foreign, "none"):
        assert said_first(served, token) is None
    assert answer(served, [f"Host: {served.split('/')[2]}"], "/?bokeh-session-id=mine")[0] == 403
    body = answer(served, [f"Host: {served.split('/')[2]}"])[2]
    token = json.loads(body[body.index('{"token":') :].partition("}")[0].partition(",")[0] + "}")["token"]
    assert "ACK" in said_first(served, token)
