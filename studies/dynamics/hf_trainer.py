"""The twin of `StudyCallback` for the Trainer of transformers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ...interventions.load import load
from ..storage.files import check_writable
from .schedule import Schedule
from .series import Series
from .study import Study, as_study, copy_of, scalars, series_key


class TrainerStudyCallback(TrainerCallback):  # type: ignore[misc]
    """Runs a study while a model is trained with transformers' Trainer, into one NetCDF file with a dim ``step``.

    As `StudyCallback`: a deep copy is measured once after an optimiser step, and the training is not disturbed. A
    Trainer that goes on from a checkpoint in the same ``output_dir`` goes on in the same file. Of several processes the
    main one measures. Scalars go into ``trainer.state.log_history``.

    Parameters
    ----------
    study : Sweep, InductionStudy or any value with ``run(model)`` and ``to_json()``
    steps : iterable of int
        Optimiser steps done; 0 is before the first.
    every_n_train_steps, every_n_epochs : int
        Exactly one of these three is given.
    out : path
        The NetCDF file.
    tokenizer : tokenizer, optional
        For tasks that are text.

    Raises
    ------
    DeclarationError
        None or several of the three are given, or a value is not possible.

    Examples
    --------
    >>> sweep = hw.Sweep(hw.RepeatedTokens(n=2, length=8), metrics=["induction"])
    >>> watch = hw.TrainerStudyCallback(sweep, steps=hw.log_spaced(100, 5), out="formation.nc")
    >>> sorted(watch.schedule.steps)  # then transformers.Trainer(..., callbacks=[watch])
    [0, 1, 5, 22, 100]
    """

    def __init__(
        self,
        study: Study,
        *,
        steps: Iterable[int] | None = None,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        out: str | os.PathLike[str],
        tokenizer: Any = None,
    ) -> None:
        self.study, self.out, self.tokenizer = as_study(study), os.fspath(out), tokenizer
        self.schedule = Schedule.of(steps, every_n_train_steps, every_n_epochs, None)
        check_writable(self.out)
        self.series: Series | None = None
        self.done: list[int] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **more: Any) -> None:
        """Take up what an interrupted run left, and measure the model as it is where this step is asked for."""
        if not state.is_world_process_zero:
            return
        text = self.study.to_json()
        self.series = Series(self.out, series_key(self.study, os.path.abspath(args.output_dir or "")), {"study": text})
        self.done = self.series.begin(state.global_step or None)
        if self.schedule.due_at_start(state.global_step):
            self._measure(state, more["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **more: Any) -> None:
        """Measure after an optimiser step, where that is due."""
        if self.schedule.due_at_step(state.global_step):
            self._measure(state, more["model"])

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: Any, **more: Any) -> None:
        """Measure after an epoch, where that is due."""
        if self.schedule.due_at_epoch(round(state.epoch or 0)):
            self._measure(state, more["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **more: Any) -> None:
        """Write the file whole."""
        if self.series is not None and self.done:
            self.series.finish()

    def _measure(self, state: TrainerState, model: Any) -> None:
        if self.series is None or state.global_step in self.done:
            return
        begun = time.monotonic()
        with isolate_rng():
            twin = copy_of(getattr(model, "module", model))
            result = self.study.run(load(twin, tokenizer=self.tokenizer), False)
        self.series.add(state.global_step, result)
        self.done.append(state.global_step)
        state.log_history.append(
            {"step": state.global_step, **scalars(result), "headwise/seconds": time.monotonic() - begun}
        )
