"""What a file asks for when it is repeated: priced, compared with what it holds, and agreed to by the user.

A file may come from anybody. What it may have without a word is a shipped model, or one of the Hub, and an amount of
work that is usual; anything else is said in a line and done only where the user agrees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from ...errors import ResultError
from ...interventions.models.locate import HUB_ID, locate
from ...interventions.plan.cost import forward_flops
from ..storage.record import Record
from ..tasks.prompts import Prompts
from ..tasks.tasks import RepeatedTokens

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ..analyses.induction import InductionStudy
    from ..circuits.study import CircuitStudy
    from ..dynamics.formation import FormationStudy
    from ..tasks.tasks import Task

Agree = bool | Callable[[str], bool]
MOST_WORK = 3e15
"""Floating-point operations that need no word: some hours on a CPU, seconds on a GPU."""
MOST_CONDITIONS = 10**5
"""Conditions that need none, however small the model is."""
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95}){0,3}")


def agree(source: Path, asks: str, yes: Agree) -> None:
    """Ask the user, where that is possible, whether a file may have what it asks for.

    Parameters
    ----------
    source : Path
        The file.
    asks : str
        What it asks for.
    yes : bool or callable
        True agrees; a callable gets the question and says whether.

    Raises
    ------
    ResultError
        The user did not agree.
    """
    if yes is True or (callable(yes) and yes(f"{source} asks {asks}")):
        return
    raise ResultError(
        f"{source} asks {asks}: that is done only where you agree, with rerun(..., yes=True) or --yes; nothing was run"
    )


def place_of(source: Path, attrs: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Where the model of a file is: name and options that `load` takes, and what has to be agreed to (or nothing).

    Raises
    ------
    ResultError
        It cannot be told, or the file names a path, which is never followed.
    """
    record = Record.from_attrs(attrs)
    name, revision = record.model, record.revision
    if revision == "memory":
        raise ResultError(f"{source} was measured on a module in memory, {name[:80]}: give it as rerun(..., model=...)")
    if revision == "local":
        folder = Path(name).name
        places = [place for place in (Path(folder), source.parent / folder) if folder.strip(".") and _is_model(place)]
        if not places:
            at = f", with step={record.step} (--step)" if record.opening else ""
            raise ResultError(
                f"{source} was measured on the folder {name[:80]}, and files do not keep where folders are: say where "
                f"it is now, rerun(..., model=...) or --model{at}"
            )
        return str(places[0]), record.opening, f"to open the model in the folder {places[0].absolute()}"
    if not HUB_ID.fullmatch(name):
        raise ResultError(
            f"{source} names the model {name[:80]!r}, which is no shipped one and no Hub id: files do not say which "
            "folders are opened; give the model as rerun(..., model=...) or --model"
        )
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise ResultError(f"{source} names the revision {revision[:80]!r}, which no model has")
    _, where, place = locate(name)
    asks = f"to open the model in the folder {Path(where).absolute()}" if place == "local" else ""
    return name, record.opening, asks


def _is_model(folder: Path) -> bool:
    try:
        return (folder / "config.json").is_file()
    except (OSError, ValueError):  # no name that a folder can have
        return False


def check_held(task: Task, ds: xr.Dataset) -> None:
    """Refuse a file that asks for other prompts than it holds values of.

    Raises
    ------
    ResultError
        Says what it asks for and what it holds.
    """
    n, tokens = size_of(task)
    _compare("prompts", n, ds.sizes.get("example", 0))
    kept = [one for name, one in ds.data_vars.items() if str(name).startswith("baseline_") and "position" in one.dims]
    if kept and isinstance(task, RepeatedTokens):  # elsewhere it may be some positions, of a grid or a site
        _compare("tokens in each prompt", tokens, kept[0].sizes["position"])


def check_study(study: InductionStudy, stored: xr.DataTree) -> None:
    """Refuse a file that asks for a larger study than it holds.

    Raises
    ------
    ResultError
        Says what it asks for and what it holds.
    """
    held = {
        "prompts": (study.n, "heads", "example"),
        "tokens in each prompt": (size_of(study.task)[1], "behaviour", "position"),
        "untrained models": (study.untrained, "heads", "seed"),
    }
    for what, (needed, group, dim) in held.items():
        sizes = stored[group].to_dataset().sizes if group in stored.children else {}
        _compare(what, needed, sizes.get(dim, 0))


def check_circuit(study: CircuitStudy, stored: xr.DataTree) -> int:
    """Refuse a file that asks for a larger study of a circuit than it holds.

    Returns
    -------
    int
        Edges that it holds scores of.

    Raises
    ------
    ResultError
        Says what it asks for and what it holds.
    """
    held = {}
    for group, dim in (("edges", "example"), ("random", "draw"), ("edges", "edge")):
        sizes = stored[group].to_dataset().sizes if group in stored.children else {}
        held[dim] = int(sizes.get(dim, 0))
    _compare("prompts", size_of(study.task)[0], held["example"])
    _compare("random circuits", study.draws, held["draw"])
    return held["edge"]


def _compare(what: str, needed: int, held: int) -> None:
    if needed != held:
        raise ResultError(f"it asks for {needed} {what} and holds {held}: it contradicts itself")


def size_of(task: Task) -> tuple[int, int]:
    """Prompts of a task, and tokens of each at most, before any is drawn."""
    if isinstance(task, RepeatedTokens):
        return task.n, 2 * task.length + task.bos
    if not isinstance(task, Prompts):
        raise ResultError(f"its task is no task that comes with headwise: {task!r}")
    prompts = [*task.prompts, *(task.corrupted or ()), *(text for _, run in task.runs for text in run)]
    answers = [*(task.answers or ()), *(task.distractors or ())]
    longest = [
        max((len(text if isinstance(text, tuple) else str(text).encode()) for text in texts), default=0)
        for texts in (prompts, answers)
    ]
    return len(task.prompts), 1 + sum(longest)


def check_training(source: Path, study: FormationStudy, yes: Agree) -> None:
    """Ask the user about trainings beyond `MOST_WORK` operations or `MOST_CONDITIONS` steps.

    Raises
    ------
    ResultError
        The user did not agree.
    """
    trainings = len(study.trainings) * study.seeds
    weights = 12 * study.layers * study.width**2 + (study.vocabulary + study.context) * study.width
    tokens = study.steps * study.batch * study.context + study.measured * study.n * 2 * (study.length + study.context)
    work = 6.0 * trainings * weights * tokens
    if work > MOST_WORK or trainings * study.steps > MOST_CONDITIONS:
        steps = f"{study.steps} steps each"
        agree(source, f"for {trainings} trainings, {steps}, up to {work:.1e} floating-point operations", yes)


def check_work(source: Path, model: Model, task: Task, forward: int, yes: Agree) -> None:
    """Ask the user about work beyond `MOST_WORK` operations or `MOST_CONDITIONS` conditions.

    Parameters
    ----------
    source : Path
        The file, for the question.
    model : Model
    task : Task
    forward : int
        Forward passes of all prompts, at most.
    yes : bool or callable
        See `agree`.

    Raises
    ------
    ResultError
        The user did not agree, or the task is none that comes with headwise.
    """
    n, tokens = size_of(task)
    work = forward_flops(model.shape, n, min(tokens, model.shape.context)) * forward
    if work > MOST_WORK or forward > MOST_CONDITIONS:
        agree(
            source,
            f"for {n} prompts times {forward} conditions on {model.name}, up to {work:.1e} floating-point operations",
            yes,
        )
