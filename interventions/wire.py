"""What goes over the wire to an NDIF server, and what comes back: sessions as bytes, questions, results.

The protocol is nnsight's own; this only uses it without waiting, silently, and with numbers made here.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import httpx
import nnsight
import torch
import zstandard
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.ndif import pull_env
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.backend import Backend


class _Packing(Backend):  # type: ignore[misc]  # nnsight has no types
    """Takes a session as the bytes that would be sent."""

    def __call__(self, tracer: Any) -> None:
        nnsight.register(__name__.partition(".")[0])
        pull_env()
        self.blob = RequestModel.serialize(tracer, compress=True)


class Envelope(RequestModel):  # type: ignore[misc]
    """What is said of a job beside its content; the server takes our number for it."""

    id: str


class Line(RemoteBackend):  # type: ignore[misc]
    """One question to the server at a time; shows nothing by itself."""

    last: ResponseModel | None = None

    def note(self, response: ResponseModel) -> bool:
        """Keep a status update; errors are ours to tell."""
        self.last = response
        return bool(response.status == Status.COMPLETED)

    def finalize(self, content: bytes) -> Any:
        """A result, as tensors and plain data and nothing else."""
        return torch.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(content)), weights_only=True)


def packed(root: Any, served: Callable[[Any, dict[str, Any]], Any], program: dict[str, Any]) -> bytes:
    """A session that does ``served(root, program)`` and sends back what it gives, as ``results``."""
    packing = _Packing()
    with root.session(backend=packing):
        results = served(root, program)
        nnsight.save(results)
    blob: bytes = packing.blob
    return blob


def detail(error: httpx.HTTPStatusError) -> str:
    """What a server says beside an error code."""
    try:
        body = error.response.json()
    except ValueError:
        body = error.response.text
    return str(body.get("detail") if isinstance(body, dict) else body)


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
