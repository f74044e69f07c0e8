"""How a call on a model begins and ends: which model it is, whether it is read right, and its mode.

What gives numbers of a model does so inside `begin`, or in a `turn` of its own. Composes identity and
self-check; nothing below the studies imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import ModelError
from . import selfcheck
from .models.identity import Identity
from .models.model import Model
from .models.turns import turn_of
from .run.identify import identity_of

_SEEN: WeakKeyDictionary[Model, Identity] = WeakKeyDictionary()
"""On a worker: the model that it opened, and the one that it was seen to be."""


@dataclass
class Call:
    """A call that is going on.

    Attributes
    ----------
    identity : Identity
        Of the model, read when the call began.
    anew : bool
        Whether it was found out then, or is what a server said before.
    """

    identity: Identity
    anew: bool


@contextmanager
def begin(
    model: Model, *, check: bool = True, anew: bool = False, length: int = 0, ledger: Any = None, quiet: bool = False
) -> Iterator[Call]:
    """A call on a model: calls on one module take turns, and a call inside a call on the same thread belongs to it.

    That holds for calls of headwise, see `turns`: a thread that calls the module itself, or trains it, is not stopped,
    is heard by a call that runs meanwhile, and may change its numbers.

    For as long as it lasts every module is in evaluation mode; then each gets back the mode it had. Of a model that
    runs here every weight and buffer is read, since nothing cheaper shows that they are as they were.

    Parameters
    ----------
    model : Model
    check : bool
        Run the self-check, unless this very model has passed it.
    anew : bool
        Ask a server which model it has, as is needed where a number is stored or resumed. Otherwise what it said before
        holds for as long as the fingerprint does, which comes with everything that it computes.
    length : int
        Tokens of the longest prompt, for the self-check.
    ledger : Ledger, optional
        Where jobs for a server are written down; left out, where the call around this one has them written down.
    quiet : bool
        Show nothing of how such jobs are doing.

    Yields
    ------
    Call

    Raises
    ------
    ModelError
        The self-check failed.
    """
    memory = model._memory
    with turn(model):
        outer, before = memory.call, (memory.ledger, memory.quiet)
        try:
            memory.ledger, memory.quiet = ledger or memory.ledger, quiet or memory.quiet
            if outer is None or (anew and not outer.anew):
                memory.call = Call(*model.backend.identify(anew))
            if check:
                selfcheck.check_model(model, memory.call.identity, length)
            yield memory.call
        finally:
            memory.call, (memory.ledger, memory.quiet) = outer, before


def turn(model: Model) -> AbstractContextManager[None]:
    """Meanwhile no other thread runs the module of a model, and one with weights here is in evaluation mode."""
    return turn_of(model.module, mode=model.backend.module is not None, passes=True)


def check_reproduced(model: Model, identity: Identity) -> None:
    """Refuse, on a worker, a model that is not the one it was asked for; once, as nobody changes a worker's own model.

    The tokenizer does not matter, since token ids are compared by themselves.

    Raises
    ------
    ModelError
        Says what differs.
    """
    if _SEEN.get(model) == identity:
        return
    differ = identity.differences(identity_of(model), "here", "on a worker", but=("tokenizer",))
    if differ:
        raise ModelError(
            f"a worker cannot reproduce {model.name}: opened there, it differs in {'; '.join(differ)}. Workers open "
            "it from where it was loaded, without what was changed in place since: save it in a folder and load that"
        )
    _SEEN[model] = identity
