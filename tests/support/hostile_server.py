"""A server on loopback that does to its clients whatever a test wants, and counts what they take."""

import base64
import hashlib
import io
import json
import re
import socket
import struct
import threading
import time
import zipfile
from pathlib import Path

import torch
import zstandard

PIECE = b"a" * 65536


class Hostile:
    """A server whose routes are functions of a connection and a request.

    Parameters
    ----------
    **routes
        First word of a path to ``function(connection, head, body)``; those that are missing do as NDIF does for a job
        that is complete at once, with `result` as what it gives.
    """

    def __init__(self, result=b"", /, **routes):
        self.routes, self.result = routes, result
        self.heads, self.taken, self.ended = [], 0, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.host = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self.socket.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        try:
            with connection, connection.makefile("rb") as given:
                head = b"".join(iter(given.readline, b"\r\n")).decode()
                self.heads.append(head)
                size = re.search(r"(?i)content-length: (\d+)", head)
                body = given.read(int(size[1])) if size else b""
                route = head.split()[1].split("/")[1]
                self.routes.get(route, getattr(self, f"_{route}", self._missing))(connection, head, body)
                self.ended.append(route)
        except OSError:
            pass  # the client has had enough

    def give(self, connection, data):
        """Send, and count what is taken."""
        connection.sendall(data)
        self.taken += len(data)

    def _missing(self, connection, head, body):
        answer(connection, 404, b"{}")

    def _ping(self, connection, head, body):
        answer(connection, 200, b"{}")

    def _request(self, connection, head, body):
        number = re.search(rb'"id":"(\w+)"', body)[1].decode()
        answer(connection, 200, status("RECEIVED", number))

    def _response(self, connection, head, body):
        answer(connection, 200, status("COMPLETED", head.split()[1].split("/")[2], f"{self.host}/result/1?signed=1"))

    def _result(self, connection, head, body):
        answer(connection, 200, self.result)


def status(status, number, data=None, description=""):
    return json.dumps({"id": number, "status": status, "description": description, "data": data}).encode()


def answer(connection, code, body, *more):
    head = [f"HTTP/1.1 {code} Said", f"Content-Length: {len(body)}", "Connection: close", *more, "", ""]
    connection.sendall("\r\n".join(head).encode() + body)


def endless(server, megabytes, begin=b'{"id": "'):
    """A body that goes on and on; its end is far beyond anything that makes sense."""

    def route(connection, head, body):
        server().give(connection, b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + begin)
        for _ in range(16 * megabytes):
            server().give(connection, PIECE)

    return route


def trickle(begin, one, seconds, gap=0.05):
    """One piece after the other, each in time."""

    def route(connection, head, body):
        connection.sendall(begin)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            connection.sendall(one)
            time.sleep(gap)

    return route


def upgraded(connection, head):
    """Open a websocket."""
    key = re.search(r"(?i)sec-websocket-key: (\S+)", head)[1] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    sign = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
    lines = ["HTTP/1.1 101 Switching", "Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Accept: {sign}"]
    connection.sendall("\r\n".join([*lines, "", ""]).encode())


def frame(content, opcode=1, fin=1, declared=None):
    """A frame of a websocket, which may declare another length than it has."""
    return bytes([fin << 7 | opcode, 127]) + struct.pack("!Q", len(content) if declared is None else declared) + content


def packed(saved):
    """What a server sends for a result."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def archive(pickled, members=(), method=zipfile.ZIP_STORED):
    """An archive as `torch.save` makes it, of a pickle of one's own, and members ``(name, content)``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        made.writestr("archive/data.pkl", pickled, zipfile.ZIP_STORED)
        made.writestr("archive/byteorder", "little", zipfile.ZIP_STORED)
        for name, content in members:
            made.writestr(f"archive/{name}", content)
        made.writestr("archive/version", "3\n", zipfile.ZIP_STORED)
    return buffer.getvalue()


def bomb(megabytes, *, unsized=False):
    """A zstandard frame of zeros."""
    packer = zstandard.ZstdCompressor().compressobj(size=-1 if unsized else megabytes * 2**20)
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(megabytes)), packer.flush()])


class Peak:
    """The most memory that this process has from here on, in megabytes beyond what it has now; Linux only."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self.begun = self._read("VmHWM")

    def _read(self, name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    @property
    def grown(self):
        return self._read("VmHWM") - self.begun
