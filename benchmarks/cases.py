"""The jobs that contenders do: which model, which prompts, which conditions, and what counts as the number.

Imports torch, transformers, and headwise's task and names of edges only, so what a contender is compared with does not
come from headwise.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

import headwise as hw
from headwise.studies import RepeatedTokens

LENGTH = 25
MOST_EDGES = 400
"""Edges of a job; as many are drawn from those of a larger model."""
SCORES = ("induction", "previous_token", "duplicate_token")
AXES = {"components": ("q", "k", "v"), "scores": SCORES, "positions": range(2 * LENGTH)}


class Place(NamedTuple):
    """What one row of the answer is about: a condition, or for ``scores`` the score of a head.

    Of ``mlp_post``, `head` is the number of a neuron. An edge is `what` by itself, as text.
    """

    what: str
    layer: int
    head: int | None = None
    position: int | None = None


@dataclass(frozen=True)
class Case:
    """A job in words. `source` is the run that values are taken from (None: zeros); `metric` is what is measured."""

    name: str
    words: str
    source: str | None
    metric: str


CASES = {
    case.name: case
    for case in (
        Case("ablation", "zero ablation of every head, loss", None, "loss"),
        Case("qkv", "patching q, k and v of every head, logit difference", "corrupted", "logit_diff"),
        Case("resid", "patching the residual stream at every layer and position, logit difference", "corrupted",
             "logit_diff"),
        Case("neurons", "zero ablation of every neuron of the first layer, loss", None, "loss"),
        Case("edges", "every edge that carries the corrupted run (by hooks two passes each), logit difference",
             "corrupted", "logit_diff"),
        Case("scores", "induction, previous-token and duplicate-token score of every head", None, ""),
    )
}  # fmt: skip

MODELS = {
    "words-2l": "0.13M parameters, ships with headwise",
    "gpt2-small": "GPT-2 small, 124M parameters, random weights",
}


@dataclass(frozen=True, eq=False)
class Job:
    """A case on a model with some prompts.

    Attributes
    ----------
    case : Case
    model : str
    module : PreTrainedModel
        As it was loaded. No tool gets it, since most change what they are given: each takes a `twin`.
    tokenizer : tokenizer
    task : RepeatedTokens
    runs : dict
        ``clean`` and ``corrupted``: token ids ``(example, position)``.
    scored : list of int
        Positions whose next token is judged.
    targets, distractors : tensor (example, scored)
    places : tuple of Place
        Rows of the answer, whose shape is ``(place, example)``.
    """

    case: Case
    model: str
    module: PreTrainedModel
    tokenizer: Any
    task: RepeatedTokens
    runs: dict[str, torch.Tensor]
    scored: list[int]
    targets: torch.Tensor
    distractors: torch.Tensor
    places: tuple[Place, ...]

    @property
    def clean(self) -> torch.Tensor:
        """The run that is intervened on."""
        return self.runs["clean"]

    @property
    def source(self) -> torch.Tensor | None:
        """The run that values are taken from, if they are."""
        return None if self.case.source is None else self.runs[self.case.source]

    @property
    def layers(self) -> range:
        """Indices of the layers."""
        return range(self.module.config.n_layer)

    @property
    def heads(self) -> range:
        """Indices of the heads of a layer."""
        return range(self.module.config.n_head)

    def passes(self, places: Sequence[Place]) -> int:
        """Forward passes that one pass for each condition takes; all attention scores come from one."""
        return min(1, len(places)) if self.case.name == "scores" else len(places)

    def twin(self, attention: str = "sdpa") -> PreTrainedModel:
        """A module of its own with the same weights, which lie in memory once.

        A tool may replace submodules (TransformerLens), wrap ``forward`` (nnsight) or remove all hooks (pyvene).
        """
        twin = copy.deepcopy(self.module, {id(weight): weight for weight in self.module.parameters()})
        twin.set_attn_implementation(attention)
        return twin

    def value(self, logits: torch.Tensor) -> np.ndarray:
        """The metric of the case, one number for each example, from logits at all positions."""
        return METRICS[self.case.metric](self, logits[:, self.scored].float()).mean(-1).numpy()

    def table(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Rows as ``(place, example)``, also where there is none."""
        return np.asarray(rows, dtype=np.float32).reshape(len(rows), len(self.clean))

    def where(self, place: Place) -> tuple[slice, slice, slice]:
        """Index of a place in the tensor that holds it, ``(example, position, column)``: ``c_attn`` writes q|k|v."""
        columns = slice(None)
        if place.what == "mlp_post":
            columns = slice(place.head, (place.head or 0) + 1)
        elif place.head is not None:
            width = self.module.config.n_embd // self.module.config.n_head
            start = {"k": 1, "v": 2}.get(place.what, 0) * self.module.config.n_embd + place.head * width
            columns = slice(start, start + width)
        position = slice(None) if place.position is None else slice(place.position, place.position + 1)
        return slice(None), position, columns

    def scores(self, patterns: Sequence[torch.Tensor], places: Sequence[Place]) -> np.ndarray:
        """Attention scores from the patterns ``(example, head, query, key)`` of all layers, for the given places."""
        stacked = torch.stack(list(patterns))
        along: dict[str, Callable[[], torch.Tensor]] = {
            "induction": lambda: stacked.diagonal(1 - LENGTH, -2, -1)[..., 1:],  # A[i, i-L+1] from i = L on
            "previous_token": lambda: stacked.diagonal(-1, -2, -1),
            "duplicate_token": lambda: stacked.diagonal(-LENGTH, -2, -1),
        }
        found = {name: along[name]().mean(-1).numpy() for name in SCORES}
        return self.table([found[place.what][place.layer, :, place.head] for place in places])


