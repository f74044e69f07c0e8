"""Follows a pass through a model: the calls of its modules, and what each tensor is as a sum. Imports torch.

Each tensor as wide as the stream has an expression: what entered the block and what modules gave, each times a factor.
Additions, factors, dropout and casts keep expressions; what anything else makes is an atom of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

LENGTH = 8
"""Tokens of the prompt."""
STREAM = "stream"
"""The atom of what entered a block, or the model's list of blocks."""
ADD = {"add": 1.0, "__add__": 1.0, "__radd__": 1.0, "__iadd__": 1.0, "add_": 1.0, "sub": -1.0, "__sub__": -1.0}
TIMES = {"mul", "__mul__", "__rmul__", "__imul__", "mul_"}
OVER = {"div", "__truediv__", "__itruediv__", "div_", "true_divide"}
SAME = {"dropout", "to", "float", "type_as", "contiguous", "clone", "view", "reshape", "__getitem__", "type", "half"}
ATTENTION = {"scaled_dot_product_attention", "softmax"}
GROUPED = {"grouped_mm", "_grouped_mm"}
Expression = dict[str, float]


class Call(NamedTuple):
    """A call of a module."""

    path: str
    module: Any
    began: int  # when
    ended: int
    taken: Any  # the first tensor that it took
    given: Any  # the first that it gave
    parts: Expression  # what that was then
    weights: Any  # the second that it gave in a tuple
    several: int  # how many things it gave in a tuple; 0 where it gave no tuple


class Spot(NamedTuple):
    """When attention was computed, in which modules, and of how many heads."""

    when: int
    within: tuple[str, ...]
    heads: int


@dataclass
class Record:
    """What happened in a pass.

    Attributes
    ----------
    calls : list of Call
        In the order in which they ended.
    spots : list of Spot
    known : dict of int to Expression
        By the id of a tensor; all tensors are held meanwhile, so that an id means one.
    entered : Expression
        What entered the first block.
    caps : dict of str to Expression
        Atoms that are the hyperbolic tangent of something, and of what.
    """

    calls: list[Call] = field(default_factory=list)
    spots: list[Spot] = field(default_factory=list)
    known: dict[int, Expression] = field(default_factory=dict)
    caps: dict[str, Expression] = field(default_factory=dict)
    entered: Expression = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)
    stack: list[tuple[str, int, Any]] = field(default_factory=list)
    clock: int = 0

    def tick(self) -> int:
        """The time, which goes on."""
        self.clock += 1
        return self.clock

    def of(self, tensor: Any) -> Expression:
        """The expression of a tensor: itself, where nothing more is known."""
        self.held.append(tensor)
        return self.known.setdefault(id(tensor), {f"#{id(tensor)}": 1.0})

    def name(self, tensor: Any, atom: str) -> None:
        """Make a tensor an atom of its own."""
        self.held.append(tensor)
        self.known[id(tensor)] = {atom: 1.0}


