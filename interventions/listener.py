"""What a server says of jobs on its websocket, heard in a thread while a call lasts.

NDIF answers a job in one of two ways. A job that is sent under the session of a websocket is answered on that websocket
and nowhere else: no later status can hide its last one, and it cannot be asked for where the connection was cut. A job
without a session has its status stored, where any process can ask for it, and where whoever writes last wins.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import threading
import time
import zipfile
from typing import Any

import websocket
from nnsight.schema.response import ResponseModel, Status

from .refusals import first_line

LOG = logging.getLogger("headwise.remote")
OPENING = 5.0
"""Seconds in which a websocket is open, or is done without."""
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
        self._fresh: set[str] = set()
        self._lock, self._news, self._tried = threading.Lock(), threading.Event(), threading.Event()
        self._closed, self._wanted = False, time.monotonic()
        self._socket: Any = None
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

    def heard(self, number: str) -> ResponseModel | None:
        """The last that was said of a job; of a websocket that was cut, only how a job ended."""
        with self._lock:
            response = self._heard.get(number)
        return response if response is not None and (response.status in _FINAL or self.open) else None

    def forget(self, number: str) -> None:
        """A job has ended, and what was said of it, which may be large, is not needed any more."""
        with self._lock:
            self._heard.pop(number, None)

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
        if self._socket is not None:
            self._socket.abort()  # wakes the thread
        if self._thread.is_alive():
            self._thread.join(CLOSING)

    def _listen(self) -> None:
        try:
            scheme, _, rest = self.host.partition("://")
            address = f"{'wss' if scheme == 'https' else 'ws'}://{rest}/subscribe"
            header = {"ndif-api-key": self.key} if self.key else None
            self._socket = websocket.create_connection(address, timeout=OPENING, header=header)
            self.session = str(json.loads(self._socket.recv())["session_id"])
            self._tried.set()
            self._socket.settimeout(SILENT)
            self._hear()
            LOG.info("the websocket of %s was closed", self.host)
        except Exception as error:  # proxies and servers fail in many ways, and polling does without
            if not self._closed:
                LOG.info("no websocket of %s: %s", self.host, first_line(error, self.key))
        finally:
            if self._socket is not None:
                self._socket.shutdown()
            self._tried.set()
            self._news.set()

    def _hear(self) -> None:
        asked = False
        while not self._closed and time.monotonic() - self._wanted < LEFT:
            try:
                kind, content = self._socket.recv_data(control_frame=True)
            except websocket.WebSocketTimeoutException:
                if asked:
                    raise
                self._socket.ping()
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
            self._news.set()


class _Plain(pickle.Unpickler):
    """Reads plain data and nothing else: the bytes come from elsewhere."""

    def find_class(self, module: str, name: str) -> Any:
        """A status; all else is refused."""
        if (module, name) == (Status.__module__, Status.__name__):
            return Status
        raise pickle.UnpicklingError(f"a result comes with a {module}.{name}, which is not plain data")


def _read(kind: int, content: bytes) -> ResponseModel:
    """A frame: JSON, or, where it carries a result as bytes, what nnsight's `ResponseModel.pickle` made.

    That is an archive of `torch.save`, which `torch.load` with ``weights_only`` cannot read in this pickle protocol.
    """
    if kind == websocket.ABNF.OPCODE_TEXT:
        return ResponseModel.model_validate_json(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = [one for one in archive.namelist() if one.endswith("/data.pkl")]
        return ResponseModel(**_Plain(io.BytesIO(archive.read(name))).load())
