"""Prompts of one's own: text, conversations or token ids. Owns `Prompts`: what it takes, how it becomes a `Batch`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DeclarationError, check_text, choices, whole
from ...interventions.declare.codec import written_repr
from ...interventions.declare.sites import LEFT_OUT, check_label
from .batch import Batch
from .chat import TEMPLATE, Chat, as_chat
from .tasks import Task, bos_of, has_no_text

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]
Text = str | tuple[int, ...]
"""An answer: text, or token ids."""
Prompt = Text | Chat
CONTINUATIONS = ("answers", "distractors")
Places = int | tuple[int | tuple[int, ...], ...]
"""A labelled position: one for all prompts; or for each prompt one, or several."""


@dataclass(frozen=True)
class Prompts:
    """Any text, conversations, or token ids. Prompts of unequal length are grouped by length and never padded.

    Everything is text, or everything is token ids, for which a model needs no tokenizer: ``Prompts([[5, 9, 11]],
    answers=[33])``. One bare string is one prompt. Prompts may be conversations: each a `Chat`, or a list of messages
    such as ``[{"role": "user", "content": "Hi"}]``; then all are, those of other runs too, and answers are text.

    An answer of several tokens is scored as a whole, each of its tokens after those before it: ``loss`` is minus the
    summed log-probability in nats, ``prob`` the product of the probabilities, ``accuracy`` whether every token has the
    largest logit, and ``logit_diff`` the summed log-probability of the answer less that of the distractor, which runs
    after the prompt on its own (for one token each, this is the difference of the two logits). Where one answer or
    distractor has several tokens, this holds for all of them; other metrics of the logits are refused, and so are
    estimates. Positions of sites are then those of the prompt as it is written, ``-1`` its last token, and a site
    without positions takes in the tokens of the answer.

    Parameters
    ----------
    prompts : str, or sequence of str, of conversations or of lists of token ids
    answers : sequence of str, token ids or lists of these, optional
        For each prompt the right continuation, scored from the last position on. Left out: every position that
        has a next token is scored on it.
    distractors : sequence of str, token ids or lists of these, optional
        For each prompt a wrong continuation, for `logit_diff`.
    corrupted : sequence as `prompts`, optional
        The run ``corrupted``: for each prompt, another one of as many tokens.
    others : sequence as `prompts`, optional
        Reference prompts for mean and resample ablation; the prompts themselves when left out.
    runs : mapping of name to a sequence as `prompts`, optional
        Further runs to patch from: for each prompt, another one of as many tokens.
    bos : bool
        Put the model's BOS in front of each; refused where a chat template writes it.
    labels : mapping of str to int or sequence, optional
        Names of positions, for sites such as ``Head(9, 6).z.at("S2")``: one position for all prompts, or a list that
        holds for each prompt a position or a list of them. Negative ones count from the end of the prompt, and with
        `bos` position 0 is the BOS. Positions of conversations have labels besides, see `Chat`.

    Raises
    ------
    DeclarationError
        There is no prompt, or not one answer, distractor, text of another run or labelled position for each; or text is
        mixed with token ids. That runs have prompts of equal length, that the model has a tokenizer and knows the
        tokens, and that labelled positions exist, is seen when the model is known.

    Examples
    --------
    >>> task = hw.Prompts("apple banana cherry apple", answers="banana", distractors="cherry", labels={"first": 0})
    >>> ds = hw.measure(hw.load("words-2l"), task, metrics=[hw.metrics.accuracy])
    >>> float(ds["accuracy"].mean())
    1.0
    """

    prompts: tuple[Prompt, ...]
    answers: tuple[Text, ...] | None = None
    distractors: tuple[Text, ...] | None = None
    corrupted: tuple[Prompt, ...] | None = None
    others: tuple[Prompt, ...] | None = None
    runs: tuple[tuple[str, tuple[Prompt, ...]], ...] = field(default=(), kw_only=True)
    bos: bool = field(default=False, kw_only=True)
    labels: tuple[tuple[str, Places], ...] = field(default=(), kw_only=True, metadata=LEFT_OUT)

    __repr__ = written_repr

    def __post_init__(self) -> None:
        for name in ("prompts", "answers", "distractors", "corrupted", "others"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if not self.prompts:
            raise DeclarationError("Prompts needs at least one prompt")
        object.__setattr__(self, "runs", _runs(self.runs))
        each = {name: getattr(self, name) for name in ("answers", "distractors", "corrupted")}
        each |= {f"prompts of the run {name}": texts for name, texts in self.runs}
        for name, given in each.items():
            if given is not None and len(given) != len(self.prompts):
                raise DeclarationError(f"{len(given)} {name} for {len(self.prompts)} prompts: give one for each")
            _check_alike({"prompts": self.prompts, name: given or ()})
        _check_alike({"prompts": self.prompts, "others": self.others or ()})
        if self.distractors is not None and self.answers is None:
            raise DeclarationError("distractors are compared with answers: give answers too")
        object.__setattr__(self, "labels", _labels(self.labels, len(self.prompts)))

    def rendered(self, model: Model) -> Prompts:
        """The prompts with what the model's chat template makes of conversations; themselves where there are none."""

        def texts(given: tuple[Prompt, ...] | None) -> tuple[Prompt, ...] | None:
            return given and tuple(one.rendered(model) if isinstance(one, Chat) else one for one in given)

        if not isinstance(self.prompts[0], Chat):
            return self
        runs = tuple((name, texts(given)) for name, given in self.runs)
        fields = {name: texts(getattr(self, name)) for name in ("prompts", "corrupted", "others")}
        made = replace(self, runs=runs, **fields)  # type: ignore[arg-type]
        return self if made == self else made

    def draw(self, model: Model) -> Batch:
        """The prompts as tokens, and those of an answer but its last after them."""
        if (own := self.rendered(model)) is not self:  # a template is asked once: it may tell the time
            return own.draw(model)
        texts = {"clean": self.prompts} | ({"corrupted": self.corrupted} if self.corrupted is not None else {})
        ids = {run: [self._encode(model, text) for text in given] for run, given in (texts | dict(self.runs)).items()}
        clean = ids["clean"]
        for run, rows in ids.items():
            for tokens, other, text in zip(clean, rows, self.prompts, strict=True):
                if len(tokens) != len(other):
                    raise DeclarationError(
                        f"prompt {_said(text)} has {len(tokens)} tokens, its {run} one {len(other)}: make them equal"
                    )
        labels = {label: _places(label, given, clean) for label, given in self.labels} | self._held(model, clean)
        if self.answers is None:
            for tokens, text in zip(clean, self.prompts, strict=True):
                if len(tokens) == 1:
                    raise DeclarationError(f"prompt {_said(text)} is one token: there is no next token to score")
            return _batch(ids, [0] * len(clean), [tokens[1:] for tokens in clean], labels=labels)
        answers = [token_ids(model, text, "answer") for text in self.answers]
        wrong = [token_ids(model, text, "distractor") for text in self.distractors or ()]
        lengths = None if all(len(one) == 1 for one in answers + wrong) else np.array(list(map(len, clean)))

        def followed(continuations: Sequence[list[int]]) -> Batch:
            rows = {
                run: [[*tokens, *more[:-1]] for tokens, more in zip(prompts, continuations, strict=True)]
                for run, prompts in ids.items()
            }
            longest = max(map(len, rows["clean"]))
            if longest > model.shape.context:
                raise DeclarationError(
                    f"a prompt and its answer have {longest} tokens: {model.name} reads at most {model.shape.context}"
                )
            return _batch(
                rows, [len(tokens) - 1 for tokens in clean], continuations, labels=labels, prompt_lengths=lengths
            )

        batch = followed(answers)
        if not wrong:
            return batch
        rivals = followed(wrong)
        return replace(batch, distractors=rivals.targets) if lengths is None else replace(batch, rivals=rivals)

    def reference(self, model: Model) -> Batch:
        """The other prompts where they were given, else these prompts."""
        if self.others is None:
            return self.draw(model)
        rows = [self._encode(model, text) for text in self.others]
        return _batch({"clean": rows}, [0] * len(rows), [[]] * len(rows))

    def _held(self, model: Model, prompts: Sequence[list[int]]) -> dict[str, list[tuple[int, ...]]]:
        """What each token of a conversation is part of: label to positions in each prompt."""
        front = int(self.bos)
        each = [
            one.labels(model, tokens[front:]) if isinstance(one, Chat) else {}
            for one, tokens in zip(self.prompts, prompts, strict=True)
        ]
        found: dict[str, list[tuple[int, ...]]] = {}
        for label in dict.fromkeys(label for one in each for label in one):
            if label in dict(self.labels):
                raise DeclarationError(f"labels[{label!r}]: tokens of conversations have this label by themselves")
            found[label] = [tuple(place + front for place in one.get(label, ())) for one in each]
        if front and TEMPLATE in found:
            found[TEMPLATE] = [(0, *places) for places in found[TEMPLATE]]
        return found

    def _encode(self, model: Model, text: Prompt) -> list[int]:
        if isinstance(text, Chat):
            text = text.rendered(model).text
            if self.bos and token_ids(model, text, "prompt")[0] == bos_of(model):
                raise DeclarationError(f"the chat template of {model.name} writes the BOS itself: leave out bos=True")
        tokens = [*([bos_of(model)] if self.bos else []), *token_ids(model, text, "prompt")]
        if len(tokens) > model.shape.context:
            shown = f"{text[:40]!r}..." if isinstance(text, str) else f"[{', '.join(map(str, text[:8]))}, ...]"
            raise DeclarationError(
                f"prompt {shown} has {len(tokens)} tokens: {model.name} reads at most {model.shape.context}"
            )
        return tokens


