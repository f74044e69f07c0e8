"""Hashes of plain data and of what functions do, the same in every process. A leaf: imports nothing of ours."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import numpy as np


def short_hash(*parts: bytes | str) -> str:
    """SHA-256 of all parts, its first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def data_hash(value: Any) -> str:
    """A hash of nested dicts, lists, tuples, sets, slices, numbers, texts, arrays, tensors and functions."""
    return short_hash(*_data(value))


def _data(value: Any) -> Iterator[bytes | str]:
    if isinstance(value, dict):
        yield f"dict {len(value)}"
        for key, inner in sorted(value.items(), key=lambda item: repr(item[0])):
            yield repr(key)
            yield from _data(inner)
    elif isinstance(value, list | tuple):
        yield f"list {len(value)}"
        for inner in value:
            yield from _data(inner)
    elif isinstance(value, set | frozenset):
        yield repr(sorted(value))
    elif isinstance(value, np.ndarray) or hasattr(value, "detach"):
        yield array_bytes(value)
    elif callable(value):
        yield code_hash(value)
    else:
        yield repr(value)


def array_bytes(array: Any) -> bytes:
    """Shape, number format and bytes of an array or tensor."""
    flat: Any = np.ascontiguousarray(array.detach().cpu() if hasattr(array, "detach") else array)
    content: bytes = flat.tobytes()
    return f"{flat.shape} {flat.dtype.str} ".encode() + content


def code_hash(function: Callable[..., Any]) -> str:
    """A hash of what a function does: its code, its defaults, what it closes over, and functions it calls by name."""
    return short_hash(*_code(function, set()))


def _code(value: object, seen: set[int]) -> Iterator[str]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, FunctionType):
        yield from _code(value.__code__, seen)
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        for inner in (value.__defaults__, value.__kwdefaults__, *cells):
            yield from _code(inner, seen)
        for name in value.__code__.co_names:
            if isinstance(other := value.__globals__.get(name), FunctionType):
                yield from _code(other, seen)
    elif isinstance(value, CodeType):
        yield value.co_code.hex() + " ".join(value.co_names + value.co_varnames)
        for constant in value.co_consts:
            yield from _code(constant, seen)
    elif isinstance(function := getattr(value, "func", None), FunctionType):  # functools.partial
        yield from _code(function, seen)
        yield repr((getattr(value, "args", ()), getattr(value, "keywords", {})))
    elif isinstance(value, np.ndarray) or hasattr(value, "detach"):
        yield array_bytes(value).hex()
    else:
        yield repr(value)
