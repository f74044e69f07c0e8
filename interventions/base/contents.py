"""What values, functions and classes hold, as texts and bytes to be hashed, the same in every process. A leaf."""

from __future__ import annotations

import copyreg
import importlib
import pickle
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GenericAlias,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    UnionType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np

from .names import globals_of, imported, is_found, named, names_of, of_library, replaced

OUTSIDE = {"open", "eval", "exec", "compile", "input", "globals", "__import__"}
"""Builtins through which a function can read what is not seen here."""
ENVIRONMENT = {"environ", "getenv"}
WHOLE = {"getattr", "vars", "__dict__"}
"""Names of a function that may read any attribute of a module."""
BARE = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__annotate__", "__annotate_func__",
    "__annotations_cache__", "__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__",
    "__slotnames__",
}  # fmt: skip
"""Entries of a class that change nothing that it does."""
KINDS = 4 | 8 | 32 | 128 | 512
"""Flags of code: it takes more arguments, is a generator, can be awaited; not where it stands in a file."""
MADE, MADE_IN_PYTHON = 3 << 8, 1 << 9
"""Flags of a class that say how it was made, and those of a class statement; objects of such hold attributes only."""
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented), range)
Parts = Iterator[bytes | str]


def array_bytes(array: Any) -> bytes:
    """Shape, number format and bytes of an array or tensor."""
    shape, name = tuple(array.shape), ""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        try:
            array = array.numpy()
        except TypeError:  # bfloat16 and the like, which NumPy has not; float32 holds all their values
            array, name = array.float().numpy(), f"{array.dtype} "
    flat: Any = np.ascontiguousarray(array)
    content: bytes = flat.tobytes()
    return f"{shape} {name}{flat.dtype.str} ".encode() + content


