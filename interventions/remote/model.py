"""The handle of a model that a server has: what is asked of it, and which model it is."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from ...errors import ModelError, ServerError
from ..base.hashing import data_hash, short_hash
from ..models.checkpoints import revision_and_step
from ..models.family import HeadWeights
from ..models.identity import Fingerprint, Identity, unequal_configurations
from ..models.model import Model
from ..models.turns import turn_of
from ..run.activations import described
from ..run.identify import modules_facts, prompt
from ..traced.passes import server_jobs
from ..traced.passes.traces import DIRECTIONS
from ..traced.structure import configuration_of
from .job import Failed, RemoteJob
from .ledger import InMemoryLedger, Ledger
from .protocol import Unfit
from .queue import JobQueue
from .refusals import SHOWN

Array = np.ndarray[Any, Any]
FACTS = 32 * 2**20
"""Bytes of what tells which model a server has: a name, a shape and a sum for each of its tensors."""
WORD = re.compile(r"[\w .:/@+-]{0,100}")
"""What the name of a number format, of a device or of an implementation looks like."""
NAME = 1000
"""Characters of the name of a module or tensor, or of what is said of one."""
LONGEST = 2**20
"""Characters of a configuration."""


@dataclass(frozen=True, eq=False, repr=False)
class RemoteModel(Model):
    """A model of a server. What it is asked to do is sent there, and only numbers come back.

    Attributes
    ----------
    queue : JobQueue
        Sends jobs.
    commit : str
        Of the configuration on the Hub; else as `revision`.
    """

    queue: JobQueue = field(kw_only=True)
    commit: str = field(kw_only=True)
    remote: ClassVar[bool] = True

    @property
    def device(self) -> torch.device:
        """Where what is sent is made: the CPU of this machine."""
        return torch.device("cpu")

    @property
    def ledger(self) -> Ledger:
        """Where jobs are written down in the call that is going on; else one that nobody reads again."""
        return self._memory.ledger or InMemoryLedger()

    @property
    def identity(self) -> Identity:
        """Which model the server has, as it said last; asked for where it has not said yet."""
        found: Identity | None = self._memory.identity
        if found is not None:
            return found
        with turn_of(self.module, mode=False):  # no job of ours beside the result of another thread's call
            found = self._memory.identity
            return found if found is not None else self.ask_identity()

    @property
    def dtype(self) -> str:
        """Number format of the weights on the server."""
        return self.identity.dtype

    @property
    def place(self) -> str:
        """Kind of device on the server."""
        self.identity  # noqa: B018  asks where the server has not said
        return self._memory.device

    @property
    def executed(self) -> str:
        """The server."""
        return self.queue.host

    @property
    def weight_hash(self) -> str:
        """A hash of names, shapes and a sample of the numbers of all weights (``sample:`` and 16 hexadecimal digits).

        Made on the server, which cannot be asked to read all of a large model. A server that runs what it is sent apart
        from the weights gives none: then it is a hash of the model's name and revision (``revision:`` and 16 digits).
        """
        return self.identity.weights

    @property
    def has_gradients(self) -> bool:
        """Not where a server runs jobs apart from the weights."""
        return self.weight_hash.startswith("sample:")

    def head_weights(self, layer: int) -> HeadWeights:
        """Not here."""
        raise ModelError(
            f"the weights of {self.name} are on {self.queue.host}: composition_scores, circuit_scores, "
            "head_circuits and neuron_tokens are computed there"
        )

    def ask(
        self, what: str, function: Callable[..., Any], program: dict[str, Any], read: Callable[[Any], Any], most: int
    ) -> Any:
        """Run one job, and give what came back. It stays written down: only the caller knows when that is safe.

        Parameters
        ----------
        what, function, program, read, most
            As for `job`.

        Returns
        -------
        object
            What `read` gives.

        Raises
        ------
        ServerError
            The job failed, the server refuses or cannot be reached, or the model computes otherwise now.
        DeclarationError
            A function in the job cannot be sent.
        """
        for _, result in self.answers([self.job(what, function, program, read, most)]):
            if isinstance(result, Failed):
                raise self.queue.failure(result)
        return result

    def answers(self, jobs: Sequence[RemoteJob], say: Callable[[str], None] | None = None) -> Iterator[tuple[int, Any]]:
        """As `JobQueue.run`; each answer comes from the model that this call began with.

        Raises
        ------
        ServerError
            The model computes otherwise now. What it gave is not taken, and the next call asks which model it is.
        """
        for at, result in self.queue.run(jobs, say, self.ledger, self._memory.quiet):
            if isinstance(result, Failed):
                yield at, result
                continue
            known, (found, values) = self._memory.identity, result
            if known is not None and (unlike := known.fingerprint.unlike(found, known.dtype)):
                self._memory.identity = None
                self.ledger.drop_job(jobs[at].key)
                raise ServerError(
                    f"{self.name} on {self.queue.host} is not the model that it was when this began: {unlike}. "
                    "Nothing of that answer is kept; the same call measures the model that is there now"
                )
            yield at, values

    def job(
        self, what: str, function: Callable[..., Any], program: dict[str, Any], read: Callable[[Any], Any], most: int
    ) -> RemoteJob:
        """Make a job. What the model computes on the prompt of its fingerprint comes back with what the job gives.

        Parameters
        ----------
        what : str
            What the job is, for those who look at the server.
        function : callable
            Of `server_jobs`; it is sent along.
        program : dict
            What the function takes beside the model: plain data, tensors and functions.
        read : callable
            Makes what is used of what came back, or raises where that is not what was asked for.
        most : int
            Bytes that may come back.

        Returns
        -------
        RemoteJob
            It gives a tuple of Fingerprint and what `read` gives.
        """
        tokens = torch.as_tensor(prompt(self.shape.vocabulary, self.shape.context))
        full_program = {"parts": described(self), "prompt": tokens, **program, "job": function}
        key = data_hash([what, self.queue.model_key, server_jobs.answered, full_program])
        size = (self.shape.layers + 1, tokens.shape[1], 1 + DIRECTIONS)

        def taken(result: Any) -> tuple[Fingerprint, Any]:
            """Split what came back into the fingerprint of the model and what `read` gives."""
            return Fingerprint.of(numbers(result["fingerprint"], size, torch.float64)), read(result)

        return RemoteJob(key, server_jobs.answered, {**full_program, "key": key, "what": what}, taken, most)

    def ask_identity(self) -> Identity:
        """Which model the server has now.

        Raises
        ------
        ModelError
            Its configuration is not the one that this handle was opened with.
        """
        self._memory.identity = None
        # numbered, so that the answer to an earlier question is never taken for this one's
        job = self.job("facts", server_jobs.facts, {"asked": uuid.uuid4().hex}, facts_of, FACTS)
        for _, found in self.answers([job]):
            if isinstance(found, Failed):
                raise self.queue.failure(found)
        self.ledger.drop_job(job.key)
        named = f"revision:{short_hash(self.queue.model_key, self.commit)}"
        here = configuration_of(self.traced._module.config)
        apart = not found["weights"]
        unknown = {"modules": {}, "modules_hash": ""}
        identity = Identity(
            family=self.family.name,
            dtype=found["dtype"],
            attention=found.get("attention", ""),
            configuration=found.get("configuration", here),
            buffers="" if apart else f"sample:{data_hash(found['buffers'])}",
            weights=named if apart else f"sample:{data_hash(found['weights'])}",
            tokenizer=self.tokenizer_hash,
            fingerprint=Fingerprint.of(found["fingerprint"].numpy()),
            **(unknown if apart else modules_facts(found["modules"], "names:")),
        )
        if differ := unequal_configurations(here, identity.configuration, "here", f"on {self.queue.host}"):
            told = differ[0] if len(differ[0]) <= SHOWN else f"{differ[0][:SHOWN]}..."
            raise ModelError(f"{self.name} has another {told}: open the revision that the server has")
        self._memory.identity, self._memory.device = identity, found["device"] or "server"
        return identity

    def __repr__(self) -> str:
        where = "NDIF" if self.queue.host.endswith("ndif.us") else "a server of NDIF's kind"
        what = revision_and_step(self.revision, self.step)
        return (
            f"<Model {self.name} ({what}): {self.family.name}, {self.shape.layers} layers of "
            f"{self.shape.heads} heads, runs on {where}, {self.queue.host}{self._way}>"
        )


def numbers(given: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    """What came back, as long as it is an array of this shape and number format.

    Raises
    ------
    Unfit
        It is something else.
    """
    if not isinstance(given, torch.Tensor) or given.dtype != dtype or tuple(given.shape) != shape:
        raise Unfit(f"it does not hold the {str(dtype)[6:]} numbers of shape {shape} that were asked for")
    array: Array = given.numpy()
    return array


def facts_of(result: Any) -> dict[str, Any]:
    """What `server_jobs.facts` says, as long as it says it in such words."""
    for name in ("dtype", "device", "attention"):
        if not WORD.fullmatch(result.get(name, "")):
            raise Unfit(f"its {name} is no name")
    for name in ("weights", "buffers"):
        for path, shape, dtype, total in result[name]:
            words, sizes = {type(path), type(dtype)}, {type(total), *map(type, shape)}
            if words != {str} or sizes != {int} or max(len(path), len(dtype), len(shape)) > NAME:
                raise Unfit(f"what it says of its {name} makes no sense")
    if not all(type(one) is str and len(one) <= NAME for pair in result["modules"].items() for one in pair):
        raise Unfit("what it says of its modules makes no sense")
    text = result.get("configuration", "{}")
    if len(text) > LONGEST or not isinstance(json.loads(text), dict):
        raise Unfit("its configuration is none")
    return dict(result)
