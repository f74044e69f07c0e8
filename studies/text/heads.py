"""What the heads of a model do on text, as far as their attention tells: `text_heads`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import LARGEST_SEED, MOST_DRAWS, DeclarationError, whole
from ...interventions.declare.edits import Compose, MeanAblate
from ...interventions.declare.sites import Head
from ...metrics.attention import attention_over
from ...metrics.card import Card
from ...metrics.intervals import bootstrap_interval, interval_attrs
from ...metrics.outputs import loss, loss_over
from ...metrics.statistics import benjamini_hochberg, possible_control_sets, sign_flip
from ..measuring import context as carried_out
from ..measuring.labels import check_is_model, number_dims
from ..measuring.measure import measure
from ..output.progress import Progress
from ..storage.provenance import as_attrs, provenance
from .brackets import Relations, relations, structure
from .claims import CLAIMS, CONTROLS, NONE, places, weights
from .windows import Windows, read_text, windows

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]
FILES = 12
"""With so many files or more, tests and intervals are over files; with fewer, over windows."""
HELD = 128 * 2**20
"""Bytes of weights that are held at once."""
ABLATED = 16
"""Windows at most on which heads are ablated."""
TIMED = 4
"""Windows that are scored to see how long it takes."""
OPTIONS = ("n", "context", "threshold", "alpha", "controls", "seed")
"""What the attribute ``text_heads`` of a result holds."""
FAMILY = ("layer", "head")


def text_heads(
    model: Model,
    text: str | os.PathLike[str] | None = None,
    *,
    context: int | None = None,
    n: int = 256,
    threshold: float = 0.2,
    alpha: float = 0.05,
    controls: int = 0,
    seed: int = 0,
    check: bool = True,
    progress: Callable[[int, int], None] | bool | None = None,
) -> xr.Dataset:
    """What each head does on text, as far as attention tells: each claim with a control, and a name by a stated rule.

    Of each claim, such as "from a closing bracket to the bracket that opens it", the score is the attention from a
    query to its keys, mean over the queries of a file. It is compared with the attention that pairs get which are
    alike but do not match (``mismatch``: another opening bracket) and with the mean over all pairs at the same distance
    that do not match (``same distance``), so that a head that looks a fixed number of tokens back is not called a
    bracket head.

    The rule: a claim fits a head where its score is at least `threshold` above each control, and ``q <= alpha``. The
    head is called by the claim that fits with the largest difference from the nearer control; by "current token" and
    "first token", where attention rests and little is moved, only where nothing else fits; and "none of these" where
    nothing does.

    Parameters
    ----------
    model : Model
        From `headwise.load`.
    text : str or path, optional
        A file, or a folder whose files are read; left out, the folder ``held_out`` of the model. Brackets and
        indentation are looked for in the files that are Python source, and are missing where none is.
    context : int, optional
        Tokens of a window; as many as the model reads when left out.
    n : int
        Windows that are drawn from the text; all where there are fewer.
    threshold : float
        How far a score must be above its controls, between 0 and 1.
    alpha : float
        False discovery rate.
    controls : int
        Ablate the heads that each claim fits, on 16 of the windows, and so many random sets of as many heads, in the
        same layers and over all layers; 0 leaves that out.
    seed : int
        Of the windows, and of random sets.
    check : bool
        As for `measure`.
    progress : callable or bool, optional
        As for `measure`, with windows in place of passes.

    Returns
    -------
    Dataset
        ``score(claim, layer, head, unit)`` and ``control_score(claim, control, layer, head, unit)``; a unit is a file,
        or a window where there are fewer than 12 files. ``difference_low`` and ``difference_high(claim, control, layer,
        head)``, 95% intervals of score less control; ``p(claim, layer, head)``, one-sided by flipping the signs of
        units, the larger one of both controls; ``q``, the same after Benjamini-Hochberg over all claims and heads;
        ``fits(claim, layer, head)``, 0 or 1; ``called(layer, head)``, text; ``queries(claim, unit)``. The coordinates
        ``looks_from``, ``looks_at``, ``compared_with`` and ``helps_with`` say what a claim is. With `controls`,
        where a claim fits a head:
        ``loss_without(ablated, window, place)``, where ``ablated`` are claims, all heads that each fits mean-ablated,
        and ``place`` the next tokens of which it is the loss; ``loss_whole(window, place)`` of the whole model;
        ``loss_without_random(ablated, random, draw, window, place)``; and ``p_without(ablated, random, place)``, how
        often a random set does at least as much damage.

    Raises
    ------
    DeclarationError
        There is no text that the model can read, or an option is not possible.
    ModelError
        A self-check failed.

    Examples
    --------
    >>> import pathlib
    >>> _ = pathlib.Path("words.txt").write_text("apple banana cherry dog cat apple dog banana cat red green " * 40)
    >>> ds = hw.text_heads(hw.load("words-2l"), "words.txt", context=20, n=16)
    >>> str(ds["called"].sel(layer=0, head=3).item()), str(ds["called"].sel(layer=1, head=2).item())
    ('previous token', 'induction')
    """
    from ...interventions.begin import begin

    check_is_model(model)
    for name, value, most in (("threshold", threshold, 1.0), ("alpha", alpha, 1.0)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < most:
            raise DeclarationError(f"{name}={value!r}: possible is a number between 0 and 1, such as 0.2 and 0.05")
    whole(controls, "controls", high=MOST_DRAWS)
    whole(seed, "a seed", high=LARGEST_SEED)
    found = windows(model, text, context, n, seed)
    related, read = _relations(model, text, found)
    with (
        begin(model, check=check, length=found.tokens.shape[1]) as call,
        carried_out.using(label="heads on text"),
    ):
        measured = _scores(model, found, related, progress)
        result = _judged(model, measured, found, threshold, alpha)
        if controls:
            result = result.merge(_ablated(model, result, found, related, controls, seed))
    options = dict(zip(OPTIONS, (n, found.tokens.shape[1], threshold, alpha, controls, seed), strict=True))
    return number_dims(result).assign_attrs(
        provenance(model, call.identity)
        | as_attrs(
            {
                "title": f"Heads of {model.name} on text",
                "text_heads": json.dumps(options),
                "text": "held_out" if text is None else os.fspath(text),
                "text_sha256": found.sha256,
                "windows": found.tokens.shape[0],
                "files": len(set(found.files)),
                "python_files": read,
            }
        )
    )


def claims_on(
    model: Model, text: str | os.PathLike[str] | None, found: Windows, timed: bool
) -> tuple[int, float | None]:
    """How many claims there are on windows, fewer where none is Python, and the seconds that scoring them takes.

    Parameters
    ----------
    model : Model
    text : str or path, optional
    found : Windows
        Of that text.
    timed : bool
        Score a few windows: most of the time goes into sums over patterns, not into passes.

    Returns
    -------
    claims : int
    seconds : float or None
    """
    from ...interventions.begin import begin

    related, _ = _relations(model, text, found)
    at = next((at for at, one in enumerate(related) if one is not None), 0)
    claims = len(weights(found.tokens[at], related[at]))
    if not timed:
        return claims, None
    seconds = 0.0
    with begin(model, check=False):
        for count in (1, TIMED):  # the first call is slower
            started = time.monotonic()
            _scores(model, replace(found, tokens=found.tokens[:count]), related[:count], False)
            seconds = time.monotonic() - started
    return claims, seconds * len(found.tokens) / min(TIMED, len(found.tokens))


def _relations(model: Model, text: str | os.PathLike[str] | None, found: Windows) -> tuple[list[Relations | None], int]:
    """What matches what in each window, None of a file that is no Python; and how many files are."""
    if not getattr(model.tokenizer, "is_fast", False):  # it does not say which characters a token is made of
        return [None] * len(found.files), 0
    _, content = read_text(model, text)
    known = {}
    for name in set(found.files):
        source = structure(content[name])
        if source is not None:
            offsets = model.tokenizer(
                content[name], add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )["offset_mapping"]
            ends = np.maximum.accumulate(np.array(offsets)[:, 1])
            known[name] = source, np.append(0, ends[:-1]), ends
    size = found.tokens.shape[1]
    related: list[Relations | None] = []
    for name, start in zip(found.files, found.starts.tolist(), strict=True):
        if name not in known:
            related.append(None)
            continue
        source, starts, ends = known[name]
        related.append(relations(source, starts[start : start + size], ends[start : start + size]))
    return related, len(known)


def _scores(
    model: Model,
    found: Windows,
    related: Sequence[Relations | None],
    progress: Callable[[int, int], None] | bool | None,
) -> xr.Dataset:
    """``attention(claim, part, layer, head, window)``, sums over queries, and ``queries(claim, window)``.

    The parts are the score and the controls; NaN for a control that a claim does not have.
    """
    count, size = found.tokens.shape
    parts = ("score", *CONTROLS)
    shape = (len(CLAIMS), len(parts), model.shape.layers, model.shape.heads, count)
    sums, queries = np.zeros(shape), np.zeros((len(CLAIMS), count), dtype=int)
    nothing = np.zeros((size, size))
    at_once = max(1, HELD // (4 * size * size * len(CLAIMS) * len(parts)))
    with Progress("heads on text", progress, unit="windows", total=count) as bar:
        for start in range(0, count, at_once):
            some = slice(start, min(start + at_once, count))
            by_window = [weights(found.tokens[one], related[one]) for one in range(some.start, some.stop)]
            metrics, filled = [], []
            for number, name in enumerate(CLAIMS):
                for part in range(len(parts)):
                    of: list[Any] = [one[name][part] if name in one else nothing for one in by_window]
                    if any(one is None for one in of):
                        sums[number, part] = np.nan
                        continue
                    card = Card(f"attention_{number}_{part}", f"{name}, {parts[part]}", "1", (0.0, np.inf))
                    metrics.append(attention_over(card, np.stack(of).astype(np.float32)))
                    filled.append((number, part))
                queries[number, some] = [one[name].queries if name in one else 0 for one in by_window]
            block = replace(found, tokens=found.tokens[some])
            measured = measure(model, block, None, metrics, check=False, progress=False)
            for metric, (number, part) in zip(metrics, filled, strict=True):
                sums[number, part, ..., some] = measured[metric.name].values * queries[number, some]
            bar.update(some.stop, count)
    return xr.Dataset(
        {"attention": (("claim", "part", *FAMILY, "window"), sums), "queries": (("claim", "window"), queries)},
        coords={"claim": np.array([*CLAIMS], dtype=object), "part": np.array(parts, dtype=object)},
    )


def _judged(model: Model, measured: xr.Dataset, found: Windows, threshold: float, alpha: float) -> xr.Dataset:
    """Scores by unit, intervals, p, and what each head is called."""
    files = list(dict.fromkeys(found.files))
    by_file = len(files) >= FILES
    names = files if by_file else [f"{file} {start}" for file, start in zip(found.files, found.starts, strict=True)]
    unit = np.array([files.index(one) for one in found.files] if by_file else range(len(found.files)))
    into = np.zeros((len(found.files), len(names)))
    into[np.arange(len(unit)), unit] = 1
    queries = measured["queries"].values @ into
    with np.errstate(invalid="ignore"):
        values = (measured["attention"].values @ into) / np.where(queries > 0, queries, np.nan)[:, None, None, None]
    score, control = values[:, 0], values[:, 1:]
    shape = control.shape[:-1]
    low, high, p = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    difference = score[:, None] - control
    for number in range(len(queries)):
        known = difference[number][..., queries[number] > 0]
        if known.shape[-1]:
            low[number], high[number] = bootstrap_interval(known, bounds=(-1.0, 1.0))
            p[number] = sign_flip(known)
    margin, largest = np.fmin.reduce(_mean(difference), axis=1), np.fmax.reduce(p, axis=1)
    q = benjamini_hochberg(largest)
    fits = (margin >= threshold) & (q <= alpha)
    called = np.full(shape[2:], NONE, dtype=object)
    for resting in (True, False):
        rows = [number for number, one in enumerate(CLAIMS.values()) if one.resting is resting]
        best = np.where(fits[rows], margin[rows], -np.inf)
        called = np.where(fits[rows].any(axis=0), np.array([*CLAIMS], dtype=object)[rows][best.argmax(axis=0)], called)
    one, of_head = ("claim", "control", *FAMILY), ("claim", *FAMILY)
    few = interval_attrs(int((queries > 0).sum(axis=1).max(initial=0)))
    texts = {"looks_from": "looks_from", "looks_at": "looks_at", "compared_with": "mismatch", "helps_with": "place"}
    words = {
        name: ("claim", np.array([getattr(claim, field) for claim in CLAIMS.values()], dtype=object))
        for name, field in texts.items()
    }
    pure = {"units": "1"}
    return xr.Dataset(
        {
            "score": ((*of_head, "unit"), score, pure | {"long_name": "attention to where the claim says"}),
            "control_score": ((*one, "unit"), control, pure | {"long_name": "attention to what does not match"}),
            "difference_low": (one, low, pure | few | {"long_name": "score less control, 95% interval, low end"}),
            "difference_high": (one, high, pure | few | {"long_name": "score less control, 95% interval, high end"}),
            "p": (
                of_head,
                largest,
                pure | {"long_name": "p: flips of the signs of units; the larger of both controls"},
            ),
            "q": (of_head, q, pure | {"long_name": "q: p after Benjamini-Hochberg over claims and heads"}),
            "fits": (of_head, fits.astype(np.int8), pure | {"long_name": "whether the claim fits the head"}),
            "called": (FAMILY, called, {"long_name": "what the head is called", "rule": rule(threshold, alpha)}),
            "queries": (("claim", "unit"), queries.astype(np.int64), pure | {"long_name": "queries of the claim"}),
        },
        coords={
            "claim": measured["claim"],
            "control": np.array(CONTROLS, dtype=object),
            "unit": (
                "unit",
                np.array(names, dtype=object),
                {"long_name": "file" if by_file else "file and first token"},
            ),
            "layer": list(model.layers),
            "head": list(model.heads),
            **words,
        },
    )


def rule(threshold: float, alpha: float) -> str:
    """The rule by which a head is called, in words."""
    return (
        f"a claim fits where score less each control is at least {threshold:g} and q at most {alpha:g}; the one with "
        "the largest difference names the head, and current token and first token only where nothing else fits"
    )


def _mean(values: Array) -> Array:
    """Mean over units that are not missing; NaN where all are."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis=-1)
    mean: Array = np.where(known.any(axis=-1), total / np.maximum(known.sum(axis=-1), 1), np.nan)
    return mean


