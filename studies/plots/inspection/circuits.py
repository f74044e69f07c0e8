"""What weights say of tokens: eigenvalues of a circuit in the plane, and the tokens or pairs that stand out as bars."""

from __future__ import annotations

from typing import Any

import holoviews as hv
import numpy as np
import xarray as xr

from ....errors import DeclarationError
from ..parts.dots import dots, row_chart, rows_of, span_of, value_bars
from ..parts.inputs import need, need_dims, possible
from ..parts.patterns import short, visible
from ..parts.style import BLUE, GREY, ORANGE, dimension, hover, overlay, styled

EIGENVALUES = ("eigenvalue_real", "eigenvalue_imag")
PAIRS = (("source_token", "output_token"), ("query_token", "key_token"))
"""Rows and columns of OV and of QK circuits."""


def words_of(ds: xr.Dataset, variable: str) -> tuple[str, ...]:
    """The variables that hold the tokens of a weight ``(side, rank)``; empty where it is none of these weights."""
    if not {"side", "rank"} <= {*ds[variable].dims}:
        return ()
    candidates = PAIRS if variable == "weight" else ((f"{variable.removesuffix('_weight')}_token",),)
    return next((names for names in candidates if {*names} <= {*ds}), ())


def eigenvalue_plane(ds: xr.Dataset, *, title: str = "") -> Any:
    """Eigenvalues of a circuit in the complex plane; those of a head that copies lie to the right.

    Parameters
    ----------
    ds : Dataset
        ``ov`` or ``qk`` of `headwise.head_circuits`: ``eigenvalue_real`` and ``eigenvalue_imag`` ``(index)``.
    title : str

    Returns
    -------
    holoviews.Overlay
        ``VLine`` at 0, ``Points`` of those with a positive and with a negative real part.
    """
    ds = need(ds, "eigenvalue_plane", *EIGENVALUES)
    need_dims(ds, "eigenvalue_plane", dict.fromkeys(EIGENVALUES, ("index",)))
    real, imaginary = (np.asarray(ds[name].values, dtype=float) for name in EIGENVALUES)
    axes = [dimension(name, ds[name]) for name in EIGENVALUES]
    parts = [styled(hv.VLine(0), color=GREY, line_width=1), styled(hv.HLine(0), color=GREY, line_width=1)]
    tips = hover(axes[0], f"@{EIGENVALUES[0]}", (axes[1].label, f"@{EIGENVALUES[1]}"), ("number", "@index"))
    for name, look, here in (
        ("positive", (BLUE, "circle"), real > 0),
        ("not positive", (ORANGE, "diamond"), real <= 0),
    ):
        table = {EIGENVALUES[0]: real[here], EIGENVALUES[1]: imaginary[here], "index": np.flatnonzero(here)}
        label = f"{name}: {int(here.sum())} of {len(real)}"
        parts.append(dots(table, axes, label, look, 9, alpha=0.85, **tips))
    reach = max(float(np.abs(imaginary).max()), 0.25 * float(np.abs(real).max()), 1e-12) * 1.1
    labels = {"xlabel": axes[0].pprint_label, "ylabel": axes[1].pprint_label}
    return overlay(parts, width=470, height=360, title=title, xlim=span_of([real]), ylim=(-reach, reach), **labels)


def token_bars(ds: xr.Dataset, variable: str = "weight", *, title: str = "") -> Any:
    """The tokens, or pairs of tokens, with the highest and the lowest weights.

    Parameters
    ----------
    ds : Dataset
        ``ov`` or ``qk`` of `headwise.head_circuits`, or of `headwise.neuron_tokens`.
    variable : str
        Of weights ``(side, rank)``: ``weight`` of pairs, ``chosen_output_weight``, ``input_weight``, ...
    title : str

    Returns
    -------
    holoviews.Overlay
        ``Rectangles`` from 0 (``token`` and ``value`` beside), blue for the highest and orange for the lowest, and
        ``Labels`` with the numbers.

    Raises
    ------
    UnknownNameError
        A variable that is not there.
    DeclarationError
        It has no tokens beside it, or other dims: select first.
    """
    ds = need(ds, "token_bars", variable)
    if not title and variable.startswith("chosen_") and "chosen" in ds.coords and not ds["chosen"].ndim:
        title = f"of {visible(str(ds['chosen'].item()))}"
    names = words_of(ds, variable)
    if not names:
        raise DeclarationError(f"token_bars draws weights of tokens (side, rank), such as weight: {variable} is none")
    for dim in set(ds[variable].dims) - {"side", "rank"}:
        raise DeclarationError(f"token_bars draws one set of tokens: select {dim}, {possible(ds, str(dim))}")
    flat = ds[[variable, *names]].transpose("side", "rank")
    numbers = np.concatenate([flat[variable].values[0], flat[variable].values[-1][::-1]]).astype(float)
    words = [np.concatenate([flat[name].values[0], flat[name].values[-1][::-1]]) for name in names]
    tokens = [" → ".join(visible(str(one)) for one in several) for several in zip(*words, strict=True)]
    ticks = [" → ".join(short(visible(str(one))) for one in several) for several in zip(*words, strict=True)]
    rows, shown, half = rows_of(tokens), dimension("value", ds[variable]), flat.sizes["rank"]
    beside = {"token": tokens, "colour": [BLUE] * half + [ORANGE] * half}
    parts = value_bars(numbers, rows, shown, beside, [("tokens", "@token")])
    low, high = span_of([numbers])
    shape: dict[str, Any] = {"width": 440, "height": 96 + 22 * len(rows), "xlim": (low, high + 0.2 * (high - low))}
    return row_chart(parts, shown, ticks, title=title, show_legend=False, **shape)