def _said(prompt: Prompt) -> str:
    """A prompt as an error quotes it."""
    return repr(str(prompt)) if isinstance(prompt, Chat) else repr(prompt)


def rendered(task: Task, model: Model) -> Task:
    """A task with what the model's chat template makes of its conversations; any other task as it is."""
    return task.rendered(model) if isinstance(task, Prompts) and hasattr(model, "tokenizer") else task


def _batch(
    rows: Mapping[str, Sequence[list[int]]], starts: Sequence[int], answers: Sequence[list[int]], **more: Any
) -> Batch:
    """Rows of tokens, each judged from its start on by what ought to come next."""
    lengths = np.array([len(tokens) for tokens in rows["clean"]])
    shape = (len(lengths), int(lengths.max()))
    runs = {run: np.zeros(shape, dtype=np.int64) for run in rows}
    for run, tokens in rows.items():
        for row, one in enumerate(tokens):
            runs[run][row, : len(one)] = one
    scored, targets = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
    for row, (start, answer) in enumerate(zip(starts, answers, strict=True)):
        scored[row, start : start + len(answer)] = True
        targets[row, start : start + len(answer)] = answer
    return Batch(runs, lengths, scored, targets, **more)


def token_id(model: Model, given: str | int) -> int:
    """The id of a token that is given as text or by its id, or an error that says why there is none."""
    found = token_ids(model, given if isinstance(given, str) else (whole(given, "a token id"),), "token")
    if len(found) != 1:
        said = " ".join(map(repr, model.token_text(found)))
        raise DeclarationError(f"token {given!r} is {len(found)} tokens of {model.name}: {said}")
    return found[0]


