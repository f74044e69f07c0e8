"""The words and tables of the app as HTML, every text from a file escaped. Text only, no Panel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape as html_escape

from ...errors import printable
from ...metrics.intervals import few_prompts
from ..output.phrases import rounded
from .folder import Listed
from .head_facts import Effect, Partner, Score
from .variables import short

SPAN = (4.0, 96.0)
"""Left and right end of the axis of a small picture, in percent of its width."""

LONGEST = 2000
"""Characters of a sentence on the page."""
SHOWN = 100
"""Files that cannot be shown, of which the page says why."""

PARTNERS = (
    '<p class="soft">Composition from the weights: the score and, in brackets, how many deviations it is above random '
    "weights.</p>"
)


def escape(text: str) -> str:
    """Text of a file as HTML: fit to be shown, and cut where it is longer than anybody reads."""
    return html_escape(short(text))


def partner(one: Partner) -> str:
    """A partner on its button."""
    above = f" ({rounded(one.deviations, '+.1f')})" if math.isfinite(one.deviations) else ""
    return f"{one.head}  {one.score:.2f}{above}"


def prompt_heading(model: str) -> str:
    """What the prompt is for."""
    return (
        "<h2>Try a prompt</h2><p class=soft>Type some words and see every head of "
        f"<b>{escape(model or 'the model')}</b> fire on them. Repeat a word: an induction head attends to "
        "what came after it.</p>"
    )


def circuit(found: Sequence[str]) -> str:
    """What a study of a circuit found."""
    lines = "".join(f"<li>{html_escape(printable(one[:LONGEST]))}</li>" for one in found[:SHOWN])
    return f"<h2>The circuit</h2><ul>{lines}</ul>"


def heading(head: str, role: str) -> str:
    """The picked head and its role."""
    words = f' <span class="role">{escape(_role(role))}</span>' if role else ""
    return f"<h2>{escape(head)}{words}</h2>"


def _role(role: str) -> str:
    return "no role in the file" if role == "other" else f"{role} head"


def scores_table(scores: Sequence[Score]) -> str:
    """The scores of a head, each drawn between 0 and 1 with its interval; the upright line is chance."""
    if not scores:
        return ""
    rows = []
    for one in sorted(scores, key=lambda one: -_sortable(one.value)):
        drawn = interval(one.value, one.low, one.high, 0.0, 1.0, mark=one.chance)
        rows.append(f"<tr><td>{escape(one.long_name)}</td>{_cell(one.value, '.2f')}<td class=bar>{drawn}</td></tr>")
    return (
        "<h3>Scores</h3><table><thead><tr><th>score</th><th class=n>mean</th><th>0 to 1; orange: chance</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table>{_few(scores)}"
    )


def _few(shown: Sequence[Score | Effect]) -> str:
    """What is said of intervals over few prompts; nothing where there are enough, or no interval."""
    said = dict.fromkeys(few_prompts(one.examples) for one in shown if math.isfinite(one.low))
    return "".join(f'<p class="soft">{escape(words)}.</p>' for words in said if words)


def effects_table(effects: Sequence[Effect], lost: tuple[str, float] | None = None) -> str:
    """What intervening on a head changes, with 95% intervals, each metric on a scale of its own.

    Where nothing was measured prompt by prompt, `lost` is said: what goes without the head, in words and as a number.
    """
    if not effects and lost is not None:
        words = escape(lost[0])
        row = f"<tr><td>{words[:1].upper()}{words[1:]}</td>{_cell(lost[1], '+.3f')}</tr>"
        return f"<h3>Without it</h3><table><tbody>{row}</tbody></table>"
    if not effects:
        return '<p class="soft">This file measures no intervention on single heads.</p>'
    parts = []
    for metric in dict.fromkeys(one.metric for one in effects):
        some = [one for one in effects if one.metric == metric]
        ends = [end for one in some for end in (one.mean, one.low, one.high) if math.isfinite(end)]
        low, high = min([0.0, *ends]), max([0.0, *ends])
        rows = []
        short, long = ("+.2f", "+.3f") if max(high, -low) >= 0.1 else ("+.4f", "+.5f")
        for one in some:
            drawn = interval(one.mean, one.low, one.high, low, high, mark=None, zero=True)
            name = escape(one.condition or "the intervention")
            between = f"{_text(one.low, short)} to {_text(one.high, short)}" if math.isfinite(one.low) else "–"
            rows.append(
                f"<tr><td>{name}</td>{_cell(one.mean, long)}<td class=n>{between}</td><td class=bar>{drawn}</td></tr>"
            )
        unit = f" ({escape(some[0].unit)})" if some[0].unit else ""
        name = escape(metric.replace("_", " "))
        parts.append(
            f"<h3>Change of {name}{unit} without it</h3>"
            "<div class=scroll><table><thead><tr><th></th><th class=n>mean</th><th class=n>95% interval</th><th></th>"
            f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
    return "".join(parts) + _few(effects)


def interval(
    value: float, low: float, high: float, start: float, stop: float, *, mark: float | None, zero: bool = False
) -> str:
    """A value with its interval on an axis from `start` to `stop`, as a small picture beside its numbers.

    Parameters
    ----------
    value, low, high : float
        The ends are left out where they are missing.
    start, stop : float
        Ends of the axis.
    mark : float, optional
        Where a line for chance stands.
    zero : bool
        Whether a line stands at 0.

    Returns
    -------
    str
        SVG; empty where the value is missing.
    """
    if not math.isfinite(value):
        return ""
    span = (stop - start) or 1.0

    def at(number: float) -> str:
        share = min(max((number - start) / span, 0.0), 1.0)
        return f"{SPAN[0] + share * (SPAN[1] - SPAN[0]):.2f}%"

    parts = [f'<line class="axis" x1="{SPAN[0]}%" x2="{SPAN[1]}%" y1="50%" y2="50%"/>']
    if zero:
        parts.append(f'<line class="axis" x1="{at(0)}" x2="{at(0)}" y1="5%" y2="95%"/>')
    if mark is not None and math.isfinite(mark):
        parts.append(f'<line class="chance" x1="{at(mark)}" x2="{at(mark)}" y1="12%" y2="88%"/>')
    if math.isfinite(low) and math.isfinite(high):
        parts.append(f'<line class="range" x1="{at(low)}" x2="{at(high)}" y1="50%" y2="50%"/>')
    parts.append(f'<circle class="dot" cx="{at(value)}" cy="50%" r="4"/>')
    return f'<svg aria-hidden="true">{"".join(parts)}</svg>'


def files(listed: Sequence[Listed], folder: str) -> str:
    """How many results there are, and the files that are none, each with its reason."""
    bad = [one for one in listed if one.reason]
    good = len(listed) - len(bad)
    if not good:
        words = (
            f"There is no result in {escape(folder)} yet." if not bad else f"No file in {escape(folder)} can be shown."
        )
        text = (
            f"<h2>{words}</h2><p>This makes one, in half a minute: <code>headwise induction --out "
            f"{escape(folder)}/induction-words-2l.nc</code></p><p>Then load this page again.</p>"
        )
        return text + (f"<h3>What is there</h3>{_reasons(bad)}" if bad else "")
    if not bad:
        return ""
    many = "1 file cannot be shown" if len(bad) == 1 else f"{len(bad)} files cannot be shown"
    return f"<details><summary>{many}</summary>{_reasons(bad)}</details>"


def nothing_comes_back(tokens: Sequence[str]) -> str:
    """Why there is nothing to match in a prompt, of which no token comes back."""
    forms: dict[str, set[str]] = {}
    for token in tokens:
        forms.setdefault(token.strip(), set()).add(token)
    twice = [word for word, some in forms.items() if word and len(some) > 1]
    if twice:
        why = f"{short(twice[0])} with a space before it is another token than without"
        return f"No token of this prompt comes back ({why}), so there is nothing to match."
    return "No token of this prompt comes back, so there is nothing to match: type a word twice."


def _reasons(bad: Sequence[Listed]) -> str:
    rows = (f"<li><code>{escape(one.name)}</code> {escape(one.reason)}</li>" for one in bad[:SHOWN])
    more = f"<li>and {len(bad) - SHOWN} more</li>" if len(bad) > SHOWN else ""
    return f"<ul>{''.join(rows)}{more}</ul>"


def note(text: str, *, warn: bool = False) -> str:
    """A sentence, or nothing."""
    return (
        f'<p class="{"warn" if warn else "soft"}" role="status">{html_escape(printable(text[:LONGEST]))}</p>'
        if text
        else ""
    )


def _cell(value: float, pattern: str) -> str:
    return f"<td class=n>{_text(value, pattern)}</td>"


def _text(value: float, pattern: str) -> str:
    """A number as text, a dash where it is missing; zero has no sign."""
    text = format(value, pattern) if math.isfinite(value) else "–"
    return text if text.strip("+-0.") else text.lstrip("+-")


def _sortable(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
