"""What goes over the wire to an NDIF server, and what comes back: sessions as bytes, questions, results.

The protocol is nnsight's own; this only uses it without waiting, silently, and with numbers made here.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import nnsight
import torch
import zstandard
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.intervention.serialization import dumps
from nnsight.ndif import pull_env
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.backend import Backend

from ..errors import DeclarationError, ServerError, choices
from .refusals import first_line

CONNECT, READ = 10.0, 30.0
"""Seconds that a question waits for a connection, and for the next bytes on it; other jobs wait meanwhile."""


def address() -> str:
    """Where nnsight is set to send jobs.

    Raises
    ------
    ServerError
        It is no address.
    """
    given = CONFIG.API.HOST or ""
    host: str = given.strip().rstrip("/")
    try:
        url = httpx.URL(host)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ServerError(f"NDIF_HOST={given!r} is no address of a server: write it as in https://api.ndif.us")
    return host


class _Packing(Backend):  # type: ignore[misc]  # nnsight has no types
    """Takes a session as the bytes that would be sent, with the source of some packages."""

    blob: bytes = b""
    error: Exception | None = None

    def __init__(self, packages: set[str]) -> None:
        self.packages = {__name__.partition(".")[0], *packages}

    def __call__(self, tracer: Any) -> None:
        for package in self.packages:
            nnsight.register(package)
        pull_env()
        try:
            self.blob = RequestModel.serialize(tracer, compress=True)
        except Exception as error:  # what a function holds decides which
            self.error = error


class Envelope(RequestModel):  # type: ignore[misc]
    """What is said of a job beside its content; the server takes our number for it."""

    id: str


class Line(RemoteBackend):  # type: ignore[misc]
    """One question to the server at a time; shows nothing by itself."""

    last: ResponseModel | None = None

    def __init__(self, host: str, model_key: str, number: str, env: dict[str, Any]) -> None:
        super().__init__(model_key, host=host, blocking=False, job_id=number, env=env)
        self.display.enabled, self.compress = False, True

    def post(self, envelope: Envelope, blob: bytes) -> ResponseModel:
        """Send a job; its first status. What goes wrong is raised as it is."""
        try:
            return self._post(envelope, blob)
        except RemoteError as error:
            raise error.__cause__ or error from None

    def ask(self, heard: ResponseModel | None = None) -> Any:
        """Ask how the job is, for `last`, which stays None where the server does not know it; its results, if any.

        What was heard of it on a websocket is taken without asking.
        """
        found = self.poll() if heard is None else self.handle(heard)
        if self.last is None or self.last.status != Status.COMPLETED:
            return None
        if not isinstance(found, dict) or "results" not in found:
            raise ValueError("it is said to be complete, and holds nothing")
        return found["results"]

    def poll(self, tracer: Any = None) -> Any:
        """As nnsight's, which would wait for ten minutes."""
        key = {"ndif-api-key": self.api_key} if self.api_key else {}
        answer = self._get(f"{self.host}/response/{self.job_id}", key)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        return self.handle(ResponseModel.model_validate_json(answer.raise_for_status().text))

    def note(self, response: ResponseModel) -> bool:
        """Keep a status update; errors are ours to tell."""
        self.last = response
        return bool(response.status == Status.COMPLETED)

    def download_result(self, url: str | bytes | None) -> Any:
        """A result, as tensors and plain data and nothing else; from its address, or as it came on a websocket."""
        if not url:
            return None
        packed = url if isinstance(url, bytes) else self._get(url, {}).raise_for_status().content
        return torch.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(packed)), weights_only=True)

    def _get(self, url: str, headers: dict[str, str]) -> httpx.Response:
        return httpx.get(url, headers=headers, timeout=httpx.Timeout(CONNECT, read=READ))


def never_sent(error: Exception) -> bool:
    """Whether a job cannot have reached the server."""
    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.LocalProtocolError)


def code_of(error: Exception) -> int | None:
    """The code that a server answered with."""
    return error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None


def packed(root: Any, served: Callable[[Any, dict[str, Any]], Any], program: dict[str, Any]) -> bytes:
    """A session that does ``served(root, program)`` and sends back what it gives, as ``results``.

    Functions in `program` go along as source, with the others of their package, unless it is an installed one.

    Raises
    ------
    DeclarationError
        A function in `program` holds something that cannot be sent.
    """
    packing = _Packing({package for one in _functions(program) if (package := _own_package(one))})
    with root.session(backend=packing):
        results = served(root, program)
        nnsight.save(results)
    if packing.error is not None:
        stuck = sorted({getattr(one, "__qualname__", repr(one)) for one in _functions(program) if not _travels(one)})
        why = first_line(packing.error, None)
        raise DeclarationError(
            f"{choices(stuck) or 'what is asked'} cannot travel to a server ({why}): a function that is sent may use "
            "plain data, tensors and modules, and no open files, locks or the like"
        )
    return packing.blob


def _functions(value: Any) -> Iterator[Any]:
    """The functions in plain data."""
    if isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _functions(one)
    elif callable(value) and not isinstance(value, torch.Tensor):
        yield value


def _own_package(function: Any) -> str:
    """The package, or the module that is in none, that somebody wrote a function in; nothing where it was installed."""
    name = str(getattr(getattr(function, "func", function), "__module__", "")).partition(".")[0]
    found = sys.modules.get(name)
    places = [*getattr(found, "__path__", []), getattr(found, "__file__", None) or ""]
    installed = any(part in place for place in places for part in ("site-packages", "dist-packages"))
    return "" if name in ("", "__main__", *sys.stdlib_module_names) or installed else name


def _travels(function: Any) -> bool:
    try:
        dumps(function)
    except Exception:
        return False
    return True


def detail(error: httpx.HTTPStatusError) -> str:
    """What a server says beside an error code."""
    try:
        body = error.response.json()
    except ValueError:
        body = error.response.text
    return str(body.get("detail", body) if isinstance(body, dict) else body)


def unpacked(result: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """What `served.together` packed."""
    found, start = [], 0
    for shapes in result["shapes"]:
        values = {}
        for name, shape in shapes:
            size = 1
            for length in shape:
                size *= length
            values[name] = result["numbers"][start : start + size].reshape(shape)
            start += size
        found.append(values)
    return found