def token_ids(model: Model, text: Text, what: str) -> list[int]:
    """The token ids of a prompt, an answer, or what `what` calls it."""
    if not isinstance(text, str):
        for token in text:
            if token >= model.shape.vocabulary:
                raise DeclarationError(
                    f"{what} {list(text)} has the token id {token}: {model.name} has 0 to {model.shape.vocabulary - 1}"
                )
        return list(text)
    lacking = has_no_text(model)
    hint = (
        f"; {lacking}: give hw.load(..., tokenizer=...), or token ids such as Prompts([[5, 9, 11]])" if lacking else ""
    )
    if model.tokenizer is None:
        raise DeclarationError(f"{what} {text!r} is text{hint}")
    tokens = model.encode(text)
    unknown = model.tokenizer.unk_token_id
    if unknown is not None and unknown in tokens and str(model.tokenizer.unk_token) not in text:
        words = [word for word in text.split() if unknown in model.encode(word)] if what == "prompt" else []
        named = ", ".join(map(repr, words)) or (repr(text) if what == "prompt" else f"{what} {text!r}")
        raise DeclarationError(f"{named} is not in the vocabulary of {model.name}{hint}")
    if not tokens:
        raise DeclarationError(f"{what} {text!r} is empty")
    if max(tokens) >= model.shape.vocabulary:
        raise DeclarationError(
            f"{what} {text!r} has the token id {max(tokens)}: {model.name} has 0 to {model.shape.vocabulary - 1}, so "
            "its tokenizer is that of another model"
        )
    return tokens


def _places(label: str, given: Places, prompts: Sequence[list[int]]) -> list[tuple[int, ...]]:
    """The positions with a label in each prompt, counted from 0."""
    found = []
    for tokens, places in zip(prompts, [given] * len(prompts) if isinstance(given, int) else given, strict=True):
        several = (places,) if isinstance(places, int) else places
        for place in several:
            if not -len(tokens) <= place < len(tokens):
                raise DeclarationError(
                    f"labels[{label!r}]: position {place} does not exist in a prompt of {len(tokens)} tokens "
                    f"(0 to {len(tokens) - 1}, or -{len(tokens)} to -1 from the end)"
                )
        found.append(tuple(sorted({place % len(tokens) for place in several})))
    return found


