"""capture: activations, attention patterns and logits of a task's prompts, under any intervention, labelled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, UnknownNameError, choices
from ...interventions.base.hashing import short_hash
from ...interventions.base.memory import shortage
from ...interventions.base.shape import Group
from ...interventions.declare.codec import encode
from ...interventions.declare.sites import Head, Logits, Neuron, Site, as_read
from ...interventions.plan.plan import Plan, make_plan
from ...interventions.plan.reads import Read, dims_of, name_of
from ..output.progress import Progress
from ..storage import unfinished
from ..storage.files import array_on_disk
from ..storage.provenance import provenance
from ..storage.registry import TASKS
from ..tasks.batch import Batch
from ..tasks.prompts import rendered, token_id
from ..tasks.tasks import Task
from . import context
from .context import check_remote
from .labels import check_axes, check_is_model, coordinates, number_dims, task_json, with_axes
from .request import Axes, What, conditions, inputs_of, warn_of_nothing

if TYPE_CHECKING:
    from ...interventions.begin import Call
    from ...interventions.models.model import Model
    from ...interventions.run.outcome import Inputs
    from ..storage.unfinished import UnfinishedResult

Array = np.ndarray[Any, Any]
Sites = Site | Head | Neuron | Logits | str | Sequence[Site | Head | Neuron | Logits | str]
SHARE = 3 / 4
"""Of the free memory, which a result may take."""


def capture(
    model: Model,
    task: Task,
    sites: Sites,
    *,
    what: What = None,
    run: str = "clean",
    batch_size: int | str = "auto",
    remote: bool | None = None,
    check: bool = True,
    progress: Callable[[int, int], None] | bool | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
) -> xr.Dataset:
    """Read activations, attention patterns and logits, as they are or under interventions.

    Conditions share forward passes, each starts at the layer that it changes, and nothing is computed after the last
    layer that is read. What is read of a place that is written is its value after the write. ``hw.plan(model, task,
    what, capture=sites)`` says beforehand what it costs and how large it is.

    Parameters
    ----------
    model : Model
        From `headwise.load`.
    task : Task
    sites : Site, Logits, str, or sequence of these
        Such as ``Head(1, 2).pattern`` or ``Layer(0).resid_post``, or as text ``"L1H2.pattern"``; a bare head stands for
        its ``z``, a bare neuron for its ``mlp_post``; ``Logits([" apple"]).at(-1)``, or ``"logits"``.
    what : Intervention, mapping of names to interventions, sequence of interventions, Grid, or None
        As for `measure`; None, also as one condition of a mapping, changes nothing.
    run : str
        The run of the task that is read, and that interventions change.
    batch_size : int or "auto"
        As for `measure`; of use with interventions.
    remote : bool, optional
        As for `measure`; of a server, the values of these sites come back and nothing else.
    check : bool
        Before the first measurement or capture on a model, check that the table of its family fits it.
    progress : callable or bool, optional
        As for `measure`.
    out : path, optional
        NetCDF file to write, for what memory does not hold: values go to the disk as they come. As for `measure`,
        finished passes are kept beside it until it is whole. The result is then read from the file where it is used.
    resume : bool
        False takes nothing from what is there.

    Returns
    -------
    Dataset
        One variable for each site, named like ``L1H2_pattern``: the dims of `what` (none, ``condition``, or the axes
        of the grid), then ``example``, then ``query key`` for patterns,
        ``position`` and ``d_head``, ``neuron`` or ``d_model`` for the rest (``position`` alone of one neuron), with
        ``head`` before them where the site names a whole layer (``kv_head`` where heads share the keys and values in
        question; ``read_head`` where ``head`` is an axis of the grid). NaN beyond the end of shorter prompts.
        The positions of a site that names some are a dim of its own, by number or label, and so are the tokens of
        logits, by their text.

    Raises
    ------
    ModelError
        A self-check failed.
    DeclarationError
        A site or an intervention that the model or the prompts do not have, or more than memory holds.
    UnknownNameError
        The task has no such run.
    ResultError
        `out` cannot be written, or another process is writing it; what was finished is kept.
    ServerError
        The server of a remote model cannot be reached, or refuses.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> ds = hw.capture(model, task, ["L1H2.pattern", hw.Layer(0).resid_post])
    >>> ds["L1H2_pattern"].dims, ds["L0_resid_post"].dims
    (('example', 'query', 'key'), ('example', 'position', 'd_model'))

    What a head attends to without another one:

    >>> what = {"clean": None, "without L0H3": hw.ZeroAblate(hw.Head(0, 3))}
    >>> ds = hw.capture(model, task, "L1H2.pattern", what=what)
    >>> ds["L1H2_pattern"].dims
    ('condition', 'example', 'query', 'key')
    """
    from ...interventions.begin import begin

    shown = progress is None or progress is True
    with context.using(quiet=context.current().quiet or not shown) as execution:
        asked = request_of(model, task, sites, what, run, batch_size)
        check_remote(model, remote)
        if out is None:
            asked.check_room()
            with begin(model, check=False, quiet=execution.quiet) as call:
                asked.check_model(call, check)
                return asked.read(call, progress)
        with (
            unfinished.keeping(out, resume) as kept,
            begin(model, check=False, anew=True, ledger=kept, quiet=execution.quiet) as call,
        ):
            return asked.kept_in(kept, call, check, progress)


@dataclass(frozen=True, eq=False)
class CaptureRequest:
    """What `capture` was asked for, checked and planned.

    Attributes
    ----------
    model : Model
    task : Task
    sites : list of Site or Logits
        As they were declared; ``plan.reads`` are the same, with token ids for text.
    what : as for `capture`
    run : str
    axes : list of (name, labels)
    declared : str
        The task as JSON.
    batch : Batch
    plan : Plan
    """

    model: Model
    task: Task
    sites: list[Read]
    what: What
    run: str
    axes: Axes
    declared: str
    batch: Batch
    plan: Plan

    @property
    def names(self) -> list[str]:
        """The names of the variables."""
        return [str(site).replace(" ", "_").replace(",", "").replace("-", "m") for site in self.sites]

    @property
    def attrs(self) -> dict[str, str]:
        """What was asked for, as NetCDF attributes."""
        changed = {} if self.what is None else {"interventions": json.dumps(encode(self.what, TASKS))}
        sites = json.dumps(encode(tuple(self.sites), TASKS))
        return {"run": self.run, "task": self.declared, "sites": sites} | changed

    @property
    def planned(self) -> bool:
        """Whether planned passes read it, and not the model's own pass alone."""
        return self.what is not None or any(isinstance(site, Logits) for site in self.sites)

    def check_room(self) -> None:
        """Refuse a result that the free memory does not hold."""
        sizes = [int(np.prod(size)) * (8 if self.model.dtype == "float64" else 4) for size in self.plan.sizes()]
        if short := shortage(sum(sizes) + max(sizes), SHARE):
            largest = self.names[int(np.argmax(sizes))]
            raise DeclarationError(
                f"what is captured {short} (most of it {largest}): write it to a file with out='NAME.nc', or name "
                "fewer sites, positions (such as Layer(0).resid_post.at(-1)), tokens of logits, prompts or conditions"
            )

    def check_model(self, call: Call, check: bool) -> None:
        """Run the self-check where it is wanted, unless this very model has passed it."""
        from ...interventions.selfcheck import check_planned

        if check:
            check_planned(self.model, call.identity, self.plan)

    def inputs(self) -> Inputs:
        """The prompts as the engine sees them."""
        return inputs_of(self.task, self.model, self.batch, self.plan)

    def read(self, call: Call, progress: Any) -> xr.Dataset:
        """The result, in memory."""
        if self.planned:
            return self._labelled(call, self._by_passes(progress, None, np.zeros), _filled)
        seen = [_as_read(site, self.plan.groups) for site in self.sites if isinstance(site, Site)]
        tokens = [self.batch.tokens(self.run, group) for group in self.plan.groups]
        captured = self.model.backend.capture(seen, tokens)
        found: list[list[Array]] = [[] for _ in seen]
        for group, values in zip(self.plan.groups, captured, strict=True):
            for at, (site, own, value) in enumerate(zip(self.sites, seen, values, strict=True)):
                if own != site:
                    dims = ("example", *dims_of(site, self.model.shape))
                    axis = dims.index("query" if "query" in dims else "position")
                    value = value.take(group.count_out(site.positions or ()), axis=axis)
                found[at].append(value[None])
        return self._labelled(call, iter(found), _filled)

    def kept_in(self, kept: UnfinishedResult, call: Call, check: bool, progress: Any) -> xr.Dataset:
        """The result as a file; made pass by pass, and none again that was finished before.

        Parameters
        ----------
        kept : UnfinishedResult
        call : Call
        check : bool
            Whether the self-check runs first.
        progress : callable or bool, optional

        Returns
        -------
        Dataset
            Whose values are read where they are used.
        """
        from ..storage.pass_store import PassStore
        from ..storage.reading import as_tree, open_result

        plan = self.plan if self.plan.conditions else self._plan_as_it_is()
        asked = replace(self, plan=plan)
        kept.describe(provenance(self.model, call.identity) | self.attrs, call.identity)
        store = PassStore(kept, self.model, call.identity, plan, (), asked.inputs())
        inputs = short_hash(store.inputs, json.dumps(self.attrs))
        if not kept.is_whole(inputs, call.identity):
            self.check_model(call, check)
            blank = partial(array_on_disk, kept.folder)
            found = asked._by_passes(progress, store, blank)
            kept.finish(asked._labelled(call, found, partial(_filled, blank=blank)).assign_attrs(inputs=inputs))
        return as_tree(open_result(kept.target)).to_dataset()

    def _plan_as_it_is(self) -> Plan:
        """The plan of one condition that changes nothing."""
        return _planned(self.model, self.batch, [()], self.plan.reads, self.run, "auto")

    def _by_passes(self, progress: Any, store: Any, blank: Any) -> Iterator[list[Array]]:
        """Run the passes; for each site its values by group, ``(condition, example, ...)``, which are then let go."""
        plan = self.plan if self.plan.conditions else self._plan_as_it_is()
        execution, where = context.current(), None if store is None else store.parts.folder
        with Progress(execution.label, progress, kept=where, total=plan.steps, stage=execution.stage) as bar:
            outcome = self.model.backend.run_plan(plan, (), self.inputs(), bar.update, store, say=bar.say, blank=blank)
        for number in range(len(plan.reads)):
            yield [outcome.values.pop((name_of(number), group)) for group in range(len(plan.groups))]

    def _labelled(self, call: Call, found: Iterator[list[Array]], filled: Callable[..., Array]) -> xr.Dataset:
        """The dataset of the values of each site by group, ``(condition, example, ...)``."""
        batch, shape, axes = self.batch, self.model.shape, self.axes
        axis_names = [name for name, _ in axes]
        dataset = xr.Dataset(coords=with_axes(coordinates(self.model, batch, self.run, [self.run]), axes))
        sizes = {label: max(map(len, places)) for label, places in batch.labels.items()}
        for name, site, read, by_group in zip(self.names, self.sites, self.plan.reads, found, strict=True):
            dims = dims_of(site, shape)
            if site.positions is not None and site.labels:
                by_group = [
                    _at_places(site, value, group, 2 + dims.index("query" if "query" in dims else "position"), sizes)
                    for value, group in zip(by_group, self.plan.groups, strict=True)
                ]
            whole = filled(by_group, self.plan.groups, len(batch.lengths))
            whole = whole.reshape(*(len(values) for _, values in axes), *whole.shape[1:])
            dims = tuple("read_head" if dim.endswith("head") and dim != "d_head" and dim in axis_names else dim
                         for dim in dims)  # fmt: skip
            units = "logit" if isinstance(site, Logits) else "1"
            array = xr.DataArray(
                whole,
                dims=(*axis_names, "example", *dims),
                attrs={"long_name": str(site), "units": units, "site": repr(site)},
            )
            if site.positions is not None:  # a dimension of its own, since it holds some positions only
                own = f"{name}_{'query' if 'query' in dims else 'position'}"
                array = array.rename({own.rsplit("_", 1)[1]: own}).assign_coords({own: _names(site, sizes)})
            if isinstance(read, Logits):
                ids = np.arange(shape.vocabulary) if read.tokens is None else np.asarray(read.tokens)
                words = [text.replace("\0", "␀") for text in self.model.token_text(ids.tolist())]
                own = f"{name}_token"
                array = array.rename(token=own).assign_coords({own: np.asarray(words, dtype=object)})
                array = array.assign_coords({f"{own}_id": (own, ids)})
            dataset[name] = array
        dataset = number_dims(dataset)
        dataset.attrs = provenance(self.model, call.identity) | self.attrs
        return dataset


