"""Figures of a report for whatever a dataset holds: the best picture of a variable, a choice made where it must be."""

from __future__ import annotations

from typing import Any

import xarray as xr

from ...errors import HeadwiseError
from ..output.page import Page
from .changes import READ, Changes

PLAIN = {"example", "run"}
"""Dims that make no figure by themselves: a table says it better."""


def draw(page: Page, ds: xr.Dataset, name: str, caption: str, **select: Any) -> bool:
    """Append the picture that suits a variable to a page, where there is one.

    Parameters
    ----------
    page : Page
    ds : Dataset
    name : str
        The variable.
    caption : str
        Stands below the figure.
    **select
        Value of a dim, see `plots.picture`.

    Returns
    -------
    bool
        Whether a figure was appended. False where the variable is empty, has no dims but `PLAIN`, or no picture has its
        dims.
    """
    from .. import plots

    if {*map(str, ds[name].dims)} <= PLAIN or not ds[name].size:
        return False
    try:
        element = plots.picture(ds, name, **select)
    except HeadwiseError:
        return False
    page.figure(element, caption)
    return True


def draw_changes(page: Page, ds: xr.Dataset, moved: Changes) -> None:
    """What every condition changes; where there are more dims than a picture has, at the one that changes most."""
    metric, label = moved.name, moved.label.partition(",")[0]
    axes, kept = [str(dim) for dim in moved.axes], ds[metric].dims
    by_position = "position" in kept and "position" not in axes
    flat = ds
    if by_position:
        names = [metric, f"baseline_{metric}"]
        flat = ds.assign({name: ds[name].mean("position", keep_attrs=True) for name in names})
    caption = f"Change of the {label} from the run without intervention, mean over prompts"
    most = moved.at(moved.order()[0])
    where = ", ".join(f"{dim} {label}" for dim, label in most.items() if dim not in READ)
    read = [dim for dim in READ if dim in kept]
    if read:
        at = {dim: most[dim] for dim in axes if dim not in READ}
        caption += (
            f", at every head that was looked at{f', for the condition that changes most: {where}' if at else ''}"
        )
        draw(page, flat, metric, f"{caption}.", **at)
        return
    if not draw(page, flat, metric, f"{caption}.") and len(axes) > 1:
        rest = [dim for dim in axes if dim not in ("layer", "head")]
        whole = len(axes) - len(rest) == 2
        shown = whole and len(rest) == 1 and draw(page, flat, metric, f"{caption}, by {rest[0]}.", **{rest[0]: "all"})
        if not shown:
            fixed = {dim: most[dim] for dim in (rest if whole else axes[:-2])}
            words = ", ".join(f"{dim} {value}" for dim, value in fixed.items())
            draw(page, flat, metric, f"{caption}, at {words}, where it is largest.", **fixed)
    if by_position:
        words = f" for the condition that changes most ({where})" if axes else ""
        draw(page, ds, metric, f"{caption}, at each scored position{words}, with 95% intervals.", **most)
