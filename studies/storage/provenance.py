"""What produced a result (model, versions, place, time) and what its variables are, as attributes of a file."""

from __future__ import annotations

import json
import platform
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ...interventions.base.hashing import data_hash, short_hash
from ...version import version

if TYPE_CHECKING:
    from ...interventions.models.identity import Identity
    from ...interventions.models.model import Model
    from ...metrics.card import Card, Metric

SCHEMA = "1"
NUMBERS = "3"
"""Changes when headwise computes any number otherwise than before, so that old parts are not mixed with new ones."""
LIBRARIES = ("torch", "transformers", "nnsight", "numpy", "xarray")


def provenance(model: Model, identity: Identity) -> dict[str, Any]:
    """What produced a result: model, versions, place and time, as NetCDF attributes want it.

    Parameters
    ----------
    model : Model
    identity : Identity
        Of the model when the call began, see `headwise.interventions.begin`.
    """
    return {
        "Conventions": "headwise",
        "schema_version": SCHEMA,
        "model": model.name,
        "model_revision": model.revision,
        **({} if model.step is None else {"step": model.step}),
        "model_shape": json.dumps({name: one for name, one in vars(model.shape).items() if name != "neurons"}),
        **identity.attrs(),
        "device": model.place,
        "executed": model.executed,
        "host": socket.gethostname(),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def exact_facts(model: Model, identity: Identity) -> dict[str, Any]:
    """What the numbers of a model depend on, beside the prompts, as far as it can be hashed into names."""
    table = data_hash(model.family)  # which says how headwise reads the model
    return {"numbers": NUMBERS, "table": table, **identity.exact, "device": model.place, "versions": versions()}


def inputs_of(
    model: Model, identity: Identity, *asked: str, tasks: Sequence[Any] = (), metrics: Sequence[Metric] = ()
) -> str:
    """A hash of all that a result depends on, by which a file knows whether it holds what is asked for.

    Names do not tell tasks and metrics of one's own apart, so what they give and do is in it.

    Parameters
    ----------
    model : Model
    identity : Identity
        Of the model when the call began.
    *asked : str
        What was asked for, as text.
    tasks : sequence of Task
        The prompts that they draw, and their reference prompts, count.
    metrics : sequence of Metric

    Returns
    -------
    str
    """
    drawn = [(task.draw(model), task.reference(model) if hasattr(task, "reference") else None) for task in tasks]
    return short_hash(*asked, data_hash(drawn), data_hash(list(metrics)), json.dumps(exact_facts(model, identity)))


@cache
def versions() -> str:
    """Versions of headwise and of the libraries that numbers depend on, as JSON."""
    return json.dumps({"headwise": version()} | {name: metadata.version(name) for name in LIBRARIES})


def card_attrs(card: Card, *, long_name: str | None = None) -> dict[str, str]:
    """NetCDF attributes of a variable that a metric fills."""
    attrs = {"long_name": long_name or card.long_name, "units": card.units, "metric": card.name}
    return attrs | ({"references": card.reference} if card.reference else {})


def as_attrs(values: Mapping[str, object]) -> dict[str, str | int | float]:
    """Attributes that NetCDF takes: numbers and text; the rest as JSON text."""
    return {
        key: value if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)
        for key, value in values.items()
    }
