"""Naive: what conditions give in one plain forward pass each, the second opinion on the planned engine.

The model's own forward pass under the hooks of `raw_paths` or `raw_families`, one condition at a time, with the edits
in forward order, so that a later one sees what the earlier ones made. Of headwise it takes the drawn tokens, the fields
of the declarations, the windows of attention and the seeded partners of resampling.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from functools import cache, cached_property

import numpy as np
import torch

from headwise.interventions import Add, Knockout, Patch, PathPatch, ProjectOut, ResampleAblate, Scale, ZeroAblate
from headwise.interventions.run.deferred import derangement
from headwise.metrics import induction, kl, logit_diff
from tests.oracles import naive, raw_families, raw_paths
from tests.oracles.raw_paths import Place

QKV = ("q", "k", "v")
BEFORE = ("embed", "pos_embed", "resid_pre", "attn_in", *QKV, "q_rot", "k_rot", "pattern", "z", "head_out", "attn_out")
ORDER = (*BEFORE, "resid_mid", "mlp_in", "mlp_pre", "mlp_post", "mlp_out", "resid_post")


def starved(edit, length, query, window=None):
    """Whether a knockout takes every key from a query, which it must not where it names the query."""
    keys, query = {*range(length)} if edit.key is None else {at % length for at in edit.key}, query % length
    return all(key in keys for key in range(query + 1) if window is None or query - key < window)


class Naive:
    """One forward pass of the model's own for each condition."""

    def __init__(self, model, task, base):
        self.model, self.module, self.task, self.base = model, model.module, task, base
        self.batch, self.last, self.heads = task.draw(model), model.shape.layers - 1, range(model.shape.heads)
        self.groups = self.batch.groups()
        self.raw = raw_paths if model.family.name == "gpt2" else raw_families
        self._read = cache(lambda run, length, place: self.raw.read(self.module, self.tokens(run, length), place))

    @cached_property
    def reference(self):
        return self.task.reference(self.model)

    def tokens(self, run, length):
        """Prompts of a length; those of the reference draw where the run is None."""
        batch = self.reference if run is None else self.batch
        return torch.as_tensor(batch.runs[run or self.base][batch.lengths == length, :length])

    def value(self, edit, length, place):
        """What stands at a place after an edit, as a change of what stood there."""
        if isinstance(edit, ZeroAblate):
            return torch.zeros_like
        if isinstance(edit, Scale):
            return lambda old: old * edit.factor
        if isinstance(edit, Add):
            return lambda old: old + torch.tensor(edit.vector, dtype=torch.float32)
        if isinstance(edit, ProjectOut):
            direction = torch.tensor(edit.vector)  # a neuron has no axis of its own
            return lambda old: raw_paths.without_direction(old.reshape(-1, len(direction)), direction).reshape(
                old.shape
            )
        if isinstance(edit, Patch):
            new = self._read(edit.source, length, place)
        elif isinstance(edit, ResampleAblate):
            there = self._read(None, length, place)
            examples = len(self.tokens(self.base, length))
            new = there[derangement(len(there), edit.seed)[np.arange(examples) % len(there)]]
        elif edit.over == "example":
            new = self._read(None, length, place).mean(0, keepdim=True)
        else:
            lengths, whole = sorted(set(self.reference.lengths.tolist())), place._replace(positions=None)
            new = torch.cat([self._read(None, one, whole).flatten(0, 1) for one in lengths]).mean(0)[None, None]
        return lambda old: new.expand_as(old)

    def path(self, edit, length):
        """The place that a path ends at, and the change there."""
        (end,), tokens, own = edit.receivers, self.tokens(self.base, length), edit.sender
        sender = Place(own.layer, str(own.component), own.head, own.positions)
        place = Place(self.last, "resid_post")
        if end != "logits":
            place = Place(end.layer, str(end.component), end.head, end.positions)
        frozen = [Place(layer, "z") for layer in range(self.last + 1)]
        frozen += [] if edit.through_mlps else [Place(layer, "mlp_out") for layer in range(self.last + 1)]
        kept = [(one, self._read(self.base, length, one)) for one in frozen]
        holds = [(one, lambda _old, value=value: value) for one, value in kept]
        sent, seen = self._read(edit.source, length, sender), []

        def look(old):
            seen.append(old.clone())
            return old

        self.raw.run(self.module, tokens, [*holds, (sender, lambda _old: sent), (place, look)])
        if end == "logits":
            moved = seen[0] - self._read(self.base, length, place)
            return place, lambda old: old + moved
        return place, lambda _old: seen[0]

    @cached_property
    def size(self):
        """The largest logit of the base run, the scale of what rounding leaves."""
        return max(float(self.run((), group.length)[0].abs().max()) for group in self.groups)

    def changes(self, edits, length):
        """``(layer, component)`` to changes there, in order; a knockout is one of its pattern."""
        table = {}
        for edit in sorted(edits, key=lambda edit: isinstance(edit, PathPatch)):  # what goes to the logits comes last
            if isinstance(edit, PathPatch):
                place, change = self.path(edit, length)
                table.setdefault(place[:2], []).append((place, change))
                continue
            site, component = edit.site, str(edit.site.component)
            each = self.heads if component in ("pattern", "head_out") and site.head is None else [site.part]
            for head in each:
                place = Place(site.layer, component, head, site.positions)
                change = edit if isinstance(edit, Knockout) else self.value(edit, length, place)
                table.setdefault(place[:2], []).append((place, change))
        return table

    @torch.no_grad()
    def run(self, edits, length, attend=False, looks=()):
        """Logits, and where asked for the patterns ``(example, layer, head, query, key)`` of attention.

        `looks` are changes of places, which are made after those of the edits there.
        """
        tokens, table, seen = self.tokens(self.base, length), self.changes(edits, length), {}

        def weigh(layer, head, scores):
            mine = [(place, change) for place, change in table.get((layer, "pattern"), ()) if place.head == head]
            for place, edit in mine:
                if isinstance(edit, Knockout):
                    window = self.model.shape.window(layer)
                    kept = [query for query in range(length) if not starved(edit, length, query, window)]
                    keys = range(length) if edit.key is None else edit.key
                    for query, key in itertools.product(place.positions or kept, keys):
                        scores[:, query, key] = -torch.inf
            weights = raw_families.weights(self.module, layer, head, scores)
            for place, change in mine:
                if not isinstance(change, Knockout):
                    weights = raw_paths._changed(weights, raw_paths._at(place.positions), change)
            seen[layer, head] = weights
            return weights

        with ExitStack() as stack:
            for layer, component in itertools.product(range(self.last + 1), ORDER):
                for place, change in table.get((layer, component), ()) if component != "pattern" else ():
                    for handle in self.raw._hooks(self.module, tokens, place, change):
                        stack.enter_context(handle)
                for place, look in looks:
                    for handle in (
                        self.raw._hooks(self.module, tokens, place, look) if place[:2] == (layer, component) else ()
                    ):
                        stack.enter_context(handle)
                for head in self.heads if component == "pattern" and (attend or (layer, component) in table) else ():
                    for handle in self.raw._attention_hooks(
                        self.module, layer, head, None, lambda s, layer=layer, head=head: weigh(layer, head, s)
                    ):
                        stack.enter_context(handle)
            logits = self.module(tokens, use_cache=False).logits
        layers = range(self.last + 1) if attend else ()
        return logits, [torch.stack([seen[layer, head] for head in self.heads], 1) for layer in layers]

    def captured(self, edits, length, places):
        """What stands at places, at all positions, after the edits; of all heads, where one names none, in axis 2.

        ``logits`` is a component too; patterns are ``(example, query, key)`` of a head, or ``(example, head, query,
        key)``.
        """
        heads = [place for place in places if place.component == "head_out" and place.head is None]
        single = [one for one in places if one.component not in ("logits", "pattern") and one not in heads]
        single += [place._replace(head=head) for place in heads for head in self.heads]
        seen, table = {}, self.changes(edits, length)
        looks = [raw_paths._reader(seen, place._replace(positions=None)) for place in dict.fromkeys(single)]
        logits, patterns = self.run(edits, length, True, looks)

        def value(place):
            layer, component, head, _ = place
            if component == "logits":
                return logits
            if component == "pattern":
                return patterns[layer] if head is None else patterns[layer][:, head]
            if place in heads:
                return torch.stack([value(place._replace(head=one)) for one in self.heads], 2)
            found = seen[str(place)]
            for at, change in table.get((layer, component), ()) if component == "head_out" else ():
                if at.head == head:  # which the hooks add to what the layer writes, and not to what the head does
                    found = raw_paths._changed(found, raw_paths._at(at.positions), change)
            return found

        return [value(place) for place in places]

    def measured(self, conditions, metrics, per_position):
        """Metric name to values of all conditions, as in `measure`."""
        shape = (len(conditions), *self.batch.scored.shape)
        found = {metric.name: np.full(shape, np.nan) for metric in metrics if metric.kind == "logits"}
        for metric in metrics:
            if metric.kind == "pattern":
                found[metric.name] = np.full((*shape[:2], self.last + 1, len(self.heads)), np.nan)
        for group, (row, edits) in itertools.product(self.groups, enumerate(conditions)):
            facts, where = self.batch.facts(self.base, group), np.ix_([row], group.examples, group.scored)
            logits, patterns = self.run(edits, group.length, any(metric.kind == "pattern" for metric in metrics))
            scored = logits[:, list(group.scored)]
            base, _ = self.run((), group.length)
            for metric in metrics:
                if metric.kind == "pattern":
                    one = (
                        (lambda a, facts=facts: naive.induction(a, facts.period))
                        if metric is induction
                        else naive.self_attention
                    )
                    found[metric.name][row, list(group.examples)] = np.stack([one(a) for a in patterns], 1)
                elif metric is kl:
                    found["kl"][where] = naive.kl(base[:, list(group.scored)], scored)
                elif metric is logit_diff:
                    found["logit_diff"][where] = naive.logit_diff(scored, facts.targets, facts.distractors)
                else:
                    found["loss"][where] = naive.loss(scored, facts.targets)
        if not per_position:
            for metric in metrics:
                if metric.kind == "logits":
                    found[metric.name] = np.nanmean(found[metric.name], -1)
        return found
