"""Direct logit attribution: what each part of a model writes towards an answer, by the frozen final norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, UnknownNameError, choices
from ...metrics.card import need
from ...metrics.outputs import logit_diff
from ..measuring.context import check_remote
from ..measuring.labels import check_is_model, coordinates, task_json
from ..storage.provenance import provenance
from .predict import asked_for

if TYPE_CHECKING:
    from ...interventions.base.shape import Group
    from ...interventions.models.model import Model
    from ...interventions.traced.specs import DirectSpec
    from ..tasks.batch import Batch
    from ..tasks.tasks import Task

Array = np.ndarray[Any, Any]
OF = {"logit_diff": "logit of the answer minus that of the distractor", "logit": "logit of the answer"}
"""What parts can be asked for, and its name in words."""


def direct_logit_attribution(
    model: Model,
    task: Task,
    of: str | Sequence[float] | Array = "logit_diff",
    *,
    run: str = "clean",
    per_position: bool = False,
    check: bool = True,
    remote: bool | None = None,
) -> xr.Dataset:
    """What each head, each MLP, the embeddings and the biases add to the logits of the answer, directly.

    The logits are a linear function of the last stream where the final norm divides by what it divides by now; the
    stream is the sum of what the parts wrote. What a part does by way of later parts is not in its share.

    Parameters
    ----------
    model : Model
        From `headwise.load`.
    task : Task
    of : {"logit_diff", "logit"} or array (d_model,)
        The answer's logit less that of the distractor, the answer's logit, or any direction of the normed last stream.
    run : str
        The run of the task that is read.
    per_position : bool
        Keep each scored position (NaN elsewhere) instead of their mean.
    check, remote
        As for `capture`; of a server, these numbers come back and nothing else.

    Returns
    -------
    Dataset
        ``attribution(source, example)``, in logits, and ``whole(example)``, their sum as the model computes it; with
        `per_position` also ``position``. Sources: ``embed``, ``pos_embed`` where there is one, ``L0H0`` ... ``L0.mlp``
        ... and ``bias``, all biases after the embedding that no MLP holds. Coordinates of them: ``kind`` (``embed
        head mlp bias``), ``layer`` and ``head``, -1 where there is none.

    Raises
    ------
    DeclarationError
        The task has no answers or distractors, answers are several tokens, or `of` is something else.
    UnknownNameError
        The task has no such run.
    ModelError
        A self-check failed.
    ServerError
        The server of a remote model cannot be reached, refuses, or keeps the weights apart.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=12)
    >>> ds = hw.direct_logit_attribution(model, task)
    >>> ds["attribution"].mean("example").idxmax("source").item()[:3]
    'L1H'

    References
    ----------
    Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; nostalgebraist 2020, on the logit lens.
    """
    from ...interventions.begin import begin

    check_is_model(model)
    check_remote(model, remote)
    batch = task.draw(model)
    if run not in batch.runs:
        raise UnknownNameError(f"run={run!r}: the task has the runs {choices(batch.runs)}")
    if batch.sequences:
        raise DeclarationError("an answer has several tokens: direct attribution is of the logits of one")
    groups = batch.groups()
    asked = [_asked(model, batch, run, group, of) for group in groups]
    with begin(model, check=check, length=int(batch.lengths.max())) as call:
        found = model.backend.attribute(asked)
    shape = (len(found[0]), *batch.scored.shape)
    values = np.full(shape, np.nan, dtype=found[0].dtype)
    for group, shares in zip(groups, found, strict=True):
        values[np.ix_(range(shape[0]), group.examples, group.scored)] = shares
    dims: tuple[str, ...] = ("source", "example", "position")
    if not per_position:
        values, dims = np.nanmean(values, axis=-1), dims[:-1]
    words = OF[of] if isinstance(of, str) else "direction of the last stream, normed"
    units = "logit" if isinstance(of, str) else "1"
    shared = coordinates(model, batch, run)
    kept = shared if per_position else {"example": shared["example"]}
    result = xr.Dataset(
        {
            "attribution": (dims, values[:-1], {"long_name": f"{words}: share of a part", "units": units}),
            "whole": (dims[1:], values[-1], {"long_name": words, "units": units}),
        },
        coords={name: kept[name] for name in kept if name != "run"} | _sources(model),
    )
    told = of if isinstance(of, str) else "direction"
    again = asked_for("direct_logit_attribution", of=of, per_position=per_position)
    own = {"run": run, "task": task_json(task), "of": told}
    return result.assign_attrs(provenance(model, call.identity) | again | own)


def _asked(model: Model, batch: Batch, run: str, group: Group, of: Any) -> DirectSpec:
    """What is asked of the prompts of a group."""
    import torch

    facts = batch.facts(run, group)
    answers = others = direction = None
    if isinstance(of, str) and of in OF:
        answers = torch.from_numpy(need(facts.targets, of, "targets: give the task answers"))
        if of == "logit_diff":
            others = torch.from_numpy(np.ascontiguousarray(logit_diff.prepare(facts)["distractors"]))
    else:
        vector = np.asarray([] if isinstance(of, str) else of, dtype=np.float64)
        if vector.shape != (model.shape.d_model,) or not np.isfinite(vector).all():
            given = f"{of!r}" if isinstance(of, str) else f"an array of shape {vector.shape}"
            raise DeclarationError(
                f"of={given}: possible are {choices([repr(name) for name in OF])}, or a direction of "
                f"{model.shape.d_model} numbers"
            )
        direction = torch.from_numpy(vector)
    tokens = torch.from_numpy(np.ascontiguousarray(facts.tokens))
    return {
        "tokens": tokens,
        "scored": list(group.scored),
        "answers": answers,
        "others": others,
        "direction": direction,
    }


def _sources(model: Model) -> dict[str, Any]:
    """The coordinates of the sources, in the order in which they come."""
    rows = [("embed", "embed", -1, -1)]
    if "pos_embed" in model.family.embeddings:
        rows.append(("pos_embed", "embed", -1, -1))
    for layer in model.layers:
        rows += [(f"L{layer}H{head}", "head", layer, head) for head in model.heads]
        rows.append((f"L{layer}.mlp", "mlp", layer, -1))
    names, kinds, layers, heads = zip(*rows, ("bias", "bias", -1, -1), strict=True)
    return {
        "source": np.asarray(names, dtype=object),
        "kind": ("source", np.asarray(kinds, dtype=object)),
        "layer": ("source", np.asarray(layers)),
        "head": ("source", np.asarray(heads)),
    }
