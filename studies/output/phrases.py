"""How numbers are put into words: percent, points, lists, counts. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def rounded(value: Any, pattern: str = ".2f") -> str:
    """`value` as `pattern`; what rounds to 0 has no sign."""
    text = format(float(value), pattern)
    return text if text.strip("+-0.") else text.lstrip("+-")


def percent(value: Any) -> str:
    """``0.873`` as ``87%``."""
    return f"{100 * float(value):.0f}%"


def points(value: Any) -> str:
    """``0.5`` as ``50 points`` (of a percentage)."""
    number = rounded(100 * float(value), ".0f")
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


def no_or_count(number: int, noun: str) -> str:
    """``no head``, ``1 head``, ``2 heads``."""
    return count(number, noun) if number else f"no {noun}"


def went(before: str, after: str) -> str:
    """``goes from 100% to 3%``; ``stays at 100%`` where both read the same."""
    return f"stays at {before}" if before == after else f"goes from {before} to {after}"
