"""The backend of models that a server has, and how such a model is opened: here without weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from nnsight.modeling import huggingface
from nnsight.modeling.transformers import TransformersModel
from transformers import AutoConfig, AutoTokenizer

from ...errors import ModelError
from ..base.hashing import data_hash, short_hash
from ..declare.sites import Site
from ..models.checkpoints import step_of_revision
from ..models.family import Family, check_fits, family_of, why_called
from ..models.finding import find_parts
from ..models.identity import Identity
from ..models.locate import why
from ..models.opening import options_of
from ..models.turns import making, turn_of
from ..plan.cost import DEFAULT_BUDGET
from ..plan.plan import Plan
from ..plan.reads import size_of
from ..run import engine, gradients
from ..run.activations import as_tensor, described_site
from ..run.backend import Backend, CheckAnswer, CheckRequest, Say, Score
from ..run.cache import CompiledMetric
from ..run.engine import Progress
from ..run.memory import ACCELERATOR_OVERHEAD
from ..run.outcome import Blank, Inputs, Outcome, Store
from ..traced.passes import server_jobs
from ..traced.specs import DirectSpec
from .model import RemoteModel, numbers
from .protocol import ROOM, Unfit, deserialize_values, room
from .queue import JobQueue
from .run import RemoteSweep, finished_values

Array = np.ndarray[Any, Any]
BUDGET = 4 * DEFAULT_BUDGET
"""Bytes for all tensors on a server, which does not say what it has; always the same, so that jobs are found again."""


@dataclass(frozen=True)
class NdifBackend(Backend):
    """Runs a model on its server, as jobs of which metrics come back.

    Parameters
    ----------
    model : RemoteModel
    """

    model: RemoteModel
    every_position: ClassVar[bool] = False
    budget: ClassVar[int] = BUDGET
    overhead: ClassVar[float] = ACCELERATOR_OVERHEAD
    module: ClassVar[None] = None

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
        """Measure group by group of passes; a job that was sent before is asked for instead of being sent again.

        See `Backend.run_plan`.
        """
        sweep = RemoteSweep(self.model, plan, readers, inputs, positions, say)
        return engine.run_plan(plan, readers, sweep.execute, progress, store, positions, blank)

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
        """Estimate chunk by chunk. See `Backend.run_estimate`."""
        sweep = RemoteSweep(self.model, plan, readers, inputs, positions, say)
        execute = partial(sweep.estimates, steps, edges=edges)
        return gradients.run_estimate(plan, readers, steps, execute, progress, positions, edges)

    def capture(self, sites: Sequence[Site], tokens: Sequence[Array]) -> list[list[Array]]:
        """In one job; the values of these sites come back and nothing else."""
        model, asked = self.model, [described_site(self.model, site) for site in sites]
        program = {"sites": asked, "tokens": [as_tensor(model, group) for group in tokens]}
        some = [None if site.positions is None else len(site.positions) for site in sites]
        wanted = [
            {
                str(at): (len(group), *size_of(site, model.shape, group.shape[1], some[at]))
                for at, site in enumerate(sites)
            }
            for group in tokens
        ]
        read = partial(deserialize_values, wanted=wanted)
        found = model.ask("capture", server_jobs.activations, program, read, room(wanted))
        return [[values[str(at)].numpy() for at in range(len(sites))] for values in found]

    def weighted_sums(self, sites: Sequence[Site], tokens: Sequence[Array], weights: Sequence[Array]) -> list[Array]:
        """In one job; one vector comes back for each site."""
        model, asked = self.model, [described_site(self.model, site) for site in sites]
        given = [[as_tensor(model, one) for one in several] for several in (tokens, weights)]
        wanted = [{str(number): size_of(site, model.shape, 1, 1)[1:] for number, site in enumerate(sites)}]
        read = partial(deserialize_values, wanted=wanted)
        program = {"sites": asked, "tokens": given[0], "weights": given[1]}
        (found,) = model.ask("sums", server_jobs.sums, program, read, room(wanted))
        return [found[str(number)].numpy() for number in range(len(sites))]

    def attribute(self, groups: Sequence[DirectSpec]) -> list[Array]:
        """In one job; one number comes back for each source, prompt and scored position."""
        model, shape = self.model, self.model.shape
        every = 2 + ("pos_embed" in model.family.embeddings) + shape.layers * (shape.heads + 1)

        def sources(group: DirectSpec) -> int:
            """How many there are in a group of prompts."""
            if group["parts"] is None:
                return every
            sizes = [shape.d_mlp + 1 if one["neurons"] is None else len(one["neurons"]) for one in group["parts"]]
            heads = [one["head"] is not None for one in group["parts"]]
            keys = group["tokens"].shape[1]
            return sum(keys if of_head else size for of_head, size in zip(heads, sizes, strict=True))

        wanted = [{"shares": (1 + sources(one), len(one["tokens"]), len(one["scored"]))} for one in groups]
        read = partial(deserialize_values, wanted=wanted)
        found = model.ask("direct", server_jobs.direct, {"groups": list(groups)}, read, room(wanted))
        return [values["shares"].numpy() for values in found]

    def lens(
        self, plan: Plan, readers: Sequence[CompiledMetric], inputs: Inputs, heads: bool = False
    ) -> list[dict[str, Array]]:
        """In one job; one number comes back for each reader, layer, prompt and scored position. See `Backend.lens`."""
        model, shape = self.model, self.model.shape
        rows = (shape.layers, shape.heads) if heads else (shape.layers + 1,)
        runs = [engine.runs_of(cast(Any, model), plan, chunk, readers, inputs)[0] for chunk in plan.chunks]
        wanted = [{one.name: (*rows, len(run["tokens"]), len(run["scored"])) for one in readers} for run in runs]
        read = partial(deserialize_values, wanted=wanted)
        found = model.ask("lens", server_jobs.lenses, {"runs": runs, "heads": heads}, read, room(wanted))
        return [{name: value.numpy() for name, value in values.items()} for values in found]

    def score_weights(self, score: Score, shape: tuple[int, ...]) -> Array:
        """In one job; the weights stay there."""
        table: Array = self.model.ask(
            "weights",
            server_jobs.scores_of_weights,
            {"score": score, "vocabulary": self.model.shape.vocabulary},
            lambda result: numbers(result["table"], shape, torch.float64),
            ROOM + 8 * int(np.prod(shape)),
        )
        return table

    def identify(self, anew: bool) -> tuple[Identity, bool]:
        """What the server says now, or said last: that holds for as long as the fingerprint that comes with answers."""
        return self.model.ask_identity() if anew else self.model.identity, anew

    def self_check(self, request: CheckRequest) -> CheckAnswer:
        """In one job."""
        model, layers, rows = self.model, request.layers, request.rows
        sweep = RemoteSweep(model, request.plan, request.readers, request.inputs, True)
        chunks = list(request.plan.chunks)
        wanted = sweep.shapes(chunks)
        program = {
            **sweep.job(chunks).program,
            "rows": rows,
            "writes": request.writes,
            "scored": request.scored,
            "layers": layers,
            "probe": request.probe,
            "wanted": request.points,
        }

        def read(result: Any) -> tuple[list[dict[str, torch.Tensor]], Array, float, list[Any]]:
            """Take what `server_jobs.check` gives, as long as it is what was asked for."""
            own = numbers(result["own"], (len(rows), len(request.scored)), torch.float32)
            off = result["off"]
            for what, *rest in (part for one in off for part in one):
                if type(what) is not str or len(what) > 100 or [type(value) for value in rest] != [float] * 3:
                    raise Unfit("what it says of parts makes no sense")
            if len(off) != len(layers):
                raise Unfit(f"it says something of {len(off)} layers, where {len(layers)} were asked for")
            return deserialize_values(result["planned"], wanted), own, float(result["deviation"]), off

        planned, own, deviation, off = model.ask("check", server_jobs.check, program, read, room(wanted))
        outcome = Outcome(request.plan)
        for finished in finished_values(request.plan, chunks, planned):
            outcome.put(finished)
        return CheckAnswer(outcome.close().values["probe", 0][:, 0], own, deviation, off)

    def has_passed(self, identity: Identity) -> bool:
        """Whether an earlier process wrote it down."""
        return bool(self.model.ledger.job(self._passed_key(identity)))

    def note_passed(self, identity: Identity) -> None:
        """Write it down beside the jobs."""
        self.model.ledger.note_job(self._passed_key(identity), {"checked": True})

    def _passed_key(self, identity: Identity) -> str:
        facts = json.dumps([identity.exact, data_hash(self.model.family)])
        return "checked-" + short_hash(self.model.queue.host, self.model.queue.model_key, facts)

    def checked_length(self, length: int) -> int:
        """The short prompt is enough: every check is a job."""
        return 0

    def speed(self, plan: Plan, inputs: Inputs) -> None:
        """It shares its time with others."""


def open_model(name: str, where: str, place: str, tokenizer: Any, trusted: bool) -> RemoteModel:
    """Open a model without weights: configuration and tokenizer from the Hub, or from a folder that the server has too.

    Parameters
    ----------
    name, where : str
        Name of the model, and the folder or Hub id, as `locate` gives them.
    place : str
        What kind of place `locate` gives, or a revision of the Hub.
    tokenizer : tokenizer, optional
        None reads that of the model.
    trusted : bool
        Whether code may run that the model brings.

    Returns
    -------
    RemoteModel

    Raises
    ------
    ModelError
        The model cannot be read, brings code that may not run, or is of no family that headwise knows.
    ServerError
        The address or the key that nnsight is set to cannot be one, or the key would go there in clear.
    """
    revision = None if place in ("main", "local", "shipped") else place
    if place in ("local", "shipped"):
        from pathlib import Path

        where = str(Path(where).resolve())
        huggingface._ID_CACHE[where] = where  # a folder has no id on the Hub: the server finds it by its path
    options = options_of(name, where, revision, trusted, tokenizer=tokenizer is None, dtype=None)
    try:
        config = AutoConfig.from_pretrained(where, **options)
        reason = why_called(config)
        family: Family | None = None if reason else family_of(config, name)
        tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(where, **options)
        with making():
            traced = TransformersModel(where, task="text-generation", tokenizer=tokenizer, **options)
    except ModelError:
        raise
    except Exception as error:  # whatever the loaders raise
        raise ModelError(why(name, where, error)) from error
    commit = getattr(config, "_commit_hash", None) or place
    if family is None:
        with turn_of(traced._module):
            family = find_parts(traced._module, name, reason)
    check_fits(family, traced._module, name)
    return RemoteModel(
        name,
        place,
        family,
        family.shape(config, traced._module),
        tokenizer,
        traced,
        trusted=trusted,
        step=step_of_revision(revision),
        backend_type=NdifBackend,
        queue=JobQueue(traced, name),
        commit=commit,
    )