def request_of(model: Model, task: Task, sites: Sites, what: What, run: str, batch_size: int | str) -> CaptureRequest:
    """Check what a capture asks for, and plan its passes.

    Parameters
    ----------
    model, task, sites, what, run, batch_size
        As for `capture`.

    Returns
    -------
    CaptureRequest

    Raises
    ------
    DeclarationError, UnknownNameError
        Something that was asked for does not exist or cannot be; the text says what is possible.
    """
    check_is_model(model)
    given: Any = [sites] if isinstance(sites, str) or not isinstance(sites, Iterable) else sites
    wanted = list(dict.fromkeys(as_read(site) for site in given))
    if not wanted:
        raise DeclarationError("nothing to capture: name at least one site, such as Head(1, 2).pattern")
    axes, interventions = conditions(what, model)
    warn_of_nothing(interventions, run)
    task = rendered(task, model)
    declared = task_json(task)
    batch = task.draw(model)
    if run not in batch.runs:
        raise UnknownNameError(f"run={run!r}: the task has the runs {choices(batch.runs)}")
    reads = [with_ids(site, model) if isinstance(site, Logits) else site for site in wanted]
    plan = _planned(model, batch, [one.edits() for one in interventions], reads, run, batch_size)
    asked = CaptureRequest(model, task, wanted, what, run, axes, declared, batch, plan)
    _check_names(asked)
    return asked


