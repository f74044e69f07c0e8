"""Direct logit attribution: what each part of a model writes towards an answer, by the frozen final norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, UnknownNameError, choices
from ...interventions.declare.components import Component
from ...interventions.declare.sites import Head, Layer, Neuron, Site, as_place
from ...interventions.plan.reads import Inside
from ...interventions.plan.validate import check_site
from ...metrics.card import need
from ...metrics.outputs import logit_diff
from ..measuring.context import check_remote
from ..measuring.labels import check_is_model, coordinates, task_json
from ..measuring.request import What
from ..storage.provenance import provenance
from ..tasks.prompts import rendered
from .predict import asked_for
from .under import Under, check_room, under

if TYPE_CHECKING:
    from ...interventions.base.shape import Group
    from ...interventions.models.model import Model
    from ...interventions.traced.specs import DirectPart, DirectSpec
    from ..tasks.batch import Batch
    from ..tasks.tasks import Task

Array = np.ndarray[Any, Any]
Part = Layer | Neuron | Head | str
OF = {"logit_diff": "logit of the answer minus that of the distractor", "logit": "logit of the answer"}
"""What parts can be asked for, and its name in words."""


def direct_logit_attribution(
    model: Model,
    task: Task,
    of: str | Sequence[float] | Array = "logit_diff",
    *,
    what: What = None,
    parts: Part | Sequence[Part] | None = None,
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
    what : Intervention, mapping of names to interventions, sequence of interventions, Grid, or None
        As for `capture`: the shares under each intervention, by the final norm as it divides then. What is written to
        an embedding, to a head (``z``, ``head_out``) or to ``mlp_out`` counts for that part; what is written to the
        stream, to ``attn_out`` of a whole layer or to the logits by a path belongs to no part.
    parts : Layer, Neuron, Head, str, or sequence of these, optional
        What is looked into, instead of the whole model: all neurons of a layer, with the bias that its MLP adds to
        them; some neurons; a head by the key positions that it moves values from.
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
        `per_position` also ``position``. With `parts`, ``whole`` is still that of the whole model. Sources: ``embed``,
        ``pos_embed`` where there is one, ``L0H0`` ... ``L0.mlp`` ... and ``bias``, all biases after the embedding that
        no MLP holds. Coordinates of them: ``kind`` (``embed head mlp bias``), ``layer`` and ``head``, -1 where there is
        none. With `parts`: ``L0N0`` ... ``L0.mlp bias``, which sum to the share of ``L0.mlp``; ``L1H2 from 0`` ...,
        which sum to that of ``L1H2`` (NaN for keys beyond the end of a shorter prompt); kinds ``neuron`` and ``key``,
        and coordinates ``neuron`` and ``key`` too. With `what` its dims come first (none, ``condition``, or the axes of
        the grid), and the source ``intervention``, of that kind, is what no part wrote (with `parts` ``L0.mlp
        intervention`` and ``L1H2 intervention``: what is written to these instead of what neurons and keys give); the
        coordinates are ``read_layer`` and ``read_head`` where ``layer`` or ``head`` is an axis of the grid.

    Raises
    ------
    DeclarationError
        The task has no answers or distractors, answers are several tokens, `of` or `parts` is something else, the
        model has no such part, or an intervention cannot be.
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
    >>> inside = hw.direct_logit_attribution(model, task, parts=hw.Layer(0))
    >>> bool(abs(inside["attribution"].sum("source") - ds["attribution"].sel(source="L0.mlp")).max() < 1e-4)
    True
    >>> without = hw.direct_logit_attribution(model, task, what={"clean": None, "without L0H3": hw.ZeroAblate("L0H3")})
    >>> without["attribution"].dims
    ('condition', 'source', 'example')

    References
    ----------
    Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; nostalgebraist 2020, on the logit lens.
    """
    from ...interventions.begin import begin

    check_is_model(model)
    model.check_sums("direct_logit_attribution")
    check_remote(model, remote)
    task_json(task := rendered(task, model))  # refuses what is no task
    batch = task.draw(model)
    if run not in batch.runs:
        raise UnknownNameError(f"run={run!r}: the task has the runs {choices(batch.runs)}")
    if batch.sequences:
        raise DeclarationError("an answer has several tokens: direct attribution is of the logits of one")
    groups = batch.groups()
    named = None if parts is None else _named(parts)
    inside = None if named is None else _inside(model, named, batch)
    asked = [_asked(model, batch, run, group, of, inside) for group in groups]
    sources = (
        _sources(model, what is not None) if inside is None else _sources_inside(model, inside, batch, what is not None)
    )
    keys = np.asarray([*sources["key"][1], -1]) if "key" in sources else np.full(1 + len(sources["source"]), -1)
    changed = None
    if what is not None:
        changed = _under(model, task, what, batch, run, asked, len(keys), per_position)
    else:
        check_room([(len(keys),)], 1, batch)
    with begin(model, check=check, length=int(batch.lengths.max())) as call:
        if changed is not None:
            if check:
                changed.check_model(call)
            (values,) = changed.values().values()
        else:
            found = model.backend.attribute(asked)
            values = np.full((len(keys), *batch.scored.shape), np.nan, dtype=found[0].dtype)
            for group, of_group in zip(groups, found, strict=True):
                whole = np.zeros((len(keys), *of_group.shape[1:]), dtype=of_group.dtype)
                whole[keys < group.length] = of_group
                values[np.ix_(range(len(keys)), group.examples, group.scored)] = whole
    dims: tuple[str, ...] = (*(() if changed is None else changed.dims), "source", "example", "position")
    if changed is not None:
        sources = {changed.named(name): one for name, one in sources.items()}
    if not per_position:
        values, dims = np.nanmean(values, axis=-1), dims[:-1]
    axes = {} if changed is None else changed.coords
    shares, said = values.take(range(len(keys) - 1), axis=len(axes)), values.take(-1, axis=len(axes))
    words = OF[of] if isinstance(of, str) else "direction of the last stream, normed"
    units = "logit" if isinstance(of, str) else "1"
    shared = coordinates(model, batch, run)
    kept = shared if per_position else {"example": shared["example"]}
    result = xr.Dataset(
        {
            "attribution": (dims, shares, {"long_name": f"{words}: share of a part", "units": units}),
            "whole": ((*axes, *dims[len(axes) + 1 :]), said, {"long_name": words, "units": units}),
        },
        coords={name: kept[name] for name in kept if name != "run"} | sources | axes,
    )
    if (keys >= batch.lengths.min()).any():
        there = xr.DataArray(keys[:-1, None] < batch.lengths, dims=("source", "example"))
        result["attribution"] = result["attribution"].where(there)
    told = of if isinstance(of, str) else "direction"
    again = asked_for(
        "direct_logit_attribution",
        of=of,
        parts=None if named is None else [*map(str, named)],
        per_position=per_position,
    )
    own = {"run": run, "task": task_json(task), "of": told} | ({} if changed is None else changed.attrs)
    return result.assign_attrs(provenance(model, call.identity) | again | own)


