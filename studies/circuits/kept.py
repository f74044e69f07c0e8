"""What circuits keep of a behaviour: many of them measured in one call, and the stages of the study of a circuit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import AdviceWarning, ModelError
from ...interventions.declare.changes import MEAN
from ...interventions.declare.circuits import ABS, BETTER, SIGNED, Circuit
from ...interventions.declare.graph import Graph
from ...metrics.card import Metric
from ...metrics.faithfulness import faithfulness
from ...metrics.intervals import interval_attrs, ratio_interval
from ...metrics.statistics import null_p_value
from ..measuring.measure import measure
from ..tasks.tasks import Task
from .at_random import CONNECTED, KINDS, random_circuits
from .curves import circuit_curve, circuit_sizes
from .edge_scores import edge_scores
from .edges import edge_coords, edges_of

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]
SELECTIONS = (SIGNED, ABS)
CLEAN = "clean"
BETWEEN = 29
"""Numbers of edges that are tried between two that are known, and again between two of these, until they are next to
each other."""
WRONG = 1e-3
"""Share of the values by which the empty circuit or the whole one may differ from its run, in single precision."""


@dataclass(frozen=True, eq=False)
class Behaviour:
    """What circuits are judged by.

    Attributes
    ----------
    model : Model
    task : Task
    metric : Metric
    source : str
        What edges outside of a circuit carry.
    known : dict
        Values ``(example)`` of each circuit that was measured.
    """

    model: Model
    task: Task
    metric: Metric
    source: str
    known: dict[Circuit, xr.DataArray] = field(default_factory=dict, repr=False)

    @property
    def graph(self) -> Graph:
        """The edges of the model."""
        return Graph.of(self.model)

    @property
    def heads(self) -> tuple[str, ...]:
        """Its heads among the senders."""
        return tuple(name for name in self.graph.senders if name.startswith("a"))

    def of(self, circuits: Sequence[Circuit]) -> xr.Dataset:
        """Measure circuits: each of them once, and those that were not yet in one call.

        Parameters
        ----------
        circuits : sequence of Circuit

        Returns
        -------
        Dataset
            ``value (circuit, example)``; ``empty`` and ``whole`` ``(example)``, those of the empty circuit and of the
            whole model.

        Raises
        ------
        ModelError
            The whole model as a circuit is not the clean run, or the empty circuit not the run `source`.
        """
        ends = Circuit(source=self.source), Circuit(self.graph.edges, self.source)
        each = [*ends, *(Circuit(one, self.source) for one in circuits)]
        begun = bool(self.known)
        new = [one for one in dict.fromkeys(each) if one not in self.known]
        if new:
            what = {str(at): one for at, one in enumerate(new)}
            ds = measure(self.model, self.task, what, [self.metric], runs="all")
            values = ds[self.metric.name].transpose("condition", "example")
            self.known.update(zip(new, values, strict=True))
            if not begun:
                self._check(self.known[ends[0]], self.known[ends[1]], ds[f"baseline_{self.metric.name}"])
        found, about = np.stack([self.known[one].values for one in each]), self.known[ends[0]].attrs
        attrs = {name: about[name] for name in ("units", "metric", "references") if name in about}
        label = str(about.get("long_name", self.metric.name))
        return xr.Dataset(
            {
                "value": (("circuit", "example"), found[2:], attrs | {"long_name": f"{label} of the circuit"}),
                "empty": ("example", found[0], attrs | {"long_name": f"{label} of the empty circuit"}),
                "whole": ("example", found[1], attrs | {"long_name": f"{label} of the whole model"}),
            }
        )

    def _check(self, empty: xr.DataArray, whole: xr.DataArray, runs: xr.DataArray) -> None:
        """Refuse circuits that do not end where they must."""
        ends = {"whole": (whole, CLEAN)} | ({} if self.source == MEAN else {"empty": (empty, self.source)})
        for name, (found, run) in ends.items():
            values, wanted = found.values, runs.sel(run=run).values
            size = max(float(np.abs(runs.values).max()), 1e-6)
            loose = 1.0 if self.model.dtype == "float32" else 100.0
            if not np.abs(values - wanted).max() <= WRONG * loose * size:
                raise ModelError(
                    f"of {self.model.name}, the {name} circuit has a mean {self.metric.name} of {values.mean():.5g}, "
                    f"the {run} run one of {wanted.mean():.5g}: its edges do not add up to what it reads"
                )

    def gap(self) -> float:
        """Mean of the whole model less that of the empty circuit; refused where there is none."""
        found = self.of([])
        empty, model = found["empty"].values, found["whole"].values
        faithfulness(model, empty, model)
        return float(np.mean(model - empty))

    def on(self, task: Task) -> Behaviour:
        """The same of other prompts."""
        return Behaviour(self.model, task, self.metric, self.source)

    def kept(self, found: xr.Dataset) -> Array:
        """Faithfulness ``(circuit)`` of what `of` gave."""
        return faithfulness(found["value"].values, found["empty"].values, found["whole"].values)

    def between(self, heads: Sequence[str]) -> Circuit:
        """All edges between some heads and all MLPs."""
        mlps = [name for name in self.graph.senders if name.startswith("m")]
        return self.graph.between([*heads, *mlps])


def scored(behaviour: Behaviour, **options: Any) -> xr.Dataset:
    """Scores of all edges, whose attribute ``better`` is the way in which the whole model differs from no edge.

    Parameters
    ----------
    behaviour : Behaviour
    **options
        Of `edge_scores`.

    Returns
    -------
    Dataset
        What `edge_scores` gives; the attribute `reverse` is 1 where the metric is better the other way.

    Warns
    -----
    AdviceWarning
        The metric is better the other way.
    """
    way = BETTER[0] if behaviour.gap() > 0 else BETTER[1]
    found = edge_scores(behaviour.model, behaviour.task, behaviour.metric, source=behaviour.source, **options)
    reverse = found["score"].attrs.get("better") in {*BETTER} - {way}
    if reverse:
        warnings.warn(f"by {behaviour.metric.name}, {worse(way)}", AdviceWarning, stacklevel=2)
    found["score"].attrs["better"] = way
    return found.assign_attrs(reverse=int(reverse))


def worse(way: str) -> str:
    """What is said where a whole model is worse than without edges, by a metric that is better the other way."""
    return (
        "the whole model is worse than the empty circuit, and the behaviour is that it is worse: signed selection "
        f"takes {way} for better; if that is not meant, swap answers and distractors, or take another corrupted run"
    )


def with_interval(ds: xr.Dataset, name: str, words: str, *, level: float = 0.95) -> xr.Dataset:
    """The faithfulness of ``<name>_value (..., example)`` as ``name``, with the ends of its interval over prompts.

    Parameters
    ----------
    ds : Dataset
        With ``empty`` and ``whole``.
    name : str
    words : str
        What it is.
    level : float

    Returns
    -------
    Dataset
        The same, with ``name``, ``<name>_low`` and ``<name>_high``.
    """
    values = ds[f"{name}_value"].transpose(..., "example")
    empty, whole = ds["empty"].values, ds["whole"].values
    dims = values.dims[:-1]
    low, high = ratio_interval(values.values - empty, whole - empty, level)
    about = {"units": "1", "long_name": words}
    return ds.assign(
        {
            name: (dims, faithfulness(values.values, empty, whole), about),
            f"{name}_low": (dims, low, about | {"long_name": f"{words}, low end"} | interval_attrs(len(empty))),
            f"{name}_high": (dims, high, about | {"long_name": f"{words}, high end"} | interval_attrs(len(empty))),
        }
    )


def curve(behaviour: Behaviour, scores: xr.DataArray, by: str) -> xr.Dataset:
    """Circuits of growing size by their scores, pruned first.

    Parameters
    ----------
    behaviour : Behaviour
    scores : DataArray (edge)
    by : {"share", "edges"}

    Returns
    -------
    Dataset
        What `circuit_curve` gives, with dims ``selection`` and `by`; ``value``, ``empty`` and ``whole``; and ``left``,
        the edges that pruning leaves.
    """
    graph = behaviour.graph
    sizes = circuit_sizes(graph, by)
    chosen = [[graph.prune(Circuit.top(scores, int(n), one)) for n in sizes.values] for one in SELECTIONS]
    found = behaviour.of([circuit for one in chosen for circuit in one])
    values = _along(found, sizes, ("selection",), {"selection": list(SELECTIONS)})
    ds = circuit_curve(values, found["empty"], found["whole"])
    left = [[len(circuit) for circuit in one] for one in chosen]
    ds["left"] = (("selection", by), np.array(left), {"long_name": "edges that are left once it is pruned"})
    return ds.assign(value=values, empty=found["empty"], whole=found["whole"])


def drawn(behaviour: Behaviour, draws: int, seed: int) -> xr.Dataset:
    """Random circuits at MIB's shares of all edges: edges drawn one by one, and connected ones; pruned first.

    Parameters
    ----------
    behaviour : Behaviour
    draws : int
    seed : int

    Returns
    -------
    Dataset
        What `circuit_curve` gives, with dims ``kind``, ``draw`` and ``share``, and ``value``.
    """
    graph = behaviour.graph
    sizes = circuit_sizes(graph)
    each = [random_circuits(graph, sizes.values.tolist(), draws, seed, kind) for kind in KINDS]
    found = behaviour.of([graph.prune(circuit) for kind in each for draw in kind for circuit in draw])
    values = _along(found, sizes, ("kind", "draw"), {"kind": list(KINDS), "draw": np.arange(draws)})
    return circuit_curve(values, found["empty"], found["whole"], level=None).assign(value=values)


def _along(found: xr.Dataset, sizes: xr.DataArray, dims: tuple[str, ...], coords: dict[str, Any]) -> xr.DataArray:
    """Values of circuits one after the other with the dims that they were made along."""
    shape = (*(len(coords[dim]) for dim in dims), sizes.size, found.sizes["example"])
    values = found["value"].values.reshape(shape)
    names, attrs = (*dims, str(sizes.dims[0]), "example"), found["value"].attrs
    name = str(attrs.get("metric", "value"))
    return xr.DataArray(values, coords=coords | dict(sizes.coords), dims=names, name=name, attrs=attrs)


def smallest(behaviour: Behaviour, scores: xr.DataArray, curves: Sequence[xr.Dataset], share: float) -> xr.Dataset:
    """The smallest number of edges whose circuit, chosen by absolute scores, keeps a share of the behaviour.

    The first number of the curves that is enough is looked for, then `BETWEEN` numbers between it and the one before,
    and so on, until the number before the first that is enough is one less.

    Parameters
    ----------
    behaviour : Behaviour
    scores : DataArray (edge)
    curves : sequence of Dataset
        What `curve` gives, over shares and over numbers of edges.
    share : float

    Returns
    -------
    Dataset
        ``tried (tried_edges)``: faithfulness of circuits of so many edges. The attribute `n` is the first number that
        keeps the share.
    """
    graph, known = behaviour.graph, {0: 0.0}
    for ds in curves:
        kept = ds["faithfulness"].sel(selection=ABS).values
        known |= dict(zip(ds["edges"].values.astype(int).tolist(), kept.tolist(), strict=True))
    known[len(graph)] = max(known[len(graph)], share)  # the whole model keeps all of it
    tried: dict[int, float] = {}
    while True:
        sizes = sorted(known)
        at = next(at for at, size in enumerate(sizes) if known[size] >= share)
        low, high = sizes[max(at - 1, 0)], sizes[at]
        tried[high] = known[high]
        if high - low <= 1:
            break
        new = [int(n) for n in np.unique(np.linspace(low, high, BETWEEN + 2).round()) if low < n < high]
        kept = behaviour.kept(behaviour.of([graph.prune(Circuit.top(scores, n)) for n in new]))
        tried |= (more := dict(zip(new, kept.tolist(), strict=True)))
        known |= more
    words = {"units": "1", "long_name": "share of the behaviour that a circuit keeps"}
    values = ("tried_edges", [tried[size] for size in sorted(tried)], words)
    return xr.Dataset({"tried": values}, coords={"tried_edges": sorted(tried)}).assign_attrs(n=high)


def one_circuit(
    behaviour: Behaviour, scores: xr.DataArray, n: int, draws: int, seed: int, others: Behaviour | None
) -> xr.Dataset:
    """The circuit of `n` edges, all that is outside of it, and random circuits of as many connected edges.

    Parameters
    ----------
    behaviour : Behaviour
    scores : DataArray (edge)
    n : int
        Edges before it is pruned.
    draws, seed : int
        Of random circuits.
    others : Behaviour, optional
        That of other prompts, which it is judged on.

    Returns
    -------
    Dataset
        ``score`` of its edges, with the coordinates ``edge``, ``sender`` and ``receiver``; faithfulness with intervals:
        ``faithfulness``, ``complement``, and ``on_others`` where there are others; ``random (draw)`` and ``p``.
    """
    graph = behaviour.graph
    circuit = graph.prune(Circuit.top(scores, n))
    (random,) = zip(*random_circuits(graph, [len(circuit)], draws, seed), strict=True) if draws else ((),)
    found = behaviour.of([circuit, Circuit(graph.edges, circuit.source) - circuit, *map(graph.prune, random)])
    values = found["value"]
    ds = found[["empty", "whole"]].assign(
        faithfulness_value=values.isel(circuit=0),
        complement_value=values.isel(circuit=1),
        random_value=values.isel(circuit=slice(2, None)).rename(circuit="draw"),
    )
    ds = with_interval(ds, "faithfulness", "share of the behaviour that the circuit keeps")
    ds = with_interval(ds, "complement", "share that all edges outside of it keep")
    about = {"units": "1", "long_name": f"share that random circuits of as many {CONNECTED} keep"}
    ds["random"] = ("draw", behaviour.kept(found)[2:], about)
    p = null_p_value(float(ds["faithfulness"]), ds["random"].values)
    words = "share of random circuits, this one counted among them, that keep as much"
    ds["p"] = ((), p, {"units": "1", "long_name": words})
    for name, words in (("complement", "all edges outside of it"), ("random", f"random {CONNECTED}")):
        metric = str(values.attrs.get("long_name", "")).removesuffix(" of the circuit")
        ds[f"{name}_value"].attrs["long_name"] = f"{metric} of {words}"
    if others is not None:
        judged = others.of([circuit])
        judged = with_interval(
            judged.assign(on_others_value=judged["value"].isel(circuit=0)),
            "on_others",
            "share of the behaviour that the circuit keeps on other prompts",
        )
        ds = ds.assign({name: judged[name] for name in ("on_others", "on_others_low", "on_others_high")})
    of_edge = dict(zip(edges_of(scores), map(float, scores.values), strict=True))
    ds["score"] = ("edge", [of_edge[edge] for edge in circuit], dict(scores.attrs))
    return ds.assign_coords(edge_coords(circuit)).assign_attrs(n=n)
