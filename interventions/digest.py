"""Hashes of plain data and of what functions do, the same in every process. A leaf: imports nothing of ours."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

LIBRARIES = ("torch", "numpy", "nnsight", "transformers")
"""Packages whose functions count by name: their versions are part of what a result depends on."""


def short_hash(*parts: bytes | str) -> str:
    """SHA-256 of all parts, its first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def data_hash(value: Any) -> str:
    """A hash of nested dicts, lists, tuples, sets, slices, numbers, texts, arrays, tensors and functions."""
    return short_hash(*_data(value, set()))


def code_hash(function: Callable[..., Any]) -> str:
    """A hash of what a function does: its code, its defaults, what it closes over, and what of its globals it names.

    Functions that it calls count whole, also those of modules (``ops.split_heads``), but for those of libraries, which
    count by name, as classes do. A kernel that is an object counts by what it holds and what its class does; one that
    says nothing of what it holds is like no other, so that nothing is taken for its work.
    """
    return data_hash(function)


def array_bytes(array: Any) -> bytes:
    """Shape, number format and bytes of an array or tensor."""
    flat: Any = np.ascontiguousarray(array.detach().cpu() if hasattr(array, "detach") else array)
    content: bytes = flat.tobytes()
    return f"{flat.shape} {flat.dtype.str} ".encode() + content


def _data(value: Any, seen: set[int]) -> Iterator[bytes | str]:
    """`seen` are functions and objects that were gone into already: some lead to each other."""
    if isinstance(value, dict):
        yield f"dict {len(value)}"
        for key, inner in sorted(value.items(), key=lambda item: repr(item[0])):
            yield repr(key)
            yield from _data(inner, seen)
    elif isinstance(value, list | tuple):
        yield f"list {len(value)}"
        for inner in value:
            yield from _data(inner, seen)
    elif isinstance(value, set | frozenset):
        yield repr(sorted(map(repr, value)))
    elif isinstance(value, ModuleType | type):
        yield value.__name__
    elif isinstance(value, np.ndarray) or hasattr(value, "detach"):
        yield array_bytes(value)
    elif isinstance(value, FunctionType):
        yield from _function(value, seen)
    elif isinstance(value, CodeType):
        yield value.co_code.hex() + " ".join(value.co_names + value.co_varnames)
        yield from _data(value.co_consts, seen)
    elif isinstance(value, partial):
        yield from _data([value.func, value.args, value.keywords], seen)
    elif isinstance(value, MethodType):
        yield from _data([value.__func__, value.__self__], seen)
    elif isinstance(value, BuiltinFunctionType):
        yield value.__qualname__
    elif hasattr(value, "__dict__") and (callable(value) or " at 0x" in repr(value)):
        yield from _object(value, seen)
    else:
        yield repr(value)


def _object(value: Any, seen: set[int]) -> Iterator[bytes | str]:
    """What an object holds, and what its class does; its repr may say nothing of either."""
    yield f"{type(value).__module__}.{type(value).__qualname__}"
    if id(value) in seen:
        return
    seen.add(id(value))
    yield from _data(value.state_dict() if hasattr(value, "state_dict") else vars(value), seen)
    if not _of_library(type(value).__module__):
        yield from _data([one for one in vars(type(value)).values() if isinstance(one, FunctionType)], seen)


def _function(function: FunctionType, seen: set[int]) -> Iterator[bytes | str]:
    if id(function) in seen or _of_library(function.__module__):
        yield f"{function.__module__}.{function.__qualname__}"
        return
    seen.add(id(function))
    closed = [cell.cell_contents for cell in function.__closure__ or ()]
    yield from _data([function.__code__, function.__defaults__, function.__kwdefaults__, closed], seen)
    names = _names(function.__code__)
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType) and not _of_library(value.__name__):
            inner = [getattr(value, one, None) for one in names]
            yield from _data([one for one in inner if isinstance(one, FunctionType)], seen)
        elif value is not None:
            yield from _data(value, seen)


def _names(code: CodeType) -> list[str]:
    """What a function names, and the functions inside it."""
    inner = (name for one in code.co_consts if isinstance(one, CodeType) for name in _names(one))
    return sorted({*code.co_names, *inner})


def _of_library(module: str | None) -> bool:
    package = (module or "").partition(".")[0]
    return package in LIBRARIES or package in sys.stdlib_module_names
