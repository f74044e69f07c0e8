"""Where a model runs: what a backend does, and the one for models that run in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from ..declare.sites import Site
from ..models.identity import Identity
from ..models.model import Model
from ..plan.cost import forward_flops
from ..plan.plan import Plan
from ..traced import head_weights
from ..traced.passes import inside, server_jobs, traces
from ..traced.specs import DirectSpec, ReadSite, RowChange, WeightsRead
from . import engine, gradients, memory
from .activations import as_tensor, described_site, handles
from .cache import CompiledMetric
from .engine import Progress
from .identify import identity_of
from .outcome import Blank, FinishedValues, Inputs, Outcome, Store, as_array

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]
Score = Callable[[WeightsRead], Array]
PROMPTS = 4
"""Prompts that are run to see how fast a model is, and what half precision costs."""
LEAST_SECONDS = 0.05
"""A forward pass is timed for so long at least."""


@dataclass(frozen=True)
class CheckRequest:
    """What a self-check runs.

    Attributes
    ----------
    plan : Plan
        Planned passes of one reader, `probe`, on one prompt.
    readers : list of CompiledMetric
    inputs : Inputs
    rows : Tensor (row, position)
        Tokens of the model's own pass.
    writes : dict of ReadSite to list of RowChange
        What is added in it.
    scored : list of int
        Positions whose logits are probed.
    points : list of ReadSite
        What is read of the prompt; none where `layers` is empty.
    layers : list of int
        Layers whose parts are compared with what the family says of them.
    probe : callable
        ``probe(logits)`` gives ``(row, scored)``.
    """

    plan: Plan
    readers: Sequence[CompiledMetric]
    inputs: Inputs
    rows: torch.Tensor
    writes: dict[ReadSite, list[RowChange]]
    scored: list[int]
    points: list[ReadSite]
    layers: list[int]
    probe: Callable[[torch.Tensor], torch.Tensor]


class CheckAnswer(NamedTuple):
    """What a self-check compares."""

    planned: Array
    """Probes in planned passes, ``(condition, scored)``."""
    own: Array
    """Probes in the model's own pass, ``(row, scored)``, float32."""
    deviation: float
    """Standard deviation of the logits."""
    off: list[Any]
    """For each layer, what its parts are off by: ``(name, off by, deviation, rounding)`` each."""


