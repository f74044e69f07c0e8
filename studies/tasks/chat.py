"""Conversations as prompts: messages, and the text that a tokenizer's chat template makes of them. Owns `Chat`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError, choices
from ...interventions.declare.codec import written_repr
from ...interventions.declare.sites import LEFT_OUT, check_label

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Pairs = tuple[tuple[str, str], ...]
TEMPLATE = "template"
"""Label of the tokens that no message holds."""
MARK = "\ue0f0{}\ue0f1"
"""Stands for the content of a message, by its number; two letters for private use, which no text has."""
POSSIBLE = "give Chat('text', system='text'), or messages such as [{'role': 'user', 'content': 'text'}]"


@dataclass(frozen=True)
class Chat:
    r"""A conversation as a prompt: the chat template of the model's tokenizer makes text of it.

    The prompt ends where the assistant begins to speak; where the last message is the assistant's, where that message
    ends, so that the model goes on with it. The text becomes tokens without any special token but those that the
    template writes: a template that writes the BOS gives one, one that writes none gives none.

    Positions are labelled by what they hold: the role of a message, such as ``user``, ``system`` and ``assistant``, and
    ``template`` for all other tokens. Sites take these labels, ``Head(1, 2).z.at("user")``, and results show them as
    ``position_label``. A token that holds a character of a message counts to that message. There are no such labels
    where the template changes what a message says, or the tokenizer does not say which characters a token is made of.

    Parameters
    ----------
    messages : str, or sequence of mappings with ``role`` and ``content``
        Text is one message of the user. In place of a mapping, a pair of role and content.
    system : str, optional
        A message of the role ``system``, before the others.
    parts : sequence of (label, text)
        What a template made of it, with which no template is asked: the texts, one after the other, are the prompt.
        Results hold it, so that a repetition has the prompts of the file.
    template : str
        SHA-256 of the template that made the parts (first 16 hexadecimal digits).

    Raises
    ------
    DeclarationError
        There is no message; one has no role or content, or something besides; or there are two system messages. That
        the tokenizer has a chat template which takes the conversation is seen when the model is known.

    Examples
    --------
    >>> hw.Chat("What is the capital of France?", system="Answer in one word.").messages
    (('system', 'Answer in one word.'), ('user', 'What is the capital of France?'))
    >>> model = hw.load("code-4l")
    >>> model.tokenizer.chat_template = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
    >>> hw.predict(model, hw.Chat("import os"), top=1)["prompt"].item()
    '# user: import os\n'
    """

    messages: Pairs
    system: InitVar[str | None] = None
    parts: Pairs = field(default=(), kw_only=True, metadata=LEFT_OUT)
    template: str = field(default="", kw_only=True, metadata=LEFT_OUT)

    __repr__ = written_repr

    def __post_init__(self, system: str | None) -> None:
        given: Any = self.messages
        several = [("user", given)] if isinstance(given, str) else [given] if isinstance(given, Mapping) else given
        if not isinstance(several, Iterable):
            raise DeclarationError(f"a conversation is text or messages, got {given!r}: {POSSIBLE}")
        messages = tuple(_message(one) for one in several)
        if system is not None:
            messages = (_message(("system", system)), *messages)
        if not messages:
            raise DeclarationError(f"a conversation has at least one message: {POSSIBLE}")
        if [role for role, _ in messages].count("system") > 1:
            raise DeclarationError("a conversation has one system message: give it as system=, or among the messages")
        object.__setattr__(self, "messages", messages)
        object.__setattr__(self, "parts", tuple((str(label), str(text)) for label, text in self.parts))

    def __str__(self) -> str:
        """What the template made of it; the messages where that is not known yet."""
        return self.text or "\n".join(f"{role}: {content}" for role, content in self.messages)

    @property
    def text(self) -> str:
        """What the template made of it; empty where that is not known yet."""
        return "".join(text for _, text in self.parts)

    def rendered(self, model: Model) -> Chat:
        """The conversation with what the model's chat template makes of it; itself where that is known.

        Raises
        ------
        DeclarationError
            The model has no tokenizer, the tokenizer no chat template, or the template refuses the conversation.
        """
        if self.parts:
            return self
        text = _render(model, self.messages)
        return replace(self, parts=_parts(model, self.messages, text), template=template_hash(model))

    def labels(self, model: Model, ids: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Label to positions, of the tokens of a conversation that is rendered; none where they cannot be known."""
        if not getattr(model.tokenizer, "is_fast", False) or not all(label for label, _ in self.parts):
            return {}
        cut = model.tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if list(cut["input_ids"]) != list(ids):
            return {}
        of = [label for label, text in self.parts for _ in text]
        found: dict[str, list[int]] = {}
        for place, (start, end) in enumerate(cut["offset_mapping"]):
            held = of[start : max(end, start + 1)]
            own = next((label for label in held if label != TEMPLATE), TEMPLATE)
            found.setdefault(own, []).append(place)
        return {label: tuple(places) for label, places in found.items()}


