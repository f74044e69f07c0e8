"""The errors headwise raises: one family, each also the built-in that fits. Imports nothing of ours."""

from __future__ import annotations

import operator


class HeadwiseError(Exception):
    """Base of every error that headwise raises on purpose. Its text is one line: what was given, what is possible."""


class DeclarationError(HeadwiseError, ValueError):
    """A declaration (site, intervention, grid, task, study) that cannot be meant."""


class UnknownNameError(HeadwiseError, LookupError):
    """A name (component, metric, run, model, variable) that is not known; the text lists those that are."""


class MissingPartError(HeadwiseError, AttributeError):
    """A part that a head or a layer does not have; the text lists those it has."""


class ModelError(HeadwiseError, OSError):
    """A model that cannot be found, read, or used."""


class ResultError(HeadwiseError, OSError):
    """A result file or folder that cannot be read or written."""


class ServerError(HeadwiseError, ConnectionError):
    """A server that cannot be reached, or that refuses or fails to run what was sent; the text gives its reason."""


class ServerWarning(UserWarning):
    """A job was lost by its server and is sent again; the text says which."""


class ResultWarning(UserWarning):
    """A stored part of a result could not be used; the text says what is done instead."""


def whole(value: object, what: str, low: int = 0, high: int | None = None) -> int:
    """`value` as a whole number within bounds, or an error that says what was given and what is possible."""
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


def choices(names: object) -> str:
    """``a, b and c``: how a message lists what is possible."""
    items = [str(name) for name in names]  # type: ignore[attr-defined]
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
