"""Hashes of plain data and of what functions do, the same in every process. A leaf: imports `contents` only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from .contents import Contents, array_bytes, like_no_other

__all__ = ["array_bytes", "code_hash", "data_hash", "short_hash"]


def short_hash(*parts: bytes | str) -> str:
    """SHA-256 of all parts, its first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def data_hash(value: Any, names: Mapping[int, str] | None = None) -> str:
    """A hash of nested dicts, lists, tuples, sets, slices, numbers, texts, arrays, tensors, functions and objects.

    `names` gives objects, by their `id`, that count by a name.

    What cannot be seen into (a lock, a generator, a bare ``object()``) is like no other: its hash differs each time.
    """
    try:
        return short_hash(*Contents(short_hash, names or {}).of(value))
    except Exception:  # nested too deep, or an object that raises where it is looked at
        return short_hash(*like_no_other())


def code_hash(function: Callable[..., Any]) -> str:
    """A hash of what a function does: its code, its defaults, what it closes over, and what of its globals it names.

    Functions, classes (with their bases, attributes and methods) and objects that it reaches count whole, also those of
    modules (``activations.split_heads``, ``mine.LIMIT``) and those that it imports itself; functions and classes of
    libraries count by name. What nobody can tell beforehand makes it like no other, so that nothing is taken for its
    work: files that it opens, the environment, ``eval``, and objects that say nothing of what they hold. Random numbers
    from a generator of torch or NumPy that a library keeps for everyone are not seen.
    """
    return data_hash(function)