class Backend(Protocol):
    """Carries out what is asked of one model, where its weights are."""

    every_position: ClassVar[bool]
    """Whether `run_plan` gives each scored position also where only their mean is wanted."""

    @property
    def budget(self) -> int:
        """Bytes that all tensors of a pass may take, beside the weights."""

    @property
    def overhead(self) -> float:
        """Operations that a layer of a pass costs beside its work."""

    @property
    def module(self) -> PreTrainedModel | None:
        """The module with its weights; None where they are not in this process."""

    def run_plan(
        self,
        plan: Plan,
        readers: Sequence[CompiledMetric],
        inputs: Inputs,
        progress: Progress | None = None,
        store: Store | None = None,
        *,
        positions: bool = True,
        say: Say | None = None,
        blank: Blank = np.zeros,
    ) -> Outcome:
        """Measure every run as it is, and every condition of a plan.

        Parameters
        ----------
        plan : Plan
        readers : sequence of CompiledMetric
        inputs : Inputs
        progress : callable, optional
            Called with passes done and passes in all.
        store : Store, optional
            Gives what was finished before, and gets what is finished now.
        positions : bool
            Whether values are wanted for each scored position, or their mean is enough: a server then gives the mean
            only. In this process each position is given anyway.
        say : callable, optional
            Gets a line on how the work is doing, where it is done elsewhere.
        blank : callable
            Makes the arrays that values of conditions are put in, of a shape and a dtype; zeros at first.

        Returns
        -------
        Outcome

        Raises
        ------
        DeclarationError
            A reader's arguments or values do not fit the scored positions.
        ModelError
            Even a single prompt needs more memory than there is.
        ServerError
            A server refuses, or cannot be reached for a long time.
        """

    def run_estimate(
        self,
        plan: Plan,
        readers: Sequence[CompiledMetric],
        inputs: Inputs,
        steps: int | None,
        progress: Progress | None = None,
        *,
        positions: bool = True,
        say: Say | None = None,
        edges: str = "",
    ) -> Outcome:
        """Estimate every condition of a plan from gradients; the runs as they are stay exact.

        Parameters
        ----------
        plan, readers, inputs, positions, say
            As for `run_plan`.
        steps : int, optional
            Of the integrated estimate; None for the gradient at the base run.
        progress : callable, optional
            Called with examples done and in all.
        edges : str
            The estimator of edge scores, where the conditions are edges.

        Returns
        -------
        Outcome

        Raises
        ------
        DeclarationError, ModelError, ServerError
            As `run_plan`; also where something has no estimate.
        """

    def capture(self, sites: Sequence[Site], tokens: Sequence[Array]) -> list[list[Array]]:
        """The values of sites, in the shapes that `Component` states, for each group of prompts.

        `tokens` are ``(example, position)`` for each group.
        """

    def weighted_sums(self, sites: Sequence[Site], tokens: Sequence[Array], weights: Sequence[Array]) -> list[Array]:
        """The values of sites, times ``(example, position)`` weights, summed over groups, examples and positions."""

    def attribute(self, groups: Sequence[DirectSpec]) -> list[Array]:
        """What each part adds to a linear function of the logits, for each group of prompts.

        ``(source + 1, example, scored)``, as `logits.direct_shares` gives it.
        """

    def lens(
        self, plan: Plan, readers: Sequence[CompiledMetric], inputs: Inputs, heads: bool = False
    ) -> list[dict[str, Array]]:
        """What the final norm and the unembedding make of the stream before the first layer and after each.

        Parameters
        ----------
        plan : Plan
            Its base run is read.
        readers : sequence of CompiledMetric
        inputs : Inputs
        heads : bool
            Whether what each head writes is read instead of the stream.

        Returns
        -------
        list of dict
            For each chunk, reader to values ``(layer + 1, example, scored)``; of heads ``(layer, head, example,
            scored)``.
        """

    def score_weights(self, score: Score, shape: tuple[int, ...]) -> Array:
        """``score(read)``, float64 numbers of a shape; `read` gives weights, see `WeightsRead`.

        `score` is a plain function that may be sent to a server, where the weights stay.
        """

    def identify(self, anew: bool) -> tuple[Identity, bool]:
        """Which model this is, with its fingerprint, and whether that was found out now.

        It is where `anew` says so, and in this process always, since nothing cheaper shows that the weights are as
        they were.
        """

    def self_check(self, request: CheckRequest) -> CheckAnswer:
        """Run the passes of a self-check."""

    def has_passed(self, identity: Identity) -> bool:
        """Whether it is written down, beside an unfinished result, that this very model passed the self-check."""

    def note_passed(self, identity: Identity) -> None:
        """Write it down where a later process cannot see it otherwise."""

    def checked_length(self, length: int) -> int:
        """How long a prompt the self-check has to see, where prompts of at most `length` tokens are measured."""

    def speed(self, plan: Plan, inputs: Inputs) -> float | None:
        """Floating-point operations a second of plain passes; None where it cannot be told."""