def as_chat(given: object) -> Chat | None:
    """A conversation from messages as people write them; None where it is something else."""
    if isinstance(given, Chat):
        return given
    several = [given] if isinstance(given, Mapping) else given
    if not isinstance(several, list | tuple) or not several:
        return None
    is_pair = all(isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str) for one in several)
    return Chat(several) if is_pair or any(isinstance(one, Mapping) for one in several) else None  # type: ignore[arg-type]


def prompt_in_words(prompt: Any) -> tuple[str, str]:
    """What kind of prompts a result holds, and one as text, from its JSON as a file has it."""
    if isinstance(prompt, str):
        return "text", prompt
    if isinstance(prompt, Mapping):
        pairs = prompt.get("messages")
        contents = [one[-1] for one in pairs if isinstance(one, list) and one] if isinstance(pairs, list) else []
        return "conversations", " ".join(map(str, contents))
    return "token ids", " ".join(map(str, prompt)) if isinstance(prompt, list) else str(prompt)


def template_hash(model: Model) -> str:
    """SHA-256 of the chat template (first 16 hexadecimal digits); empty where there is none."""
    text = _template(model)
    return "" if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]


def _template(model: Model) -> str | None:
    if getattr(model.tokenizer, "chat_template", None) is None:
        return None
    try:
        return str(model.tokenizer.get_chat_template())
    except ValueError as error:  # several templates, and none is the default
        raise DeclarationError(f"the tokenizer of {model.name}: {error}") from error


def _message(given: object) -> tuple[str, str]:
    if isinstance(given, Mapping):
        if {*given} != {"role", "content"}:
            raise DeclarationError(f"a message has role and content, got {choices(map(repr, given)) or 'nothing'}")
        given = (given["role"], given["content"])
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(isinstance(one, str) for one in given):
        raise DeclarationError(f"role and content of a message are text, got {given!r}: {POSSIBLE}")
    role, content = given
    if role == TEMPLATE:
        raise DeclarationError(f"a role cannot be called {TEMPLATE!r}: tokens that no message holds are labelled so")
    return check_label(role), content


def _render(model: Model, messages: Pairs) -> str:
    """What the chat template makes of messages."""
    from jinja2 import TemplateError

    if model.tokenizer is None or _template(model) is None:
        lacking = "no tokenizer" if model.tokenizer is None else "a tokenizer without chat template"
        raise DeclarationError(
            f"{model.name} has {lacking}, so that no conversation can be written for it: give the prompt as text, set "
            "model.tokenizer.chat_template, or hw.load(..., tokenizer=...) with one that has a template"
        )
    goes_on = messages[-1][0] == "assistant"
    try:
        text: str = model.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        roles = ", ".join(role for role, _ in messages)
        reason = str(error).partition("\n")[0]
        raise DeclarationError(
            f"the chat template of {model.name} does not take a conversation of {roles}: {reason}"
        ) from error
    return text


def _parts(model: Model, messages: Pairs, text: str) -> Pairs:
    """The text with labels: by what the template makes of marks in place of contents, which it may trim."""
    try:
        marked = _render(model, tuple((role, MARK.format(at)) for at, (role, _) in enumerate(messages)))
    except DeclarationError:  # the template looks into messages
        marked = ""
    before, after = MARK.split("{}")
    pieces = re.split(f"{before}([0-9]+){after}", marked)
    roles, pattern = [TEMPLATE] * len(pieces), ""
    for at, piece in enumerate(pieces):
        possible = [piece]
        if at % 2:
            roles[at], content = messages[int(piece)]
            possible = [content, content.strip()]
        pattern += f"({'|'.join(map(re.escape, possible))})"
    found = re.fullmatch(pattern, text)
    return (
        tuple((role, part) for role, part in zip(roles, found.groups(), strict=True) if part)
        if found
        else (("", text),)
    )
