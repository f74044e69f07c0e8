"""A study over checkpoints that are there: `over_checkpoints`, one result with a dim ``step``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ...errors import DeclarationError, ModelError, UnknownNameError, choices, first_line, whole
from ...interventions.load import load
from ...interventions.models.checkpoints import checkpoint_steps
from ...interventions.models.model import Model
from ...interventions.models.turns import making
from ..output.progress import Progress
from ..storage.reading import Result
from .series import Series, joined
from .study import series_key

if TYPE_CHECKING:
    from .study import Study

FOLDER = re.compile(r"checkpoint-(\d+)")
"""How transformers' Trainer calls the folders of its checkpoints."""
Opener = Callable[[], Model]


def over_checkpoints(
    model: str | os.PathLike[str] | Mapping[int, Any] | Sequence[Any],
    study: Study,
    steps: str | Iterable[int] = "all",
    *,
    out: str | os.PathLike[str] | None = None,
    like: str | PreTrainedModel | None = None,
    tokenizer: Any = None,
    resume: bool = True,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Result:
    """Run a study on each checkpoint of a training.

    Parameters
    ----------
    model : str, path, mapping or sequence
        A shipped name with checkpoints (``"words-2l"``), a folder with ``checkpoints.safetensors``, with folders
        ``checkpoint-100`` (of transformers' Trainer) or with Lightning's ``.ckpt`` files, a Hub id with revisions
        ``step1000`` (Pythia); or models, names or folders themselves: a mapping from their steps, or a sequence, whose
        places are the steps. Of ``.ckpt`` files weights are read and nothing is unpickled.
    study : Sweep, InductionStudy or any value with ``run(model)`` and ``to_json()``
    steps : "all" or iterable of int
    out : path, optional
        NetCDF file to write. Each step that is done is kept; the same call again does only what is missing.
    like : str or PreTrainedModel, optional
        For ``.ckpt`` files that `headwise.CausalLM` did not write: a model with their configuration.
    tokenizer : tokenizer, optional
        Replaces that of the checkpoints.
    resume : bool
        False takes nothing from what is there.
    executor : concurrent.futures.Executor, optional
        Runs the passes of each step, see `headwise.measure`.
    progress : callable or bool, optional
        Called with steps done and in all; True and False force a bar on or off.

    Returns
    -------
    Dataset or DataTree
        What the study gives, with ``step`` in front.

    Raises
    ------
    DeclarationError, UnknownNameError
        There are no checkpoints, or none of a step; the text says what there is.
    ModelError
        A checkpoint cannot be read.
    ResultError
        `out` cannot be written.

    Examples
    --------
    >>> sweep = hw.Sweep(hw.RepeatedTokens(n=4, length=8), metrics=[hw.metrics.induction])
    >>> hw.over_checkpoints("words-2l", sweep, steps=[0, 512, 2000])["induction"].sizes["step"]
    3
    """
    name, found = _openers(model, like, tokenizer)
    chosen = _chosen(steps, found)
    series = None
    done: list[int] = []
    if out is not None:
        text = study.to_json()
        series = Series(out, series_key(study, name), {"study": text, "model": name})
        done = series.begin(max(chosen) if resume else None)
    results: dict[int, Result] = {}
    with Progress("checkpoints", progress, unit="checkpoints", total=len(chosen)) as bar:
        for number, step in enumerate(chosen):
            opened = found[step]()
            if series is None or step not in done or series.weights(step) != opened.weight_hash:
                more = {} if executor is None or opened.source is None else {"executor": executor}
                result = study.run(opened, False, **more)
                if series is None:
                    results[step] = result
                else:
                    series.add(step, result)
            bar.update(number + 1, len(chosen))
    return joined(results) if series is None else series.finish(chosen)


def checkpoints_of(model: Any, steps: str | Iterable[int] = "all") -> dict[int, Opener]:
    """What opens the model of each of these steps, see `over_checkpoints`."""
    _, found = _openers(model, None, None)
    return {step: found[step] for step in _chosen(steps, found)}


def _chosen(steps: str | Iterable[int], found: Mapping[int, Opener]) -> list[int]:
    if isinstance(steps, str) and steps == "all":
        return sorted(found)
    if isinstance(steps, str):
        raise DeclarationError(f"steps={steps!r}: give 'all', or numbers such as [0, 512]")
    chosen = sorted({whole(step, "a step") for step in steps})
    missing = [step for step in chosen if step not in found]
    if missing or not chosen:
        raise UnknownNameError(
            f"there is no checkpoint of step {choices(map(str, missing))}: there are {choices(map(str, sorted(found)))}"
        )
    return chosen


def _openers(model: Any, like: Any, tokenizer: Any) -> tuple[str, dict[int, Opener]]:
    """What the training is called, and what opens the model of each step."""
    if isinstance(model, Mapping):
        return "several models", {
            whole(step, "a step"): partial(_opened, one, tokenizer) for step, one in model.items()
        }
    if not isinstance(model, str | os.PathLike):
        if not isinstance(model, Sequence):
            raise DeclarationError(
                f"{model!r}: give a name, a folder, a mapping of steps to models, or a list of models"
            )
        return "several models", {number: partial(_opened, one, tokenizer) for number, one in enumerate(model)}
    folder = Path(model).expanduser()
    if folder.is_dir():
        kept = {
            int(match[1]): one for one in folder.iterdir() if (match := FOLDER.fullmatch(one.name)) and one.is_dir()
        }
        if kept:
            return folder.name, {step: partial(_opened, one, tokenizer) for step, one in kept.items()}
        if files := sorted(folder.rglob("*.ckpt")):
            stepped = {_read(file)["global_step"]: file for file in files}
            return folder.name, {
                step: partial(_from_lightning, file, like, tokenizer) for step, file in stepped.items()
            }
    name = str(model)
    return name, {step: partial(_opened, name, tokenizer, step=step) for step in checkpoint_steps(name)}


def _opened(model: Any, tokenizer: Any, **options: Any) -> Model:
    return model if isinstance(model, Model) else load(model, tokenizer=tokenizer, **options)


def _read(file: Path) -> dict[str, Any]:
    """A checkpoint of Lightning: plain values and tensors, nothing unpickled."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the file makes of it
        raise ModelError(
            f"{file} cannot be read without unpickling objects ({first_line(error)}): save weights only"
        ) from error
    if not isinstance(found, dict) or "state_dict" not in found or "global_step" not in found:
        raise ModelError(f"{file} is no checkpoint of PyTorch Lightning: it lacks state_dict or global_step")
    return found


def _from_lightning(file: Path, like: Any, tokenizer: Any) -> Model:
    found = _read(file)
    config = (found.get("hyper_parameters") or {}).get("model")
    if like is not None:
        config = like.config if isinstance(like, PreTrainedModel) else load(like).module.config
    elif isinstance(config, Mapping) and "model_type" in config:
        config = AutoConfig.for_model(**config)
    else:
        raise DeclarationError(f"{file} does not say which model it holds: give like=, a model with its configuration")
    with making():
        module = AutoModelForCausalLM.from_config(config)
    weights = found["state_dict"]
    own = module.state_dict()
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in weights if name.endswith(first)]
    fitting = [one for one in prefixes if all(one + name in weights or name == "lm_head.weight" for name in own)]
    if not fitting:
        raise ModelError(f"{file} does not hold the weights of {type(module).__name__}, such as {first}")
    given = {name: weights[fitting[0] + name] for name in own if fitting[0] + name in weights}
    if wrong := [name for name, one in given.items() if one.shape != own[name].shape]:
        raise ModelError(
            f"{file} holds {wrong[0]} of shape {tuple(given[wrong[0]].shape)}, {tuple(own[wrong[0]].shape)} is needed"
        )
    module.load_state_dict(given, strict=False)
    return load(module.eval(), tokenizer=tokenizer)
