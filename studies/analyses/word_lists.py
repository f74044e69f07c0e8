"""Words in context: do the same heads fire on short lists of plain words in which one comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from scipy import stats

from ...errors import DeclarationError
from ...interventions.declare.edits import Intervention
from ...interventions.declare.sites import Head
from ...metrics.attention import prefix_matching
from ...metrics.outputs import accuracy, loss, prob, rank
from ..measuring.measure import measure
from ..tasks.prompts import Prompts
from .ablation import ablate
from .heads import head_scores

if TYPE_CHECKING:
    from ...interventions.models.model import Model

LISTS = (
    ("apple banana cherry apple", "banana"),
    ("red green blue red", "green"),
    ("dog cat horse dog", "cat"),
    ("one two three one", "two"),
    ("king queen prince king", "queen"),
    ("sun moon star sun", "moon"),
    ("car bus train car", "bus"),
    ("bread butter cheese milk bread", "butter"),
    ("doctor nurse teacher farmer doctor", "nurse"),
    ("river lake ocean hill river", "lake"),
    ("lion tiger bear wolf lion", "tiger"),
    ("summer winter spring summer", "winter"),
    ("gold silver stone wood sand gold silver", "stone"),
    ("book pen table chair lamp book pen", "table"),
)
"""Prompt and the word that continues it. Every word is written with a space in front, so that tokenizers that care
give its two occurrences the same token."""

METRICS = (prob, rank, accuracy, loss)


def words_in_context(model: Model, heads: Sequence[Head], score: xr.DataArray) -> xr.Dataset:
    """Run the word lists: whether the answer is right, the same heads fire, and the induction heads are needed.

    Parameters
    ----------
    model : Model
    heads : sequence of Head
        Induction heads, to ablate.
    score : DataArray (layer, head)
        Their score on repeated random tokens, to compare with.

    Returns
    -------
    Dataset
        ``prob``, ``rank``, ``accuracy``, ``loss`` ``(example)``; ``ablated_<same>(ablation, example)`` where there are
        heads to ablate; ``prefix_matching(layer, head, example)``; ``agreement``, Spearman's rank correlation of its
        mean with `score` over heads, and ``agreement_p``; ``prompt`` and ``answer`` ``(example)``. Lists that hold a
        word the model does not know, or an answer that is not one token, are left out and named in the attribute
        ``left_out``.
    """
    task, left_out = lists_for(model)
    if task is None:
        return xr.Dataset(attrs={"left_out": ", ".join(left_out)})
    metrics, what = METRICS, conditions_on(model, task, heads)
    measured = measure(model, task, what, metrics)
    result = xr.Dataset(
        coords={"example": measured["example"]}, attrs=measured.attrs | {"left_out": ", ".join(left_out)}
    )
    for metric in metrics:
        result[metric.name] = measured[f"baseline_{metric.name}"].sel(run="clean", drop=True)
        if what:
            result[f"ablated_{metric.name}"] = measured[metric.name].rename(condition="ablation")
    fired = head_scores(model, task, [prefix_matching])
    result["prefix_matching"] = fired["prefix_matching"]
    result["chance_prefix_matching"] = fired["chance_prefix_matching"]
    pair = (score.transpose("layer", "head").values.ravel(), fired["prefix_matching"].mean("example").values.ravel())
    flat = any(np.ptp(side) == 0 for side in pair)
    agreement = (np.nan, np.nan) if flat else stats.spearmanr(*pair)
    result["agreement"] = (
        (),
        float(agreement[0]),
        {"long_name": "rank correlation with repeated random tokens", "units": "1"},
    )
    result["agreement_p"] = ((), float(agreement[1]), {"long_name": "p of the rank correlation", "units": "1"})
    result["prompt"] = ("example", np.asarray([str(prompt).strip() for prompt in task.prompts], dtype=object))
    result["answer"] = ("example", np.asarray([str(answer).strip() for answer in task.answers or ()], dtype=object))
    return result


def lists_for(model: Model) -> tuple[Prompts | None, list[str]]:
    """The lists that a model's tokenizer can take, as a task (None where there are none), and the others."""
    usable, left_out = [], []
    for prompt, answer in LISTS:
        spaced = " " + prompt
        try:
            fits = not Prompts((spaced,), (f" {answer}",)).draw(model).sequences
        except DeclarationError:
            fits = False
        if fits:
            usable.append((spaced, f" {answer}"))
        else:
            left_out.append(prompt)
    prompts, answers = (tuple(pair[at] for pair in usable) for at in (0, 1))
    return Prompts(prompts, answers, others=tuple(map(_turned, prompts))) if usable else None, left_out


def conditions_on(model: Model, task: Prompts, heads: Sequence[Head]) -> dict[str, Intervention] | None:
    """The heads zero- and mean-ablated (no mean where there are too few prompts of a length); None without heads."""
    if not heads:
        return None
    methods = ("zero", "mean") if _enough_for_mean(model, task) else ("zero",)
    return {method: ablate(heads, method) for method in methods}


def _turned(prompt: str) -> str:
    """A list of the same form that is not evaluated: its different words in the opposite order."""
    words = prompt.split()
    different = list(dict.fromkeys(words))
    swapped = dict(zip(different, reversed(different), strict=True))
    return " " + " ".join(swapped[word] for word in words)


def _enough_for_mean(model: Model, task: Prompts) -> bool:
    """Whether each length has two prompts, so that a mean over prompts of that length exists."""
    return all(len(group.examples) > 1 for group in task.draw(model).groups())
