"""The errors headwise raises: one family, each also the built-in that fits. Imports nothing of ours.

Examples
--------
>>> try:
...     hw.measure(hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8), hw.ZeroAblate(hw.Head(5, 12)))
... except hw.errors.HeadwiseError as error:
...     print(type(error).__name__, isinstance(error, ValueError), error)
DeclarationError True L5H12 z: words-2l has layers 0 to 1
"""

from __future__ import annotations

import operator
import unicodedata

__all__ = [
    "AdviceWarning",
    "DeclarationError",
    "HeadwiseError",
    "MissingPartError",
    "ModelError",
    "ResultError",
    "ResultWarning",
    "ServerError",
    "ServerWarning",
    "UnknownNameError",
]


def __dir__() -> list[str]:
    return __all__


SHOWN, READ = 300, 2000
"""Characters of an error of a library that are shown, and those that are looked at."""
JOINING = "\u200c\u200d"
"""Keep the letters of some scripts apart or together, and join pictures."""


def printable(text: object, *, lines: bool = False) -> str:
    """Text from outside as it may be shown: what would steer a terminal, or turn words around, stands as an escape.

    Control characters, marks that change the direction of writing, invisible signs and halves of characters are written
    out as in a literal of Python; letters of all scripts, what joins them, and spaces, stay.

    Parameters
    ----------
    text : object
        Names, titles, units, and what else a file, a server or a user gives.
    lines : bool
        Text of several lines: line ends and tabs stay too.
    """
    given = str(text)
    if lines:
        return "\n".join(_printable(line, "\t") for line in given.split("\n"))
    return _printable(given)


def _printable(line: str, kept: str = "") -> str:
    if line.isprintable():
        return line
    return "".join(
        one
        if one.isprintable()
        or one in kept
        or unicodedata.category(one) == "Zs"
        or (one in JOINING and _joins(line[at - 1 : at], line[at + 1 : at + 2]))
        else one.encode("unicode_escape").decode("ascii")
        for at, one in enumerate(line)
    )


def _joins(before: str, after: str) -> bool:
    """Whether both are letters or pictures that can be joined, as Latin letters cannot."""
    return all(one.isprintable() and not one.isascii() for one in (before, after))


class _Said:
    """An error or a warning that quotes what came from outside: its text is one line that can be shown anywhere."""

    lines = False
    """Whether the text may have several lines."""

    def __str__(self) -> str:
        return printable(super().__str__(), lines=self.lines)


class HeadwiseError(_Said, Exception):
    """Base of every error that headwise raises on purpose. Its text is one line: what was given, what is possible."""


class DeclarationError(HeadwiseError, ValueError):
    """A declaration (site, intervention, grid, task, study) that cannot be meant."""


class UnknownNameError(HeadwiseError, LookupError):
    """A name (component, metric, run, model, variable) that is not known; the text lists those that are."""


class MissingPartError(HeadwiseError, AttributeError):
    """A part that a head or a layer does not have; the text lists those it has."""


class ModelError(HeadwiseError, OSError):
    """A model that cannot be found, read, or used; of an unknown family, below it, what to write to make it known."""

    lines = True


class ResultError(HeadwiseError, OSError):
    """A result file or folder that cannot be read or written."""


class ServerError(HeadwiseError, ConnectionError):
    """A server that cannot be reached, or that refuses or fails to run what was sent; the text gives its reason."""


class ServerWarning(_Said, UserWarning):
    """A job was lost by its server and is sent again; the text says which."""


class AdviceWarning(_Said, UserWarning):
    """A way of measuring that the literature advises against; the text says why, and what to do instead."""


class ResultWarning(_Said, UserWarning):
    """A stored part of a result could not be used; the text says what is done instead."""


def first_line(error: BaseException, kind: bool = False) -> str:
    """What an error of a library says, in the first line of its text; the name of its class where it says nothing.

    With `kind`, the name of its class stands before what it says.
    """
    lines = [" ".join(line.split()) for line in str(error).strip()[:READ].splitlines()[:1]]
    said, name = "".join(lines).rstrip(".")[:SHOWN], type(error).__name__
    return f"{name}: {said}" if kind and said else said or name


def whole(value: object, what: str, low: int = 0, high: int | None = None) -> int:
    """`value` as a whole number within bounds, or an error that says what was given and what is possible.

    Parameters
    ----------
    value : object
    what : str
        What it is, as the error names it.
    low, high : int
        Smallest and largest possible value; no largest one when left out.

    Returns
    -------
    int

    Raises
    ------
    DeclarationError
        It is no whole number, or out of bounds.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # int and NumPy integers, not floats or text
    except TypeError:
        raise DeclarationError(f"{what} must be a whole number, got {value!r}") from None
    if number < low:
        raise DeclarationError(f"{what} must be {low} or more, got {number}")
    if high is not None and number > high:
        raise DeclarationError(f"{what} must be at most {high}, got {number}")
    return number


LARGEST_SEED = 2**32 - 1
"""Seeds of frozen random streams are 32-bit."""
MOST_PROMPTS, MOST_DRAWS, MOST_STEPS = 10**6, 10**6, 10**4
"""More than anybody means: a slip, or a file that asks for what nobody can compute, is refused at once."""


LONGEST_NAME = 200
"""Bytes of a name: NetCDF takes 255, and results put more around some, as in ``baseline_loss``."""


def check_name(name: object, what: str) -> None:
    """Refuse a name that no variable or dim of a NetCDF file can have, or that would come back as another.

    Names start with a letter, a digit or ``_``; ``/`` and control characters are not in them, and no space at the end.
    """
    check_text(name, what)
    text = str(name)
    if not text:
        why = "is empty"
    elif "/" in text:
        why = "has a '/'"
    elif any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        why = "has a control character"
    elif text[0].isascii() and not (text[0].isalnum() or text[0] == "_"):
        why = f"starts with {text[0]!r}"
    elif text.endswith(" "):
        why = "ends with a space"
    elif unicodedata.normalize("NFC", text) != text:
        why = f"has letters in parts, which files keep as one: {unicodedata.normalize('NFC', text)!r}"
    elif len(text.encode()) > LONGEST_NAME:
        why = f"is longer than {LONGEST_NAME} bytes"
    else:
        return
    raise DeclarationError(
        f"{what} {_short(text)} {why}: possible are letters, digits, _ and, inside, most other signs, such as 'layer_2'"
    )


def check_text(text: object, what: str) -> None:
    """Refuse a text that a NetCDF file would cut or cannot hold."""
    if not isinstance(text, str):
        raise DeclarationError(f"{what} must be text, got {text!r}")
    if "\0" in text:
        raise DeclarationError(
            f"{what} {_short(text)} has a NUL, at which files cut it: possible is any text without one"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DeclarationError(
            f"{what} {_short(text)} has half of a character: possible is any text that UTF-8 can hold"
        )


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else repr(text[:60]) + "..."


def choices(names: object) -> str:
    """``a, b and c``: how a message lists what is possible."""
    items = [str(name) for name in names]  # type: ignore[attr-defined]
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
