"""Passes of a plan as parts on disk: what each depends on, hashed, so that it is found again only by the same work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...interventions.base.hashing import array_bytes, code_hash, short_hash
from ...interventions.declare.codec import encode, read_json
from ...interventions.plan.plan import Plan
from ...interventions.plan.reads import sizes_in
from ...interventions.run.outcome import FinishedValues, Inputs
from .provenance import exact_facts
from .registry import TASKS
from .unfinished import UnfinishedResult

if TYPE_CHECKING:
    from ...interventions.models.identity import Identity
    from ...interventions.models.model import Model
    from ...interventions.run.cache import CompiledMetric


class PassStore:
    """Keeps the finished passes of one measurement.

    Parameters
    ----------
    parts : UnfinishedResult
    model : Model
    identity : Identity
        Of the model when the call began.
    plan : Plan
    readers : sequence of CompiledMetric
    inputs : Inputs
    whole : bool
        Whether values are kept for each scored position, or their mean.

    Attributes
    ----------
    groups : list of str
        For each group of prompts, the hash of everything its numbers depend on but the interventions.
    conditions : list of str
        For each condition, the hash of its edits.
    """

    def __init__(
        self,
        parts: UnfinishedResult,
        model: Model,
        identity: Identity,
        plan: Plan,
        readers: Sequence[CompiledMetric],
        inputs: Inputs,
        whole: bool = True,
    ) -> None:
        self.parts, self.identity, self.plan = parts, identity, plan
        patterns = (plan.shape.layers, plan.shape.heads)
        self.trails: list[dict[str, tuple[int, ...]]] = [
            {
                reader.name: patterns if reader.kind == "pattern" else (len(group.scored) if whole else 1,)
                for reader in readers
            }
            for group in plan.groups
        ]
        self.read = [sizes_in(plan.reads, plan.shape, group) for group in plan.groups]
        common = json.dumps([exact_facts(model, identity), plan.base] + ([] if whole else ["mean over positions"]))
        read = [json.dumps(encode(list(plan.reads), TASKS))] if plan.reads else []
        self.groups = [
            short_hash(common, *prompts(plan, inputs, at), *(_reader(reader, at) for reader in readers), *read)
            for at in range(len(plan.groups))
        ]
        self.conditions = [short_hash(json.dumps(encode(list(edits), TASKS))) for edits in plan.conditions]

    @property
    def inputs(self) -> str:
        """The hash of everything that the measurement depends on."""
        return short_hash(*self.groups, *self.conditions)

    def found(self) -> Iterator[FinishedValues]:
        """What was kept of the same work."""
        places: dict[str, list[int]] = {}
        for number, name in enumerate(self.conditions):
            places.setdefault(name, []).append(number)
        for group, start in enumerate(self.groups):
            for key in self.parts.keys(start):
                part = self.parts.load(key, self.identity, partial(self._check, key, group))
                if part is not None:
                    yield from _finished_values(part, group, places)

    def keep(self, finished: FinishedValues) -> None:
        """Keep finished values."""
        names = [self.conditions[number] for number in finished.conditions]
        once = [
            at for at, name in enumerate(names) if name not in names[:at]
        ]  # conditions that are equal are kept once
        names, kept = [names[at] for at in once], finished.values
        if len(once) < len(finished.conditions):
            kept = {name: value[once] for name, value in finished.values.items()}
        what = {"examples": list(finished.examples), "run": finished.run or "", "conditions": json.dumps(names)}
        key = self._key(finished.group, what)
        if not self.parts.keys(key):
            values = {name: (_dims(name, finished.run, value.ndim), value) for name, value in kept.items()}
            self.parts.save(key, xr.Dataset(values, attrs=what), self.identity)

    def _key(self, group: int, what: dict[str, Any]) -> str:
        """The name of what is kept."""
        return f"{self.groups[group]}-{short_hash(json.dumps(what))}"

    def _check(self, key: str, group: int, part: xr.Dataset) -> None:
        """Refuse a part that is not what some pass of this plan gives; its values were not read yet.

        Its name says that it is, and the hash in it that nothing was damaged; but names and hashes can be forged.
        """
        start, stop = (int(end) for end in np.atleast_1d(part.attrs["examples"]))
        run, names = str(part.attrs["run"]), read_json(part.attrs["conditions"])
        what = {"examples": [start, stop], "run": run, "conditions": str(part.attrs["conditions"])}
        if key != self._key(group, what):
            raise ValueError("it holds other work than its name says")
        if not 0 <= start < stop <= len(self.plan.groups[group].examples):
            raise ValueError(f"it holds the examples {start} to {stop}, which are not there")
        if not isinstance(names, list) or len({*map(str, names)}) < len(names) or bool(names) == bool(run):
            raise ValueError("it does not say which conditions it holds")
        if run and run not in self.plan.runs:
            raise ValueError(f"it holds the run {run}, which is not there")
        lead = (stop - start,) if run else (len(names), stop - start)
        trails = self.trails[group] | ({} if run else self.read[group])
        wanted = {name: (*lead, *trail) for name, trail in trails.items()}
        found = {str(name): one.shape for name, one in part.variables.items()}
        if found != wanted or any(one.dims != _dims(name, run, one.ndim) for name, one in part.data_vars.items()):
            raise ValueError(f"it holds {found}, where {wanted} is asked for")
        if any(one.dtype not in (np.float32, np.float64) for one in part.variables.values()):
            raise ValueError("it holds other values than numbers")


def _dims(name: object, run: str | None, count: int) -> tuple[str, ...]:
    """The dims of a variable in a part."""
    first = ("example",) if run else ("condition", "example")
    return (*first, *(f"{name}_{axis}" for axis in range(count - len(first))))


def _finished_values(part: xr.Dataset, group: int, places: dict[str, list[int]]) -> Iterator[FinishedValues]:
    """What a part that was checked holds of this plan."""
    start, stop = (int(end) for end in part.attrs["examples"])
    values = {str(name): part[name].values for name in part.data_vars}
    if part.attrs["run"]:
        yield FinishedValues(group, (start, stop), values, part.attrs["run"])
        return
    wanted = [
        (row, number) for row, name in enumerate(read_json(part.attrs["conditions"])) for number in places.get(name, ())
    ]
    if wanted:
        rows = [row for row, _ in wanted]
        some = {name: value[rows] for name, value in values.items()}
        yield FinishedValues(group, (start, stop), some, None, tuple(number for _, number in wanted))


def prompts(plan: Plan, inputs: Inputs, group: int) -> Iterator[bytes | str]:
    """Token ids of every run and of the reference draw, what is scored, and where positions are."""
    for run in plan.runs:
        yield run
        yield array_bytes(inputs.runs[run][group])
    yield array_bytes(inputs.reference[group]) if inputs.reference else ""
    yield from map(array_bytes, inputs.whole_reference)
    own = plan.groups[group]
    yield json.dumps(own.scored)
    if own.labels or own.prompt != own.length:
        yield json.dumps([own.prompt, own.labels])


def _reader(reader: CompiledMetric, group: int) -> bytes:
    """What a metric does to the logits or patterns of a group."""
    parts: list[bytes | str] = [
        reader.name,
        reader.kind,
        f"{reader.needs_base} {reader.tokens}",
        code_hash(reader.kernel),
    ]
    for run, given in reader.arguments.items():
        for name, value in given[group].items():
            parts += [run, name, array_bytes(value)]
    return short_hash(*parts).encode()
