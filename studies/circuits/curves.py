"""How much circuits of growing size keep, with intervals over prompts: from what was measured. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, choices
from ...interventions.declare.circuits import ABS, SIGNED
from ...interventions.declare.graph import Graph
from ...metrics.faithfulness import SHARES, cmd, cpr, even_sizes, faithfulness, mib_sizes
from ...metrics.intervals import area_interval, interval_attrs, ratio_interval

Array = np.ndarray[Any, Any]
SIZES = ("share", "edges")
"""Dims along which circuits grow; the other one of the two stands beside it as a coordinate."""
AREAS: dict[str, tuple[Callable[..., Array], bool, str, str]] = {
    "cpr": (cpr, False, SIGNED, "circuit performance ratio"),
    "cpr_log": (cpr, True, SIGNED, "circuit performance ratio, mean over the logarithm of the share"),
    "cmd": (cmd, False, ABS, "circuit-model distance"),
    "cmd_log": (cmd, True, ABS, "circuit-model distance, mean over the logarithm of the share"),
}
"""Name to the function, whether over the logarithm, the selection of edges that it judges, and what it is."""


def circuit_sizes(graph: Graph, by: str = "share") -> xr.DataArray:
    """How many edges circuits of growing size have.

    Parameters
    ----------
    graph : Graph
    by : {"share", "edges"}
        At MIB's shares of all edges, ``int(share * edges)``, which are 0 or 1 in small models; or 1, 2, 5, 10, ...

    Returns
    -------
    DataArray (share) or (edges)
        Whole numbers, with the coordinates ``share`` and ``edges``.

    Raises
    ------
    DeclarationError
        `by` is neither, or this is no graph.

    Examples
    --------
    >>> graph = hw.Graph.of(hw.load("words-2l"))
    >>> hw.circuit_sizes(graph).values.tolist()
    [0, 0, 1, 3, 6, 15, 31, 62, 155, 310]
    >>> hw.circuit_sizes(graph, by="edges").values.tolist()
    [1, 2, 5, 10, 20, 50, 100, 200, 310]
    """
    if not isinstance(graph, Graph):
        raise DeclarationError(f"circuit_sizes takes a Graph, such as Graph.of(model), got {type(graph).__name__}")
    if by not in SIZES:
        raise DeclarationError(f"by={by!r}: possible are {choices(map(repr, SIZES))}")
    numbers = np.array(mib_sizes(len(graph)) if by == "share" else even_sizes(len(graph)))
    shares = np.array(SHARES) if by == "share" else numbers / len(graph)
    coords = {"share": (by, shares, {"long_name": "share of all edges"}), "edges": (by, numbers)}
    return xr.DataArray(numbers, coords=coords, dims=by, name="n", attrs={"long_name": "number of edges"})


def circuit_curve(
    measured: xr.DataArray, empty: xr.DataArray, model: xr.DataArray, *, level: float | None = 0.95
) -> xr.Dataset:
    """Faithfulness of circuits of growing size, and the areas under it, with bootstrap intervals over prompts.

    Faithfulness is ``(m(circuit) - m(empty)) / (m(model) - m(empty))``, a ratio of means over prompts. ``cpr`` is the
    area under it and ``cmd`` that under ``|1 - f|``, by the trapezoid rule over the share of edges: at MIB's shares, a
    circuit that does nothing until it is the whole model has 0.25 and 0.749, one that does everything 0.999 and 0.
    ``cpr_log`` and ``cmd_log`` are means over the logarithm of the share. At other shares or numbers of edges the areas
    are not those of MIB. Where edges were selected in two ways,
    ``cpr`` is that of the signed selection and ``cmd`` that of the absolute one, as MIB has it.

    Parameters
    ----------
    measured : DataArray (..., share or edges, example)
        A metric of circuits; ``share`` and ``edges`` are coordinates, as in `circuit_sizes`. May have a dim
        ``selection`` with the labels ``"signed"`` and ``"abs"``, as `Circuit.top` calls them, and others, such as draws
        of random circuits.
    empty, model : DataArray (example,)
        The metric of the empty circuit, and of the whole model.
    level : float, optional
        Coverage of the intervals; None for none, as for many draws of random circuits.

    Returns
    -------
    Dataset
        ``faithfulness(..., share or edges)``; ``cpr``, ``cmd``, ``cpr_log``, ``cmd_log`` ``(...)``; and each of them
        with ``_low`` and ``_high`` (if any), NaN where the model and the empty circuit are within noise of each other;
        the low end of a distance is 0 where it would be below.

    Raises
    ------
    DeclarationError
        Dims or coordinates are missing, the prompts differ, shares do not rise from above 0 to 1, or the whole model
        and the empty circuit have the same mean.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> sizes = hw.circuit_sizes(hw.Graph(layers=2, heads=8))
    >>> empty, model = (xr.DataArray(np.full(3, value), dims="example") for value in (0.0, 2.0))
    >>> nothing_until_all = xr.where(sizes < 310, empty, model)
    >>> curve = hw.circuit_curve(nothing_until_all, empty, model)
    >>> float(curve["cpr"].round(3)), float(curve["cmd"].round(3))
    (0.25, 0.749)
    """
    along = _checked(measured, empty, model)
    others = [dim for dim in measured.dims if dim not in (along, "example")]
    values = measured.transpose(*others, along, "example")
    base, gap = (np.asarray(part, dtype=np.float64) for part in (empty.values, model.values - empty.values))
    change = np.asarray(values.values, dtype=np.float64) - base
    shares = np.asarray(values["share"].values, dtype=np.float64)
    comment = interval_attrs(len(base))
    found = faithfulness(values.values, base, model.values)
    kept = {name: values[name] for name in values.coords if "example" not in values[name].dims}
    ds = xr.Dataset(coords=kept)

    def put(name: str, dims: list[Any], value: Array, ends: tuple[Array, Array] | None, words: str) -> None:
        ds[name] = (dims, value, {"units": "1", "long_name": words})
        for end, array in zip(("low", "high"), ends or (), strict=False):
            words_of_end = f"{words}, {level:.0%} interval, {end} end"
            ds[f"{name}_{end}"] = (dims, array, {"units": "1", "long_name": words_of_end, **comment})

    ends = None if level is None else ratio_interval(change, gap, level)
    put("faithfulness", [*others, along], found, ends, "faithfulness")
    reach = f"from a share of {shares[0]:.3g} to {shares[-1]:.3g}"
    if along == "edges":
        reach += ", over numbers of edges: not that of MIB, which is over its shares"
    for name, (area, log, selection, words) in AREAS.items():
        dims, of = others, partial(area, shares=shares, log=log)
        curves, changes = found, change
        if "selection" in others:
            axis = others.index("selection")
            one = [str(label) for label in values["selection"].values].index(selection)
            curves, changes = np.take(found, one, axis), np.take(change, one, axis)
            dims = [dim for dim in others if dim != "selection"]
        put(name, dims, of(curves), _ends(of, changes, gap, level, area is cmd), f"{words}, {reach}")
    ds.attrs["metric"] = str(measured.name or "")
    return ds


def _ends(
    of: Callable[[Array], Array], changes: Array, gap: Array, level: float | None, positive: bool
) -> tuple[Array, Array] | None:
    """Ends of the interval of an area of each curve, ``(..., size, example)``."""
    if level is None:
        return None
    low, high = (np.full(changes.shape[:-2], np.nan) for _ in range(2))
    for at in np.ndindex(low.shape):
        low[at], high[at] = area_interval(changes[at], gap, of, level)
    return np.maximum(low, 0.0) if positive else low, high


def _checked(measured: xr.DataArray, empty: xr.DataArray, model: xr.DataArray) -> str:
    """The dim along which circuits grow."""
    for name, one in (("measured", measured), ("empty", empty), ("model", model)):
        if not isinstance(one, xr.DataArray):
            raise DeclarationError(f"circuit_curve takes {name} as a DataArray, got {type(one).__name__}")
    along = [dim for dim in SIZES if dim in measured.dims]
    if len(along) != 1 or "example" not in measured.dims or not {*SIZES} <= {*measured.coords}:
        raise DeclarationError(
            "circuit_curve takes what was measured with the dims share or edges, and example, and the coordinates "
            f"share and edges: this has the dims {choices(measured.dims) or 'none'} and the coordinates "
            f"{choices(measured.coords) or 'none'}"
        )
    for name, one in (("empty", empty), ("model", model)):
        if one.dims != ("example",) or one.sizes["example"] != measured.sizes["example"]:
            raise DeclarationError(
                f"circuit_curve takes {name} of the same {measured.sizes['example']} prompts, with the dim example: it "
                f"has {choices(f'{dim} {size}' for dim, size in one.sizes.items()) or 'no dims'}"
            )
    if "selection" in measured.dims:
        labels = [str(label) for label in measured["selection"].values] if "selection" in measured.coords else []
        if not {SIGNED, ABS} <= {*labels}:
            raise DeclarationError(
                f"circuit_curve takes the selections {SIGNED!r} and {ABS!r}: there is {choices(labels) or 'no label'}"
            )
    shares = np.asarray(measured["share"].values, dtype=np.float64)
    if len(shares) < 2 or shares[0] <= 0 or not (np.diff(shares) > 0).all() or shares[-1] != 1:
        raise DeclarationError(f"circuit_curve takes shares that rise from above 0 to 1, got {shares.tolist()}")
    return along[0]
