"""How a call on a model begins and ends: which model it is, whether it is read right, and its mode.

Everything public that runs a model does so inside `begin`. Composes identity, self-check and remote models; nothing in
this package imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from ..errors import HeadwiseError, ModelError
from . import selfcheck
from .elsewhere import RemoteModel
from .identify import fingerprint_of, identity_of
from .identity import Identity
from .memory import is_out_of_memory

if TYPE_CHECKING:
    from .models import Model

_TURNS: WeakKeyDictionary[torch.nn.Module, RLock] = WeakKeyDictionary()
_ADDING = RLock()


@dataclass
class Call:
    """A call that is going on.

    Attributes
    ----------
    identity : Identity
        Of the model, read when the call began.
    anew : bool
        Whether every weight and buffer was read then.
    """

    identity: Identity
    anew: bool


@contextmanager
def begin(model: Model, *, check: bool = True, anew: bool = False) -> Iterator[Call]:
    """A call on a model: calls on one module take turns, and a call inside a call on the same thread belongs to it.

    For as long as it lasts every module is in evaluation mode; then each gets back the mode it had.

    Parameters
    ----------
    model : Model
    check : bool
        Run the self-check, unless this very model has passed it.
    anew : bool
        Read every weight and buffer, as is needed where a number is stored, resumed or sent. Otherwise the hashes of
        an earlier call hold while the fingerprint is the same to the last bit.

    Raises
    ------
    ModelError
        The model fails on a short prompt, or its self-check failed.
    """
    with _turn_of(model.module):
        outer = model._memory.call
        if outer is not None and (outer.anew or not anew):
            if check:
                selfcheck.check_model(model, outer.identity)
            yield outer
            return
        with nullcontext() if model.remote else evaluating(model.module):
            call = Call(_identity(model, anew), anew)
            model._memory.call = call
            try:
                if check:
                    selfcheck.check_model(model, call.identity)
                yield call
            finally:
                model._memory.call = outer


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Meanwhile every module below `module` is in evaluation mode; then each has the mode it had.

    The flag is set as such: `train` and `eval` of a module of one's own may do more, such as merge an adapter.
    """
    modes = [(one, one.training) for one in module.modules()]
    for one, _ in modes:
        one.training = False
    try:
        yield
    finally:
        for one, training in modes:
            one.training = training


def _turn_of(module: torch.nn.Module) -> RLock:
    with _ADDING:
        return _TURNS.setdefault(module, RLock())


def _identity(model: Model, anew: bool) -> Identity:
    """Which model this is; remembered where nothing says otherwise."""
    before = None if anew else model._memory.identity
    if isinstance(model, RemoteModel):
        return model.ask_identity() if before is None else before
    try:
        fingerprint = fingerprint_of(model)
    except Exception as error:  # whatever a strange model raises
        if isinstance(error, HeadwiseError) or is_out_of_memory(error):
            raise
        raise ModelError(
            f"{model.name} fails on a prompt of a few tokens: {selfcheck.line_of(error)}. Does what the family "
            f"{model.family.name} says of its modules and counts hold for this model?"
        ) from error
    addresses = model._memory.addresses, _addresses(model.module)
    holds = before is not None and before.fingerprint is not None and before.fingerprint.bits == fingerprint.bits
    before = before if holds and addresses[0] == addresses[1] else None
    model._memory.addresses = addresses[1]
    model._memory.identity = found = identity_of(model, fingerprint, before)
    return found


def _addresses(module: torch.nn.Module) -> tuple[tuple[int, int], ...]:
    """Where parameters and buffers are, and how often torch saw them change: other numbers mean another model.

    Equal ones prove nothing: fused optimisers, ``.data`` and NumPy views change weights without a trace.
    """
    tensors = [*module.parameters(), *module.buffers()]
    return tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors)
