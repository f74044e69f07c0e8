"""Who is let in to the app: by which names it is asked for, how many at once, and how much each may send."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from bokeh.util.token import check_token_signature, get_session_id
from panel.io.server import DocHandler, WSHandler
from tornado.routing import Matcher, Rule
from tornado.web import OutputTransform, RequestHandler

from ...errors import DeclarationError, printable

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::", "")
NAME = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::(?P<port>[0-9]{1,5}))?")
"""A host as an address bar shows it."""
PLACES = re.compile(r"/(|ws|favicon\.ico|static/.*)")
"""What a page of ours asks for; Bokeh would also serve scripts that put the app into pages of other sites."""
SESSIONS = 100
"""Pages open at once."""
CONNECTIONS = 4
"""To one of them."""
PATIENCE = 12.0
"""Seconds until a page is made, beyond which its reader is asked to come back."""
BREATH = 0.02
"""Seconds between two pages, in which the pages that are there are served."""
GUESS = 0.5
"""Seconds that a page takes, until one was made."""
MESSAGE = 1_000_000
"""Bytes of a message from a page, and of a request."""
BURST, RATE, FRAGMENT = 4_000_000, 20_000, 500
"""Bytes that a page may send at once, and for each second that it is open; what a piece of a message costs besides."""
BUSY = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{seconds}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>headwise is busy</title></head>
<body style="font: 16px/1.5 system-ui, sans-serif; max-width: 34rem; margin: 3rem auto; padding: 0 1rem">
<h1 style="font-size: 1.2rem">The app is busy</h1>
<p>Too many pages are being opened at this moment. This one tries again by itself in {seconds} seconds.</p>
</body></html>
"""


def names_of(address: str, port: int, allow: Iterable[str] = ()) -> list[str]:
    """The names, ``host:port``, under which a server that listens there answers.

    Raises
    ------
    DeclarationError
        A name in `allow` is none.
    """
    names = {*LOOPBACK[:2]} if address in (*LOOPBACK, *EVERYWHERE) else {address.lower()}
    if address in EVERYWHERE:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        with contextlib.suppress(OSError):  # a host that does not know its own name
            names |= {str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None)}
    if ":" in address:
        names.add("::1" if address in EVERYWHERE else address.lower())
    return sorted({f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name in names} | set(_allowed(allow)))


def _allowed(allow: Iterable[str]) -> Iterable[str]:
    for one in [allow] if isinstance(allow, str) else allow:
        name = asked_for(str(one))
        if not name:
            raise DeclarationError(
                f"allow={one!r}: write a host as the address bar shows it, such as lab.example or lab.example:8080"
            )
        yield name


def asked_for(host: str) -> str:
    """The ``host:port`` that a Host header, or a user, means; empty where it is none."""
    found = NAME.fullmatch(host.lower())
    if found is None:
        return ""
    name, port = found["name"], int(found["port"] or 80)
    if name.startswith("["):
        try:
            name = f"[{ipaddress.IPv6Address(name[1:-1])}]"
        except ValueError:
            return ""
    return f"{name}:{port}"


class PageQueue:
    """Makes pages one after another, and says when there are too many. One page of Bokeh's takes its time to make."""

    def __init__(self) -> None:
        self._turn, self._waiting, self._seconds = asyncio.Lock(), 0, GUESS

    def wait(self, sessions: int) -> int:
        """Seconds after which a reader should come back; 0 where a page can be made in time."""
        seconds = self._seconds * (self._waiting + 1)
        if sessions + self._waiting >= SESSIONS:
            return 30
        return 0 if seconds <= PATIENCE else 5 + int(seconds / 2)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the pages before this one."""
        self._waiting += 1
        try:
            async with self._turn:
                await asyncio.sleep(BREATH)
                began = time.monotonic()
                yield
                self._seconds += (time.monotonic() - began - self._seconds) / 3
        finally:
            self._waiting -= 1


class PageHandler(DocHandler):  # type: ignore[misc]
    """The page, once it is its turn."""

    gone = False

    def on_connection_close(self) -> None:
        """Note that nobody waits for this page."""
        self.gone = True
        super().on_connection_close()

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Make the page, or ask its reader to come back."""
        queue: PageQueue = self.application.settings["page queue"]
        seconds = queue.wait(len(list(self.application_context.sessions)))
        if seconds:
            self.set_status(503)
            self.set_header("Retry-After", str(seconds))
            self.set_header("Cache-Control", "no-store")
            self.finish(BUSY.format(seconds=seconds))
            return
        async with queue.turn():
            if not self.gone:
                await super().get(*args, **kwargs)


