"""What a session shows, and how the address of the page says it, so that a link opens it again. Knows no Panel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs, quote, urlencode

AT = "at."
"""In front of a dim's name in the address."""
NAMES = ("result", "variable", "show", "head", "pattern", "prompt", "fires", "token", "without")
LONGEST = 2000
"""Characters of one value that are read from an address."""


@dataclass
class Selection:
    """What is chosen; each is empty until it is.

    Attributes
    ----------
    result : str
        File name.
    variable : str
        Key of a variable, ``ablation/loss``.
    show : str
        ``change``, ``value`` or ``share``.
    head : str
        Such as ``L1H2``.
    pattern : str
        Which prompt of the study the pattern is of: ``short``, or its number.
    prompt : str
        The prompt that was typed.
    fires : str
        What the live grid shows.
    token : str
        Position of the token that heads may attend to.
    without : str
        Parts that are left out of the predictions; empty for the picked head.
    at : dict of dim to label
    """

    result: str = ""
    variable: str = ""
    show: str = ""
    head: str = ""
    pattern: str = ""
    prompt: str = ""
    fires: str = ""
    token: str = ""
    without: str = ""
    at: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_query(cls, query: str) -> Selection:
        """What an address asks for; whatever it does not say stays empty, and nothing in it is trusted."""
        given = {name: found[-1][:LONGEST] for name, found in _parsed(query).items()}
        at = {name.removeprefix(AT): text for name, text in given.items() if name.startswith(AT)}
        return cls(**{name: given[name] for name in NAMES if name in given}, at=at)

    def to_query(self) -> str:
        """The end of the address, with its question mark; empty where nothing is chosen."""
        pairs = {name: getattr(self, name) for name in NAMES} | {f"{AT}{dim}": label for dim, label in self.at.items()}
        text = urlencode({name: value for name, value in pairs.items() if value}, quote_via=quote, safe="/")
        return f"?{text}" if text else ""


def _parsed(query: str) -> Mapping[str, list[str]]:
    try:
        return parse_qs(query.removeprefix("?"), errors="replace", max_num_fields=50)
    except ValueError:  # more fields than any page of ours writes
        return {}
