"""How numbers are put into words: percent, points, lists, counts. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def percent(value: Any) -> str:
    """``0.873`` as ``87%``."""
    return f"{100 * float(value):.0f}%"


def points(value: Any) -> str:
    """``0.5`` as ``50 points`` (of a percentage)."""
    number = f"{round(100 * float(value), 0) + 0.0:.0f}"  # and no -0
    return f"{number} point{'' if number in ('1', '-1') else 's'}"


def listed(items: Iterable[str]) -> str:
    """``a, b and c``; nothing where there are none."""
    *rest, last = [*items] or [""]
    return f"{', '.join(rest)} and {last}" if rest else last


def count(number: int, noun: str) -> str:
    """``1 head``, ``2 heads``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def article(word: str) -> str:
    """``a`` or ``an``."""
    return "an" if word[:1] in tuple("aeiou") else "a"
