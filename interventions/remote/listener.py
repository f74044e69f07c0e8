"""What a server says of jobs on its websocket, heard in a thread while a call lasts.

NDIF answers a job in one of two ways. A job that is sent under the session of a websocket is answered on that websocket
and nowhere else: no later status can hide its last one, and it cannot be asked for where the connection was cut. A job
without a session has its status stored, where any process can ask for it, and where whoever writes last wins.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import socket
import threading
import time
import urllib.request

import httpx
import websocket
from nnsight.schema.response import ResponseModel, Status

from . import plain
from .asking import PACE, STATUS, is_loopback, trusted
from .plain import Oversize
from .protocol import NUMBER, ROOM, brief, said
from .refusals import first_line

LOG = logging.getLogger("headwise.remote")
OPENING = 5.0
"""Seconds in which a websocket is open, or is done without."""
OTHERS = 4
"""Jobs that are not known here of which the last word is kept: a server may give a job another number than ours."""
SILENT = 20.0
"""Seconds without a word after which the server is asked for a sign, which it has as long again to give."""
CLOSING = 2.0
"""Seconds that the end of a call waits for the thread."""
LEFT = 600.0
"""Seconds after which nobody wants to hear any more: a call that is left in the middle of its results has no end."""
WITHOUT: set[str] = set()
"""Servers whose websocket could not be opened by this process: it is not tried again."""
_FINAL = (Status.COMPLETED, Status.ERROR)


class Listener:
    """The websocket of a server, and the last that was heard on it of each job.

    Parameters
    ----------
    host : str
        Address of the server.
    key : str
        That nnsight found; may be empty.

    Attributes
    ----------
    session : str
        What jobs are sent under that are to be answered here; empty where no websocket could be opened.
    """

    def __init__(self, host: str, key: str) -> None:
        self.host, self.key, self.session = host, key, ""
        self._heard: dict[str, ResponseModel] = {}
        self._ours: set[str] = set()
        self._fresh: set[str] = set()
        self._lock, self._news, self._tried = threading.Lock(), threading.Event(), threading.Event()
        self._closed, self._wanted = False, time.monotonic()
        self._plug: http.client.HTTPConnection | None = None
        self._socket: _Socket | None = None
        self._thread = threading.Thread(target=self._listen, name="headwise listener", daemon=True)
        if host not in WITHOUT:
            self._thread.start()
            self._tried.wait(OPENING + 1)
            if not self.session:
                WITHOUT.add(host)
                self.close()

    @property
    def open(self) -> bool:
        """Whether the server is still heard."""
        return bool(self.session) and not self._closed and self._thread.is_alive()

    def expect(self, number: str, most: int) -> None:
        """A job is sent, whose result may have so many bytes."""
        with self._lock:
            self._ours.add(number)
        if self._socket is not None:
            self._socket.most = max(self._socket.most, most + ROOM)

    def heard(self, number: str) -> ResponseModel | None:
        """The last that was said of a job; of a websocket that was cut, only how a job ended."""
        with self._lock:
            response = self._heard.get(number)
        return response if response is not None and (response.status in _FINAL or self.open) else None

    def forget(self, number: str) -> None:
        """A job has ended, and what was said of it, which may be large, is not needed any more."""
        with self._lock:
            self._heard.pop(number, None)
            self._ours.discard(number)

    def wait(self, seconds: float) -> set[str]:
        """Wait until something is heard, or some time; the jobs of which something was."""
        self._news.wait(seconds)
        self._wanted = time.monotonic()
        with self._lock:
            self._news.clear()
            fresh, self._fresh = self._fresh, set()
        return fresh

    def close(self) -> None:
        """Stop listening; the thread ends."""
        self._closed = True
        for holder in (self._plug, self._socket):  # which wakes the thread, at whatever it is
            try:
                if holder is not None and holder.sock is not None:
                    holder.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        if self._thread.is_alive():
            self._thread.join(CLOSING)

    def _listen(self) -> None:
        try:
            self._socket = self._dialled()
            session = json.loads(self._socket.message()[1])["session_id"]
            if not isinstance(session, str) or not NUMBER.fullmatch(session):
                raise ValueError("a websocket without a number")
            self._socket.settimeout(SILENT)
            self.session = session
            self._tried.set()
            self._hear(self._socket)
            LOG.info("the websocket of %s was closed", self.host)
        except Exception as error:  # proxies and servers fail in many ways, and polling does without
            if not self._closed:
                LOG.info("no websocket of %s: %s", self.host, first_line(error, self.key))
        finally:
            for holder in (self._socket, self._plug):
                if holder is not None and holder.sock is not None:
                    holder.sock.close()
            self._tried.set()
            self._news.set()

    def _dialled(self) -> _Socket:
        """A websocket, made through what stands between, with the same trust as any other question."""
        url = httpx.URL(self.host)
        port = url.port or (443 if url.scheme == "https" else 80)
        proxy = None if is_loopback(url.host) or urllib.request.proxy_bypass(url.host) else _proxy(url.scheme)
        place = (proxy.host, proxy.port or 80) if proxy else (url.host, port)
        self._plug = http.client.HTTPConnection(*place, timeout=OPENING)
        if url.scheme == "https":
            self._plug = http.client.HTTPSConnection(*place, timeout=OPENING, context=trusted())
        if proxy:
            who = base64.b64encode(proxy.userinfo).decode()
            self._plug.set_tunnel(url.host, port, {"Proxy-Authorization": f"Basic {who}"} if who else {})
        self._plug.connect()
        if self._closed:
            raise OSError("nobody wants to hear any more")
        made, (scheme, _, rest) = _Socket(), self.host.partition("://")
        header = {"ndif-api-key": self.key} if self.key else None
        address = f"{'wss' if scheme == 'https' else 'ws'}://{rest}/subscribe"
        made.connect(address, socket=self._plug.sock, header=header, redirect_limit=0)  # type: ignore[no-untyped-call]
        return made

    def _hear(self, heard: _Socket) -> None:
        asked = False
        while not self._closed and time.monotonic() - self._wanted < LEFT:
            try:
                kind, content = heard.message()
            except websocket.WebSocketTimeoutException:
                if asked or heard.came:
                    raise
                heard.ping()
                asked = True
                continue
            asked = False
            if kind == websocket.ABNF.OPCODE_CLOSE:
                return
            if kind in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
                self._take(_read(kind, content))

    def _take(self, response: ResponseModel) -> None:
        with self._lock:
            last = self._heard.get(response.id)
            if response.status == Status.LOG or (last is not None and last.status in _FINAL):
                return  # what is said after the end is late
            self._heard[response.id] = response
            self._fresh.add(response.id)
            for other in [one for one in self._heard if one not in self._ours][:-OTHERS]:
                del self._heard[other]
                self._fresh.discard(other)
            self._news.set()


def _read(kind: int, content: bytes) -> ResponseModel:
    """A message: JSON, or, where it carries a result as bytes, what nnsight's `ResponseModel.pickle` made."""
    if kind == websocket.ABNF.OPCODE_TEXT:
        if len(content) > STATUS:
            raise Oversize(f"a status of more than {STATUS:,} bytes")
        return said(content)
    return brief(ResponseModel(**plain.read(content)))


