"""Prompts of the kind "Harry Potter ... Harry": the last word stood before, and what followed it is to come again."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError
from ...metrics.intervals import bootstrap_interval, interval_attrs
from ...metrics.outputs import accuracy, loss
from ..measuring.measure import measure
from ..output.phrases import count, listed
from ..tasks.prompts import Prompts, token_ids

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]
FORMAT = "one prompt in a line, whose last word stands in it once before, such as: Harry Potter went home. Then Harry"
FAULTS = 3
"""Lines of a file that an error names."""
GAINS = {
    "gain": "loss of the answer where it first follows the word, less its loss at the end",
    "causal_gain": "loss of the answer with the first word and answer replaced, less that of the prompt as it is",
}


@dataclass(frozen=True)
class Line:
    """A prompt and its answer as token ids.

    Attributes
    ----------
    text : str
    tokens : tuple of int
        The prompt, and the answer after it.
    start, first : int
        Positions of the first occurrence: where the word begins, and of the answer after it.
    """

    text: str
    tokens: tuple[int, ...]
    start: int
    first: int


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a file; empty lines are left out.

    Raises
    ------
    DeclarationError
        It cannot be read or holds no prompt; or the last word of a line does not stand in it before, directly before,
        or more than once, so that no one token followed it.
    """
    try:
        text = Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise DeclarationError(f"cannot read prompts={str(path)!r}: {reason}; it holds {FORMAT}") from error
    lines = {number: line.strip() for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    if not lines:
        raise DeclarationError(f"prompts={str(path)!r} holds no prompt: it holds {FORMAT}")
    faults = [f"line {number}: {fault}" for number, line in lines.items() if (fault := _fault(line))]
    if faults:
        more = f"; and {count(len(faults) - FAULTS, 'line')} more" if len(faults) > FAULTS else ""
        raise DeclarationError(f"prompts={str(path)!r}, {'; '.join(faults[:FAULTS])}{more}; give {FORMAT}")
    return [*lines.values()]


def _fault(text: str) -> str:
    """Why no one token followed the last word of a prompt before; nothing where one did."""
    word, found = _before(text)
    if not found:
        return f"its last word, {word!r}, does not stand in it before"
    if len(found) > 1:
        after = dict.fromkeys((text[one.end() :].split() or [""])[0] for one in found)
        return (
            f"its last word, {word!r}, stands in it {len(found)} times before, in front of {listed(map(repr, after))}"
        )
    return "" if text[found[0].end() : -len(word)].strip() else f"its last word, {word!r}, stands twice in a row"


def _before(text: str) -> tuple[str, list[re.Match[str]]]:
    """The last word of a prompt, and where it stands before."""
    word = text.split()[-1]
    return word, [*re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text[: -len(word)])]


def parse(model: Model, text: str) -> Line:
    """A prompt with the token that followed its last word before.

    Raises
    ------
    DeclarationError
        Its last word does not stand in it before, its tokens do not end where that word ends, or there are too many.
    """
    word, found = _before(text)
    if not found:
        raise DeclarationError(f"prompt {text!r}: its last word, {word!r}, does not stand in it before; give {FORMAT}")
    ids = token_ids(model, text, "prompt")
    before, until = (model.encode(text[:end].rstrip()) if end else [] for end in found[0].span())
    answer = len(until)
    if ids[: len(before)] != before or ids[:answer] != until or answer >= len(ids) or len(before) == answer:
        raise DeclarationError(f"prompt {text!r}: no token of {model.name} ends where its first {word!r} ends")
    if len(ids) >= model.shape.context:
        raise DeclarationError(
            f"prompt {text[:40]!r}... and its answer have {len(ids) + 1} tokens: {model.name} reads at most "
            f"{model.shape.context}"
        )
    return Line(text, (*ids, ids[answer]), len(before), answer)


def replaced(lines: list[Line], seed: int) -> list[tuple[int, ...] | None]:
    """The prompts with the first word and answer replaced by tokens of other prompts; None where there are none."""
    random = np.random.default_rng((seed, 2))
    found: list[tuple[int, ...] | None] = []
    for number, line in enumerate(lines):
        old = {*line.tokens[line.start : line.first + 1]}
        other = sorted({token for at, one in enumerate(lines) if at != number for token in one.tokens} - old)
        if not other:
            found.append(None)
            continue
        new = random.choice(other, line.first + 1 - line.start).tolist()
        found.append((*line.tokens[: line.start], *new, *line.tokens[line.first + 1 :]))
    return found


def own_prompts(model: Model, texts: list[str], seed: int) -> xr.Dataset:
    """The loss and the probability of each prompt's answer, and how they depend on its first occurrence.

    Parameters
    ----------
    model : Model
    texts : list of str
        See `FORMAT`.
    seed : int
        Of the tokens that replace the first occurrence.

    Returns
    -------
    Dataset
        Dim ``prompt``: ``loss``, ``prob`` and ``accuracy`` of the answer at the end, ``loss_first`` where it first
        stood, ``gain`` and ``causal_gain`` (see `GAINS`; NaN where no other prompt has a token to put there); for each
        gain its mean, ``mean_<gain>``, with ``_low`` and ``_high`` over prompts.
    """
    lines = [parse(model, text) for text in texts]
    whole = measure(model, Prompts(tuple(one.tokens for one in lines)), None, [loss, accuracy], per_position=True)
    rows = np.arange(len(lines))
    last = np.array([len(one.tokens) - 2 for one in lines])
    first = np.array([one.first - 1 for one in lines])
    order = ("example", "position")
    losses, right = (whole[name].transpose(*order).values for name in ("loss", "accuracy"))
    found = {
        "loss": (losses[rows, last], "loss of the answer", "nat"),
        "prob": (np.exp(-losses[rows, last]), "probability of the answer", "1"),
        "accuracy": (right[rows, last], "whether the answer is the most likely token", "1"),
        "loss_first": (losses[rows, first], "loss of the answer where it first stood", "nat"),
        "gain": (losses[rows, first] - losses[rows, last], GAINS["gain"], "nat"),
    }
    causal = np.full(len(lines), np.nan)
    changed = replaced(lines, seed)
    if kept := [at for at, one in enumerate(changed) if one is not None]:
        task = Prompts(tuple(one for one in changed if one is not None))
        after = measure(model, task, None, [loss], per_position=True)["loss"].transpose(*order).values
        causal[kept] = after[np.arange(len(kept)), last[kept]] - losses[kept, last[kept]]
    found["causal_gain"] = (causal, GAINS["causal_gain"], "nat")
    ds = xr.Dataset(coords={"prompt": np.asarray(texts, dtype=object)})
    ds["answer"] = ("prompt", np.asarray(model.token_text([one.tokens[-1] for one in lines]), dtype=object))
    for name, (values, words, units) in found.items():
        ds[name] = ("prompt", np.asarray(values, dtype=np.float64), {"long_name": words, "units": units})
    for name in GAINS:
        values = ds[name].values[~np.isnan(ds[name].values)]
        attrs = {"long_name": f"mean: {GAINS[name]}", "units": "nat"}
        ends = [float(one) for one in bootstrap_interval(values)] if len(values) else [np.nan, np.nan]
        ds[f"mean_{name}"] = ((), values.mean() if len(values) else np.nan, attrs)
        for end, value in zip(("low", "high"), ends, strict=True):
            ds[f"mean_{name}_{end}"] = ((), value, attrs | interval_attrs(len(values)))
    return ds