def _planned(
    model: Model, batch: Batch, edits: Sequence[Any], reads: Sequence[Read], run: str, batch_size: int | str
) -> Plan:
    """The passes that read sites in every condition."""
    return make_plan(
        edits,
        model=model.name,
        shape=model.shape,
        groups=batch.groups(),
        runs=list(batch.runs),
        base=run,
        measured=[],
        batch_size=batch_size,
        columns=0,
        budget=model.backend.budget,
        overhead=model.backend.overhead,
        reads=reads,
    )


def with_ids(logits: Logits, model: Model) -> Logits:
    """Logits of tokens by their ids."""
    if logits.tokens is None:
        return logits
    ids = [token_id(model, token) for token in logits.tokens]
    if len(set(ids)) < len(ids):
        raise DeclarationError(f"{logits!r}: tokens must differ, got the ids {ids}")
    return replace(logits, tokens=tuple(ids))


def _check_names(asked: CaptureRequest) -> None:
    """Refuse axes that have the name of a variable or of a dim of the result, and variables of one name."""
    names = asked.names
    if len(set(names)) < len(names):
        raise DeclarationError(
            f"{choices(sorted({one for one in names if names.count(one) > 1}))} is named twice: two sites would have "
            "this name in the result; tokens of logits at the same positions go into one, Logits([...]).at(...)"
        )
    dims = {dim for site in asked.sites for dim in dims_of(site, asked.model.shape)} | {"position", "token"}
    check_axes(asked.axes, {*names, *dims} - {"head", "kv_head"})