class Watch(TorchFunctionMode):
    """Follows sums of tensors, and sees attention."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, record = getattr(func, "__name__", ""), self.record
        before = [dict(record.of(one)) if isinstance(one, torch.Tensor) and name in WATCHED else None for one in args]
        if name == "__bool__" and args[0].is_meta:  # asked of prompts: whether they are one text, all of it seen
            return True
        if name in GROUPED and args[0].is_meta:  # which torch has for one number format only, where nothing is computed
            return args[0].new_empty(len(args[0]), args[1].shape[-1])
        given = func(*args, **kwargs)
        if not isinstance(given, torch.Tensor) or name not in WATCHED or not args:
            return given
        first = args[0]
        if name in ATTENTION:
            _see(record, name, first, given)
        elif name == "tanh":
            record.name(given, f"tanh{id(given)}")
            record.caps[f"tanh{id(given)}"] = before[0] or {}
        elif name in ADD and len(args) > 1 and all(isinstance(one, torch.Tensor) for one in args[:2]):
            if first.shape == args[1].shape == given.shape:
                sign = ADD[name] * float(kwargs.get("alpha", 1))
                _set(record, given, _sum(before[0] or {}, before[1] or {}, sign))
        elif name in TIMES | OVER and len(args) > 1:
            factor, whole = (args[1], before[0]) if isinstance(first, torch.Tensor) else (first, before[1])
            number = _number(factor)
            if number is not None and whole is not None and number != 0:
                number = 1 / number if name in OVER else number
                _set(record, given, {atom: by * number for atom, by in whole.items()})
        elif name in SAME and given is not first and _alike(first, given):
            _set(record, given, dict(before[0] or {}))
        return given


WATCHED = {*ADD, *TIMES, *OVER, *SAME, *ATTENTION, "tanh"}


def _alike(one: Any, two: Any) -> bool:
    """Whether two tensors hold the same vectors, be they of one prompt or of all in a row."""
    return isinstance(one, torch.Tensor) and one.shape[-1:] == two.shape[-1:] and one.numel() == two.numel()


def _number(value: Any) -> float | None:
    if isinstance(value, int | float):
        return float(value)
    return float(value) if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_meta else None


def _set(record: Record, tensor: Any, expression: Expression) -> None:
    record.held.append(tensor)
    record.known[id(tensor)] = expression


def _sum(one: Expression, two: Expression, sign: float) -> Expression:
    return {
        atom: one.get(atom, 0.0) + sign * two.get(atom, 0.0) for atom in [*one, *(key for key in two if key not in one)]
    }


def _see(record: Record, name: str, first: Any, given: Any) -> None:
    """Note attention: of queries ``(row, head, position, width)``, or weights ``(row, head, query, key)``."""
    if isinstance(first, torch.Tensor) and first.dim() == 4 and first.shape[2] == LENGTH:
        record.spots.append(Spot(record.tick(), tuple(path for path, _, _ in record.stack), int(first.shape[1])))


@contextmanager
def recorded(module: torch.nn.Module, blocks: dict[str, Any]) -> Iterator[Record]:
    """Meanwhile what happens in passes is written down; `blocks` are those whose input is an atom of its own."""
    record, hooks = Record(), []

    def before(path: str) -> Callable[..., None]:
        def note(one: Any, args: Any, kwargs: Any) -> None:
            taken = _first(args, kwargs)
            if path in blocks and taken is not None:
                if blocks[path] == 0:
                    record.entered = dict(record.of(taken))
                record.name(taken, f"{STREAM} {path}")
            record.stack.append((path, record.tick(), taken))

        return note

    def after(path: str) -> Callable[..., None]:
        def note(one: Any, args: Any, kwargs: Any, given: Any) -> None:
            _, began, taken = record.stack.pop()
            out = given[0] if isinstance(given, tuple) else given
            if isinstance(out, torch.Tensor):
                parts = record.of(out)
                if not any(atom.startswith(STREAM) for atom in parts) and path not in blocks and out is not taken:
                    known = record.known[id(out)]
                    if not (len(known) == 1 and next(iter(known)).startswith("tanh")):
                        record.name(out, path)
            several = len(given) if isinstance(given, tuple) else 0
            second = given[1] if several > 1 else None
            made = out if isinstance(out, torch.Tensor) else None
            said = {} if made is None else dict(record.of(made))
            record.calls.append(Call(path, one, began, record.tick(), taken, made, said, second, several))

        return note

    for path, one in module.named_modules():
        hooks.append(one.register_forward_pre_hook(before(path), with_kwargs=True, prepend=True))
        hooks.append(one.register_forward_hook(after(path), with_kwargs=True))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def _first(args: Any, kwargs: Any) -> Any:
    """The first tensor that a module is given, which is what nnsight calls its input."""
    one = args[0] if args else next(iter(kwargs.values()), None)
    return one if isinstance(one, torch.Tensor) else None
