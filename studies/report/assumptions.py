"""What a result takes for granted, and what was not tested: every sentence from what the result says was run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import xarray as xr

from ..measuring.advice import ABLATIONS, ZEROS, advice
from ..output.phrases import count, listed
from ..storage.attributes import json_in, number_in
from ..storage.record import Record, edits_in

PLACES = {
    "heads": ("q", "k", "v", "q_rot", "k_rot", "pattern", "z", "head_out"),
    "MLPs": ("mlp_in", "mlp_out"),
    "neurons": ("mlp_pre", "mlp_post"),
    "the residual stream": ("embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out"),
}
"""Parts of a model, and the components of sites that are theirs."""
KINDS = {
    "ZeroAblate": "Zero ablation takes zeros for the absence of a part: the model may never have zeros there.",
    "MeanAblate": "Mean ablation takes a mean over reference prompts for the absence of a part: what all prompts share "
    "stays.",
    "ResampleAblate": "Resample ablation takes what another prompt has for the absence of a part: what two prompts "
    "have in common stays.",
    "Patch": "A patch shows only what depends on what the two runs differ in: what both have in common, it leaves.",
    "PathPatch": "A path patch holds what lies between sender and receiver as it is in the base run; what goes on by "
    "way of other parts is not in it.",
    "Circuit": "A circuit lets all other edges carry what another run has: what both runs have in common flows through "
    "every edge, and the model may never have such mixtures.",
    "Knockout": "Attention that is knocked out is shared among the other keys, which then say more.",
    "Add": "Steering puts the model where it may never be by itself: the effect is of this vector at this size.",
    "ProjectOut": "Projecting out takes away all that lies along a direction, what every prompt has there too.",
    "Scale": "Scaling puts the model where it may never be by itself: the effect is of these factors.",
}
"""Kind of intervention to what it assumes."""
METRICS = {
    "loss": "The loss tells how much probability the right token loses, not which token gains it.",
    "accuracy": "Accuracy moves only where another token comes first: changes below that are not seen.",
    "rank": "The rank does not tell by how much tokens lie apart.",
    "prob": "A probability hardly moves near 0 and near 1: it hides what lowers an answer that is unlikely already.",
    "logit_diff": "The logit difference sees the answer beside one distractor: what moves both alike is not seen.",
    "kl": "KL tells how much the probabilities move, not towards what.",
}
"""Name of a metric to what it does not see."""
DIRECTIONS = {
    "noising": "Noising alone was run, which shows what is necessary; what is sufficient to restore the answer, "
    'denoising would show (base="corrupted", source="clean").',
    "denoising": "Denoising alone was run, which shows what is sufficient; what is necessary for the answer, noising "
    'would show (base="clean", source="corrupted").',
}
"""The only direction that was run to what it leaves open."""


@dataclass(frozen=True)
class Ran:
    """What was run, as far as a result says.

    Attributes
    ----------
    tree : DataTree
    record : Record
        Of the root.
    parts : list of mapping
        Attributes of the root and of every group.
    edits : list of dict
        Every intervention, as it was declared.
    metrics : list of str
    directions : list of str
        ``noising`` and ``denoising``, as far as runs were patched.
    """

    tree: xr.DataTree
    record: Record
    parts: list[Mapping[Any, Any]]
    edits: list[dict[str, Any]]
    metrics: list[str]
    directions: list[str]

    @classmethod
    def of(cls, tree: xr.DataTree) -> Ran:
        """Gather it from the attributes of all groups, and of an `InductionStudy` from its variables."""
        parts: list[Mapping[Any, Any]] = [node.attrs for node in tree.subtree]
        edits = [edit for attrs in parts for edit in edits_in(json_in(attrs, "interventions", object))]
        metrics = [str(name) for attrs in parts for name in json_in(attrs, "metrics", list)]
        held = {str(name) for node in tree.subtree for name in node.data_vars}
        said = " ".join(str(attrs.get("direction", "")) for attrs in parts).split()
        directions = [one for one in DIRECTIONS if one in said]
        if directions and not any("source" in edit for edit in edits):  # of a study, whose parts do not declare them
            edits += [{"type": "Patch", "site": {"component": "q", "positions": None}}]
        if held & {"path_logit_diff", "strongest_logit_diff"}:
            edits += [{"type": "PathPatch"}]
        return cls(tree, Record.from_attrs(tree.attrs), parts, edits, [*dict.fromkeys(metrics)], directions)

    @property
    def kinds(self) -> list[str]:
        """Kinds of intervention."""
        return [*dict.fromkeys(str(edit["type"]) for edit in self.edits)]

    @property
    def study(self) -> bool:
        """Whether it is an induction study, at one step or over training."""
        return self.record.study.get("type") == "InductionStudy"

    @property
    def sites(self) -> list[Mapping[str, Any]]:
        """The sites that were changed, and the senders of paths."""
        found = (edit.get("site", edit.get("sender")) for edit in self.edits)
        return [site for site in found if isinstance(site, Mapping)]

    @property
    def says(self) -> bool:
        """Whether the result says of which model, prompts or interventions it is."""
        return bool(self.record.model or self.record.task or self.edits or self.metrics)


def assumed(ran: Ran) -> list[str]:
    """What the result takes for granted, in sentences."""
    return [text for text in (*_model(ran), *_prompts(ran), *_ways(ran)) if text]


def untested(ran: Ran) -> list[str]:
    """What was not tested, in sentences."""
    return [*dict.fromkeys((*_interventions(ran), *_where(ran), *_beside(ran)))]


def _model(ran: Ran) -> Iterator[str]:
    record = ran.record
    if not record.model:
        return
    if "step" in ran.tree.dims:
        yield f"It is about one training of {record.model}, at {count(ran.tree.sizes['step'], 'step')}: another seed "
        "of training may form other parts at other steps."
        return
    at = f" at step {record.step}" if record.step is not None else ""
    revision = f", revision {record.revision}" if record.revision not in ("", "local", "shipped", "memory") else ""
    dtype = f", in {record.attrs['dtype']}" if "dtype" in record.attrs else ""
    yield (
        f"It is about one checkpoint of one model, {record.model}{at}{revision}{dtype}: what another seed, size or "
        "step of training gives was not run."
    )


def _prompts(ran: Ran) -> Iterator[str]:
    task = ran.record.task
    if task.get("type") == "RepeatedTokens" and {"n", "length", "seed"} <= {*task}:
        words = ran.tree["words"] if "words" in ran.tree.children else xr.DataTree()
        text = f", but for {count(words.sizes['example'], 'list')} of words" if "accuracy" in words else ""
        yield (
            f"The prompts are synthetic: {count(task['n'], 'draw')} of {task['length']} random tokens, repeated once "
            f"(seed {task['seed']}). Natural text was not run{text}."
        )
    elif task.get("type") == "Prompts" and isinstance(prompts := task.get("prompts"), list):
        yield f"It is about {count(len(prompts), 'given prompt')}: no others were run."
    elif "repr" in task:
        yield f"The prompts are those that {task['repr']} draws: no others were run."


def _ways(ran: Ran) -> Iterator[str]:
    alone = [kind for kind in ran.kinds if kind in ABLATIONS] == ["ZeroAblate"]  # which stands in what was not tested
    if ran.record.study.get("type") == "CircuitStudy":
        means = ran.record.study.get("source") == "mean"
        carried = "means over the reference prompts" if means else "the values of another run"
        common = "all of these" if means else "both runs"
        yield f"Edges outside of a circuit carry {carried}: what {common} have in common, they carry too."
        yield METRICS.get(str(ran.record.study.get("metric")), "")
        return
    yield from (KINDS[kind] for kind in ran.kinds if kind in KINDS and not (alone and kind == "ZeroAblate"))
    yield from (METRICS[name] for name in ran.metrics if name in METRICS)
    held = {str(name) for node in ran.tree.subtree for name in node.data_vars}
    if "attribution" in held:
        yield "Direct attribution freezes the final norm; what a part does by way of later parts is not in its share."
    if ran.record.kind == "logit_lens":
        yield "A logit lens reads each layer by the last norm and the unembedding, which are made for the last stream."
    if "composition" in held and ran.record.shape.get("rotary"):
        yield "Composition leaves the rotary embedding out of the products of weights."


def _interventions(ran: Ran) -> Iterator[str]:
    if ran.record.study.get("type") == "CircuitStudy":
        yield "Edges were replaced at all positions of a prompt at once: at which of them they matter was not tested."
        yield "Each edge was scored alone, and circuits take edges in the order of these scores: no other was searched."
        return
    if not ran.edits:
        if ran.says:
            yield "Nothing was intervened on: this describes the model, and shows no cause."
        return
    done = [ABLATIONS[kind] for kind in ran.kinds if kind in ABLATIONS]
    missing = [name for name in ABLATIONS.values() if name not in done]
    if done and missing and done != ["zero"]:
        yield f"{listed(missing).capitalize()} ablation {'were' if len(missing) > 1 else 'was'} not run."
    told = [text for attrs in ran.parts for text in advice(attrs)]
    yield from (text for text in told if text != ZEROS or done == ["zero"])
    if len(ran.directions) == 1:
        yield DIRECTIONS[ran.directions[0]]
    elif done and not ran.directions:
        yield "Ablation shows what is necessary; what is sufficient was not tested: no run was denoised."


def _where(ran: Ran) -> Iterator[str]:
    components = {str(site.get("component")) for site in ran.sites}
    if not components:
        return
    left = [part for part, own in PLACES.items() if not components & {*own}]
    if left:
        yield f"Nothing was done to {listed(left).replace(' and ', ' or ')}."
    shape = ran.record.shape
    layers, heads = (int(number_in(shape, name) or 0) for name in ("layers", "heads"))
    changed = {
        (site.get("layer"), site.get("head")) for site in ran.sites if site.get("component") in ("z", "head_out")
    }
    if changed and len(changed) < layers * heads and all(head is not None for _, head in changed):
        yield f"Of {layers * heads} heads, {len(changed)} {'were' if len(changed) > 1 else 'was'} intervened on."
    if all(site.get("positions") is None for site in ran.sites) and not any("key" in edit for edit in ran.edits):
        yield (
            "Every intervention is at all positions of a prompt at once: at which of them it matters was not tested."
        )


def _beside(ran: Ran) -> Iterator[str]:
    together = any('"Compose"' in str(attrs.get("interventions", "")) for attrs in ran.parts)
    if len(ran.edits) > 1 and not together:
        yield "One part was changed at a time: what several do together, or one for another, was not tested."
    estimated = [str(attrs.get("estimator")) for attrs in ran.parts if str(attrs.get("estimator", "exact")) != "exact"]
    if estimated:
        yield f"No estimate ({estimated[0]}) was verified by a measurement."
    ablated = any(kind in ABLATIONS for kind in ran.kinds) and any(site.get("component") == "z" for site in ran.sites)
    measured = ran.record.kind == "measurement"
    if ablated and measured and not any("controls" in attrs for attrs in ran.parts):
        yield "No random heads were ablated beside these (controls=50 would): that other heads do less was not tested."
    if ran.study and "heads" in ran.tree.children and (number := ran.tree["heads"].sizes.get("seed", 0)):
        yield f"Scores were compared with {number} untrained models, with none that was trained without repeats."
