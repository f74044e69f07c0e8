"""A measurement as a value: `Sweep` says what `measure` is given, and can be stored, compared and run again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xarray as xr

from ...errors import DeclarationError
from ...interventions.declare.codec import decode, encode, read_json
from ...metrics.card import Metric
from ...metrics.outputs import loss
from ..storage.registry import TASKS, metric_of, written_name
from ..tasks.tasks import Task
from .measure import measure, plan
from .request import What, check_estimable, check_what, chosen_metrics

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...interventions.plan.plan import Plan


@dataclass(frozen=True)
class Sweep:
    """A measurement as a frozen value: ``Sweep(...).run(model)`` is ``measure(model, ...)``.

    Parameters
    ----------
    task : Task
    what : Intervention, mapping of names to interventions, Grid, EdgePatches, or None
        None measures the model without intervention.
    metrics : Metric, str, or sequence of these
    base : str
        The run that is intervened on.
    runs : "all", str or sequence of str, optional
        Runs that are measured as they are, see `headwise.measure`.
    per_position : bool
        Keep the values at each scored position.
    estimator : {"exact", "gradient", "integrated"}
    steps : int
        Of the integrated estimate.

    Raises
    ------
    DeclarationError, UnknownNameError
        A value is not possible. What a model cannot have is refused when it runs.

    Examples
    --------
    >>> sweep = hw.Sweep(hw.RepeatedTokens(n=4, length=8), hw.ZeroAblate(hw.Head(0, 3)), hw.metrics.loss)
    >>> hw.effect(sweep.run(hw.load("words-2l")), "loss").dims
    ('example',)
    >>> hw.Sweep.from_json(sweep.to_json()) == sweep
    True
    """

    task: Task
    what: What = None
    metrics: Metric | str | Sequence[Metric | str] = (loss,)
    base: str = "clean"
    runs: str | tuple[str, ...] | None = None
    per_position: bool = False
    estimator: str = "exact"
    steps: int = 8

    def __post_init__(self) -> None:
        chosen = chosen_metrics(self.metrics)
        object.__setattr__(self, "metrics", tuple(chosen))
        if isinstance(self.runs, list):
            object.__setattr__(self, "runs", tuple(self.runs))
        check_what(self.what)
        check_estimable(chosen, self.estimator, self.steps, self.per_position, self.what)

    def run(
        self,
        model: Model,
        progress: Callable[[int, int], None] | bool | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        resume: bool = True,
        executor: Executor | None = None,
    ) -> xr.Dataset:
        """Measure a model.

        Parameters
        ----------
        model, progress, out, resume, executor
            See `headwise.measure`.

        Returns
        -------
        Dataset
            As `headwise.measure` gives it.
        """
        return measure(
            model,
            self.task,
            self.what,
            self.metrics,
            base=self.base,
            runs=self.runs,
            per_position=self.per_position,
            estimator=self.estimator,
            steps=self.steps,
            progress=progress,
            out=out,
            resume=resume,
            executor=executor,
        )

    def plan(self, model: Model, *, timed: bool = True) -> Plan:
        """What `run` would do on a model, without doing it: see `headwise.plan`."""
        return plan(model, self.task, self.what, self.metrics, base=self.base, runs=self.runs, timed=timed)

    def to_json(self) -> str:
        """The sweep as JSON text; metrics by their names.

        Raises
        ------
        DeclarationError
            A task or a metric of your own cannot be written.
        """
        data = {name: encode(value, TASKS) for name, value in vars(self).items() if name != "metrics"}
        return json.dumps({"type": "Sweep", **data, "metrics": list(map(written_name, chosen_metrics(self.metrics)))})

    @classmethod
    def from_json(cls, text: str) -> Sweep:
        """The sweep that `to_json` wrote.

        Raises
        ------
        DeclarationError, UnknownNameError
            The text holds something else, or a metric that does not ship with headwise.
        """
        data: Any = read_json(text)
        if not isinstance(data, dict) or data.pop("type", None) != "Sweep":
            raise DeclarationError("this JSON does not hold a Sweep")
        metrics = [metric_of(str(name)) for name in data.pop("metrics", [])]
        try:
            return cls(**{name: decode(value, TASKS) for name, value in data.items()}, metrics=metrics)
        except TypeError as error:
            raise DeclarationError(f"JSON of a Sweep has missing or unknown fields: {error}") from None
