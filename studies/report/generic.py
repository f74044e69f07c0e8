"""The report of any dataset, whatever made it: what it holds, a picture of each variable, its largest values."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from ..measuring.effects import condition_names
from ..output.page import Number, Page, folded, number, table
from ..output.phrases import count, listed
from .figures import draw
from .induction import Section

TOP = 20
"""Rows of a table; the others are counted."""
NAMED = 4
"""Variables that the answer names."""
PICTURES = 8
"""Variables of one dataset that are drawn; the others stand in the table."""


def sections(tree: xr.DataTree, known: tuple[str, ...] = ()) -> list[Section]:
    """A section for each group that holds variables, but for those in `known` and what is below them."""
    found: list[Section] = []
    for node in tree.subtree:
        path = node.path.strip("/")
        if not node.data_vars or path.split("/")[0] in known:
            continue
        words = str(node.attrs.get("long_name", "")) or (f"The group {path}" if path else "The variables")
        fill = partial(_fill, path=path)
        found.append(Section(f"group{len(found)}", path or "Variables", words[:1].upper() + words[1:], fill))
    return found


def says(tree: xr.DataTree, section: Section) -> list[str]:
    """What a section of `sections` holds, in a sentence."""
    path = section.fill.keywords["path"] if isinstance(section.fill, partial) else section.key
    ds = tree[path].to_dataset() if path else tree.to_dataset()
    names = [_label(values) for values in ds.data_vars.values()]
    named = f": {listed(names)}" if len(names) <= NAMED else f", such as {listed(names[:NAMED])}"
    return [f"It holds {count(len(names), 'variable')}{named}."]


def _fill(page: Page, ds: xr.Dataset, tree: xr.DataTree, *, path: str) -> None:
    overview(page, tree[path].to_dataset() if path else tree.to_dataset())


def overview(page: Page, ds: xr.Dataset, *, pictures: int = PICTURES) -> None:
    """What a dataset holds: a table of its variables, and for each that can be drawn a picture and its values."""
    page.add(_variables(ds))
    drawn = 0
    for name in map(str, ds.data_vars):
        values = ds[name]
        if values.dtype.kind not in "biuf" or not values.size:
            continue
        drawn += drawn < pictures and draw(page, ds, name, f"{_label(values)[:1].upper()}{_label(values)[1:]}.")
        page.add(folded(f"Values: {_label(values)}", _values(values)))


def _variables(ds: xr.Dataset) -> str:
    rows = []
    for name, values in ds.data_vars.items():
        dims = ", ".join(f"{dim} {size}" for dim, size in values.sizes.items()) or "one value"
        row = [str(name), _label(values), dims, str(values.attrs.get("units", ""))]
        if values.dtype.kind in "biuf" and values.size:
            numbers = values.values.astype(np.float64)
            known = numbers[~np.isnan(numbers)]
            facts = [known.min(), known.mean(), known.max()] if known.size else [np.nan] * 3
            row += [*map(figure, facts), Number(numbers.size - known.size)]
        else:
            row += [Number("–")] * 4
        rows.append(row)
    head = ["variable", "what it is", "dims", "unit", "smallest", "mean", "largest", "missing"]
    return table(head, rows, caption="What is there.", long=(1, 2))


def _values(values: xr.DataArray) -> str:
    """The largest values, averaged over examples."""
    over = "example" in values.dims
    mean = values.astype(np.float64)
    mean = mean.mean("example") if over else mean
    names, flat = condition_names(mean).ravel(), mean.values.ravel()
    order = np.argsort(-np.nan_to_num(np.abs(flat), nan=-1.0), kind="stable")[:TOP]
    rows = [["all" if not mean.dims else str(names[at]), figure(float(flat[at]))] for at in order]
    note = "Mean over examples" if over else "As stored"
    note += f"; the {len(rows)} largest of {flat.size}: {flat.size - len(rows)} further are in the file." * (
        flat.size > len(rows)
    )
    return table(["where", _label(values)], rows, caption=note.rstrip(".") + ".")


def _label(values: xr.DataArray) -> str:
    return str(values.attrs.get("long_name") or values.name)


def figure(value: float, sign: str = "") -> Number:
    """A number with three digits that count."""
    if value != value:
        return number(value)
    if value == 0:
        return Number("0")
    return Number(f"{value:{sign}.0f}" if abs(value) >= 99.95 else f"{value:{sign}#.3g}")


def unit_words(unit: Any) -> str:
    """`` nats`` for ``nat``; nothing for a pure number."""
    return {"1": "", "": "", "nat": " nats", "logit": " logits"}.get(str(unit), f" {unit}")