class _Socket(websocket.WebSocket):
    """Takes no message that has more than `most` bytes, or that takes long.

    Attributes
    ----------
    most : int
    came : int
        Bytes of the message that has begun.
    begun : float
        When it did.
    """

    most, came, begun = STATUS, 0, 0.0

    def _recv(self, size: int) -> bytes:
        piece: bytes = super()._recv(size)  # type: ignore[no-untyped-call]
        self.begun = self.begun if self.came else time.monotonic()
        self.came += len(piece)
        if self.came > self.most:
            raise Oversize(f"a message of more than {self.most:,} bytes")
        if time.monotonic() - self.begun > SILENT + self.came / PACE:
            raise websocket.WebSocketTimeoutException("a message that takes too long")
        return piece

    def message(self) -> tuple[int, bytes]:
        """The next one, or the next sign."""
        kind, content = self.recv_data(control_frame=True)
        if self.cont_frame.cont_data is None:  # no sign in the midst of a message
            self.came = 0
        return int(kind), content


def _proxy(scheme: str) -> httpx.URL | None:
    """What this machine is set to go through, if anything."""
    found = urllib.request.getproxies()
    text = found.get(scheme) or found.get("all")
    if not text:
        return None
    proxy = httpx.URL(text if "://" in text else f"http://{text}")
    if proxy.scheme != "http":
        raise OSError(f"no websocket through a proxy of the kind {proxy.scheme}")
    return proxy
