"""How induction forms: a small model and its controls are trained from several seeds, and measured all the while."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...errors import LARGEST_SEED, MOST_PROMPTS, MOST_STEPS, DeclarationError, choices, whole
from ...interventions.base.hashing import short_hash
from ...interventions.declare import codec
from ...interventions.declare.sites import Layer
from ...interventions.declare.steering import Knockout
from ...metrics.weights import random_composition
from ..output.progress import Progress
from ..storage import unfinished
from ..storage.provenance import SCHEMA, versions
from ..storage.reading import as_tree, open_result
from ..tasks.tasks import RepeatedTokens
from .formation_changes import changes_of, curves_of
from .formation_findings import conclude
from .formation_look import PLACES, SCORES, Look
from .schedule import log_spaced
from .series import NOBODY

if TYPE_CHECKING:
    from ...interventions.declare.edits import Intervention
    from ..training.data import MixedData

TRAININGS = {
    "main": "two layers or more, nothing is held on the model",
    "one layer": "control: a single layer, in which no head can read what an earlier one wrote",
    "knockout in layer 0": "control: no head of layer 0 attends to the previous position, throughout training",
    "knockout in all layers": "control: no head of any layer attends to the previous position, throughout training",
}
"""What is trained, and why."""


SHIPPED = Path(__file__).with_name("formation.nc")
"""The result of the study as it is by default, which takes long to train."""


@dataclass(frozen=True)
class FormationStudy:
    """When induction forms in training, in which order its parts appear, and without what it does not.

    GPT-2 models with the default initialisation of transformers are trained from several seeds, on sequences of an
    artificial language: in most a part of random length, from a random position on, repeats to the end, where induction
    helps, and in the others nothing repeats, where it does not. Of the tokens that cannot be known only some enter the
    loss, since their noise hides the others. Measured at steps that are spaced by their logarithm, each model as it is
    trained (a control with its knockout): induction, previous-token, duplicate-token and prefix-matching score of every
    head; its attention to the tokens 1 to 4 places behind the earlier copy of a token, and 1 to 4 back; loss and
    accuracy at each position of repeated random tokens; the loss on sequences held out, and from it the
    in-context-learning score (Olsson et al. 2022): the mean loss of the last quarter of the tokens less that of the
    tokens before which nothing can repeat; composition between the heads of layers 0 and 1. From each curve: its change
    point.

    Parameters
    ----------
    layers, heads, width : int
        Of the model; `width` is that of the residual stream.
    vocabulary, context : int
        Token ids, and tokens of a sequence.
    period : (int, int)
        Shortest and longest part that repeats, in tokens.
    lead : int
        Tokens that stand before that part, at most.
    repeats : float
        Share of sequences in which a part repeats.
    exponent, bigrams, skip_bigrams : float
        Of Zipf's law, and the shares of tokens that follow from the one before and from the one two before. For the
        latter a head that attends to the previous position is of use by itself.
    scored : float
        Share of the tokens that cannot be known which enter the loss in training.
    batch : int
        Sequences of a training step.
    learning_rate : float
        Of AdamW. Rises from 0 over `warmup` steps, then stays.
    muon_rate : float, optional
        Learning rate of Muon, for the matrices in blocks; None leaves all to AdamW, with which induction comes later
        and not from every seed.
    warmup, steps : int
        Training steps.
    measured : int
        Steps at which the model is measured, see `headwise.log_spaced`: a third of them are spaced by their logarithm,
        and the others evenly.
    seeds : int
        Trainings of each kind; seed 0, 1, ... gives weights and the order of data.
    n, length : int
        Prompts of repeated random tokens that are measured on, and their half length; as many sequences of each kind
        are held out.
    trainings : tuple of str
        Which of ``main``, ``one layer``, ``knockout in layer 0`` and ``knockout in all layers``.

    Raises
    ------
    DeclarationError
        A value is not possible.

    Examples
    --------
    >>> tiny = dict(heads=2, width=8, vocabulary=16, context=16, period=(3, 6), lead=2, batch=2, n=2, length=4)
    >>> study = hw.FormationStudy(**tiny, steps=8, measured=6, seeds=2, trainings=("main",))
    >>> tree = study.run(progress=False)
    >>> tree["heads"]["induction"].sizes["seed"], hw.FormationStudy.from_json(tree.attrs["study"]) == study
    (2, True)

    References
    ----------
    Olsson et al. (2022), "In-context Learning and Induction Heads".
    """

    layers: int = 2
    heads: int = 2
    width: int = 64
    vocabulary: int = 64
    context: int = 32
    period: tuple[int, int] = (2, 12)
    lead: int = 8
    repeats: float = 0.6
    exponent: float = 0.0
    bigrams: float = 0.0
    skip_bigrams: float = 0.5
    scored: float = 0.1
    batch: int = 32
    learning_rate: float = 4e-3
    muon_rate: float | None = 0.02
    warmup: int = 50
    steps: int = 1200
    measured: int = 30
    seeds: int = 3
    n: int = 16
    length: int = 12
    trainings: tuple[str, ...] = tuple(TRAININGS)

    def __post_init__(self) -> None:
        for name, low, high in (
            *((name, 1, None) for name in ("layers", "heads", "width", "vocabulary", "batch")),
            ("context", 4, None),
            ("warmup", 0, None),
            ("lead", 0, None),
            ("steps", 4, MOST_STEPS),
            ("measured", 6, None),
            ("seeds", 1, LARGEST_SEED),
            ("n", 2, MOST_PROMPTS),
        ):
            value = whole(getattr(self, name), name, low=low, **({} if high is None else {"high": high}))
            object.__setattr__(self, name, value)
        object.__setattr__(self, "period", tuple(self.period))
        object.__setattr__(self, "trainings", tuple(self.trainings))
        if unknown := [name for name in self.trainings if name not in TRAININGS]:
            raise DeclarationError(f"there is no training {unknown[0]!r}: possible are {choices(TRAININGS)}")
        if not self.trainings or len({*self.trainings}) < len(self.trainings):
            raise DeclarationError(f"trainings={self.trainings}: name one at least, and each once")
        if self.layers < 2 and {*self.trainings} & {"main", "knockout in layer 0"}:
            raise DeclarationError("layers=1: of one layer there is the training 'one layer'; give 2 or more")
        if not 0 <= self.repeats <= 1:
            raise DeclarationError(f"repeats={self.repeats}: give the share of sequences in which a part repeats")
        if 2 * self.length > min(self.context, self.vocabulary):
            raise DeclarationError(
                f"length={self.length}: twice as many tokens must fit the context of {self.context} and differ, of "
                f"{self.vocabulary}: length can be 2 to {min(self.context, self.vocabulary) // 2}"
            )
        most = 3 * self.context // 4 - self.lead
        if not (len(self.period) == 2 and 2 <= self.period[0] <= self.period[1] <= most):
            raise DeclarationError(
                f"period={self.period}: give two lengths from 2 up to {most}, three quarters of the context of "
                f"{self.context} less lead={self.lead}, so that the last quarter of its tokens always repeats"
            )
        if self.width % self.heads:
            raise DeclarationError(f"width={self.width} is no multiple of heads={self.heads}")
        if not self.learning_rate > 0:
            raise DeclarationError(f"learning_rate={self.learning_rate}: give a number above 0")
        if self.muon_rate is not None and not self.muon_rate > 0:
            raise DeclarationError(f"muon_rate={self.muon_rate}: give a number above 0, or None for AdamW alone")
        _ = self.task, self.data(0)  # which refuse what they cannot make

    @property
    def task(self) -> RepeatedTokens:
        """The repeated random tokens that heads, loss and accuracy are measured on."""
        return RepeatedTokens(self.n, self.length, score="all")

    @property
    def at(self) -> tuple[int, ...]:
        """The steps at which the model is measured."""
        logs = log_spaced(self.steps, max(self.measured // 3, 3))
        even = np.linspace(0, self.steps, self.measured - len(logs) + 2).round().astype(int)
        return tuple(sorted({*logs, *even.tolist()}))

    def data(self, seed: int) -> MixedData:
        """The sequences of a training.

        Parameters
        ----------
        seed : int

        Returns
        -------
        MixedData
            Sequences in which a part repeats, and sequences in which nothing does.
        """
        from ..training.data import MixedData
        from ..training.repeats import ZipfData

        alike: dict[str, Any] = {
            "vocabulary": self.vocabulary,
            "exponent": self.exponent,
            "bigrams": self.bigrams,
            "skip_bigrams": self.skip_bigrams,
            "lead": self.lead,
            "scored": self.scored,
            "seed": seed,
        }
        size = self.steps * self.batch
        parts = [ZipfData(self.context, period=period, size=size, **alike) for period in (self.period, None)]
        weights = [self.repeats, 1 - self.repeats]
        return MixedData(parts, weights, batch_size=self.batch, size=size, seed=seed)

    def held(self, training: str, length: int) -> Intervention | None:
        """What is held on the model in a training: attention to the previous position, knocked out.

        Parameters
        ----------
        training : str
        length : int
            Tokens of the sequences; the first keeps the only key that it has.
        """
        layers = {"knockout in layer 0": range(1), "knockout in all layers": range(self.layers)}.get(training, range(0))
        each = [Knockout(Layer(layer), query=at, key=at - 1) for layer in layers for at in range(1, length)]
        return sum(each[1:], each[0]) if each else None

    def shipped(self) -> xr.DataTree | None:
        """The result that comes with headwise: that of the study as it is by default; None for any other."""
        if not SHIPPED.is_file():
            return None
        tree = as_tree(open_result(SHIPPED, load=True))
        return tree if FormationStudy.from_json(tree.attrs["study"]) == self else None

    def run(
        self,
        progress: Callable[[int, int], None] | bool | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        resume: bool = True,
    ) -> xr.DataTree:
        """Train every model from every seed, and measure all the while.

        Parameters
        ----------
        progress : callable or bool, optional
            Called with measured steps done and in all; True and False force a bar on or off.
        out : path, optional
            NetCDF file to write. Until it is whole, each training that is done is kept beside it, and the same call
            again does only what is missing.
        resume : bool
            False takes nothing from what is there.

        Returns
        -------
        DataTree
            ``heads``: scores ``(training, seed, step, layer, head)``; ``behaviour``: loss and accuracy by position;
            ``composition``; ``curves``: what change points are taken of, ``(training, seed, step[, example])``;
            ``changes``: change points, their intervals and order. The conclusion as JSON text in the attributes.

        Raises
        ------
        ResultError
            `out` cannot be written.

        Notes
        -----
        Trainings use one thread of torch, so that on one machine the same study gives the same numbers.
        """
        begun = time.monotonic()
        with Progress("training", progress, unit="measured steps", total=self._looks) as bar:
            if out is None:
                return self._finished(self._trained(bar, lambda key, make: make()), begun)
            with unfinished.keeping(out, resume) as kept:
                inputs = short_hash(self.to_json(), versions())
                if (there := kept.finished(inputs, NOBODY)) is not None:
                    return there
                kept.describe({"title": self.title, "study": self.to_json()}, NOBODY)
                parts = self._trained(bar, lambda key, make: kept.stage(f"{inputs}-{key}", make, NOBODY))
                tree = self._finished(parts, begun)
                tree.attrs["inputs"] = inputs
                kept.finish(tree)
                return tree

    @property
    def _looks(self) -> int:
        return len(self.at) * self.seeds * len(self.trainings)

    def _trained(self, bar: Progress, keep: Callable[[str, Callable[[], xr.Dataset]], xr.Dataset]) -> xr.Dataset:
        """What was measured, with dims training and seed in front."""
        rows, done = [], 0
        for number, training in enumerate(self.trainings):
            each = []
            for seed in range(self.seeds):
                begin = done
                tell = partial(lambda begin, count: bar.update(begin + count, self._looks), begin)
                each.append(keep(f"{number}-{seed}", partial(self._train, training, seed, tell)))
                done += len(self.at)
                bar.update(done, self._looks)
            rows.append(xr.concat(each, xr.DataArray(range(self.seeds), dims="seed", name="seed"), data_vars="all"))
        names = xr.DataArray(np.asarray(self.trainings, dtype=object), dims="training", name="training")
        return xr.concat(rows, names, data_vars="all", join="outer", combine_attrs="override", coords="minimal")

    def _train(self, training: str, seed: int, tell: Callable[[int], None]) -> xr.Dataset:
        """Train one model, and measure it at each step."""
        import lightning as L

        from ..training.causal_lm import CausalLM
        from .callback import StudyCallback

        module = CausalLM.tiny(
            1 if training == "one layer" else self.layers,
            self.heads,
            self.width,
            vocabulary=self.vocabulary,
            context=self.context,
            seed=seed,
            learning_rate=self.learning_rate,
            muon_rate=self.muon_rate,
            warmup_steps=self.warmup,
            during=self.held(training, self.context),
        )
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
            file = Path(folder) / "training.nc"
            watch = StudyCallback(Look(self, training, tell), steps=self.at, out=file, log=False)
            off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
            with _quiet(), _one_thread():
                trainer = L.Trainer(
                    max_steps=self.steps,
                    accelerator="cpu",
                    devices=1,
                    callbacks=[watch],
                    gradient_clip_val=1.0,
                    default_root_dir=folder,
                    **dict.fromkeys(off, False),
                )
                trainer.fit(module, self.data(seed))
            found = open_result(file, load=True)
        assert isinstance(found, xr.Dataset)
        return found.drop_vars([name for name in found.data_vars if str(name).startswith("step_")]).drop_attrs(
            deep=False
        )

    def _finished(self, measured: xr.Dataset, begun: float) -> xr.DataTree:
        """The tree: what was measured, by topic, and what follows from it."""
        measured = _described(measured)
        heads = measured[[*SCORES, *PLACES]].mean("example", keep_attrs=True)
        groups = {"heads": heads.assign_attrs(long_name="scores of every head")}
        starts = {"long_name": "loss and accuracy by position", "repeat_starts": self.length}
        behaviour = measured[["loss", "accuracy"]].mean("example", keep_attrs=True)
        held_out = measured["held_out_loss"].mean("example", keep_attrs=True)
        groups["behaviour"] = behaviour.assign_attrs(starts)
        groups["held_out"] = held_out.to_dataset().assign_attrs(long_name="loss on sequences held out, by position")
        if "composition" in measured:
            floor = random_composition(self.width, self.width // self.heads)
            kinds = [str(kind) for kind in measured["kind"].values]
            words = {"long_name": "composition score of random weights", "units": "1"}
            made = measured[["composition"]].assign(
                floor_mean=("kind", [floor[kind][0] for kind in kinds], words),
                floor_sd=("kind", [floor[kind][1] for kind in kinds], words | {"long_name": "its standard deviation"}),
            )
            groups["composition"] = made.assign_attrs(long_name="composition of heads of layer 0 into those of layer 1")
        groups["curves"] = curves_of(measured, self).assign_attrs(long_name="what change points are taken of")
        groups["changes"] = changes_of(groups["curves"]).assign_attrs(long_name="when each curve changes")
        tree = xr.DataTree.from_dict({f"/{name}": _small(ds) for name, ds in groups.items()})
        tree.attrs = {
            "Conventions": "headwise",
            "schema_version": SCHEMA,
            "title": self.title,
            "model": f"GPT-2 with {self.layers} layers, trained here",
            "model_revision": "memory",
            "study": self.to_json(),
            "task": codec.to_json(self.task, {"RepeatedTokens": RepeatedTokens}),
            "device": "cpu",
            "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "versions": versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - begun, 1),
        }
        tree.attrs["conclusion"] = json.dumps([asdict(finding) for finding in conclude(tree)])
        return tree

    @property
    def title(self) -> str:
        """Of the result."""
        return f"How induction forms in a GPT-2 of {self.layers} layers"

    def to_json(self) -> str:
        """The study as JSON text."""
        return codec.to_json(self, {"FormationStudy": FormationStudy})

    @classmethod
    def from_json(cls, text: str) -> FormationStudy:
        """The study that `to_json` wrote."""
        study = codec.from_json(text, {"FormationStudy": cls})
        if not isinstance(study, cls):
            raise DeclarationError("this JSON does not hold a FormationStudy")
        return study


WORDS = {
    "induction": ("induction score", "1"),
    "previous_token": ("previous-token score", "1"),
    "duplicate_token": ("duplicate-token score", "1"),
    "prefix_matching": ("prefix-matching score", "1"),
    "behind": ("attention to a token behind the earlier copy", "1"),
    "back": ("attention to a token before", "1"),
    "distance": ("places behind the earlier copy, or back", "1"),
    "loss": ("next-token cross-entropy", "nat"),
    "accuracy": ("accuracy", "1"),
    "held_out_loss": ("next-token cross-entropy", "nat"),
    "composition": ("composition score", "1"),
    "step": ("step of training", "1"),
}
"""What each variable is, and its unit."""


def _described(measured: xr.Dataset) -> xr.Dataset:
    found = measured.copy()
    for name, (words, unit) in WORDS.items():
        if name in found.variables:
            found[name].attrs = {"long_name": words, "units": unit}
    return found


def _small(ds: xr.Dataset) -> xr.Dataset:
    """A dataset in half the bytes, compressed when it is written."""
    for name, values in ds.data_vars.items():
        if values.dtype == np.float64 and values.size > 1000:
            ds = ds.assign({name: values.astype(np.float32)})
        if values.ndim > 2 and values.dtype.kind == "f":
            ds[name].encoding = {"zlib": True, "complevel": 5}
    return ds


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch uses one thread meanwhile: sums are then the same for every number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _quiet:
    """Lightning says nothing meanwhile."""

    def __enter__(self) -> None:
        import logging

        self.loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
        self.levels = [one.level for one in self.loggers]
        for one in self.loggers:
            one.setLevel(logging.ERROR)

    def __exit__(self, *given: object) -> None:
        for one, level in zip(self.loggers, self.levels, strict=True):
            one.setLevel(level)
