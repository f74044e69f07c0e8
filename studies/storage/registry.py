"""The tables of everything that is stored by name beside results: interventions, tasks, metrics. Owns no behaviour."""

from __future__ import annotations

import math
import re
from collections import ChainMap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError, UnknownNameError, choices
from ...interventions.base.hashing import data_hash
from ...interventions.declare import codec
from ...interventions.declare.codec import TABLE
from ..tasks.chat import Chat
from ..tasks.prompts import Prompts
from ..tasks.tasks import RepeatedTokens

if TYPE_CHECKING:
    import xarray as xr

    from ...metrics.card import Metric

TASKS: ChainMap[str, Callable[..., Any]] = ChainMap(
    {"RepeatedTokens": RepeatedTokens, "Prompts": Prompts, "Chat": Chat}, TABLE
)
"""Type name to maker, of tasks, conversations and of the declarations in `TABLE`."""
IN_CONTEXT = re.compile(r"in_context_([1-9][0-9]{0,8})_([1-9][0-9]{0,8})")
"""Names of in-context-learning scores, which say their tokens."""


def to_json(value: object) -> str:
    """A declaration as JSON text, as results hold it and ``headwise plan --what FILE`` reads it.

    Parameters
    ----------
    value : Site, Intervention, Grid, task, or a list or mapping of these
        A grid is written as its axes and interventions: the function that made them is not kept.

    Returns
    -------
    str

    Raises
    ------
    DeclarationError
        It is of a class that headwise does not know, such as a task of your own.

    Examples
    --------
    >>> hw.to_json(hw.ZeroAblate(hw.Head(0, 3)))
    '{"type": "ZeroAblate", "site": {"type": "Site", "component": "z", "layer": 0, "head": 3, "positions": null}}'
    """
    return codec.to_json(value, TASKS)


def from_json(text: str) -> Any:
    """The declaration that `to_json` wrote.

    Parameters
    ----------
    text : str
        JSON, such as the attribute ``task`` or ``interventions`` of a result.

    Returns
    -------
    Site, Intervention, Grid, task, or a tuple or dict of these
        Equal to what was written; a list comes back as a tuple.

    Raises
    ------
    DeclarationError, UnknownNameError
        The text is no JSON, or holds something else.

    Examples
    --------
    >>> hw.from_json(hw.to_json(hw.RepeatedTokens(n=4, length=8)))
    RepeatedTokens(n=4, length=8, seed=0, bos=False, tokens=None, score='repeat')
    """
    return codec.from_json(text, TASKS)


def metric_names() -> dict[str, tuple[str, Metric]]:
    """Name in results of each metric that ships with headwise, to its name in `headwise.metrics` and itself."""
    from ... import metrics

    named = ((name, getattr(metrics, name)) for name in metrics.__all__)
    return {value.name: (name, value) for name, value in named if isinstance(value, metrics.Metric)}


def known_metric(name: str) -> tuple[str, Metric] | None:
    """How the metric is written in code, after ``hw.metrics.``, that is called so in results; None for no such one."""
    if match := IN_CONTEXT.fullmatch(name):
        from ...metrics.outputs import in_context

        early, late = int(match[1]), int(match[2])
        return (f"in_context({early}, {late})", in_context(early, late)) if 2 <= early < late else None
    return metric_names().get(name)


def written_name(metric: Metric) -> str:
    """The name of a metric, as JSON holds it.

    Raises
    ------
    DeclarationError
        A metric that ships with headwise has this name and is another one, which would be taken for it.
    """
    known = known_metric(metric.name)
    if known and known[1] is not metric and data_hash(known[1]) != data_hash(metric):
        raise DeclarationError(
            f"a metric of your own is called {metric.name!r}, like hw.metrics.{known[0]}: JSON holds its name only, so "
            "give it another one, as in dataclasses.replace(metric, card=dataclasses.replace(metric.card, name='mine'))"
        )
    return metric.name


def bounds_of(values: xr.DataArray) -> tuple[float, float]:
    """Smallest and largest value that a metric that ships can have; infinite where `values` are of no such metric."""
    found = known_metric(str(values.attrs.get("metric", "")))
    low, high = found[1].card.bounds if found else (-math.inf, math.inf)
    within = ((values >= low) & (values <= high)) | values.isnull()
    return (low, high) if bool(within.all()) else (-math.inf, math.inf)  # else it is a change, or one of your own


def metric_of(name: str) -> Metric:
    """The metric of a name: the one it has in results, or in `headwise.metrics`.

    Raises
    ------
    UnknownNameError
        No metric that ships with headwise is called so; the text lists those that are.
    """
    if IN_CONTEXT.fullmatch(name) and (found := known_metric(name)):
        return found[1]
    known = dict(metric_names().values())
    for attribute, metric in known.items():
        if name in (attribute, metric.name):
            return metric
    raise UnknownNameError(f"there is no metric {name!r}: possible are {choices(known)}")