class Contents:
    """Goes through a value once; functions, classes and objects that lead to each other are gone into once each.

    Parameters
    ----------
    summed : callable
        One text for several, for what has no order.
    known : mapping of int to str
        Objects, by their `id`, that count by a name.
    """

    def __init__(self, summed: Callable[..., str], known: Mapping[int, str]) -> None:
        self.summed, self.known = summed, known
        self.seen: dict[int, tuple[int, Any]] = {}  # holds what it saw, so that no other gets its address
        self.within: list[Any] = []

    def of(self, value: Any, names: Iterable[str] | None = None) -> Parts:
        """The parts of a value; `names` is what the function around it names, for modules."""
        kind = type(value)
        if kind in PLAIN:
            yield repr(value)
        elif id(value) in self.known:
            yield self.known[id(value)]
        elif kind in (dict, list, tuple, set, frozenset, MappingProxyType):
            if id(value) in self.within:
                yield f"within {self.within.index(id(value))}"
                return
            self.within.append(id(value))
            yield from self._container(value, names)
            self.within.pop()
        elif kind is slice:
            yield from self.of(["slice", value.start, value.stop, value.step], names)
        elif isinstance(value, CodeType):
            yield from self._code(value)
        elif isinstance(value, BuiltinFunctionType | MethodWrapperType):
            yield f"{value.__module__ if hasattr(value, '__module__') else ''} {value.__qualname__}"
            if not isinstance(value.__self__, ModuleType | None):
                yield from self.of(value.__self__, names)
        elif isinstance(value, MethodType):
            yield from self.of([value.__func__, value.__self__], names)
        elif isinstance(
            value, MethodDescriptorType | WrapperDescriptorType | GetSetDescriptorType | MemberDescriptorType
        ):
            yield f"{value.__objclass__.__module__} {value.__objclass__.__qualname__} {value.__name__}"
        elif isinstance(value, ModuleType):
            yield value.__name__
            yield from self._module(value, names)
        elif id(value) in self.seen:
            yield f"seen {self.seen[id(value)][0]}"
        else:
            self.seen[id(value)] = len(self.seen), value
            yield from self._new(value)

    def _container(self, value: Any, names: Iterable[str] | None) -> Parts:
        if isinstance(value, dict | MappingProxyType):
            yield f"dict {len(value)}"
            for key, inner in value.items():  # in their order, which a function may go by
                yield from self.of(key)
                yield from self.of(inner, names)
        elif isinstance(value, list | tuple):
            yield f"list {len(value)}"
            for inner in value:
                yield from self.of(inner, names)
        else:
            yield f"set {len(value)}"
            before, found = dict(self.seen), []
            for inner in value:  # in any order: each as if it were the first
                self.seen = dict(before)
                found.append(self.summed(*self.of(inner, names)))
            self.seen = before
            yield from sorted(found)

    def _new(self, value: Any) -> Parts:
        if isinstance(value, type):
            yield from self._class(value)
        elif type(value) is np.ndarray and value.dtype.hasobject:
            yield f"{value.shape} objects"
            yield from self.of(value.ravel().tolist())
        elif type(value) is np.ndarray:
            yield array_bytes(value)
            yield from [repr(value.dtype.descr)] if value.dtype.names else []
        elif isinstance(value, FunctionType):
            yield from self._function(value)
        elif isinstance(value, partial):
            yield from self.of([value.func, value.args, value.keywords, vars(value)])
        elif isinstance(value, property):
            yield from self.of(["property", value.fget, value.fset, value.fdel])
        elif isinstance(value, staticmethod | classmethod):
            yield from self.of([type(value).__name__, value.__func__])
        elif isinstance(value, cached_property):
            yield from self.of(["cached", value.func])
        elif isinstance(value, GenericAlias | UnionType) or type(value).__module__ == "typing":  # of annotations
            yield repr(value)
        elif type(value).__module__ == "functools" and hasattr(value, "__wrapped__"):  # behind functools.cache
            yield from self.of(["cached", value.__wrapped__])
        elif hasattr(type(value), "detach") and hasattr(type(value), "shape"):
            yield from self._tensor(value)
        else:
            yield from self._object(value)

    def _tensor(self, value: Any) -> Parts:
        try:
            content = array_bytes(value)
        except Exception:  # sparse, quantised, without data: libraries raise what they like
            yield from like_no_other()
            return
        yield content
        yield from self.of(vars(value)) if getattr(value, "__dict__", None) else []

    def _object(self, value: Any) -> Parts:
        """What an object holds, and what its class does; its repr may say nothing of either."""
        kind = type(value)
        yield from self.of(kind)
        yield from self.of(getattr(value, "__dict__", {}))
        try:
            reduced = copyreg.dispatch_table[kind](value) if kind in copyreg.dispatch_table else value.__reduce_ex__(4)
        except Exception:  # what cannot be pickled raises what it likes
            plain = all(one.__flags__ & MADE == MADE_IN_PYTHON and not _slots(one) for one in kind.__mro__[:-1])
            yield from [] if plain and hasattr(value, "__dict__") else like_no_other()
            return
        if isinstance(reduced, str):
            found = pickle.whichmodule(value, reduced)  # type: ignore[attr-defined]
            yield from [named(found, reduced)] if of_library(found) else like_no_other()
        elif kind is object:
            yield from like_no_other()
        else:
            for part in reduced:
                yield from self.of(list(part) if isinstance(part, Iterator) else part)

    def _class(self, value: type) -> Parts:
        module = value.__module__ if isinstance(value.__module__, str) else "builtins"  # a descriptor in Cython's
        yield named(module, value.__qualname__)
        if of_library(module):
            return
        yield from self.of([type(value), *value.__bases__])
        for name, inner in sorted(vars(value).items()):
            if name not in BARE:
                yield name
                yield from self.of(inner)

    def _function(self, function: FunctionType) -> Parts:
        library = of_library(function.__module__)
        if library:
            yield named(function.__module__, function.__qualname__)
            if is_found(function):
                return
        else:
            yield from self._code(function.__code__)
        names = names_of(function.__code__)
        closed = [_cell(cell) for cell in function.__closure__ or ()]
        yield from self.of([function.__defaults__, function.__kwdefaults__, closed, vars(function)], names)
        if not library:
            yield from self._globals(function, names)

    def _globals(self, function: FunctionType, names: set[str]) -> Parts:
        scope = function.__globals__
        for name in sorted(globals_of(function.__code__)):
            if name in scope:
                yield name
                yield from self.of(scope[name], names)
            elif name in OUTSIDE:
                yield from like_no_other()
        for name in sorted(imported(function.__code__, scope.get("__package__") or "")):
            try:
                found = sys.modules.get(name) or importlib.import_module(name)
            except ModuleNotFoundError:
                yield f"no {name}"
            except Exception:  # whatever a module raises that is imported
                yield from like_no_other()
            else:
                yield from self.of(found, names)
        if names & ENVIRONMENT:
            yield from like_no_other()

    def _code(self, code: CodeType) -> Parts:
        yield code.co_code.hex() + " ".join(code.co_names + code.co_varnames)
        yield f"{code.co_flags & KINDS} {code.co_argcount} {code.co_kwonlyargcount}"
        yield f"{code.co_freevars} {code.co_cellvars}"
        yield code.co_exceptiontable
        yield from self.of(code.co_consts)

    def _module(self, module: ModuleType, names: Iterable[str] | None) -> Parts:
        """Of a module what is named beside it: all of it where any attribute may be."""
        library = of_library(module.__name__)
        wanted = WHOLE if names is None else {*names}
        if wanted & WHOLE and not library:
            wanted = wanted | {name for name in vars(module) if not name.startswith("__")}
        key = (id(module), frozenset(wanted))
        if key in self.within:
            return
        self.within.append(key)
        for name in sorted(wanted):
            inner = vars(module).get(name) if library else getattr(module, name, None)
            if inner is not None and (not library or replaced(inner)):
                yield name
                yield from self.of(inner, names)
        self.within.pop()


def like_no_other() -> Parts:
    """What stands for something that cannot be told: another each time."""
    yield uuid.uuid4().hex


def _slots(kind: type) -> bool:
    return bool(vars(kind).get("__slots__"))


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"
