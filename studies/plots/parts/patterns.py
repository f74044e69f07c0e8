"""Attention patterns made ready for drawing: from a study, from `capture`, or from an array made by hand."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr

from ....errors import DeclarationError, UnknownNameError
from .inputs import Array, array_of, listed, names_of, need, numbers_of, part_of
from .style import dimension, head_name

CAPTURED = re.compile(r"(L\d+(?:H\d+)?)_pattern")
"""How `capture` names the pattern of a head, or of all heads of a layer."""
LONGEST = 12
"""Characters of a token that are written in a picture; hover shows all."""
SIGNS = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Pattern:
    """One head's attention on one prompt.

    Attributes
    ----------
    name : str
        Of the head, such as ``"L1H2"``.
    weights : array (query, key)
        NaN where nothing can be attended to.
    queries, keys : arrays
        Positions in the prompt.
    tokens : dict of int to str
        Text by position; whole, with signs for what cannot be seen.
    expected : array (query,)
        Position of the key that each query should attend to, NaN where there is none.
    kind : str
        What `expected` is, in words.
    shown : holoviews.Dimension
        What the weights are.
    block : int
        Weights stand for the largest of so many by so many.
    peak_queries, peak_keys : arrays (query, key)
        Where that largest weight is; empty for a block of 1.
    """

    name: str
    weights: Array
    queries: Array
    keys: Array
    tokens: dict[int, str]
    expected: Array
    kind: str
    shown: Any
    block: int = 1
    peak_queries: Array = field(default_factory=lambda: np.empty((0, 0)))
    peak_keys: Array = field(default_factory=lambda: np.empty((0, 0)))

    def token(self, position: int) -> str:
        """The token at a position, or the position where the tokens are not known."""
        return self.tokens.get(int(position), str(int(position)))

    def at_expected(self) -> float:
        """Mean weight of the expected keys, NaN where there are none."""
        column = {int(key): place for place, key in enumerate(self.keys)}
        found = [
            self.weights[row, column[int(key)]]
            for row, key in enumerate(self.expected)
            if np.isfinite(key) and int(key) in column
        ]
        return float(np.mean(found)) if found else math.nan


def short(token: str) -> str:
    """A token as it is written along an axis."""
    return token if len(token) <= LONGEST else token[: LONGEST - 1] + "…"


def names_of_patterns(ds: xr.Dataset) -> list[str]:
    """The heads whose patterns a dataset holds."""
    if "pattern" in ds and "shown" in ds["pattern"].dims:
        return names_of(ds, "shown")
    names = []
    sources = {"": "pattern"} if "pattern" in ds else {}
    sources |= {found[1]: str(name) for name in ds.data_vars if (found := CAPTURED.match(str(name)))}
    for prefix, variable in sources.items():
        values = ds[variable]
        own = {dim: numbers_of(values, dim) for dim in ("layer", "head") if dim in values.dims}
        if "layer" in own and "head" in own:
            names += [head_name(layer, head) for layer in own["layer"] for head in own["head"]]
        elif "head" in own and prefix:
            names += [f"{prefix}H{head}" for head in own["head"]]
        else:
            names.append(prefix or "pattern")
    return names


def read_pattern(ds: Any, shown: str | None = None, *, example: int = 0, what: str = "attention") -> Pattern:
    """One pattern of `ds`, see `attention` for what it may be.

    Parameters
    ----------
    ds, shown, example
        As for `attention`.
    what : str
        Name of the picture, for messages.

    Returns
    -------
    Pattern

    Raises
    ------
    UnknownNameError, DeclarationError
        For a head or an example that is not there, and for what holds no pattern; the text lists what there is.
    """
    ds = part_of(ds, what, "pattern")
    if isinstance(ds, xr.DataArray):
        values, name = array_of(ds, what, ("query", "key")), shown or str(ds.name or "")
        ds = ds.to_dataset(name="pattern")
    else:
        values, ds, name = _chosen(ds, shown, what)
    own = {str(dim): end for dim in values.dims for end in ("query", "key") if str(dim).endswith(f"_{end}")}
    values = values.rename(own)
    ds = ds.rename({dim: end for dim, end in own.items() if dim in ds.dims and end not in ds.dims})
    if "example" in values.dims:
        count = values.sizes["example"]
        if not -count <= example < count:
            raise UnknownNameError(f"{what}: there is no example {example}: there are 0 to {count - 1}")
        values, ds = values.isel(example=example), ds.isel(example=example)
    values = values.squeeze([dim for dim in values.dims if dim not in ("query", "key") and values.sizes[dim] == 1])
    if set(values.dims) != {"query", "key"}:
        extra = [str(dim) for dim in values.dims if dim not in ("query", "key")]
        raise DeclarationError(
            f"{what} draws one pattern (query, key), and this has {listed(values.dims) or 'no dims'}"
            + (f": select one {extra[0]} first" if extra else "")
        )
    values = values.transpose("query", "key")
    weights = np.asarray(values.values, dtype=float)
    queries, keys = numbers_of(values, "query"), numbers_of(values, "key")
    rows, columns = (np.flatnonzero(np.isfinite(weights).any(axis)) for axis in (1, 0))  # a shorter prompt's own part
    weights, queries, keys = weights[np.ix_(rows, columns)], queries[rows].astype(int), keys[columns].astype(int)
    if not weights.size:
        raise DeclarationError(f"{what}: the pattern of {name or 'this head'} has no value that is not missing")
    later = keys[None, :] > queries[:, None]
    if not np.nan_to_num(weights[later]).any():
        weights = np.where(later, np.nan, weights)
    expected = np.full(len(rows), np.nan)
    if "expected" in ds and set(ds["expected"].dims) == {"query"}:
        expected = np.asarray(ds["expected"].values, dtype=float)[rows]
    kind = str(ds["kind"].values).replace("_", "-") if "kind" in ds and ds["kind"].ndim == 0 else ""
    return Pattern(
        name, weights, queries, keys, _tokens(ds, values), expected, kind, dimension("weight", values, _label(values))
    )


def _label(values: xr.DataArray) -> str | None:
    """What the weights are called: arrays from `capture` carry the name of their site."""
    return "attention" if "site" in values.attrs or not values.attrs.get("long_name") else None


def _chosen(ds: Any, shown: str | None, what: str) -> tuple[xr.DataArray, xr.Dataset, str]:
    """The array of one head, the dataset of its row, and the head's name."""
    names = names_of_patterns(ds) if isinstance(ds, xr.Dataset) else []
    if not names:
        need(ds, what, "pattern")
    if names == ["pattern"]:
        return ds["pattern"], ds, shown or ""
    if shown is None and len(names) == 1:
        shown = names[0]
    if shown not in names:
        asked = f"no pattern of {shown!r} is here" if shown else f"{what} draws one head: name it"
        raise UnknownNameError(f"{asked}: there are {listed(names)}")
    if "pattern" in ds:
        values = ds["pattern"]
        if "shown" in values.dims:
            row = names.index(shown)
            return values.isel(shown=row), ds.isel(shown=row), shown
    else:
        layer = shown.split("H")[0]
        (variable,) = [
            str(name) for name in ds.data_vars if (found := CAPTURED.match(str(name))) and found[1] in (shown, layer)
        ][:1]
        values = ds[variable]
    at = re.fullmatch(r"L(\d+)H(\d+)", shown)
    for place, dim in enumerate(("layer", "head"), start=1):
        if at and dim in values.dims:
            values = values.isel({dim: int(np.flatnonzero(numbers_of(values, dim) == int(at[place]))[0])})
    return values, ds, shown


