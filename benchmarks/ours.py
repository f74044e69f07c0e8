"""headwise: one call of `measure` for all conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

import headwise as hw
from benchmarks.cases import SCORES, Job, Place
from headwise import metrics
from headwise.interventions import EdgePatches, Grid, Head, Intervention, Layer, Neuron, Patch, ZeroAblate
from headwise.interventions.begin import begin
from headwise.studies import measure


def prepare(job: Job) -> Callable[[Sequence[Place]], np.ndarray]:
    """All conditions are one grid, since what headwise saves it saves over the grid; some of them are a mapping."""
    model = hw.load(job.twin(), device="cpu", tokenizer=job.tokenizer)

    def edges(places: Sequence[Place]) -> np.ndarray:
        every = len(places) == len(hw.Graph.of(model))
        what = EdgePatches() if every else EdgePatches([place.what for place in places])
        return measure(model, job.task, what, [metrics.logit_diff], progress=False)["logit_diff"].values

    def whole() -> np.ndarray:
        grid, metric = _grid(job, model), getattr(metrics, job.case.metric)
        found = measure(model, job.task, grid, [metric], progress=False)[metric.name]
        return found.transpose(*grid.shape, "example").values.reshape(len(job.places), -1)

    def some(places: Sequence[Place]) -> np.ndarray:
        metric = getattr(metrics, job.case.metric)
        conditions = {str(place): _intervention(place) for place in places}
        return measure(model, job.task, conditions, [metric], progress=False)[metric.name].values

    def scores(places: Sequence[Place]) -> np.ndarray:
        found = measure(model, job.task, None, [getattr(metrics, name) for name in SCORES], progress=False)
        read = {name: found[name].values for name in SCORES}  # (layer, head, example)
        return job.table([read[place.what][place.layer, place.head] for place in places])

    if job.case.name in ("scores", "edges"):
        return scores if job.case.name == "scores" else edges
    return lambda places: whole() if tuple(places) == job.places else some(places)


def identity(job: Job) -> Callable[[], None]:
    """What each call does to tell which model it is."""
    model = hw.load(job.twin(), device="cpu", tokenizer=job.tokenizer)

    def told() -> None:
        with begin(model, check=False):
            pass

    return told


def _grid(job: Job, model: hw.Model) -> Grid:
    if job.case.name == "ablation":
        return Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=model.layers, head=model.heads)
    if job.case.name == "qkv":
        return Grid(
            lambda component, layer, head: Patch(Head(layer, head).site(component), source="corrupted"),
            component=["q", "k", "v"],
            layer=model.layers,
            head=model.heads,
        )
    if job.case.name == "neurons":
        return Grid(lambda layer, neuron: ZeroAblate(Neuron(layer, neuron)), layer=[0], neuron=model.neurons)
    return Grid(
        lambda layer, place: Patch(Layer(layer).resid_pre.at(place), source="corrupted"),
        layer=model.layers,
        place=range(job.clean.shape[1]),
    )


def _intervention(place: Place) -> Intervention:
    if place.what == "resid_pre":
        return Patch(Layer(place.layer).resid_pre.at(place.position or 0), source="corrupted")
    if place.what == "mlp_post":
        return ZeroAblate(Neuron(place.layer, place.head or 0))
    head = Head(place.layer, place.head or 0)
    return ZeroAblate(head) if place.what == "z" else Patch(head.site(place.what), source="corrupted")
