"""How a call is carried out: on which workers, beside which unfinished result, and whether it says how it is doing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError, printable
from ..output.notebook import Line, notebook
from ..output.progress import duration

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ..storage.unfinished import UnfinishedResult


@dataclass(frozen=True)
class Execution:
    """How measurements are carried out, by themselves or as parts of a study.

    Attributes
    ----------
    executor : Executor, optional
        Its workers run the passes, where they can open the model.
    store : UnfinishedResult, optional
        Keeps finished passes, and the records of jobs that a server has.
    quiet : bool
        No line says how the jobs of a server are doing.
    label : str
        What the work is called where its progress is shown.
    stage : str, optional
        The stage that the work is a part of, in words; None where nothing is to be shown.
    """

    executor: Executor | None = None
    store: UnfinishedResult | None = None
    quiet: bool = False
    label: str = "measuring"
    stage: str | None = ""

    def executor_for(self, model: Model) -> Executor | None:
        """The executor, for a model that its workers can open."""
        return None if model.source is None else self.executor


_CURRENT: ContextVar[Execution] = ContextVar("execution", default=Execution())  # noqa: B039  it is frozen


def current() -> Execution:
    """How the measurements of the study are carried out that is going on."""
    return _CURRENT.get()


@contextmanager
def using(**changes: Any) -> Iterator[Execution]:
    """Meanwhile, measurements are carried out as before but for `changes`, which are fields of `Execution`."""
    token = _CURRENT.set(replace(_CURRENT.get(), **changes))
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)


@contextmanager
def stages(names: Mapping[str, str], show: Callable[[str], None] | bool | None) -> Iterator[Callable[[str], None]]:
    """What is called with the name of each stage of long work when it begins, and says so.

    Parameters
    ----------
    names : mapping of str to str
        Every stage, in words.
    show : callable or bool, optional
        A callable gets the names, and nothing else is said of the stages. True says them in a line of a notebook, and
        elsewhere in lines on standard error; None in a notebook only. False shows nothing, neither stages nor bars.
    """
    started, order, inside = time.monotonic(), list(names), notebook() is not None
    said = show is True or (show is None and inside)

    def begin(name: str) -> None:
        words = f"{order.index(name) + 1}/{len(order)} {names[name]}"
        if callable(show):
            show(name)
        elif said:
            _CURRENT.set(replace(current(), stage=words))
            Line.write(words, last=True) if inside else print(printable(words), file=sys.stderr, flush=True)

    with using(stage=None if show is False else current().stage):
        yield begin
        if said and inside and current().stage:
            Line.write(f"{len(order)} stages in {duration(time.monotonic() - started)}", last=True)


def check_remote(model: Model, remote: bool | None) -> None:
    """Refuse to run a model elsewhere than where it was opened."""
    if remote and not model.remote:
        raise DeclarationError(f"remote=True: {model.name} was opened here; open it with load(name, remote=True)")
    if remote is False and model.remote:
        raise DeclarationError(f"remote=False: {model.name} has no weights here; open it with load(name)")


def check_executor(model: Model, executor: Executor | None, estimator: str = "exact") -> None:
    """Refuse an executor for an estimate, and for a model that its workers cannot open or that is elsewhere already."""
    if executor is None:
        return
    if estimator != "exact":
        raise DeclarationError(
            f"executor=...: estimator={estimator!r} takes few passes, which run here: leave the executor out"
        )
    if model.remote:
        raise DeclarationError(f"executor=...: {model.name} runs on a server, which shares out its passes itself")
    if model.source is None:
        raise DeclarationError(
            f"{model.name} is a module in memory, which workers cannot open: save it in a folder, with its tokenizer, "
            "and load that"
        )