class SocketHandler(WSHandler):  # type: ignore[misc]
    """What a page says and is told; a page of ours says little."""

    taken = 0

    def open(self) -> None:
        """Open the connection of a page that was made here, unless there are too many."""
        self.since = time.monotonic()
        known = {session.id: session for session in self.application_context.sessions}
        app, token = self.application, self._token or ""
        try:
            signed = check_token_signature(token, secret_key=app.secret_key, signed=app.sign_sessions)
            session = known.get(get_session_id(token))
        except Exception:  # whatever it is, it is no token
            signed = False
        if not signed or self.selected_subprotocol != "bokeh":
            self.close(1008, "no page was made for this session")
            return
        if len(known) >= SESSIONS if session is None else session.connection_count >= CONNECTIONS:
            self.close(1013, "too many pages are open")
            return
        super().open()

    async def on_message(self, fragment: str | bytes) -> None:
        """Take a piece of a message, unless the page says more than any page of ours would."""
        self.taken += len(fragment) + FRAGMENT
        if self.taken > BURST + RATE * (time.monotonic() - self.since):
            self.close(1009, "too much was sent")
        elif self.ws_connection is not None:
            await super().on_message(fragment)


class _Refused(RequestHandler):
    """Answers in one plain line."""

    def initialize(self, status: int, said: str) -> None:
        """Keep the status code and the text of the answer."""
        self._answer = status, said

    def prepare(self) -> None:
        """Answer any request with the status code and the text."""
        status, said = self._answer
        self.set_status(status)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{said}\n")


class _NotForUs(Matcher):
    """Requests that are not for this app, or not from a page of its own."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def match(self, request: Any) -> dict[str, Any] | None:
        """How to refuse a request; None where it is one of ours."""
        hosts = request.headers.get_list("Host")
        mode = tuple(request.headers.get(f"Sec-Fetch-{one}", "") for one in ("Mode", "Dest"))
        if len(hosts) != 1 or asked_for(hosts[0]) not in self.names:
            host = printable(", ".join(hosts))[:200] or "no name"
            known = ", ".join(self.names)
            said = f"the app is not served as {host}, only as {known}: start it with --allow {host} for more"
            status = 421
        elif request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site") and mode != ("navigate", "document"):
            status, said = 403, "the app is no part of pages of other sites"
        elif not PLACES.fullmatch(request.path):
            status, said = 404, "there is no such page"
        else:
            return None
        return {"target_kwargs": {"status": status, "said": said}}


class _Headers(OutputTransform):
    """What every answer says besides: it stays in a window of its own, and tells no other site of its address."""

    def transform_first_chunk(
        self, status_code: int, headers: Any, chunk: bytes, finishing: bool
    ) -> tuple[int, Any, bytes]:
        """Add headers that keep a page from being framed, or read by other sites."""
        headers["X-Frame-Options"] = "DENY"
        headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
        headers["Cross-Origin-Resource-Policy"] = "same-origin"
        return status_code, headers, chunk


def guard(server: Any, names: Iterable[str]) -> None:
    """Let a Bokeh server answer to these names alone, and to as many pages as it can bear."""
    application = server._tornado
    application.settings["page queue"] = PageQueue()
    application.add_transform(_Headers)
    ours = {DocHandler: PageHandler, WSHandler: SocketHandler}
    for rule in application.wildcard_router.rules:
        rule.target = ours.get(rule.target, rule.target)
    application.default_router.rules.insert(0, Rule(_NotForUs(names), _Refused))
