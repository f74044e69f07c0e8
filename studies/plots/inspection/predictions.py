"""What a model says: the likeliest tokens as bars or in the cells of a grid."""

from __future__ import annotations

import textwrap
from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ....errors import DeclarationError, choices
from ..parts.dots import row_chart, rows_of, span_of, value_bars
from ..parts.inputs import Array, names_of, need, need_dims, places_of, possible, where_read
from ..parts.patterns import short, visible
from ..parts.style import (
    BLUE,
    ORANGE,
    WEIGHTS,
    ColourScale,
    cells,
    dimension,
    heat_map,
    hover,
    scale_for,
    styled,
    ticks,
    write_in_cells,
)

SAID = {"prob_of_token": "logit_lens", "prob": "predict"}
"""The variable that is drawn where none is named, and what gives it."""
PANELS, AS_ROW = 12, 4
"""Conditions that are drawn, and how many in one row."""
LETTERS = 34
"""Of a prompt, as the label of an axis."""
WORDS = 40
"""Up to so many columns tokens are written in the cells."""


def says(ds: Any) -> str | None:
    """The variable that tells how likely each token is, in what `predict` or `logit_lens` gave; else None."""
    if not isinstance(ds, xr.Dataset) or "token" not in ds.data_vars or "rank" not in {*ds.dims, *ds.coords}:
        return None
    return next((name for name in SAID if name in ds), None)


def predictions(
    ds: xr.Dataset, values: str | None = None, *, example: int = 0, top: int | None = None, title: str = ""
) -> Any:
    """The likeliest next tokens as bars, the likeliest at the top; conditions side by side.

    Parameters
    ----------
    ds : Dataset
        The result of `headwise.predict`: ``token`` and `values` ``([condition,] [example,] rank)``; ``prompt(example)``
        where it is there.
    values : str, optional
        ``prob`` or ``logit``; the probability where left out.
    example : int
        Which prompt.
    top : int, optional
        Draw only so many tokens.
    title : str

    Returns
    -------
    holoviews.Overlay, or Layout of several conditions
        ``Rectangles`` from 0 (``token`` and ``value`` beside), ``Labels`` with the numbers. What is likeliest in the
        first panel is orange in each.

    Raises
    ------
    UnknownNameError
        A variable that is not there.
    DeclarationError
        More than one dim beside examples and ranks, or more than 12 conditions: select first.
    """
    values = values or says(ds) or "prob"
    ds = need(ds, "predictions", "token", values)
    need_dims(ds, "predictions", {values: ["rank"], "token": ["rank"]})
    ds, where = _one_example(ds[_used(ds, values)].isel(rank=slice(top)), example)
    others = [str(dim) for dim in ds[values].dims if dim != "rank"]
    own = ("layer", "head", "position")
    many = [one for one in others if one not in own] or others[1:] if len(others) > 1 else []
    for dim in many or [one for one in others if ds.sizes[one] > PANELS]:
        raise DeclarationError(f"predictions draws one dim beside rank: select {dim}, {possible(ds, dim)}")
    names = names_of(ds, others[0]) if others else [""]
    panels = [ds.isel({others[0]: at}) if others else ds for at in range(len(names))]
    ends = span_of([ds[values].values])
    likeliest = int(np.argmax(np.nan_to_num(panels[0][values].values, nan=-np.inf)))
    first = str(panels[0]["token"].values[likeliest]) if others else ""
    drawn = [
        _bars(panel, values, ends, first, "" if at else where, _titled(title, name))
        for at, (panel, name) in enumerate(zip(panels, names, strict=True))
    ]
    return drawn[0] if len(drawn) == 1 else hv.Layout(drawn).cols(AS_ROW)