def _filled(
    by_group: list[Array], groups: Sequence[Group], examples: int, blank: Callable[..., Array] = np.empty
) -> Array:
    """Values by group, ``(condition, example of the group, ...)``, as one; NaN beyond the end of shorter prompts.

    Parameters
    ----------
    by_group : list of array
        Is emptied.
    groups : sequence of Group
    examples : int
        Of all groups.
    blank : callable
        Makes the array, of a shape and a dtype.

    Returns
    -------
    array (condition, example, ...)
    """
    if len(by_group) == 1:
        return by_group[0]
    first = by_group[0]
    size = [max(value.shape[axis] for value in by_group) for axis in range(2, first.ndim)]
    whole = blank((len(first), examples, *size), first.dtype)
    whole[...] = np.nan
    for group in groups:
        value = by_group.pop(0)
        for row, example in enumerate(group.examples):
            inside = tuple(slice(width) for width in value.shape[2:])
            whole[:, example][(slice(None), *inside)] = value[:, row]
    return whole


def _as_read(site: Site, groups: Sequence[Group]) -> Site:
    """The site as it is read: the whole of it, where its positions are not the same numbers in each prompt."""
    same = not site.labels and all(group.prompt == group.length for group in groups)
    return site if site.positions is None or same else replace(site, positions=None)


def _at_places(site: Read, value: Array, group: Group, axis: int, sizes: Mapping[str, int]) -> Array:
    """Values at the positions that were named, filled with NaN where a label has more of them in another prompt.

    Parameters
    ----------
    site : Site or Logits
    value : array
    group : Group
    axis : int
        That of the positions.
    sizes : mapping of str to int
        The most positions of each label.

    Returns
    -------
    array
    """
    parts, start = [], 0
    for place in site.positions or ():
        count = len(group.count_out([place]))
        part = np.moveaxis(value.take(range(start, start + count), axis=axis), axis, 0)
        missing = sizes.get(str(place), count) - count
        parts.append(np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1), constant_values=np.nan))
        start += count
    return np.moveaxis(np.concatenate(parts), 0, axis)


def _names(site: Read, sizes: Mapping[str, int]) -> list[int] | list[str]:
    """The positions of a site as coordinates: numbers, or text where there are labels (``S2``; ``S2 0``, ``S2 1``)."""
    if not site.labels:
        return [place for place in site.positions or () if not isinstance(place, str)]
    names: list[str] = []
    for place in map(str, site.positions or ()):
        names += [f"{place} {at}" for at in range(sizes[place])] if sizes.get(place, 1) > 1 else [place]
    return names