def _tokens(ds: xr.Dataset, values: xr.DataArray) -> dict[int, str]:
    """Text of the tokens by position, from ``token`` along positions, keys or queries."""
    if "token" not in ds or ds["token"].ndim != 1:
        return {}
    (dim,) = map(str, ds["token"].dims)
    if dim not in ("position", "key", "query"):
        return {}
    texts = ds["token"].values
    at = numbers_of(values, dim) if dim in values.dims else numbers_of(ds["token"], dim)
    shown = _told_apart([str(text) for text in texts])
    return {int(place): text for place, text in zip(at, shown, strict=True)}


def _told_apart(tokens: list[str]) -> list[str]:
    """Tokens as they are seen; where two of them differ by the space around them, spaces are drawn as signs."""
    forms: dict[str, set[str]] = {}
    for token in tokens:
        forms.setdefault(visible(token), set()).add(token)
    return [
        visible(token) if len(forms[visible(token)]) == 1 else token.replace(" ", "␣").translate(SIGNS)
        for token in tokens
    ]


def visible(token: str) -> str:
    """A token without the space around it; one of nothing else as its repr, line breaks and tabs as signs."""
    return token.strip().translate(SIGNS) or repr(token)


def coarse(pattern: Pattern, most: int) -> Pattern:
    """`pattern` with at most `most` cells a side: each is the largest weight in a block, so that no stripe is lost."""
    block = math.ceil(max(pattern.weights.shape) / most)
    if block == 1:
        return pattern
    count = [math.ceil(size / block) for size in pattern.weights.shape]
    whole = np.full([number * block for number in count], -np.inf)
    whole[: pattern.weights.shape[0], : pattern.weights.shape[1]] = np.nan_to_num(pattern.weights, nan=-np.inf)
    blocks = whole.reshape(count[0], block, count[1], block).transpose(0, 2, 1, 3).reshape(*count, block * block)
    peak = blocks.argmax(-1)
    weights = np.take_along_axis(blocks, peak[..., None], -1)[..., 0]
    rows = np.minimum(np.arange(count[0])[:, None] * block + peak // block, len(pattern.queries) - 1)
    columns = np.minimum(np.arange(count[1])[None, :] * block + peak % block, len(pattern.keys) - 1)
    middle = [
        np.asarray([ends[start : start + block][0] + (block - 1) / 2 for start in range(0, len(ends), block)])
        for ends in (pattern.queries, pattern.keys)
    ]
    return replace(
        pattern,
        weights=np.where(np.isfinite(weights), weights, np.nan),
        queries=middle[0],
        keys=middle[1],
        block=block,
        peak_queries=pattern.queries[rows],
        peak_keys=pattern.keys[columns],
        expected=np.full(count[0], np.nan),
    )
