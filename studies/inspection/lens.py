"""The logit lens: what the model would say, were the stream of an earlier layer the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError
from ...interventions.declare.sites import Layer
from ...interventions.plan.reads import Inside
from ...metrics.card import Metric
from ...metrics.outputs import RANKED, ranked
from ..measuring.context import check_remote
from ..measuring.labels import check_is_model, coordinates, task_json
from ..measuring.request import Metrics, What, chosen_metrics, set_up
from ..storage.provenance import card_attrs, provenance
from ..tasks.tasks import Task
from .predict import Asked, as_positions, as_task, asked_for, check_top, prompts_as_text, top_tokens
from .under import Under, check_room, under

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ..tasks.batch import Batch


def logit_lens(
    model: Model,
    prompts: Task | str | Sequence[Any],
    *,
    of: str = "stream",
    what: What = None,
    top: int = 10,
    metrics: Metrics | None = None,
    positions: int | Sequence[int] | str | None = None,
    run: str = "clean",
    check: bool = True,
    remote: bool | None = None,
) -> xr.Dataset:
    """The most likely next tokens by each layer's stream, read by the final norm and the unembedding.

    Parameters
    ----------
    model : Model
        From `headwise.load`.
    prompts : Task, str, or sequence of str or of token ids
    of : {"stream", "heads"}
        The stream of each layer, or what each head alone writes: by the final norm as it divides the whole stream, and
        without the norm's bias. The logits of a head are then its shares of the model's, and `prob_of_token` is what
        they alone would say.
    what : Intervention, mapping of names to interventions, sequence of interventions, Grid, or None
        As for `capture`: what the streams, or heads, would say under each intervention.
    top : int
        Tokens, 100 at most.
    metrics : Metric, str, or sequence of these, optional
        Of logits, such as ``"loss"`` and ``"prob"``, of the stream of each layer.
    positions : int, sequence of int, or "all", optional
        Where the next token is asked for, as for `predict`; the scored positions of the task where left out.
    run : str
        The run of the task that is read.
    check, remote
        As for `capture`; of a server, these numbers come back and nothing else.

    Returns
    -------
    Dataset
        ``token`` (text), ``token_id``, ``logit`` and ``prob_of_token``, ``(layer, example, position, rank)``, without
        ``position`` where `positions` is one number; each metric ``(layer, example, position)``. ``layer`` is the layer
        that the stream leaves; -1 is the stream before the first. The last layer gives what the model says. Of heads
        there is a dim ``head`` after ``layer``, and no layer -1. ``read_token(example, position)`` is the token that is
        read there. The dims of `what` come first (none, ``condition``, or the axes of the grid); where ``layer`` or
        ``head`` is an axis of the grid, the lens has ``read_layer`` and ``read_head``.

    Raises
    ------
    DeclarationError, UnknownNameError
        Something that was asked for does not exist or cannot be; raised before any forward pass.
    ModelError, ServerError
        As `capture`.

    Examples
    --------
    >>> lens = hw.logit_lens(hw.load("words-2l"), "apple banana cherry apple", top=3, positions=-1)
    >>> lens["token"].sel(layer=1, rank=0).item()
    'banana'
    >>> heads = hw.logit_lens(hw.load("words-2l"), "apple banana cherry apple", of="heads", top=3, positions=-1)
    >>> heads["token"].dims
    ('layer', 'head', 'example', 'rank')

    What it would say without a head:

    >>> what = {"clean": None, "without L1H2": hw.ZeroAblate("L1H2")}
    >>> lens = hw.logit_lens(hw.load("words-2l"), "apple banana cherry apple", what=what, top=1, positions=-1)
    >>> lens["token"].dims
    ('condition', 'layer', 'example', 'rank')

    References
    ----------
    nostalgebraist 2020, interpreting GPT: the logit lens.
    """
    from ...interventions.begin import begin

    check_is_model(model)
    check_remote(model, remote)
    if of not in ("stream", "heads"):
        raise DeclarationError(f"of={of!r}: possible are 'stream' and 'heads'")
    if of == "heads":
        model.check_sums("logit_lens(of='heads')")
    top, positions = check_top(model, top), None if positions is None else as_positions(positions)
    given = as_task(model, prompts)
    wanted = [] if metrics is None else chosen_metrics(metrics)
    for metric in wanted:
        if metric.kind != "logits":
            raise DeclarationError(f"{metric.name} reads attention patterns: the lens gives logits")
        if metric.needs_base:
            raise DeclarationError(f"{metric.name} compares with the logits of the base run: the lens has none beside")
        if positions is not None:
            raise DeclarationError(f"positions={positions!r}: metrics are of the scored positions: leave it out")
    if positions is None and given.draw(model).sequences:
        raise DeclarationError("an answer has several tokens: say where the next is asked for, such as positions=-1")
    task = given if positions is None else Asked(given, positions, run)
    asked = [*(ranked(name, rank, top) for name in RANKED for rank in range(top)), *wanted]
    request = set_up(model, task, None, asked, base=run, per_position=True, batch_size="auto")
    batch, plan = request.batch, request.plan
    rows = (model.shape.layers, model.shape.heads) if of == "heads" else (model.shape.layers + 1,)
    changed = None if what is None else _under(model, task, what, batch, run, of, rows, asked, positions)
    check_room([rows] * len(asked), 1, batch)
    with begin(model, check=check, length=int(batch.lengths.max())) as call:
        if changed is not None:
            if check:
                changed.check_model(call)
            values = {name.removesuffix(" inside"): one.astype(np.float64) for name, one in changed.values().items()}
        else:
            found = model.backend.lens(plan, request.readers(), request.inputs(task, model), of == "heads")
            values = {metric.name: np.full((*rows, *batch.scored.shape), np.nan) for metric in asked}
            for chunk, one in zip(plan.chunks, found, strict=True):
                group = plan.groups[chunk.group]
                examples = group.examples[slice(*chunk.examples)]
                for name, numbers in one.items():
                    values[name][np.ix_(*map(range, rows), examples, group.scored)] = numbers
    layer, head = ("layer", "head") if changed is None else (changed.named("layer"), changed.named("head"))
    dims = (layer, *((head,) if of == "heads" else ()), "example", "position")
    coords: dict[str, Any] = {
        name: np.arange(size) for name, size in zip(dims, (*rows, *batch.scored.shape), strict=True)
    }
    coords[layer] = coords[layer] if of == "heads" else coords[layer] - 1
    if changed is not None:
        dims, coords = (*changed.dims, *dims), coords | changed.coords
    every = xr.Dataset({name: (dims, one) for name, one in values.items()}, coords=coords)
    places: Any = np.flatnonzero(batch.scored.any(axis=0))
    if isinstance(task, Asked) and isinstance(positions, list):
        places = task.places(int(batch.lengths.min()))  # in the order in which they were asked for
    every = every.isel(position=places)
    if isinstance(positions, int):
        every = every.mean("position")  # one of each prompt has a value
    result = top_tokens(model, every, top).rename(prob="prob_of_token")
    for metric in wanted:
        result[metric.name] = every[metric.name].assign_attrs(card_attrs(metric.card))
    result[layer].attrs["long_name"] = "layer of the head" if of == "heads" else "layer that the stream leaves"
    result = result.assign_coords(prompt=("example", prompts_as_text(model, given, batch, run)))
    if "position" in result.dims:
        read = xr.Dataset(coords=coordinates(model, batch, run))["token"].sel(position=result["position"])
        result = result.assign_coords(read_token=(("example", "position"), read.values))
    names = None if metrics is None else [metric.name for metric in wanted]
    again = asked_for("logit_lens", top=top, of=of, positions=positions, metrics=names)
    own = {"run": run, "task": task_json(given)} | ({} if changed is None else changed.attrs)
    return result.assign_attrs(provenance(model, call.identity) | again | own)


def _under(
    model: Model,
    task: Task,
    what: What,
    batch: Batch,
    run: str,
    of: str,
    rows: tuple[int, ...],
    metrics: Sequence[Metric],
    positions: Any,
) -> Under:
    """The plan of the passes that look through the lens under interventions.

    Parameters
    ----------
    model, task, what, run, of, positions
        As for `logit_lens`.
    batch : Batch
    rows : tuple of int
        Layers, and heads of each.
    metrics : sequence of Metric
        Those of the tokens too.

    Returns
    -------
    Under
    """
    streams = [Layer(0).resid_pre, *(Layer(layer).resid_post for layer in model.layers)]
    heads = [*(Layer(layer).z for layer in model.layers), streams[-1]]
    inside = Inside(of, {f"{metric.name} inside": rows for metric in metrics})
    own = {"token", "prob_of_token", *RANKED, "rank", "example", "prompt", "read_token", *(one.name for one in metrics)}
    own |= set() if isinstance(positions, int) else {"position"}
    return under(model, task, what, batch, run, heads if of == "heads" else streams, inside, own, metrics)
