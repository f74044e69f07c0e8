"""Plans of usual sweeps, by name or from a file: the body of ``headwise plan``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError, ResultError, UnknownNameError, choices
from ...interventions.declare.codec import from_json
from ...interventions.declare.edits import Patch, ZeroAblate
from ...interventions.declare.grid import Grid
from ...interventions.declare.sites import Head, Layer
from ...interventions.plan.plan import Plan
from ..measuring.measure import plan as plan_of
from ..tasks.tasks import RepeatedTokens

if TYPE_CHECKING:
    from ...interventions.models.model import Model

SWEEPS = ("heads", "qkv", "resid")


def sweep(
    model: Model, what: str, metrics: Sequence[str], *, n: int = 32, length: int = 25, batch_size: int | str = "auto"
) -> Plan:
    """The plan of a sweep on repeated tokens.

    Parameters
    ----------
    model : Model
    what : str
        ``heads``, ``qkv``, ``resid``, or the path of a JSON file, as `to_json` of `headwise.interventions` writes it.
    metrics : sequence of str
    n, length
        Of `RepeatedTokens`.
    batch_size : int or "auto"
    """
    task = RepeatedTokens(n=n, length=length)
    return plan_of(model, task, _grid(model, what, 2 * length), _metrics(metrics), batch_size=batch_size)


def figures(plan: Plan) -> str:
    """The cost of a plan as JSON."""
    found = plan.cost()
    more = {"total": found.total, "share": found.share, "passes_run": plan.passes, "conditions": len(plan.conditions)}
    return json.dumps(asdict(found) | more, indent=2)


def _grid(model: Model, what: str, positions: int) -> Any:
    layers, heads = model.layers, model.heads
    if what == "heads":
        return Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=layers, head=heads)
    if what == "qkv":
        return Grid(
            lambda component, layer, head: Patch(model.read_by(Head(layer, head), component)),
            component=["q", "k", "v"],
            layer=layers,
            head=heads,
        )
    if what == "resid":
        return Grid(
            lambda layer, position: Patch(Layer(layer).resid_pre.at(position)), layer=layers, position=range(positions)
        )
    path = Path(what).expanduser()
    if not path.is_file():
        raise DeclarationError(f"--what {what}: possible are {choices(SWEEPS)}, and a JSON file with interventions")
    try:
        return from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"cannot read {path}: {error}") from error


def _metrics(names: Sequence[str]) -> list[Any]:
    from ... import metrics

    known = {name: getattr(metrics, name) for name in metrics.__all__}
    known = {name: value for name, value in known.items() if isinstance(value, metrics.Metric)}
    for name in names:
        if name not in known:
            raise UnknownNameError(f"--metric {name}: possible are {choices(known)}")
    return [known[name] for name in names]
