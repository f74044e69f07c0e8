"""What goes to an NDIF server, and what comes back: sessions as bytes, questions, results.

The protocol is nnsight's own; this speaks it without waiting, silently, and with numbers made here. Nothing that comes
back is used before it is seen to be what was asked for.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import httpx
import nnsight
import torch
from nnsight.intervention.serialization import dumps
from nnsight.ndif import pull_env
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.backend import Backend

from ...errors import DeclarationError, ServerError, choices
from . import plain
from .asking import PACE, STATUS, fetch, is_address, unsafe
from .refusals import first_line, shortened

READ = 30.0
"""Seconds in which a question is answered whole, and in which something more of a large answer comes."""
TAKE = 600.0
"""Seconds in which a job is taken."""
ROOM = 8 * 2**20
"""Bytes of a result beside its numbers: fingerprint, names and shapes."""
NUMBER = re.compile(r"[\w.-]{1,100}")
"""What the number of a job, or of a websocket, looks like."""


def address() -> str:
    """Where nnsight is set to send jobs.

    Raises
    ------
    ServerError
        It is no address.
    """
    given = CONFIG.API.HOST or ""
    host: str = given.strip().rstrip("/")
    if not is_address(host):
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


class Unfit(ValueError):
    """A result that cannot be what was asked for: asking again gives no other."""


class NdifRequest:
    """One question to the server at a time; shows nothing by itself.

    Parameters
    ----------
    host : str
    number : str
        Of the job.
    env : dict
        What nnsight has the server do to the model first.
    tick : callable
        Called now and then while a question is being asked; may end it by raising.
    """

    last: ResponseModel | None = None

    def __init__(self, host: str, number: str, env: dict[str, Any], tick: Callable[[], object] | None = None) -> None:
        self.host, self.job_id, self.env, self.tick = host, number, env, tick
        self.api_key: str = CONFIG.API.APIKEY or ""

    @property
    def _key(self) -> dict[str, str]:
        return {"ndif-api-key": self.api_key} if self.api_key else {}

    def post(self, envelope: Envelope, blob: bytes) -> ResponseModel:
        """Send a job; its first status. What goes wrong is raised as it is."""
        about = {"ndif-timestamp": repr(time.time()), "nnsight-version": version("nnsight")}
        answer = fetch(
            "POST",
            f"{self.host}/request",
            most=STATUS,
            silent=TAKE,
            seconds=TAKE + len(blob) / PACE,
            headers={**about, "python-version": sys.version, **self._key},
            tick=self.tick,
            data={"data": envelope.metadata()},
            files={"blob": ("request", blob, "application/octet-stream")},
        )
        response = said(answer.raise_for_status().text)
        if not NUMBER.fullmatch(response.id):
            raise ValueError("it gives a job a number that is none")
        return response

    def ask(self, most: int, heard: ResponseModel | None = None) -> Any:
        """Ask how the job is, for `last`, which stays None where the server does not know it; its results, if any.

        What was heard of it on a websocket is taken without asking. A result has `most` bytes at most.
        """
        self.last = self.poll() if heard is None else heard
        if self.last is None or self.last.status != Status.COMPLETED:
            return None
        try:
            found = self.download(self.last.data, most)
        except plain.Oversize as error:
            raise Unfit(str(error)) from None
        if not isinstance(found, dict) or found.get("results") is None:
            raise ValueError("it is said to be complete, and holds nothing")
        return found["results"]

    def poll(self) -> ResponseModel | None:
        """How the job is; None where the server does not know it."""
        url = f"{self.host}/response/{self.job_id}"
        answer = fetch("GET", url, most=STATUS, silent=READ, seconds=READ, headers=self._key, tick=self.tick)
        return None if answer.status_code == httpx.codes.NOT_FOUND else said(answer.raise_for_status().text)

    def download(self, place: Any, most: int) -> Any:
        """A result, as tensors and plain data and nothing else; from its address, or as it came on a websocket."""
        if not place:
            return None
        if isinstance(place, bytes):
            packed = place
        elif not isinstance(place, str) or (why := unsafe(place, self.host)):
            raise Unfit(f"it is said to be {why if isinstance(place, str) else 'where no address leads'}")
        else:
            answer = fetch("GET", place, most=most, silent=READ, seconds=READ, tick=self.tick)
            packed = answer.raise_for_status().content
        return plain.read(plain.decompressed(packed, most))


def said(text: str | bytes) -> ResponseModel:
    """A status that came as JSON."""
    return brief(ResponseModel.model_validate_json(text))


def brief(response: ResponseModel) -> ResponseModel:
    """A status whose description is no longer than a person would read."""
    response.description = shortened(response.description)
    return response


def never_sent(error: Exception) -> bool:
    """Whether a job cannot have reached the server."""
    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.LocalProtocolError)


def code_of(error: Exception) -> int | None:
    """The code that a server answered with."""
    return error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None


def serialize_session(root: Any, function: Callable[[Any, dict[str, Any]], Any], program: dict[str, Any]) -> bytes:
    """A session that does ``function(root, program)`` and sends back what it gives, as ``results``.

    Functions in `program` go along as source, with the others of their package, unless it is an installed one.

    Raises
    ------
    DeclarationError
        A function in `program` holds something that cannot be sent.
    """
    packing = _Packing({package for one in _functions(program) if (package := _own_package(one))})
    with root.session(backend=packing):
        results = function(root, program)
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
    except (ValueError, RecursionError):
        body = error.response.text
    told = body.get("detail", body) if isinstance(body, dict) else body
    return shortened(told if isinstance(told, str) else error.response.text)


Shapes = Mapping[str, tuple[int, ...]]
"""What a pass is to give: shapes by name."""


def room(wanted: Sequence[Shapes]) -> int:
    """Bytes that a result may have, from what it is to hold."""
    sizes = [_size(shape) for shapes in wanted for shape in shapes.values()]
    return ROOM + 4 * sum(sizes) + 512 * (len(sizes) + len(wanted))


def deserialize_values(result: Any, wanted: Sequence[Shapes]) -> list[dict[str, torch.Tensor]]:
    """What `server_jobs.in_one_tensor` packed, as long as it is what was asked for.

    Raises
    ------
    Unfit
        It has other names, other shapes, or more or fewer numbers.
    """
    given, numbers = result["shapes"], result["numbers"]
    total = sum(_size(shape) for shapes in wanted for shape in shapes.values())
    if not isinstance(numbers, torch.Tensor) or numbers.dtype != torch.float32 or tuple(numbers.shape) != (total,):
        raise Unfit(f"it does not hold the {total} numbers that were asked for")
    if len(given) != len(wanted):
        raise Unfit(f"it holds {len(given)} sets of values, where {len(wanted)} were asked for")
    found, start = [], 0
    for pairs, shapes in zip(given, wanted, strict=True):
        if {name: tuple(shape) for name, shape in pairs} != shapes or len(pairs) != len(shapes):
            raise Unfit(f"its values have other names or shapes than those that were asked for, {dict(shapes)}")
        values = {}
        for name, _ in pairs:
            size = _size(shapes[name])
            values[name] = numbers[start : start + size].reshape(shapes[name])
            start += size
        found.append(values)
    return found


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
