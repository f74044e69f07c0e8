"""What scores of edges are asked for: `EdgeRequest`, checked and ready to be run by an estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xarray as xr

from ...interventions.declare.changes import MEAN
from ...interventions.declare.edges import EdgePatches
from ...metrics.card import Metric
from ..measuring.effects import effect
from ..measuring.measure import measure

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ..tasks.tasks import Task


@dataclass(frozen=True, eq=False)
class EdgeRequest:
    """What scores of edges are asked for: checked, and ready to be run by an estimator.

    Attributes
    ----------
    model : Model
    task : Task
    metric : Metric
        Of logits.
    what : EdgePatches
        The edges, and the run, or the means, that they carry.
    base : str
    steps : int, optional
        Of an estimator that takes steps.
    then_exact : int
        How many of the edges with the largest estimates are scored exactly afterwards.
    sample, seed : int
        How many of the others too, and how they are drawn.
    check : bool
    options : dict
        What `measure` takes besides: ``batch_size``, ``remote``, ``progress``, ``executor``.
    """

    model: Model
    task: Task
    metric: Metric
    what: EdgePatches
    base: str
    steps: int | None
    then_exact: int
    sample: int
    seed: int
    check: bool
    options: dict[str, Any]

    def exactly(self, what: EdgePatches | None = None) -> xr.Dataset:
        """Exact scores ``score (edge, example)`` of these edges, or of others, with ``baseline_<metric>``."""
        some, name = self.what if what is None else what, self.metric.name
        ds = measure(self.model, self.task, some, self.metric, base=self.base, check=self.check, **self.options)
        return ds.drop_vars(name).assign(score=self.as_score(effect(ds, name)))

    def as_score(self, values: xr.DataArray) -> xr.DataArray:
        """Scores ``(edge, example)`` with the attributes that say what they are."""
        card, source = self.metric.card, self.what.source
        carried = "means over the reference draw" if source == MEAN else f"the {source} run"
        comma = "," if "," in card.long_name else ""
        attrs = {
            "long_name": f"change of {card.long_name}{comma} by one edge that carries {carried}",
            "units": card.units,
            "metric": card.name,
            "source": source,
            **({"better": card.better} if card.better else {}),
        }
        return values.transpose("edge", "example").assign_attrs(attrs).rename("score")
