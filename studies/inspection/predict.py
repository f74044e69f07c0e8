"""What a model says next: its most likely tokens, with and without interventions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xarray as xr

from ...errors import DeclarationError, UnknownNameError, choices, whole
from ...metrics.outputs import RANKED, ranked
from ..measuring.labels import check_is_model, task_json
from ..measuring.measure import measure
from ..measuring.request import What
from ..tasks.batch import Batch
from ..tasks.prompts import Prompts, rendered
from ..tasks.tasks import Task

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]
MOST = 100
"""Tokens at most: each takes three metrics."""


def predict(
    model: Model,
    prompts: Task | str | Sequence[Any],
    what: What = None,
    *,
    top: int = 10,
    positions: int | Sequence[int] | str = -1,
    run: str = "clean",
    check: bool = True,
    remote: bool | None = None,
) -> xr.Dataset:
    """The most likely next tokens.

    Parameters
    ----------
    model : Model
        From `headwise.load`.
    prompts : Task, str, or sequence of str, of messages or of token ids
        Text, several texts, a conversation or several (see `Chat`), lists of token ids, or any task.
    what : Intervention, mapping, sequence, Grid, or None
        As for `measure`; in a mapping, None is the model as it is.
    top : int
        Tokens, 100 at most.
    positions : int, sequence of int, or "all"
        Where the next token is asked for; negative ones count from the end of each prompt.
    run : str
        The run of the task that is read.
    check, remote
        As for `measure`.

    Returns
    -------
    Dataset
        ``token`` (text), ``token_id``, ``logit`` and ``prob``, with the dims of `what`, ``example``, ``position``
        unless `positions` is one number, and ``rank``, 0 for the most likely. Coordinates: ``prompt(example)``, and
        with positions ``read_token(example, position)``, the token that is read there. Beyond the end of a shorter
        prompt text is empty, ``token_id`` -1, and numbers are NaN.

    Raises
    ------
    DeclarationError, UnknownNameError
        Something that was asked for does not exist; raised before any forward pass.
    ModelError, ServerError
        As `measure`.

    Examples
    --------
    >>> said = hw.predict(hw.load("words-2l"), "apple banana cherry apple", top=3)
    >>> said["token"].values.tolist()[0][0]
    'banana'
    """
    check_is_model(model)
    top, positions = check_top(model, top), as_positions(positions)
    task = as_task(model, prompts)
    asked = Asked(task, positions, run)
    batch = asked.draw(model)
    metrics = [ranked(name, rank, top) for name in RANKED for rank in range(top)]
    several = not isinstance(positions, int)
    found = measure(model, asked, what, metrics, base=run, runs=run, per_position=several, check=check, remote=remote)
    result = top_tokens(model, found, top).assign_coords(prompt=("example", prompts_as_text(model, task, batch, run)))
    if not isinstance(positions, int):
        result = result.assign_coords(read_token=(("example", "position"), found["token"].values))
        if not isinstance(positions, str):
            result = result.isel(position=asked.places(int(batch.lengths.min())))
    attrs = {name: value for name, value in found.attrs.items() if name not in ("metrics", "estimator", "base")}
    return result.assign_attrs(
        attrs | asked_for("predict", top=top, positions=positions) | {"task": task_json(task), "run": run}
    )


def asked_for(function: str, **options: Any) -> dict[str, str]:
    """The options of a call as an attribute, called like the function, from which it is done again.

    `headwise.studies.storage.record.LOOKS` names the options that are read back.
    """
    return {function: json.dumps(options, default=lambda one: np.asarray(one).tolist())}


def as_task(model: Model, prompts: Task | str | Sequence[Any]) -> Task:
    """A task as it is; all else as `Prompts`; conversations with what the model's chat template makes of them."""
    return rendered(cast("Task", prompts) if hasattr(prompts, "draw") else Prompts(cast("Any", prompts)), model)


def as_positions(positions: Any) -> int | list[int] | str:
    """A position, a list of them, or "all", as plain values; or an error that says what is possible."""
    several = not isinstance(positions, str | bool | Integral) and isinstance(positions, Iterable)
    given = list(positions) if several else [positions]
    if isinstance(positions, str) and positions == "all":
        return positions
    if not given or any(isinstance(at, bool) or not isinstance(at, Integral) for at in given):
        raise DeclarationError(f"positions={positions!r}: give a position, a list of them, or 'all'")
    return [int(at) for at in given] if several else int(positions)