def _ablated(
    model: Model,
    judged: xr.Dataset,
    found: Windows,
    related: Sequence[Relations | None],
    controls: int,
    seed: int,
) -> xr.Dataset:
    """The loss at the places of each claim without the heads that it fits, and without as many random heads."""
    layers, heads = model.shape.layers, model.shape.heads
    sets: dict[str, Compose] = {}
    for name in CLAIMS:
        chosen = [(int(layer), int(head)) for layer, head in np.argwhere(judged["fits"].sel(claim=name).values == 1)]
        if any(possible_control_sets(chosen, layers, heads, matched) for matched in (True, False)):
            sets[name] = Compose(*(MeanAblate(Head(layer, head)) for layer, head in chosen))
    if not sets:
        return xr.Dataset()
    drawn = np.sort(np.random.default_rng((seed, 1)).permutation(len(found.tokens))[:ABLATED])
    kinds = list(dict.fromkeys(claim.place for claim in CLAIMS.values()))
    where: Mapping[str, str] = {claim.place: name for name, claim in reversed(CLAIMS.items())}
    metrics = []
    for number, kind in enumerate(kinds):
        masks = [places(found.tokens[one], related[one]).get(where[kind]) for one in drawn.tolist()]
        counted = np.array([np.zeros(found.tokens.shape[1]) if mask is None else mask for mask in masks])[:, :-1]
        totals = counted.sum(axis=1, keepdims=True)
        shares = np.where(totals > 0, counted / np.maximum(totals, 1), np.nan)
        metrics.append(loss_over(replace(loss.card, name=f"loss_{number}"), shares))
    block = replace(found, tokens=found.tokens[drawn])
    measured = measure(model, block, sets, metrics, controls=controls, seed=seed, check=False, progress=False)
    names = {"condition": "ablated", "control": "random", "example": "window"}

    def of_places(prefix: str, words: str, suffix: str = "") -> xr.DataArray:
        """A variable that there is for each metric, as one with a dim of places."""
        parts = [measured[f"{prefix}{metric.name}{suffix}"] for metric in metrics]
        dims = [names.get(str(dim), str(dim)) for dim in parts[0].dims]
        values = np.stack([part.values for part in parts], axis=-1)
        made = xr.DataArray(values, dims=[*dims, "place"], attrs={"long_name": words, "units": "nat"})
        return made.isel(run=0) if "run" in dims else made

    p = of_places("p_", str(measured["p_loss_0"].attrs["long_name"])).assign_attrs(units="1")
    heads_of = [" ".join(f"L{edit.site.layer}H{edit.site.head}" for edit in one.edits()) for one in sets.values()]
    return xr.Dataset(
        {
            "loss_without": of_places("", "loss without the heads that the claim fits"),
            "loss_whole": of_places("baseline_", "loss of the whole model"),
            "loss_without_random": of_places("", "loss without random heads", "_control"),
            "p_without": p,
        },
        coords={
            "ablated": np.array([*sets], dtype=object),
            "ablated_heads": ("ablated", np.array(heads_of, dtype=object)),
            "place": np.array(kinds, dtype=object),
            "random": measured["control"].values.astype(object),
        },
    )