def _loss(job: Job, logits: torch.Tensor) -> torch.Tensor:
    return -logits.log_softmax(-1).gather(-1, job.targets.unsqueeze(-1)).squeeze(-1)


def _logit_diff(job: Job, logits: torch.Tensor) -> torch.Tensor:
    right, wrong = (logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for tokens in (job.targets, job.distractors))
    return right - wrong


METRICS = {"loss": _loss, "logit_diff": _logit_diff}


@functools.lru_cache(maxsize=1)
def load(model: str) -> tuple[PreTrainedModel, Any]:
    """Module and tokenizer (None: token ids stand for words), as the Hugging Face library gives them."""
    if model == "gpt2-small":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module, tokenizer = GPT2LMHeadModel(GPT2Config()), None
    else:
        folder = Path(hw.__file__).parent / "models" / model
        logging.disable_progress_bar()
        module, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    module.config.use_cache = False
    return module.eval(), tokenizer


def make_job(case: str, model: str, prompts: int) -> Job:
    """The job of this case on this model with this many prompts of ``2 * LENGTH`` tokens."""
    module, tokenizer = load(model)
    layers, heads = range(module.config.n_layer), range(module.config.n_head)
    axes: dict[str, tuple[Any, ...]] = {
        "ablation": (("z",), layers, heads),
        "qkv": (AXES["components"], layers, heads),
        "resid": (("resid_pre",), layers, (None,), AXES["positions"]),
        "neurons": (("mlp_post",), (0,), range(module.config.n_inner or 4 * module.config.n_embd)),
        "edges": ((), ()),
        "scores": (SCORES, layers, heads),
    }
    task = RepeatedTokens(n=prompts, length=LENGTH)
    blank = Job(CASES[case], model, module, tokenizer, task, {}, [], torch.empty(0), torch.empty(0), ())
    handle = hw.load(blank.twin(), device="cpu", tokenizer=tokenizer)
    batch = task.draw(handle)
    (group,) = batch.groups()
    facts = batch.facts("clean", group)
    return Job(
        CASES[case],
        model,
        module,
        handle.tokenizer,
        task,
        {run: torch.as_tensor(tokens) for run, tokens in batch.runs.items()},
        list(group.scored),
        torch.as_tensor(facts.targets),
        torch.as_tensor(facts.distractors),
        _edges(handle) if case == "edges" else tuple(Place(*values) for values in itertools.product(*axes[case])),
    )


def _edges(model: hw.Model) -> tuple[Place, ...]:
    """The edges of a model; of a large one a sample, which all contenders do."""
    return sample([Place(str(edge), -1) for edge in hw.Graph.of(model).edges], MOST_EDGES)


def sample(places: Sequence[Place], size: int) -> tuple[Place, ...]:
    """A seeded choice of `size` places, in order; all where there are no more."""
    if size >= len(places):
        return tuple(places)
    chosen = np.random.RandomState(0).choice(len(places), size, replace=False)
    return tuple(places[number] for number in sorted(chosen))