def _under(
    model: Model,
    task: Task,
    what: What,
    batch: Batch,
    run: str,
    asked: Sequence[DirectSpec],
    sources: int,
    per_position: bool,
) -> Under:
    """The plan of the passes that give shares under interventions.

    Parameters
    ----------
    model, task, what, run, per_position
        As for `direct_logit_attribution`.
    batch : Batch
    asked : sequence of DirectSpec
        For each group.
    sources : int
        How many there are, with the whole.

    Returns
    -------
    Under
    """
    inside = Inside("shares", {"shares": (sources,)}, tuple(asked))
    own = {"attribution", "whole", "source", "kind", "example", "prompt", *(("position",) if per_position else ())}
    if asked[0]["parts"] is not None:
        reads = _read_of(asked[0]["parts"], model)
        return under(model, task, what, batch, run, reads, inside, own | {"neuron", "key"})
    names = (Component.embed, *((Component.pos_embed,) if "pos_embed" in model.family.embeddings else ()))
    reads = [Site(name, 0) for name in names]
    for layer in map(Layer, model.layers):
        reads += [layer.z, layer.attn_out, layer.mlp_out]
    reads.append(Layer(model.layers[-1]).resid_post)
    return under(model, task, what, batch, run, reads, inside, own)


def _read_of(parts: Sequence[DirectPart], model: Model) -> list[Site]:
    """What passes read to look into parts."""
    reads = [Layer(model.layers[-1]).resid_post]
    for part in parts:
        layer, head = Layer(part["layer"]), part["head"]
        if head is None:
            reads += [layer.mlp_post, *([layer.mlp_out] if part["neurons"] is None else [])]
        else:
            reads += [Head(layer.layer, head).pattern, Site(Component.v, layer.layer, part["key_head"]), layer.z]
    return list(dict.fromkeys(reads))


def _named(parts: Part | Sequence[Part]) -> list[Any]:
    """What is looked into, with text read."""
    given = [parts] if isinstance(parts, str) or not isinstance(parts, Iterable) else list(parts)
    return [as_place(part) if isinstance(part, str) else part for part in given]