@dataclass(frozen=True)
class LocalBackend(Backend):
    """Runs a model in this process, with the functions that a server runs.

    Parameters
    ----------
    model : Model
    """

    model: Model
    every_position: ClassVar[bool] = True

    @property
    def budget(self) -> int:
        """A share of the memory that is free now."""
        return memory.budget(self.model.device)

    @property
    def overhead(self) -> float:
        """By the kind of device."""
        return memory.overhead(self.model.device)

    @property
    def module(self) -> PreTrainedModel:
        """The module."""
        return self.model.module

    def run_plan(
        self,
        plan: Plan,
        readers: Sequence[CompiledMetric],
        inputs: Inputs,
        progress: Progress | None = None,
        store: Store | None = None,
        *,
        positions: bool = True,
        say: Say | None = None,
        blank: Blank = np.zeros,
    ) -> Outcome:
        """Measure pass by pass; what runs out of memory is done again in halves. See `Backend.run_plan`."""

        def execute(outcome: Outcome, keep: Callable[[FinishedValues], None], step: Callable[[int], None]) -> None:
            engine.run_chunks(self.model, outcome.missing(), readers, inputs, outcome, keep, step)

        return engine.run_plan(plan, readers, execute, progress, store, blank=blank)

    def run_estimate(
        self,
        plan: Plan,
        readers: Sequence[CompiledMetric],
        inputs: Inputs,
        steps: int | None,
        progress: Progress | None = None,
        *,
        positions: bool = True,
        say: Say | None = None,
        edges: str = "",
    ) -> Outcome:
        """Estimate chunk by chunk; what runs out of memory is done again in halves. See `Backend.run_estimate`."""
        execute = partial(gradients.estimate_chunks, self.model, plan, readers, inputs, steps, edges=edges)
        return gradients.run_estimate(plan, readers, steps, execute, progress, edges=edges)

    def capture(self, sites: Sequence[Site], tokens: Sequence[Array]) -> list[list[Array]]:
        """Group by group."""
        model, asked = self.model, [described_site(self.model, site) for site in sites]
        parts = handles(model)
        out_of = head_weights.output_weights(model.traced, parts, asked)
        found = []
        for group in tokens:
            wanted = [site["site"] for site in asked]
            points = inside.read_in_batches(model.traced, parts, as_tensor(model, group), wanted)
            found.append([as_array(inside.value_at(points, site, out_of)) for site in asked])  # one at a time
        return found

    def weighted_sums(self, sites: Sequence[Site], tokens: Sequence[Array], weights: Sequence[Array]) -> list[Array]:
        """Batch by batch."""
        model, asked = self.model, [described_site(self.model, site) for site in sites]
        ids, by_position = ([as_tensor(model, one) for one in several] for several in (tokens, weights))
        found = inside.weighted_sums(model.traced, handles(model), ids, by_position, asked)
        return [as_array(found[str(number)].float()) for number in range(len(sites))]

    def attribute(self, groups: Sequence[DirectSpec]) -> list[Array]:
        """Group by group."""
        model, parts = self.model, handles(self.model)
        given = [cast(DirectSpec, server_jobs.moved(dict(group), model.device)) for group in groups]
        return [as_array(inside.direct_of(model.traced, parts, group)) for group in given]

    def lens(
        self, plan: Plan, readers: Sequence[CompiledMetric], inputs: Inputs, heads: bool = False
    ) -> list[dict[str, Array]]:
        """Chunk by chunk. See `Backend.lens`."""
        model, parts = self.model, handles(self.model)
        runs = [engine.runs_of(model, plan, chunk, readers, inputs)[0] for chunk in plan.chunks]
        found = (traces.lens(model.traced, parts, run, heads) for run in runs)
        return [{name: as_array(values) for name, values in one.items()} for one in found]

    def score_weights(self, score: Score, shape: tuple[int, ...]) -> Array:
        """From the weights as they stand."""
        model, parts = self.model, handles(self.model)
        table: Array = head_weights.score_weights(model.traced, parts, model.shape.vocabulary, score)
        return table

    def identify(self, anew: bool) -> tuple[Identity, bool]:
        """From every weight and buffer, read now."""
        self.model._memory.identity = found = identity_of(self.model)
        return found, True

    def self_check(self, request: CheckRequest) -> CheckAnswer:
        """Run its passes one by one."""
        model, parts = self.model, handles(self.model)
        planned = self.run_plan(request.plan, request.readers, request.inputs).values["probe", 0][:, 0]
        own, deviation, off = server_jobs.own_pass(
            model.traced,
            parts,
            request.rows,
            request.writes,
            request.scored,
            request.points,
            request.layers,
            request.probe,
            model.device,
        )
        return CheckAnswer(planned, own.numpy(), deviation, off)

    def has_passed(self, identity: Identity) -> bool:
        """The model's own memory says it, and nothing else."""
        return False

    def note_passed(self, identity: Identity) -> None:
        """The model's own memory holds it."""

    def checked_length(self, length: int) -> int:
        """As long as the longest."""
        return length

    def speed(self, plan: Plan, inputs: Inputs) -> float:
        """Of a few passes on the first prompts of a plan, timed now."""
        model, group = self.model, plan.groups[0]
        tokens = as_tensor(model, inputs.runs[plan.base][0][:PROMPTS])
        work = forward_flops(model.shape, len(tokens), group.length)
        with torch.no_grad():
            model.module(tokens, use_cache=False)
            started, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - started < LEAST_SECONDS:
                model.module(tokens, use_cache=False).logits[0, 0, 0].item()  # waits for an accelerator
                count += 1
        return work * count / (time.perf_counter() - started)
