"""Weights of a model as they were at a step of its training. Imports locate and errors; torch only to read weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from ...errors import ModelError, UnknownNameError
from .locate import locate

if TYPE_CHECKING:
    import torch

CHECKPOINTS = "checkpoints.safetensors"
"""Beside the weights in a folder: all checkpoints, keys ``step000512/NAME``; the metadata entry ``steps`` is JSON."""
PYTHIA = re.compile(r"EleutherAI/pythia-[0-9].*")
PYTHIA_STEPS = (0, *(2**power for power in range(10)), *range(1000, 143_001, 1000))
"""Each is a revision, such as ``step1000``; the last is ``main``."""
NAMED = re.compile(r"(?:global_?)?(?:step|checkpoint)[-_]?(\d+)")


def checkpoint_steps(source: str | Path) -> list[int]:
    """The steps of training at which `load` can open a model.

    Parameters
    ----------
    source : str or Path
        A shipped name, a folder with ``checkpoints.safetensors`` beside the weights, or a Hub id of Pythia.

    Returns
    -------
    list of int
        In ascending order.

    Raises
    ------
    ModelError
        There is no such model, or it has no checkpoints that headwise knows of.

    Examples
    --------
    >>> steps = hw.checkpoint_steps("words-2l")
    >>> len(steps), steps[:3], steps[-1]
    (23, [0, 8, 16], 2000)
    """
    name, where, place = locate(str(source))
    if place == "main":
        if not PYTHIA.fullmatch(name):
            raise ModelError(
                f"headwise does not know which revisions of {name} are steps of its training (it does of "
                f'EleutherAI/pythia-*): name a revision, load("{name}", revision=...)'
            )
        return list(PYTHIA_STEPS)
    if not (Path(where) / CHECKPOINTS).is_file():
        raise ModelError(f"there is no {CHECKPOINTS} in {name}, which would hold its weights at steps of its training")
    try:
        with safe_open(Path(where) / CHECKPOINTS, "pt") as file:
            return sorted(int(step) for step in json.loads(file.metadata()["steps"]))
    except Exception as error:  # whatever a broken file makes its reader raise
        raise ModelError(f"cannot read {CHECKPOINTS} of {name}: {error}") from error


def check_step(source: str, step: int) -> None:
    """Refuse a step that a model has no checkpoint of; the text says which there are."""
    steps = checkpoint_steps(source)
    if step not in steps:
        raise UnknownNameError(f"{source} has no checkpoint of step {step}: there are {_listed(steps)}")


def _listed(steps: list[int]) -> str:
    """Steps in words."""
    if steps == list(PYTHIA_STEPS):
        return "0, 1, 2, 4, 8 to 512 (powers of 2), and 1000, 2000 to 143000 (thousands)"
    return ", ".join(map(str, steps))


def weights_at(folder: str | Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint beside the weights in a folder, by name."""
    prefix = f"step{step:06d}/"
    with safe_open(Path(folder) / CHECKPOINTS, "pt") as file:
        return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118


def revision_and_step(revision: str, step: int | None) -> str:
    """Both as a text: ``shipped, step 512``; a revision that names its step stands alone."""
    return revision if step is None or step == step_of_revision(revision) else f"{revision}, step {step}"


def step_of_revision(revision: str | None) -> int | None:
    """The step that a revision names, such as ``step1000`` or ``checkpoint-500``; None where it names none."""
    named = NAMED.fullmatch(revision or "")
    return int(named[1]) if named and len(named[1]) < 19 else None