def _inside(model: Model, named: Sequence[Any], batch: Batch) -> list[DirectPart]:
    """What is looked into: layers and heads as they were named, and some neurons of a layer together."""
    from ...interventions.run.activations import columns_of, pattern_columns

    found: list[DirectPart] = []
    for at, part in enumerate(named):
        if not isinstance(part, Layer | Head | Neuron):
            raise DeclarationError(
                f"parts: {part!r} cannot be looked into: possible are layers such as Layer(0), neurons such as "
                "Neuron(0, 17) and heads such as Head(1, 2)"
            )
        site = part.pattern if isinstance(part, Head) else part.mlp_post
        check_site(site, model.name, model.shape, batch.groups())
        if part in named[:at] or (isinstance(part, Neuron) and Layer(part.layer) in named):
            also = "" if part in named[:at] else ", by its layer too"
            raise DeclarationError(f"parts: {part!r} is named twice{also}")
        some = next((one["neurons"] for one in found if one["layer"] == part.layer and one["neurons"]), None)
        if isinstance(part, Neuron) and some is not None:
            some.append(part.neuron)
            continue
        head = part.head if isinstance(part, Head) else None
        found.append(
            {
                "layer": part.layer,
                "neurons": [part.neuron] if isinstance(part, Neuron) else None,
                "head": head,
                "key_head": None if head is None else model.shape.key_head(head),
                "pattern": None if head is None else pattern_columns(model, part.layer, head),
                "value": columns_of(model, "v", None if head is None else model.shape.key_head(head)),
            }
        )
    if not found:
        raise DeclarationError("parts: name at least one, such as Layer(0)")
    return found


def _asked(model: Model, batch: Batch, run: str, group: Group, of: Any, inside: list[DirectPart] | None) -> DirectSpec:
    """What is asked of the prompts of a group."""
    import torch

    facts = batch.facts(run, group)
    answers = others = direction = None
    if isinstance(of, str) and of in OF:
        answers = torch.from_numpy(need(facts.targets, of, "targets: give the task answers"))
        if of == "logit_diff":
            others = torch.from_numpy(np.ascontiguousarray(logit_diff.prepare(facts)["distractors"]))
    else:
        try:
            vector = np.asarray([] if isinstance(of, str) else of, dtype=np.float64)
        except (TypeError, ValueError):
            vector = np.asarray([])
        if vector.shape != (model.shape.d_model,) or not np.isfinite(vector).all():
            given = f"an array of shape {vector.shape}" if vector.size else f"{of!r}"
            raise DeclarationError(
                f"of={given}: possible are {choices([repr(name) for name in OF])}, or a direction of "
                f"{model.shape.d_model} numbers"
            )
        direction = torch.from_numpy(vector)
    tokens = torch.from_numpy(np.ascontiguousarray(facts.tokens))
    return {
        "parts": inside,
        "tokens": tokens,
        "scored": list(group.scored),
        "answers": answers,
        "others": others,
        "direction": direction,
        "keys": int(batch.lengths.max()),
    }


def _sources(model: Model, changed: bool) -> dict[str, Any]:
    """The coordinates of the sources, in the order in which they come."""
    rows = [("embed", "embed", -1, -1)]
    if "pos_embed" in model.family.embeddings:
        rows.append(("pos_embed", "embed", -1, -1))
    for layer in model.layers:
        rows += [(f"L{layer}H{head}", "head", layer, head) for head in model.heads]
        rows.append((f"L{layer}.mlp", "mlp", layer, -1))
    rows += [("bias", "bias", -1, -1), *([("intervention", "intervention", -1, -1)] if changed else [])]
    names, kinds, layers, heads = zip(*rows, strict=True)
    return {
        "source": np.asarray(names, dtype=object),
        "kind": ("source", np.asarray(kinds, dtype=object)),
        "layer": ("source", np.asarray(layers)),
        "head": ("source", np.asarray(heads)),
    }


def _sources_inside(model: Model, inside: list[DirectPart], batch: Batch, changed: bool) -> dict[str, Any]:
    """The coordinates of the sources in parts that are looked into, as many keys as the longest prompt has."""
    rows: list[tuple[str, str, int, int, int, int]] = []
    for part in inside:
        layer, head, some = part["layer"], part["head"], part["neurons"]
        if head is not None:
            length = int(batch.lengths.max())
            rows += [(f"L{layer}H{head} from {key}", "key", layer, head, -1, key) for key in range(length)]
            rows += [(f"L{layer}H{head} intervention", "intervention", layer, head, -1, -1)] if changed else []
            continue
        every = range(model.shape.d_mlp) if some is None else some
        rows += [(f"L{layer}N{neuron}", "neuron", layer, -1, neuron, -1) for neuron in every]
        rows += [(f"L{layer}.mlp bias", "bias", layer, -1, -1, -1)] if some is None else []
        rows += [(f"L{layer}.mlp intervention", "intervention", layer, -1, -1, -1)] if some is None and changed else []
    names, kinds, *numbers = zip(*rows, strict=True)
    told = {"source": np.asarray(names, dtype=object), "kind": ("source", np.asarray(kinds, dtype=object))}
    columns = zip(("layer", "head", "neuron", "key"), numbers, strict=True)
    return told | {name: ("source", np.asarray(column)) for name, column in columns}
