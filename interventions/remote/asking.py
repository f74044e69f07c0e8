"""One question to a server: every read of one goes through `fetch`, which bounds what comes, and when.

Knows too which addresses may be asked: where a key may be sent, and where a server may send its client for a result.
"""

from __future__ import annotations

import ipaddress
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import httpx

from .plain import Oversize

CONNECT = 10.0
"""Seconds that a question waits for a connection."""
STATUS = 4 * 2**20
"""Bytes of an answer in words; as objects it may take twenty times as many."""
PACE = 2**14
"""Bytes a second that an answer must come with, on the whole, once it takes longer than answers do."""
TICK = 0.25
"""Seconds between two signs that a question is still being asked."""
ALLOW = "HEADWISE_ALLOW_HTTP"
"""Set to 1, it lets the key go to a server whose address is http:// on another machine."""
LONGEST = 8192
"""Characters of an address."""


@cache
def trusted() -> ssl.SSLContext:
    """Who is trusted to say that a server is the one that it says it is; takes long to make."""
    return httpx.create_ssl_context()


def fetch(
    method: str,
    url: str,
    *,
    most: int,
    silent: float,
    seconds: float,
    headers: dict[str, str] | None = None,
    tick: Callable[[], object] | None = None,
    **body: Any,
) -> httpx.Response:
    """Ask a question, and take the whole answer. Follows nobody elsewhere, and unpacks nothing.

    The question is asked in a thread: nothing else puts an end to a name that is looked up for minutes, or to an answer
    that comes byte by byte, while this one takes Ctrl-C.

    Parameters
    ----------
    method, url : str
    most : int
        Bytes that the answer may have.
    silent, seconds : float
        Seconds in which something more must come, and in which all of it must; a large answer that comes at `PACE` has
        longer.
    headers : dict, optional
    tick : callable, optional
        Called now and then, and may end the question by raising.
    **body
        What goes with the question, as httpx takes it.

    Returns
    -------
    httpx.Response
        Its code and its bytes; no headers.

    Raises
    ------
    Oversize
        The answer is larger.
    httpx.HTTPError
        There is none, or none in time.
    """
    answers: queue.SimpleQueue[httpx.Response | BaseException] = queue.SimpleQueue()
    streams: list[Any] = []
    over, came = threading.Event(), bytearray()

    def note(event: str, about: dict[str, Any]) -> None:
        """Keep each connection, so that it can be closed; end the question where nobody waits any more."""
        if over.is_set():
            raise httpx.ReadTimeout("nobody waits any more")
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            streams.append(about["return_value"])

    def ask() -> None:
        """Put the answer, or what was raised, into the queue."""
        try:
            more = {**body, "headers": {"accept-encoding": "identity", **(headers or {})}}
            answers.put(_answer(method, url, came, most, silent, {**more, "extensions": {"trace": note}}))
        except BaseException as error:
            answers.put(error)

    thread = threading.Thread(target=ask, name="headwise question", daemon=True)
    thread.start()
    until = time.monotonic() + seconds
    try:
        while (left := until + len(came) / PACE - time.monotonic()) > 0:
            with suppress(queue.Empty):
                found = answers.get(timeout=min(TICK, left))
                break
            if tick is not None:
                tick()
        else:
            raise httpx.ReadTimeout(f"no whole answer within {seconds + len(came) / PACE:.0f} seconds")
    except BaseException:
        over.set()
        for stream in streams:
            with suppress(OSError):  # it has ended by itself
                stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        raise
    thread.join(1.0)
    if isinstance(found, BaseException):
        raise found
    return found


def _answer(method: str, url: str, came: bytearray, most: int, silent: float, more: dict[str, Any]) -> httpx.Response:
    """The answer, with its code and body and nothing else; `came` gets the body."""
    wait, proxied = httpx.Timeout(silent, connect=min(CONNECT, silent)), not is_loopback(httpx.URL(url).host)
    with (
        httpx.Client(verify=trusted(), timeout=wait, trust_env=proxied) as client,
        client.stream(method, url, **more) as response,
    ):
        most = most if response.is_success else min(most, STATUS)
        for piece in response.iter_raw():
            came += piece
            if len(came) > most:
                raise Oversize(f"it answers with more than {most:,} bytes")
        return httpx.Response(response.status_code, content=bytes(came), request=httpx.Request(method, url))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: by its name, or by an address that is written in full."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def goes_in_clear(host: str) -> bool:
    """Whether what is sent to a server can be read on its way, and nobody has said that it may be."""
    url = httpx.URL(host)
    return url.scheme != "https" and not is_loopback(url.host) and os.environ.get(ALLOW) != "1"


def is_address(text: str) -> bool:
    """Whether a text is the address of a server, and nothing that one reader takes for another host than the next."""
    if len(text) > LONGEST or not text.isprintable() or any(sign in text for sign in " \\@#?"):
        return False
    try:
        url = httpx.URL(text)
        return url.scheme in ("http", "https") and bool(url.host)
    except httpx.InvalidURL:
        return False


def unsafe(url: str, host: str) -> str:
    """Why the address of a result is not gone to, in words; empty where it is.

    It is where the server is, or anywhere over https; not on this machine, where the server is on another.

    Parameters
    ----------
    url : str
        As the server says.
    host : str
        Address of the server.
    """
    plain = len(url) <= LONGEST and url.isascii() and url.isprintable() and not set(url) & set(" \\#")
    if not plain or not is_address(url.partition("?")[0]):
        return "which is no address of a result"
    there, server = httpx.URL(url), httpx.URL(host)
    own = there.host == server.host or (is_loopback(there.host) and is_loopback(server.host))
    if there.scheme != "https" and not (own and server.scheme == "http"):
        return f"at {there.scheme}://{there.host[:100]}: it must be over https" + (
            ", or where the server is" if server.scheme == "http" else ""
        )
    return "" if own or not _is_inside(there.host) else f"at {there.host[:100]}, which only this machine can see"


def _is_inside(host: str) -> bool:
    """Whether a host is this machine or what only it can reach, in any way in which an address can be written."""
    try:
        address: Any = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # 127.1, 0x7f000001
        except OSError:
            return host.lower().rstrip(".").rpartition(".")[2] == "localhost"
    address = getattr(address, "ipv4_mapped", None) or address
    return bool(address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast)
