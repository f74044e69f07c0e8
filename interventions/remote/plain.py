"""Reads what `torch.save` wrote, whoever sent it, as plain data and tensors of floats: runs no code, stays in bounds.

`torch.load` with ``weights_only`` runs no code of a file either, but makes whatever the file asks for: a tensor of any
size over a single number, buffers of any length, archives whose parts unpack to anything. Here nothing gets larger than
what came: members are stored as they are, tensors lie within theirs, and the steps of the pickle are counted. A leaf.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard

STEPS = 2_000_000
"""Steps of a pickle, of which each makes an object at most: what tells of a model with 100,000 modules has fewer."""
MEMBERS = 1000
"""Members of an archive: a result has ten."""
WINDOW = 2**27
"""Bytes that a frame may want to be looked back at, as zstandard takes by itself."""
PIECE = 2**20
ENTRY = b"PK\1\2"
"""Begins each entry in the list of members."""
FLOATS = {"torch FloatStorage": "<f4", "torch DoubleStorage": "<f8"}
STATUS, MAPPING, TENSOR = "nnsight.schema.response Status", "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
GIVEN = ["BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"]
GIVEN += ["BINBYTES", "SHORT_BINBYTES", "BINBYTES8"]


class Oversize(ValueError):
    """What came is larger than what was asked for can be."""


class Name(NamedTuple):
    """The name of something that a pickle would call; it is only compared."""

    text: str


class Stored(NamedTuple):
    """A member of an archive that holds numbers."""

    code: str
    member: str


def decompressed(packed: bytes, most: int) -> bytes:
    """What zstandard made bytes of, as long as that has no more than `most` bytes."""
    parts, size = [], 0
    with zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(packed) as reader:
        while piece := reader.read(min(PIECE, most + 1)):
            size += len(piece)
            if size > most:
                raise Oversize(f"it unpacks to more than the {most:,} bytes that it can have")
            parts.append(piece)
    return b"".join(parts)


def read(content: bytes) -> Any:
    """What an archive of `torch.save` holds: plain data, in lists, tuples and dicts with text as keys, and tensors.

    Raises
    ------
    ValueError, pickle.UnpicklingError
        It holds anything else. Archives that are broken fail in other ways too.
    """
    if content.count(ENTRY) > MEMBERS:
        raise Oversize(f"an archive with more than {MEMBERS} members")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        found = archive.infolist()
        for one in found:
            if one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size:
                raise ValueError("an archive with members that are compressed, which torch does not write")
        if sum(one.file_size for one in found) > len(content):
            raise Oversize("an archive whose members are larger than itself")
        (first,) = [one for one in archive.namelist() if one.endswith("/data.pkl")]
        folder = first.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("an archive whose numbers begin with their large end")
        return _Reader(archive, folder, len(content)).load(archive.read(first))


class _Reader:
    """Makes plain data of the steps of a pickle; `room` is how many bytes tensors may have together."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, room: int) -> None:
        self.archive, self.folder, self.room = archive, folder, room
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self, content: bytes) -> Any:
        """Read one pickle of plain data, step by step."""
        for number, (code, given, _) in enumerate(pickletools.genops(content)):
            if number > STEPS:
                raise Oversize(f"data of more than {STEPS:,} steps")
            self.step(code.name, given)
        (found,) = self.stack
        return found

    def step(self, name: str, given: Any) -> None:
        """One step, with what is written beside it."""
        stack = self.stack
        if name in GIVEN:
            stack.append(given)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.push(tuple(self.since(len(stack) - int(name[-1]))))
        elif name == "TUPLE":
            self.push(tuple(self.since(self.marks.pop())))
        elif name in ("APPEND", "APPENDS"):
            items = self.since(len(stack) - 1 if name == "APPEND" else self.marks.pop())
            self.last(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.since(len(stack) - 2 if name == "SETITEM" else self.marks.pop())
            if not all(type(key) is str for key in items[::2]):  # to hash anything else may take for ever
                raise ValueError("data with keys that are no text")
            self.last(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name in ("BINGET", "LONG_BINGET"):
            if type(self.memo[given]) in (list, dict, tuple):  # a few that hold each other can be gone through for ever
                raise ValueError("data that holds one thing in two places")
            stack.append(self.memo[given])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else given] = stack[-1]
        elif name == "GLOBAL":
            self.name(given)
        elif name == "STACK_GLOBAL":
            module, what = self.since(len(stack) - 2)
            self.name(f"{module} {what}" if type(module) is type(what) is str else "thing without a name")
        elif name == "BINPERSID":
            self.push(self.stored(stack.pop()))
        elif name == "REDUCE":
            what, arguments = self.since(len(stack) - 2)
            self.push(self.made(what, arguments))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise pickle.UnpicklingError(f"a result comes with a step {name}, which is not plain data")

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def since(self, start: int) -> list[Any]:
        """What lies on the stack from a place on, taken off."""
        if start < 0:
            raise ValueError("a pickle that takes more than it has")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, kind: type) -> Any:
        """What lies on top, which is to be of a kind."""
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"a pickle that puts things into what is no {kind.__name__}")
        return self.stack[-1]

    def name(self, text: str) -> None:
        """Push a name that plain data may hold; refuse any other."""
        if text not in (STATUS, MAPPING, TENSOR, *FLOATS):
            raise pickle.UnpicklingError(f"a result comes with a {text[:100]}, which is not plain data")
        self.push(Name(text))

    def made(self, what: Any, arguments: Any) -> Any:
        """What a call would give, of the three that are in results."""
        if what == Name(STATUS):
            (status,) = arguments
            return str(status)
        if what == Name(MAPPING) and arguments == ():
            return {}
        if what == Name(TENSOR):
            return self.tensor(*arguments)
        raise pickle.UnpicklingError("a result comes with a call, which is not plain data")

    def stored(self, given: Any) -> Stored:
        """Name the numbers of a tensor: their format, and the file of the archive that holds them."""
        kind, storage, key, _, _ = given
        if kind != "storage" or not isinstance(storage, Name) or storage.text not in FLOATS or type(key) is not str:
            raise ValueError("numbers that are neither float32 nor float64")
        return Stored(FLOATS[storage.text], f"{self.folder}data/{key}")

    def tensor(self, stored: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
        """A tensor that lies within its numbers."""
        numbers = np.frombuffer(self.archive.read(stored.member), dtype=stored.code)
        for one in (offset, *size, *stride):
            if type(one) is not int or one < 0:
                raise ValueError("a tensor whose size is no size")
        count = 1
        for length in size:
            count *= length
        end = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
        self.room -= len(numbers) * numbers.itemsize
        if count > len(numbers) or (count and end >= len(numbers)) or len(size) > 32 or self.room < 0:
            raise Oversize("a tensor that is larger than the numbers that came with it")
        steps = tuple(numbers.itemsize * one for one in stride)
        if not count:
            return torch.from_numpy(np.zeros(size, numbers.dtype.newbyteorder("=")))
        view = np.lib.stride_tricks.as_strided(numbers[offset:], size, steps)
        return torch.from_numpy(view.astype(numbers.dtype.newbyteorder("="), order="C", copy=True))