def token_grid(
    ds: xr.Dataset,
    values: str | None = None,
    *,
    example: int = 0,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Any:
    """The likeliest token in each cell, coloured by its probability: by layer and position, or by what there is.

    Parameters
    ----------
    ds : Dataset
        The result of `headwise.logit_lens`, or of `headwise.predict` at several positions: ``token`` and `values` with
        two of the dims ``layer``, ``position`` and ``rank``; of all three, the likeliest tokens are drawn.
    values : str, optional
        What colours the cells; the probability where left out.
    example : int
        Which prompt.
    title : str
    limits : (low, high), optional
        Ends of the colour scale; of probabilities 0 and 1.

    Returns
    -------
    holoviews.HeatMap
        ``position`` or ``rank`` to the right, ``layer`` upward or ``rank`` downward; ``value``, ``token``.

    Raises
    ------
    UnknownNameError
        A variable that is not there.
    DeclarationError
        Other dims are there: select first.
    """
    values = values or says(ds) or "prob_of_token"
    ds = where_read(need(ds, "token_grid", "token", values))
    ds, where = _one_example(ds[_used(ds, values)], example)
    dims = set(map(str, ds[values].dims))
    if "rank" in dims and {"layer", "position"} <= dims:
        ds, dims = ds.isel(rank=0), dims - {"rank"}
    across = "position" if "position" in dims else "rank"
    upward = "layer" if "layer" in dims else "rank"
    if extra := [dim for dim in ds[values].dims if dim not in (across, upward)]:
        raise DeclarationError(f"token_grid draws two dims: select {extra[0]}, {possible(ds, str(extra[0]))}")
    if dims != {across, upward} or across == upward:
        raise DeclarationError(f"token_grid draws two of layer, position and rank, and has {choices(sorted(dims))}")
    array, words = (ds[name].transpose(upward, across) for name in (values, "token"))
    numbers = np.asarray(array.values, dtype=float)
    kept = np.isfinite(numbers).any(0)  # no columns beyond the end of a shorter prompt
    array, words, numbers, ds = array[:, kept], words[:, kept], numbers[:, kept], ds.isel({across: kept})
    (columns, column_names), (rows, row_names) = (places_of(array, dim) for dim in (across, upward))
    share = array.attrs.get("units", "1") == "1" and not (numbers < 0).any() and not (numbers > 1).any()
    scale = ColourScale(*(limits or (0.0, 1.0)), WEIGHTS) if share else scale_for(numbers, limits)
    written = len(columns) <= WORDS
    wide, high = (58 if written else max(620 / len(columns), 3.5)), 24
    texts = [visible(str(one)) if str(one) else "" for one in words.values.ravel()]
    read = _read_tokens(ds) if across == "position" else []
    shown = dimension("value", array)
    row, column = (at.ravel() for at in np.meshgrid(rows, columns, indexing="ij"))
    table = {
        across: column,
        upward: row,
        "value": numbers.ravel(),
        "token": texts,
        "text": [one if len(one) <= 8 else f"{one[:7]}…" for one in texts],
        "ink": scale.ink(numbers.ravel()),
        "after": (read or column_names) * len(rows),
    }
    label = [f"{name} {short(word)}" for name, word in zip(column_names, read, strict=True)] if read else column_names
    tips = [
        ("next token", "@token"),
        (upward, f"@{upward}"),
        (across, f"@{across}"),
        *([("after", "@after")] if read else []),
    ]
    return styled(
        heat_map(table, [across, upward], [shown, "token", "text", "ink", "after"]),
        **cells(scale, round(len(columns) * wide), len(rows) * high, shown.pprint_label),
        **hover(shown, "@value{0.000}", *tips),
        title=textwrap.fill(
            _titled(title, "" if read else _after(where, LETTERS)), max(round(len(columns) * wide / 7.5), 20)
        ),
        xticks=ticks(columns, [short(one) for one in label], wide * (0.8 if read else 0.7)),
        yticks=ticks(rows, row_names, high),
        xrotation=90 if read else 0,
        xlabel=f"{across}, and the token there" if read else across,
        xlim=(float(columns[0]) - 0.5, float(columns[-1]) + 0.5),
        ylim=(float(rows[0]) - 0.5, float(rows[-1]) + 0.5),
        invert_yaxis=upward == "rank",
        hooks=[write_in_cells(11)] if written else [],
    )


def _used(ds: xr.Dataset, values: str) -> list[str]:
    if ds[values].dtype.kind not in "biuf":
        raise DeclarationError(f"{values} holds text: name prob or logit")
    return ["token", values]


def _one_example(ds: xr.Dataset, example: int) -> tuple[xr.Dataset, str]:
    """The dataset at one prompt, and its text where it is known."""
    if "example" in ds.dims:
        if not 0 <= example < ds.sizes["example"]:
            raise DeclarationError(f"example={example}: there are {ds.sizes['example']}, from 0 on")
        ds = ds.isel(example=example)
    if "prompt" not in ds.coords or ds["prompt"].ndim:
        return ds, ""
    return ds, visible(str(ds["prompt"].item()))


def _after(text: str, letters: int) -> str:
    """The end of a prompt; nothing of an unknown one."""
    return text and f"after “{text if len(text) <= letters else '…' + text[1 - letters :]}”"


def _read_tokens(ds: xr.Dataset) -> list[str]:
    """The token that is read at each position, where that is known."""
    if "read_token" not in ds.coords or ds["read_token"].dims != ("position",):
        return []
    return [visible(str(one)) for one in ds["read_token"].values]


def _titled(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _bars(ds: xr.Dataset, values: str, ends: tuple[float, float], first: str, where: str, title: str) -> Any:
    """The bars of one condition."""
    numbers = np.asarray(ds[values].values, dtype=float)
    known = np.flatnonzero(np.isfinite(numbers))
    if not known.size:
        raise DeclarationError(f"predictions: {values} has no value that is not missing")
    numbers, tokens = numbers[known], [str(one) for one in ds["token"].values[known]]
    rows: Array = rows_of(tokens)
    shown = dimension("value", ds[values])
    names = [short(visible(one)) for one in tokens]
    beside = {
        "token": [visible(one) for one in tokens],
        "rank": names_of(ds, "rank")[: known[-1] + 1] if known.size == ds.sizes["rank"] else known,
        "colour": [ORANGE if first and one == first else BLUE for one in tokens],
    }
    parts = value_bars(numbers, rows, shown, beside, [("token", "@token"), ("rank", "@rank")])
    reach = ends[1] + 0.18 * (ends[1] - ends[0])  # room for the number beside the longest bar
    high, low = 96 + 24 * len(rows), ends[0] if ends[0] < -0.1 else 0.0
    label = _after(where, max(round(high / 7.5) - 12, 8))  # what has room beside the bars
    shape: dict[str, Any] = {"width": 330, "height": high, "xlim": (low, reach), "ylabel": label}
    return row_chart(parts, shown, names, title=title, show_legend=False, **shape)
