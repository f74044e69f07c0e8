"""A model that a server has: opened here without weights, run there. Owns `RemoteModel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from nnsight.modeling import huggingface
from nnsight.modeling.transformers import TransformersModel
from transformers import AutoConfig, AutoTokenizer

from ..errors import ModelError
from . import book, served
from .digest import data_hash, short_hash
from .family import HeadWeights, check_fits, family_of
from .models import Model
from .native import described, point_of
from .office import Failed, Job, Office
from .ops import columns
from .places import why
from .sites import Site
from .wire import unpacked

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False, repr=False)
class RemoteModel(Model):
    """A model of a server. What it is asked to do is sent there, and only numbers come back.

    Attributes
    ----------
    office : Office
        Sends jobs.
    commit : str
        Of the configuration on the Hub; else as `revision`.
    """

    office: Office = field(kw_only=True)
    commit: str = field(kw_only=True)
    remote: ClassVar[bool] = True

    @property
    def device(self) -> torch.device:
        """Where what is sent is made: the CPU of this machine."""
        return torch.device("cpu")

    @property
    def facts(self) -> dict[str, Any]:
        """What the server says of its copy; asked for once, and written down beside a result that is being made."""
        if not self._hashed:
            self._hashed.update(self._asked())
        return self._hashed

    @property
    def dtype(self) -> str:
        """Number format of the weights on the server."""
        return str(self.facts["dtype"])

    @property
    def place(self) -> str:
        """Kind of device on the server."""
        return str(self.facts["device"])

    @property
    def executed(self) -> str:
        """The server."""
        return self.office.host

    @property
    def weight_hash(self) -> str:
        """A hash of names, shapes and a sample of the numbers of all weights (``sample:`` and 16 hexadecimal digits).

        Made on the server, which cannot be asked to read all of a large model. A server that runs what it is sent apart
        from the weights gives none: then it is a hash of the model's name and revision (``revision:`` and 16 digits).
        """
        return str(self.facts["weights"])

    @property
    def has_gradients(self) -> bool:
        """Not where a server runs jobs apart from the weights."""
        return self.weight_hash.startswith("sample:")

    def head_weights(self, layer: int) -> HeadWeights:
        """Not here."""
        raise ModelError(f"the weights of {self.name} are on {self.office.host}: composition_scores is computed there")

    def ask(self, what: str, function: Callable[..., Any], program: dict[str, Any]) -> Any:
        """What one job gives. It stays written down: only the caller knows when what it gave is safe."""
        job = self.job(what, function, program)
        for _, result in self.office.run([job]):
            if isinstance(result, Failed):
                raise self.office.failure(result)
        return result

    def job(self, what: str, function: Callable[..., Any], program: dict[str, Any]) -> Job:
        """A job; `what` is for those who look at the server."""
        whole = {"parts": described(self), **program}
        key = data_hash([what, self.office.model_key, function, whole])
        return Job(key, function, {**whole, "key": key, "what": what})

    def _asked(self) -> dict[str, str]:
        key = "model-" + short_hash(self.office.host, self.office.model_key)
        kept = book.current()
        record = kept.job(key)
        if record is None:
            found = self.ask("facts", served.facts, {})
            named = f"revision:{short_hash(self.office.model_key, self.commit)}"
            weights = f"sample:{data_hash(found['prints'])}" if found["prints"] else named
            record = {"dtype": found["dtype"], "device": found["device"] or "server", "weights": weights}
            kept.note_job(key, record)
        return {name: str(value) for name, value in record.items()}

    def capture(self, sites: Sequence[Site], tokens: Sequence[Array]) -> list[list[torch.Tensor]]:
        """The values of sites for each group of prompts."""
        asked = [self._site(site) for site in sites]
        program = {"sites": asked, "tokens": [torch.as_tensor(np.ascontiguousarray(one)) for one in tokens]}
        result = self.ask("capture", served.activations, program)
        return [list(values.values()) for values in unpacked(result)]

    def _site(self, site: Site) -> Any:
        """A site as `served.activations` takes it."""
        shape, component, head = self.shape, site.component, site.head
        sizes = (shape.heads, shape.d_head, shape.kv_heads)
        at = None if site.positions is None else list(site.positions)
        kind = str(component)
        cols: Any = columns(component, head, *sizes)
        count = shape.kv_heads if component.of_keys else shape.heads
        if kind == "pattern":
            key_head = None if head is None else shape.key_head(head)
            turned = (columns("q_rot", head, *sizes), columns("k_rot", key_head, *sizes))
            layer = site.layer
            return (
                kind,
                point_of(site),
                (*turned, shape.d_head, self.scaling(layer), shape.window(layer)),
                count,
                head,
                at,
            )
        kind = kind if kind == "head_out" else "heads" if component.per_head else "whole"
        return (kind, point_of(site), cols, count, head, at)

    def score_weights(self, score: Callable[[list[list[Array | None]]], Array]) -> Array:
        """``score(layers)`` of the weights of all heads, computed on the server; `score` is a plain function."""
        table: Array = self.ask("weights", served.scores_of_weights, {"score": score})["table"].numpy()
        return table

    def __repr__(self) -> str:
        where = "NDIF" if self.office.host.endswith("ndif.us") else "a server of NDIF's kind"
        return (
            f"<Model {self.name} ({self.revision}): {self.family.name}, {self.shape.layers} layers of "
            f"{self.shape.heads} heads, runs on {where}, {self.office.host}>"
        )


def open_model(name: str, where: str, place: str, tokenizer: Any) -> RemoteModel:
    """A model without weights: configuration and tokenizer from the Hub, or from a folder that the server has too."""
    hub = {"revision": place} if place not in ("main", "local", "shipped") else {}
    if place in ("local", "shipped"):
        from pathlib import Path

        where = str(Path(where).resolve())
        huggingface._ID_CACHE[where] = where  # a folder has no id on the Hub: the server finds it by its path
    try:
        config = AutoConfig.from_pretrained(where, **hub)
        family = family_of(config, name)
        tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(where, **hub)
        traced = TransformersModel(where, task="text-generation", tokenizer=tokenizer, **hub)
    except ModelError:
        raise
    except Exception as error:  # whatever the loaders raise
        raise ModelError(why(name, where, error)) from error
    commit = getattr(config, "_commit_hash", None) or place
    check_fits(family, traced._module, name)
    office = Office(traced, name)
    return RemoteModel(name, place, family, family.shape(config), tokenizer, traced, office=office, commit=commit)
