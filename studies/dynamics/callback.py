"""A study inside a training run of PyTorch Lightning: `StudyCallback`, which leaves the training as it is."""

from __future__ import annotations

import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed, nn
from transformers import PreTrainedModel

from ...errors import DeclarationError, HeadwiseError, ModelError, ResultWarning, choices
from ...interventions.base.hashing import short_hash
from ...interventions.load import load
from ..storage.files import check_writable
from ..storage.reading import Result
from .schedule import Schedule
from .series import Series
from .study import PREFIX, as_study, copy_of, head_scores, measurable, scalars, series_key

if TYPE_CHECKING:
    from collections.abc import Iterator

WEIGHTS = ("model", "average")
LONG = timedelta(days=30)
"""How long processes wait for the one that measures."""


class StudyCallback(L.Callback):  # type: ignore[misc]
    """Runs a study while a model is trained with PyTorch Lightning, into one NetCDF file with a dim ``step``.

    What is measured is a deep copy of the causal language model in the LightningModule, in evaluation mode, with the
    states of the random generators put back afterwards: the training gives the weights, to the last bit, that it gives
    without. It acts once after an optimiser step, not after each batch that gradients are accumulated over, and not in
    the sanity check or under ``fast_dev_run``. Each result is on the disk before training goes on; a run that is killed
    and resumed from the trainer's checkpoint goes on in the same file. What is held on the model
    (``CausalLM(during=...)``) is taken off the copy.

    Parameters
    ----------
    study : Sweep, InductionStudy or any value with ``run(model)`` and ``to_json()``
    steps : iterable of int
        Optimiser steps done at which it runs, such as ``log_spaced(400, 12)``; 0 is before the first.
    every_n_train_steps, every_n_epochs : int
    train_time_interval : timedelta
        Exactly one of these four is given, as with ``ModelCheckpoint``.
    out : path
        The NetCDF file.
    weights : {"model", "average"}
        ``"average"`` measures what Lightning's ``WeightAveraging`` callback holds.
    model : callable, optional
        ``model(lightning_module)`` gives the causal language model, where there are several, or none is found.
    tokenizer : tokenizer, optional
        For tasks that are text.
    log : bool
        Log scalars as ``headwise/<metric>``, so that ``ModelCheckpoint``, ``EarlyStopping`` and loggers see them: of a
        score of heads the maximum over heads of the mean over examples. Loggers with images get a grid of each score.

    Raises
    ------
    DeclarationError
        None or several of the four are given, or a value is not possible.

    Examples
    --------
    >>> import lightning as L
    >>> sweep = hw.Sweep(hw.RepeatedTokens(n=2, length=8), metrics=[hw.metrics.induction, hw.metrics.loss])
    >>> watch = hw.StudyCallback(sweep, steps=[0, 2], out="formation.nc")
    >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    >>> trainer = L.Trainer(max_steps=2, callbacks=[watch], accelerator="cpu", **quiet)
    >>> trainer.fit(hw.CausalLM.tiny(1, 2, 16), hw.RepeatedTokensData(length=8, batch_size=2))
    >>> hw.open_result("formation.nc")["induction"].sizes["step"]
    2
    """

    def __init__(
        self,
        study: Any,
        *,
        steps: Iterable[int] | None = None,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        out: str | os.PathLike[str],
        weights: str = "model",
        model: Callable[[Any], nn.Module] | None = None,
        tokenizer: Any = None,
        log: bool = True,
    ) -> None:
        super().__init__()
        if weights not in WEIGHTS:
            raise DeclarationError(f"weights={weights!r}: possible are {choices(WEIGHTS)}")
        self.study, self.out, self.weights, self.find, self.tokenizer, self.log_values = (
            as_study(study),
            os.fspath(out),
            weights,
            model,
            tokenizer,
            log,
        )
        self.schedule = Schedule.of(steps, every_n_train_steps, every_n_epochs, train_time_interval)
        self.training = secrets.token_hex(16)
        self.resumed: list[int] | None = None
        self.done: list[int] = []
        self.seen = -1
        self.seconds = 0.0
        self._series: Series | None = None
        self._waiting: Any = None

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks apart in a checkpoint."""
        return f"StudyCallback-{short_hash(self.study.to_json(), self.out)}"

    def state_dict(self) -> dict[str, Any]:
        """Which training this is, and what is done of the study."""
        return {"training": self.training, "done": list(self.done), "out": self.out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the training of a checkpoint."""
        self.training, self.resumed = state["training"], [*state["done"]]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse, before training, a file that cannot be written, or a module without a causal language model."""
        if stage != "fit" or trainer.fast_dev_run:
            return
        self._series = None
        if trainer.is_global_zero:
            check_writable(self.out)
        if self.weights == "average":
            self._average(trainer)
        self._model_in(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up what an interrupted run left, and measure the model as it is where this step is asked for."""
        if trainer.fast_dev_run:
            return
        self._waiting = distributed.new_group(timeout=LONG) if trainer.world_size > 1 else None
        self.training = trainer.strategy.broadcast(self.training)
        self.schedule.begin()
        self.began = time.monotonic()
        self.seen = trainer.global_step
        text = self.study.to_json()
        about = {"study": text, "training": self.training, "weights": self.weights}
        self._series = Series(self.out, series_key(self.study, self.training), about)
        with self._alone(trainer) as mine:
            if mine:
                self.done = self._series.begin(None if self.resumed is None else trainer.global_step)
        self.done = trainer.strategy.broadcast(self.done)  # so that all processes agree on what is measured
        if self.schedule.due_at_start(trainer.global_step):
            self._measure(trainer, pl_module, log="")
        if lost := sorted({*(self.resumed or ())} - {*self.done}):
            which = f"step{'s' if len(lost) > 1 else ''} {choices(map(str, lost))}"
            warnings.warn(
                f"{self.out} lacks {which}: it was measured, and what was kept is gone", ResultWarning, stacklevel=2
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *given: Any) -> None:
        """Measure after an optimiser step, where that is due."""
        if trainer.fast_dev_run or trainer.global_step == self.seen:
            return
        self.seen = trainer.global_step
        due = self.schedule.due_at_step(self.seen)
        if self.schedule.train_time_interval is not None:
            due = trainer.strategy.broadcast(due)
        if due:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure after an epoch, where that is due."""
        if not trainer.fast_dev_run and self.schedule.due_at_epoch(trainer.current_epoch + 1):
            self._measure(trainer, pl_module, log="epoch")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file whole."""
        if trainer.fast_dev_run or self._series is None:
            return
        with self._alone(trainer) as mine:
            if mine and self.done:
                whole = time.monotonic() - self.began
                self._series.about |= {"study_share_of_time": f"{self.seconds / max(whole, 1e-9):.4f}"}
                self._series.finish()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file where a run was killed after its last checkpoint: no step is left, so no training begins."""
        if self._series is None and self.resumed is not None:
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, log: str = "step") -> None:
        """Run the study on a copy of the model as it is, keep the result, and log its scalars."""
        step, begun = trainer.global_step, time.monotonic()
        if step in self.done:
            return
        series = self._series
        assert series is not None  # training has begun
        values: dict[str, float] = {}
        with isolate_rng(), self._copied(trainer, pl_module) as twin, self._alone(trainer) as mine:
            if mine:
                result = self.study.run(load(twin, tokenizer=self.tokenizer), False)
                series.add(step, result)
                values = scalars(result)
                self._draw(trainer, result, step)
            self.done.append(step)
        self.seconds += time.monotonic() - begun
        if self.log_values:
            values = trainer.strategy.broadcast(values) | {f"{PREFIX}seconds": time.monotonic() - begun}
            if log:
                pl_module.log_dict(values, on_step=log == "step", on_epoch=log == "epoch")
            else:
                for logger in trainer.loggers:
                    logger.log_metrics(values, step)

    @contextmanager
    def _alone(self, trainer: L.Trainer) -> Iterator[bool]:
        """True in the one process that measures; the others wait for it, and get its error."""
        if self._waiting is None:
            yield True
            return
        error: list[Any] = [None]
        try:
            yield trainer.is_global_zero
        except Exception as caught:
            error = [caught]
        said = [None if error[0] is None else f"{type(error[0]).__name__}: {error[0]}"]
        distributed.broadcast_object_list(said, src=0, group=self._waiting)
        if error[0] is not None:
            raise error[0]
        if said[0] is not None:
            raise HeadwiseError(f"the study failed in the process that measures: {said[0]}")

    @contextmanager
    def _copied(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[Any]:
        """A deep copy of the model with its weights as they are; None in processes that do not measure."""
        from lightning.pytorch.strategies import FSDPStrategy

        if self.weights == "average":
            pl_module = self._average(trainer)._average_model.module
        source = self._model_in(pl_module)
        if isinstance(trainer.strategy, FSDPStrategy):
            state = trainer.strategy.lightning_module_state_dict()  # all processes take part
            prefix = next(f"{name}." if name else "" for name, one in pl_module.named_modules() if one is source)
        if not trainer.is_global_zero:
            yield None
        elif isinstance(trainer.strategy, FSDPStrategy):
            twin = type(source)(source.config)
            twin.load_state_dict(
                {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            )
            yield measurable(twin)
        else:
            yield copy_of(source)

    def _model_in(self, module: nn.Module) -> PreTrainedModel:
        """The causal language model of a LightningModule."""
        if self.find is not None:
            found = getattr(self.find(module), "_orig_mod", None) or self.find(module)
            if not isinstance(found, PreTrainedModel):
                raise ModelError(
                    f"model=... gives {type(found).__name__}: give the causal language model of transformers"
                )
            return found
        outer: dict[str, PreTrainedModel] = {}
        for name, one in module.named_modules():
            within = any(name.startswith(f"{path}.") or not path for path in outer)
            if isinstance(one, PreTrainedModel) and not within and one.get_output_embeddings() is not None:
                outer[name] = one
        if len(outer) != 1:
            what = f"{type(module).__name__} holds {len(outer)} causal language models of transformers"
            where = f" ({', '.join(outer)})" if outer else ""
            raise ModelError(f"{what}{where}: say which one is measured, model=lambda module: module.net")
        return next(iter(outer.values()))

    def _average(self, trainer: L.Trainer) -> Any:
        """The callback that averages weights."""
        from lightning.pytorch.callbacks import WeightAveraging

        found = [one for one in trainer.callbacks if isinstance(one, WeightAveraging)]
        if not found:
            raise DeclarationError('weights="average": the trainer has no WeightAveraging callback')
        return found[0]

    def _draw(self, trainer: L.Trainer, result: Result, step: int) -> None:
        """Give loggers that take images a grid (layer, head) of each score of heads, from 0 (black) to 1 (white)."""
        for name, values in head_scores(result).items():
            grid = np.repeat(np.repeat(np.clip(values.values, 0, 1), 16, axis=0), 16, axis=1)
            image = np.repeat((255 * grid).astype(np.uint8)[..., None], 3, axis=-1)
            for logger in trainer.loggers if self.log_values else ():
                if hasattr(logger, "log_image"):
                    logger.log_image(f"{PREFIX}{name}", [image], step=step)
                elif hasattr(getattr(logger, "experiment", None), "add_image"):
                    logger.experiment.add_image(f"{PREFIX}{name}", image, step, dataformats="HWC")
