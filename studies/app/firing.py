"""The model behind a result, opened once for all sessions, and what its heads do on a prompt. Knows no Panel."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import DeclarationError, HeadwiseError, ModelError
from ...interventions.declare import codec
from ...interventions.declare.edits import Compose, ZeroAblate
from ...interventions.declare.sites import Head, Layer
from ...interventions.models.identity import Identity
from ...interventions.models.locate import HUB_ID
from ..analyses.behaviour import SHOWN_LENGTH
from ..inspection.predict import predict
from ..measuring.capture import capture
from ..storage.record import Record
from ..storage.registry import TASKS
from ..tasks.prompts import Prompts
from ..tasks.tasks import RepeatedTokens, Task

if TYPE_CHECKING:
    from ...interventions.models.model import Model

LONGEST = 128
"""Tokens of a prompt whose patterns are drawn: more cannot be read, and patterns grow with the square."""
LETTERS = 4000
"""Letters of a prompt that are read at all."""
CELLS = 2**24
"""Weights of a prompt, of all heads, that are held for a page."""
WAITING = 20
"""Prompts that may run, or wait for a model, at once."""
PROMPTS = 3
"""Prompts of the study whose patterns can be looked at."""
FIRES = {
    "prefix_matching": "after an earlier copy of the token (induction)",
    "previous_token": "the token before",
    "first_token": "the first token",
    "self": "the token itself",
}
LIKELY, PARTS_OUT = 8, 20
"""Next tokens that are shown, and parts that can be left out."""
TOKEN = "token"
"""Beside `FIRES`: the largest attention that any later token pays to one that is chosen."""


class Models:
    """Models by name, revision and step that results give them, each opened once, when it is first needed.

    Parameters
    ----------
    instead : str, optional
        Shipped name, Hub id or folder of the model to use whatever the files name.
    revision, step : optional
        Of that model, as for `headwise.load`.
    """

    def __init__(self, instead: str | None = None, *, revision: str | None = None, step: int | None = None) -> None:
        self.instead, self._options = instead, {"revision": revision, "step": step}
        self._lock = threading.Lock()
        self._models: dict[tuple[Any, ...], Model] = {}
        self._line = threading.BoundedSemaphore(WAITING)

    def ready(self, name: str) -> bool:
        """Whether it is open already, or ships with headwise and opens in a moment."""
        from ...interventions.models.locate import shipped

        wanted = self.instead or name
        return wanted in shipped() or any(wanted == key[0] for key in self._models)

    @contextmanager
    def using(self, attrs: Mapping[Any, Any]) -> Iterator[Model]:
        """The model of a result with these attributes; an error where too many threads use one or wait for one."""
        record = Record.from_attrs(attrs)
        if not self._line.acquire(blocking=False):
            raise ModelError(f"{WAITING} prompts wait for a model already: try again in a moment")
        try:
            yield self.get(record)
        finally:
            self._line.release()

    def get(self, record: Record) -> Model:
        """The model of a result; may take long, and is opened once, however many threads ask.

        A result names a shipped model or a Hub id. What looks like a path, or is a folder here, is refused: a file
        must not make the app open what lies outside its folder. Where a result ran on a server, the model stays there,
        unless it ships with headwise; which server, nnsight's settings say, not the file.

        Raises
        ------
        ModelError
            It cannot be had, in words.
        """
        from ...interventions.load import load
        from ...interventions.models.locate import shipped

        wanted = self.instead or record.model
        here = wanted in shipped()
        if self.instead is None and not here and not _is_on_hub(record):
            raise ModelError(
                f"the model {wanted or '(not named)'} was in a folder or in memory, and a result does not say "
                "where: start the app with --model FOLDER to see heads fire live"
            )
        options: dict[str, Any] = self._options
        if self.instead is None:
            options = {name: value for name, value in record.opening.items() if name == "step" or not here}
        elsewhere = self.instead is None and not here and bool(record.server)
        key = (wanted, elsewhere, *options.items())
        with self._lock:
            if key not in self._models:
                self._models[key] = load(wanted, remote=elsewhere, **options)
            return self._models[key]


def _is_on_hub(record: Record) -> bool:
    named = HUB_ID.fullmatch(record.model) is not None
    return named and record.revision not in ("local", "memory", "") and not Path(record.model).exists()


def _differs(model: Model, attrs: Mapping[Any, Any], captured: Mapping[Any, Any]) -> str:
    then, now = (Identity.from_attrs(one) for one in (attrs, captured))
    differ = then.differences(now, "in the file", "here", but=("attention",))
    if not differ:
        return ""
    return f"This {model.name} is not the model of the file, so patterns may differ: {differ[0]}."


@dataclass(frozen=True, eq=False)
class Firing:
    """What every head attends to on some prompts of one length or several.

    Attributes
    ----------
    patterns : DataArray (example, layer, head, query, key)
        NaN beyond the end of shorter prompts.
    tokens : list of list of str
        The tokens of each prompt.
    ids : list of array
        Their ids.
    differs : str
        In words, where the model is not the one that the numbers of the file came from; empty where it is.
    """

    patterns: xr.DataArray
    tokens: list[list[str]]
    ids: list[np.ndarray[Any, Any]]
    differs: str = ""

    def has(self, head: Head) -> bool:
        """Whether the model has such a head."""
        return head.layer in self.patterns["layer"].values and head.head in self.patterns["head"].values

    def pattern(self, head: Head, example: int = 0) -> xr.Dataset:
        """The pattern of one head on one prompt, as `headwise.studies.plots.attention` takes it."""
        size = len(self.tokens[example])
        here = self.patterns.isel(example=example).sel(layer=head.layer, head=head.head)
        here = here.isel(query=slice(size), key=slice(size)).drop_vars(("layer", "head", "example"), errors="ignore")
        return xr.Dataset(
            {"pattern": here.expand_dims(shown=[str(head)]).assign_attrs(long_name="attention", units="1")},
            coords={"token": ("position", np.asarray(self.tokens[example], dtype=object))},
        )

    def score(self, name: str, token: int | None = None) -> xr.DataArray:
        """How strongly each head fires on the first prompt.

        Parameters
        ----------
        name : str
            Of `FIRES`: the score of that name, see `headwise.metrics.attention`; or ``token``: the largest attention
            that a later token pays to the one at position `token`.
        token : int, optional

        Returns
        -------
        DataArray (layer, head)
            NaN where nothing in the prompt is of that kind.
        """
        size = len(self.tokens[0])
        here = self.patterns.isel(example=0, query=slice(size), key=slice(size)).transpose("layer", "head", ...)
        if name == TOKEN:
            at = int(token or 0)
            later = here.isel(query=slice(at + 1, size), key=at)
            best = later.max("query") if at + 1 < size else later.sum("query") * np.nan
            return best.drop_vars("key", errors="ignore").assign_attrs(
                long_name=f"largest attention to {self.tokens[0][at].strip()!r}", units="1"
            )
        metric = _metrics()[name]
        import torch

        from ...metrics.card import PromptFacts

        arguments = {
            key: torch.from_numpy(np.array(part))
            for key, part in metric.prepare(PromptFacts(self.ids[0][None])).items()
        }
        rows = torch.from_numpy(np.ascontiguousarray(here.values))
        arguments = {key: part.expand(len(rows), *part.shape[1:]) for key, part in arguments.items()}
        found = metric.kernel(rows, **arguments).numpy()
        coords = {dim: here[dim] for dim in ("layer", "head")}
        attrs = {"long_name": metric.card.long_name, "units": metric.card.units}
        return xr.DataArray(found, coords, ("layer", "head"), name=name, attrs=attrs)


def _metrics() -> dict[str, Any]:
    from ...metrics import attention

    known = (attention.prefix_matching, attention.previous_token, attention.first_token, attention.self_attention)
    return {metric.name: metric for metric in known}


def check_prompt(text: str) -> None:
    """Refuse a prompt without a word, and one that is too long to be looked at."""
    if not text.strip():
        raise DeclarationError("type a prompt first: a few words, one of them twice")
    if len(text) > LETTERS:
        raise DeclarationError(f"this prompt has {len(text)} letters: at most {LETTERS} are read")


def fire(model: Model, text: str, attrs: Mapping[Any, Any] | None = None) -> Firing:
    """What every head attends to on a prompt as it is typed.

    Parameters
    ----------
    model : Model
    text : str
    attrs : mapping, optional
        Attributes of the file that the model is compared with.

    Raises
    ------
    DeclarationError
        The prompt is empty, a single token, too long, or has a word that the model does not know.
    """
    check_prompt(text)
    size = len(model.encode(text))
    if size == 1:
        raise DeclarationError("this prompt is one token, which can only attend to itself: type two or more")
    longest = longest_of(model)
    if size > longest:
        raise DeclarationError(f"this prompt has {size} tokens: at most {longest} can be shown")
    return _fire(model, Prompts((text,)), attrs or {})


def likely(model: Model, text: str, without: str) -> xr.Dataset:
    """The likeliest next tokens after a prompt: of the model as it is, and with zeros in the place of some parts.

    Parameters
    ----------
    model : Model
    text : str
    without : str
        Heads, neurons or sites with commas between them, such as ``L0H3, L1.mlp_out``; empty for none.

    Returns
    -------
    Dataset
        As `headwise.predict`, with the dim ``condition``.

    Raises
    ------
    DeclarationError, UnknownNameError
        The prompt cannot be run, or the model has no such part.
    """
    check_prompt(text)
    names = [name for name in re.split(r"[,;\s]+", without) if name]
    if len(names) > PARTS_OUT:
        raise DeclarationError(f"{len(names)} parts are to be left out: {PARTS_OUT} at most")
    what: dict[str, Any] = {"as it is": None}
    if names:
        edits = [ZeroAblate(name) for name in dict.fromkeys(names)]
        what[f"without {', '.join(dict.fromkeys(names))}"] = edits[0] if len(edits) == 1 else Compose(*edits)
    return predict(model, Prompts((text,)), what, top=min(LIKELY, model.shape.vocabulary))


def longest_of(model: Model) -> int:
    """Tokens of a prompt of which the patterns of all heads can be held for a page."""
    heads = model.shape.layers * model.shape.heads
    return min(LONGEST, model.shape.context, math.isqrt(CELLS // heads))


def fire_study(model: Model, tree: xr.DataTree, short: bool = False) -> Firing:
    """What every head attends to on the first prompts that a file was measured on.

    Parameters
    ----------
    model : Model
    tree : DataTree
    short : bool
        On the one short prompt instead whose patterns a study keeps.

    Raises
    ------
    DeclarationError
        The file does not say what its prompts were, or they are too long to be drawn.
    """
    text = next((str(node.attrs["task"]) for node in tree.subtree if node.attrs.get("task")), "")
    try:
        task = codec.from_json(text, TASKS)
        return _fire(model, _first(task, short), tree.attrs)
    except (HeadwiseError, ValueError) as error:
        raise DeclarationError(f"the prompts of this file cannot be shown: {error}") from error


def _first(task: Any, short: bool) -> Task:
    if isinstance(task, RepeatedTokens):
        return (
            replace(task, n=1, length=min(task.length, SHOWN_LENGTH))
            if short
            else replace(task, n=min(task.n, PROMPTS))
        )
    if isinstance(task, Prompts):
        return Prompts(task.prompts[:PROMPTS], bos=task.bos)
    raise DeclarationError(f"no prompts are known of {type(task).__name__}")


def _fire(model: Model, task: Task, attrs: Mapping[Any, Any]) -> Firing:
    batch = task.draw(model)
    longest = longest_of(model)
    if batch.lengths.max() > longest:
        raise DeclarationError(f"prompts of {batch.lengths.max()} tokens: at most {longest} can be shown")
    captured = capture(model, task, [Layer(layer).pattern for layer in model.layers])
    layers = [captured[f"L{layer}_pattern"] for layer in model.layers]
    joined = xr.concat(layers, xr.DataArray(list(model.layers), dims="layer", name="layer"), combine_attrs="drop")
    tokens = [
        [str(one) for one in row[:size]] for row, size in zip(captured["token"].values, batch.lengths, strict=True)
    ]
    ids = [row[:size] for row, size in zip(batch.runs["clean"], batch.lengths, strict=True)]
    patterns = joined.transpose("example", "layer", "head", "query", "key")
    return Firing(patterns, tokens, ids, _differs(model, attrs, captured.attrs))
