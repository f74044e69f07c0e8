"""Tasks: recipes for prompts and what counts as right. Owns `RepeatedTokens`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...errors import LARGEST_SEED, MOST_PROMPTS, DeclarationError, UnknownNameError, choices, whole
from ...interventions.declare.codec import written_repr
from ...interventions.declare.sites import LEFT_OUT
from .batch import Batch

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...interventions.plan.plan import Plan

Array = np.ndarray[Any, Any]
BYTES = 100
"""For each token of a prompt: ids in both runs, targets and distractors, and copies of them while they are made."""
SMALL = 2**20
"""Bytes that are had without asking the system."""
CORRUPTIONS = ("first", "second", "cue")
SHORTEST_CUE = 4
REFERENCE_EXAMPLES = 32
"""Fewest examples of the reference draw of a random task: a mean over a handful is mostly noise."""


class Task(Protocol):
    """What a task can do. Tasks are frozen dataclasses whose fields are JSON-ready."""

    def draw(self, model: Model) -> Batch:
        """The prompts; the same declaration gives the same prompts everywhere."""

    def reference(self, model: Model) -> Batch:
        """Prompts of the same kind, for mean and resample ablation."""


@dataclass(frozen=True)
class RepeatedTokens:
    """Random distinct tokens, repeated once: ``t[i + L] = t[i]``.

    The ``clean`` run is the repeat. The target at query ``i`` is its token at ``i + 1``. The ``corrupted`` run has
    other tokens in some places, so that a query finds no earlier copy of its token:

    ============  =====================================================  ==========================================
    ``corrupt``   the corrupted run                                      the distractor at query ``i``
    ============  =====================================================  ==========================================
    ``"first"``   another first half, the same second half               the other token that stands in the first
                                                                         half where the target stood
    ``"second"``  the same first half, another second half               the other token that stands at ``i + 1``
    ``"cue"``     the first half with its tokens 0, 2, 4, ... replaced;  the target of the next scored query (of the
                  queries are scored where these tokens come again       first, for the last one)
    ============  =====================================================  ==========================================

    Other tokens are in no place of the clean run. With ``"first"``, denoising (``base="corrupted"``,
    ``Patch(..., source="clean")``) cannot restore the answer: the target stands nowhere in the first half, and
    restoring the match, q or k, makes a head copy what stands there instead, which is the distractor. With
    ``"second"`` the first half, and so every key, is that of the clean run, and restoring the queries restores the
    answer. With ``"cue"`` the queries and the target are there, and what is missing is that the target's place in the
    first half follows a copy of the query: restoring the keys restores the answer, and so does restoring a head of an
    earlier layer that looks at the previous token. There both target and distractor stand in the first half of both
    runs, so that copying just any token of it favours neither.

    Both runs are judged on the targets of the clean run. (With ``score="all"`` and ``"first"``, queries in the first
    half are judged on next tokens of each run's own.)

    Parameters
    ----------
    n : int
        Number of prompts.
    length : int
        Half length ``L``; a prompt has ``2L`` tokens.
    seed : int
        The same seed gives the same prompts everywhere (the random stream is a frozen one). The reference draw has a
        seed of its own, derived from this one.
    bos : bool
        Put the model's BOS in front; every index shifts by one.
    tokens : (int, int), optional
        Draw from the token ids ``start`` up to, not including, ``stop``; the whole vocabulary when left out. Special
        tokens are never drawn.
    score : {"repeat", "all"}
        Score the queries ``L .. 2L-2`` (default; only ``L, L+2, ...`` with ``corrupt="cue"``), or every query that has
        a next token.
    corrupt : {"first", "second", "cue"}
        Which tokens the corrupted run replaces: the first half, the second half, or every second one of the first half.

    Raises
    ------
    DeclarationError
        A value is not possible. What a model cannot read is refused when prompts are drawn for it.

    Examples
    --------
    >>> task = hw.RepeatedTokens(n=4, length=8)
    >>> task.draw(hw.load("words-2l")).runs["clean"].shape
    (4, 16)
    """

    n: int = 32
    length: int = 25
    seed: int = 0
    bos: bool = False
    tokens: tuple[int, int] | None = None
    score: str = "repeat"
    corrupt: str = field(default="first", metadata=LEFT_OUT)

    __repr__ = written_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole(self.n, "n, the number of prompts,", low=1, high=MOST_PROMPTS))
        object.__setattr__(self, "length", whole(self.length, "length, the half length,", low=2, high=MOST_PROMPTS))
        object.__setattr__(self, "seed", whole(self.seed, "a seed", high=LARGEST_SEED))
        object.__setattr__(self, "bos", bool(self.bos))
        if self.score not in ("repeat", "all"):
            raise DeclarationError(f"score={self.score!r}: possible are 'repeat' and 'all'")
        if self.corrupt not in CORRUPTIONS:
            raise DeclarationError(f"corrupt={self.corrupt!r}: possible are {choices(map(repr, CORRUPTIONS))}")
        if self.corrupt == "cue" and self.score == "all":
            raise DeclarationError("score='all' goes with corrupt='first' and 'second': 'cue' scores its own queries")
        if self.corrupt == "cue" and self.length < SHORTEST_CUE:
            raise DeclarationError(
                f"length={self.length}: corrupt='cue' needs {SHORTEST_CUE} or more, for two queries and their targets"
            )
        if self.tokens is not None:
            span = tuple(self.tokens) if isinstance(self.tokens, Iterable) else ()
            if len(span) != 2 or not all(isinstance(token, int) for token in span) or not 0 <= span[0] < span[1]:
                raise DeclarationError(f"tokens={self.tokens}: give a start and a larger stop, such as (2, 500)")
            object.__setattr__(self, "tokens", span)

    def draw(self, model: Model) -> Batch:
        """The evaluated prompts."""
        return self._draw(model, self.n, 0)

    def reference(self, model: Model) -> Batch:
        """As many prompts (32 at least) from another seed."""
        return self._draw(model, max(self.n, REFERENCE_EXAMPLES), 1)

    def _draw(self, model: Model, n: int, stream: int) -> Batch:
        half, start = self.length, int(self.bos)
        size = start + 2 * half
        if size > model.shape.context:
            raise DeclarationError(
                f"length={half} makes prompts of {size} tokens: {model.name} reads at most {model.shape.context}, "
                f"so length can be 2 to {(model.shape.context - start) // 2}"
            )
        pool = self._pool(model)
        _check_room(n, size)
        random = np.random.RandomState([self.seed, stream])
        picked = np.stack([pool[random.permutation(len(pool))[: 2 * half]] for _ in range(n)])
        first, other = picked[:, :half], picked[:, half:]
        front = np.full((n, start), bos_of(model) if self.bos else 0, dtype=np.int64)
        cued = np.where(np.arange(half) % 2, first, other)
        halves = {"first": (other, first), "second": (first, other), "cue": (cued, first)}[self.corrupt]
        runs = {
            run: np.concatenate([front, *two], axis=1)
            for run, two in {"clean": (first, first), "corrupted": halves}.items()
        }
        scored = np.zeros((n, size), dtype=bool)
        judged = slice(0 if self.score == "all" else start + half, size - 1, 2 if self.corrupt == "cue" else 1)
        scored[:, judged] = True
        targets, distractors = (np.zeros((n, size), dtype=np.int64) for _ in range(2))
        targets[:, :-1] = runs["clean"][:, 1:]
        distractors[:, :-1] = np.concatenate([front, other, other], axis=1)[:, 1:]
        if self.corrupt == "cue":
            distractors[:, judged] = np.roll(targets[:, judged], -1, axis=1)
        own = {}
        if self.corrupt == "first":  # differs from the targets of the clean run before the repeat only
            own["corrupted"] = targets.copy()
            own["corrupted"][:, :-1] = runs["corrupted"][:, 1:]
        return Batch(runs, np.full(n, size), scored, targets, distractors, half, start, own)

    def _pool(self, model: Model) -> Array:
        if self.bos:
            bos_of(model)
        low, high = self.tokens or (0, model.shape.vocabulary)
        if high > model.shape.vocabulary:
            raise DeclarationError(
                f"tokens={self.tokens}: {model.name} has the token ids 0 to {model.shape.vocabulary - 1}"
            )
        special = set(getattr(model.tokenizer, "all_special_ids", ()))
        pool = np.array([token for token in range(low, high) if token not in special])
        if len(pool) < 2 * self.length:
            raise DeclarationError(
                f"length={self.length} needs {2 * self.length} different tokens (a half and its corruption): "
                f"there are {len(pool)}"
            )
        return pool


def bos_of(model: Model) -> int:
    """The token id of the model's BOS."""
    found = getattr(model.tokenizer, "bos_token_id", None)
    if found is None:
        raise DeclarationError(f"bos=True: {has_no_text(model) or f'the tokenizer of {model.name} has no BOS token'}")
    return int(found)


def has_no_text(model: Model) -> str:
    """In words that a model was opened without a tokenizer; nothing where it has one."""
    ids_only = getattr(model.tokenizer, "unk_token_id", None) == model.shape.vocabulary  # see `load`: ids for words
    return f"{model.name} was opened without a tokenizer" if model.tokenizer is None or ids_only else ""


def _check_room(n: int, size: int) -> None:
    """Refuse more prompts than fit in memory."""
    from ...interventions.base.memory import shortage

    needed = n * size * BYTES
    if needed > SMALL and (short := shortage(needed)):
        raise DeclarationError(f"drawing n={n} prompts of {size} tokens {short}: take fewer")


def reference_tokens(task: Task, model: Model, plan: Plan) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The reference prompts that the edits of a plan take values from.

    Parameters
    ----------
    task : Task
    model : Model
    plan : Plan

    Returns
    -------
    tuple of arrays (example, position)
        For each group of the plan, the token ids of the reference prompts of its length; none where every edit takes
        the mean over all prompts and positions, and they differ in length.
    tuple of arrays (example, position)
        For each length, those of all reference prompts, where an edit takes that mean and they differ in length.

    Raises
    ------
    UnknownNameError
        The reference prompts have no such run as the base run of the plan.
    DeclarationError
        There are fewer than two reference prompts of a length that an edit needs them of.
    """
    batch, run = task.reference(model), plan.base
    if run not in batch.runs:
        raise UnknownNameError(f"the reference prompts have the runs {choices(batch.runs)}, not {run!r}")
    drawn = batch.groups()
    lengths = sorted({one.length for one in drawn})
    over_all = {edit.over_all for edits in plan.conditions for edit in edits if edit.uses_reference}
    differ = True in over_all and {*lengths, *(group.length for group in plan.groups)} != {lengths[0]}
    found = []
    for group in plan.groups:
        alike = sorted(  # where the prompts are their own reference, those of the group stand as they stand in it
            (one for one in drawn if one.length == group.length and not (differ and over_all == {True})),
            key=lambda one: (one.scored, one.labels) != (group.scored, group.labels),
        )
        if over_all != {True} and sum(len(one.examples) for one in alike) < 2:
            raise DeclarationError(
                "resample ablation, and means by position, need at least two reference prompts of "
                f"{group.length} tokens: give Prompts(..., others=[...]); MeanAblate(..., over=('example', 'position'))"
                " needs none"
            )
        none = np.zeros((0, group.length), dtype=np.int64)
        found.append(np.concatenate([batch.tokens(run, one) for one in alike] or [none]))
    whole = [
        np.concatenate([batch.tokens(run, one) for one in drawn if one.length == length])
        for length in (lengths if differ else ())
    ]
    return tuple(found), tuple(whole)
