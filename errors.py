"""The errors headwise raises: one family, each also the built-in that fits. Imports nothing."""

from __future__ import annotations


class HeadwiseError(Exception):
    """Base of every error that headwise raises on purpose. Its text is one line: what was given, what is possible."""


class DeclarationError(HeadwiseError, ValueError):
    """A declaration (site, intervention, grid, task, study) that cannot be meant."""


class UnknownNameError(HeadwiseError, LookupError):
    """A name (component, metric, run, model, variable) that is not known; the text lists those that are."""


class ModelError(HeadwiseError, OSError):
    """A model that cannot be found, read, or used."""


class ResultError(HeadwiseError, OSError):
    """A result file or folder that cannot be read or written."""


def choices(names: object) -> str:
    """``a, b and c``: how a message lists what is possible."""
    items = [str(name) for name in names]  # type: ignore[attr-defined]
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