def check_top(model: Model, top: int) -> int:
    """The number of tokens that are asked for, or an error that says what is possible."""
    top = whole(top, "top, the number of tokens,", low=1, high=MOST)
    if top > model.shape.vocabulary:
        raise DeclarationError(f"top={top}: {model.name} has {model.shape.vocabulary} tokens")
    return top


def top_tokens(model: Model, found: xr.Dataset, top: int) -> xr.Dataset:
    """``token``, ``token_id``, ``logit`` and ``prob``, with the dim ``rank``, from the metrics `ranked`."""
    result = xr.Dataset(coords={"rank": np.arange(top)})
    for name, (card, _) in RANKED.items():
        values = xr.concat([found[f"{name}_{rank}"] for rank in range(top)], "rank").transpose(..., "rank")
        values = values.drop_vars(set(values.coords) - set(values.dims))
        if name == "token_id":
            values = values.fillna(-1).astype(np.int64)
            result["token"] = (
                values.dims,
                text_of_tokens(model, values.values),
                {"long_name": "token, the most likely first"},
            )
        result[name] = values.assign_attrs(long_name=card.long_name, units=card.units)
    return result


def text_of_tokens(model: Model, ids: Array) -> Array:
    """The text of token ids, empty for -1."""
    known, places = np.unique(ids, return_inverse=True)
    words = ["" if one < 0 else text for one, text in zip(known, model.token_text(known.clip(0).tolist()), strict=True)]
    return np.asarray([word.replace("\0", "␀") for word in words], dtype=object)[places.reshape(ids.shape)]


def prompts_as_text(model: Model, task: Task, batch: Batch, run: str) -> Array:
    """The prompts as text: as they were given, or made of their tokens.

    Parameters
    ----------
    model : Model
    task : Task
    batch : Batch
        What it draws.
    run : str

    Returns
    -------
    array (example,) of str
    """
    given = dict(getattr(task, "runs", ())) | {"clean": getattr(task, "prompts", None)}
    rows = zip(batch.runs[run], batch.lengths, strict=True)
    made = [model.tokenizer.decode(tokens[:size].tolist()) for tokens, size in rows]
    texts = [one if isinstance(one, str) else text for one, text in zip(given.get(run) or made, made, strict=True)]
    return np.asarray([text.replace("\0", "␀") for text in texts], dtype=object)


@dataclass(frozen=True)
class Asked:
    """A task of which the next token at some positions is asked for.

    Attributes
    ----------
    task : Task
    positions : int, sequence of int, or "all"
    run : str
    """

    task: Task
    positions: int | Sequence[int] | str
    run: str

    def draw(self, model: Model) -> Batch:
        """The prompts of the task without their answers, asked at these positions."""
        batch = self.task.draw(model)
        if self.run not in batch.runs:
            raise UnknownNameError(f"run={self.run!r}: the task has the runs {choices(batch.runs)}")
        lengths = batch.lengths if batch.prompt_lengths is None else batch.prompt_lengths
        if self.positions != "all":
            self.places(int(lengths.min()))
        if not isinstance(self.positions, int | str) and min(self.positions) < 0 and len(set(lengths)) > 1:
            raise DeclarationError(
                f"positions={self.positions!r}: prompts of different lengths have no common end: give one position, "
                "'all', or positions from 0 on"
            )
        scored = np.zeros((len(lengths), int(lengths.max())), dtype=bool)
        for row, size in enumerate(lengths.tolist()):
            scored[row, range(size) if self.positions == "all" else self.places(int(lengths.min()), size)] = True
        return Batch(
            {name: tokens[:, : scored.shape[1]] for name, tokens in batch.runs.items()},
            lengths,
            scored,
            np.zeros(scored.shape, dtype=np.int64),
            labels=batch.labels,
        )

    def reference(self, model: Model) -> Batch:
        """As of the task."""
        return self.task.reference(model)

    def places(self, shortest: int, size: int | None = None) -> list[int]:
        """The positions in a prompt of `size` tokens, counted from 0."""
        given: Any = [self.positions] if isinstance(self.positions, int) else self.positions
        for at in given:
            if not -shortest <= at < shortest:
                raise DeclarationError(f"positions={self.positions!r}: the shortest prompt has {shortest} tokens")
        return [int(at) % (size or shortest) for at in given]