def _texts(name: str, given: Any) -> Any:
    """Texts, conversations or lists of token ids, as tuples."""
    if given is None:
        return None
    one_chat = name not in CONTINUATIONS and (isinstance(given, Chat | Mapping) or _is_message(given))
    several = (given,) if isinstance(given, str) or one_chat else given
    if not isinstance(several, Iterable) or isinstance(several, bytes):
        raise DeclarationError(f"{name} is a text, or a list of texts or of lists of token ids, got {given!r}")
    texts = tuple(_text(name, one) for one in several)
    _check_alike({name: texts})
    return texts


def _is_message(given: Any) -> bool:
    """Whether a list is one conversation and not several."""
    return isinstance(given, list | tuple) and bool(given) and isinstance(given[0], Mapping)


def _text(name: str, given: Any) -> Prompt:
    if isinstance(given, str):
        return given
    one_token = name in CONTINUATIONS
    if not one_token and (chat := as_chat(given)) is not None:
        return chat
    possible = (
        "text, token ids, or lists of these"
        if one_token
        else "text, lists of token ids such as [[5, 9, 11]], or conversations such as Chat('text')"
    )
    wrong = DeclarationError(f"{name} are {possible}, got {given!r}")
    try:
        found = _whole(given)
    except TypeError:
        raise wrong from None
    if isinstance(given, bytes | bool) or (isinstance(found, int) and not one_token):
        raise wrong
    ids = (found,) if isinstance(found, int) else found
    if not ids or min(ids) < 0:
        raise DeclarationError(f"{name} hold {list(ids)}: a list of token ids has at least one, and none below 0")
    return ids


def _check_alike(given: Mapping[str, Iterable[Prompt]]) -> None:
    """Refuse text beside token ids, and beside conversations but for answers."""
    for kind, words in ((str | Chat, "text and token ids: give all as text, or all as token ids"),
                        (Chat, "text and conversations: give Chat('text') for a message of the user")):  # fmt: skip
        some = {name: texts for name, texts in given.items() if kind is not Chat or name not in CONTINUATIONS}
        if len({isinstance(text, kind) for texts in some.values() for text in texts}) > 1:
            raise DeclarationError(f"{' and '.join(some)} mix {words}")


def _runs(given: object) -> tuple[tuple[str, tuple[Prompt, ...]], ...]:
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        runs = tuple((str(name), _texts(f"the run {name}", texts) or ()) for name, texts in pairs)  # type: ignore
    except DeclarationError:
        raise
    except (TypeError, ValueError):
        raise DeclarationError(f"runs={given!r}: give a mapping of names to lists of texts") from None
    names = [name for name, _ in runs]
    for name in names:
        check_text(name, "the name of the run")
    if {"clean", "corrupted"} & {*names} or len({*names}) < len(names):
        raise DeclarationError(f"runs are called {choices(names)}: names must differ, from clean and corrupted too")
    return runs


def _labels(given: object, prompts: int) -> tuple[tuple[str, Places], ...]:
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        labels = tuple((name, _labelled(places)) for name, places in pairs)  # type: ignore
    except (TypeError, ValueError):
        raise DeclarationError(
            f"labels={given!r}: give a mapping of names to a position for all prompts, or to a list that has "
            "a position or a list of positions for each"
        ) from None
    for name, places in labels:
        if not isinstance(name, str):
            raise DeclarationError(f"the label of a position is text, got {name!r}")
        check_label(name)
        if not isinstance(places, int) and len(places) != prompts:
            raise DeclarationError(
                f"labels[{name!r}] has {len(places)} entries for {prompts} prompts: give one position for all, or for "
                "each prompt one (or a list of several)"
            )
    if len({name for name, _ in labels}) < len(labels):
        raise DeclarationError(f"labels must differ, got {choices([name for name, _ in labels])}")
    return labels


def _labelled(given: Any) -> Places:
    try:
        return operator.index(given)
    except TypeError:
        found = tuple(map(_whole, given))
    if () in found:
        raise ValueError("a label of no position")
    return found


def _whole(given: Any) -> int | tuple[int, ...]:
    """A whole number, or several."""
    try:
        return operator.index(given)
    except TypeError:
        return tuple(map(operator.index, given))
