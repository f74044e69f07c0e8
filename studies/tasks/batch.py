"""What a task draws: token ids of each run, and what counts as right. Owns `Batch`; knows no recipe and no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...errors import DeclarationError, check_text, printable
from ...interventions.base.shape import Group
from ...metrics.card import PromptFacts
from ..output.phrases import count, listed

Array = np.ndarray[Any, Any]
LONGEST, SHOWN = 16, 5
"""Token ids of a row, and numbers of a list, that the text of a batch gives."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The prompts that will be run, and what counts as right.

    Attributes
    ----------
    runs : mapping of str to array (example, position)
        Token ids of each run; beyond ``lengths`` they are filled with 0 and never used.
    lengths : array (example,)
        Tokens of each prompt.
    scored : bool array (example, position)
        Positions whose next token is judged.
    targets : array (example, position)
        The right next token, where scored.
    own_targets : mapping of str to array (example, position)
        Runs that are judged on next tokens of their own.
    distractors : array (example, position), optional
        A wrong next token to compare it with, where scored.
    period : int, optional
        Half length of repeated sequences.
    start : int
        Tokens in front of the repeat.
    prompt_lengths : array (example,), optional
        Given where an answer is several tokens: how many tokens of each example are its prompt. The rest are those of
        the answer but the last, each of which is followed by the next one, and what is scored is the answer as a whole.
    labels : mapping of str to sequence of tuple of int
        Named positions: for each label, those of each example, counted from 0; none where an example lacks the label.
    rivals : Batch, optional
        Where an answer or a distractor is several tokens: the same prompts, each with its distractor for an answer.
    pairs : int
        Where it is not 0: as many examples, whose rivals are the rows after them (see `with_rivals`).

    Examples
    --------
    >>> batch = hw.RepeatedTokens(n=4, length=8).draw(hw.load("words-2l"))
    >>> sorted(batch.runs), batch.scored[0].nonzero()[0].tolist()
    (['clean', 'corrupted'], [8, 9, 10, 11, 12, 13, 14])
    """

    runs: Mapping[str, Array]
    lengths: Array
    scored: Array
    targets: Array
    distractors: Array | None = None
    period: int | None = None
    start: int = 0
    own_targets: Mapping[str, Array] = field(default_factory=dict)
    prompt_lengths: Array | None = None
    labels: Mapping[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)
    rivals: Batch | None = None
    pairs: int = 0

    def __post_init__(self) -> None:
        for name in self.runs:
            check_text(name, "the name of the run")

    @property
    def sequences(self) -> bool:
        """Whether answers are several tokens, which are scored as a whole."""
        return self.prompt_lengths is not None

    def groups(self) -> list[Group]:
        """The examples by length, scored and labelled positions: those of a group run together, nothing is padded."""
        together: dict[tuple[Any, ...], list[int]] = {}
        prompts = self.lengths if self.prompt_lengths is None else self.prompt_lengths
        for example, (length, prompt) in enumerate(zip(self.lengths.tolist(), prompts.tolist(), strict=True)):
            scored = tuple(np.flatnonzero(self.scored[example]).tolist())
            known = ((label, tuple(places[example])) for label, places in self.labels.items())
            labels = tuple((label, places) for label, places in known if places)
            together.setdefault((length, scored, prompt, labels), []).append(example)
        return [Group(tuple(examples), *key) for key, examples in sorted(together.items())]

    def with_rivals(self) -> Batch:
        """The examples, and after them their rivals as further rows."""
        if self.rivals is None or self.prompt_lengths is None:
            raise DeclarationError("there are no distractors: give the task a wrong answer for each prompt")
        both, size = (self, self.rivals), max(self.scored.shape[1], self.rivals.scored.shape[1])

        def joined(rows: Iterable[Array]) -> Array:
            return np.concatenate([np.pad(row, ((0, 0), (0, size - row.shape[1]))) for row in rows])

        return replace(
            self,
            runs={run: joined(one.runs[run] for one in both) for run in self.runs},
            lengths=np.concatenate([one.lengths for one in both]),
            scored=joined(one.scored for one in both),
            targets=joined(one.targets for one in both),
            prompt_lengths=np.tile(self.prompt_lengths, 2),
            labels={label: [*places, *places] for label, places in self.labels.items()},
            rivals=None,
            pairs=len(self.lengths),
        )

    def __repr__(self) -> str:
        prompts, sizes = len(self.lengths), self.lengths.tolist()
        lines = [f"{count(prompts, 'prompt')} of {_span(sizes)} tokens" if prompts else "no prompt"]
        if prompts:
            size, scored, judged = sizes[0], self.scored[0], self.scored.sum(axis=1).tolist()
            same = (self.scored == scored).all() and judged[0]
            where = f" of each prompt: {_span(np.flatnonzero(scored).tolist())}" if same else " of a prompt"
            rows = {"scored": f"{_span(judged)} position{'' if {*judged} == {1} else 's'}{where}"}
            rows[""] = "token ids of the first prompt; model.token_text(...) gives words"
            rows |= {run: _ids(tokens[0, :size]) for run, tokens in self.runs.items()}
            rows |= {"targets": _ids(self.targets[0, scored])} if judged[0] else {}
            rows |= {} if self.distractors is None else {"distractors": _ids(self.distractors[0, scored])}
            wide = max(map(len, rows))
            lines += [f"{name:<{wide}}  {text}" for name, text in rows.items()]
        return "\n".join(map(printable, lines))

    def tokens(self, run: str, group: Group) -> Array:
        """Token ids of a run for the examples of a group, ``(example, position)``."""
        return self.runs[run][list(group.examples), : group.length]

    def facts(self, run: str, group: Group) -> PromptFacts:
        """What metrics may need to know about a run of a group."""
        where = np.ix_(group.examples, group.scored)
        targets = self.own_targets.get(run, self.targets)[where]
        distractors = None if self.distractors is None else self.distractors[where]
        return PromptFacts(self.tokens(run, group), group.scored, targets, distractors, self.period, self.start)


def _span(numbers: Sequence[int]) -> str:
    """Numbers in short, each once: ``25 to 48``, ``3, 5 and 9``."""
    found = sorted({*numbers})
    whole = found[-1] - found[0] + 1 == len(found) > 2
    return listed(map(str, found)) if len(found) <= SHOWN and not whole else f"{found[0]} to {found[-1]}"


def _ids(tokens: Array) -> str:
    """The first token ids of a row."""
    more = len(tokens) - LONGEST
    return " ".join(map(str, tokens[:LONGEST].tolist())) + (f" and {more} more" if more > 0 else "")
