"""`raw_paths` itself, path patches: hand values, limits and identities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles import planted, raw_hooks
from tests.oracles.planted import INDUCTION, LENGTH, PREVIOUS, SELF
from tests.oracles.raw_hooks import activation, patch_edit
from tests.oracles.raw_paths import (
    Place,
    path_patch,
)
from tests.support.raw_places import SHAPES, close, draw, head_weight, without_mlps

STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def unembed(model: Any, stream: Tensor) -> Tensor:
    logits: Tensor = model.lm_head(model.transformer.ln_f(stream))
    return logits


def direct(model: Any, tokens: Tensor, sent: Place, delta: Tensor, through: bool) -> list[Tensor]:
    """By hand, from the sender's layer on: the stream that enters each block and the one that leaves the last.

    ``delta`` is what the sender adds to the stream; only it, and MLPs on the way, differ from the base run.
    """
    base = {c: [activation(model, tokens, c, n) for n in range(model.config.n_layer)] for c in STREAM}
    streams, stream = [*base["resid_pre"]], base["resid_pre"][sent.layer]
    for n in range(sent.layer, model.config.n_layer):
        block = model.transformer.h[n]
        streams[n] = stream
        stream = stream + base["attn_out"][n] + (delta if n == sent.layer and sent.component != "mlp_out" else 0)
        stream = stream + (block.mlp(block.ln_2(stream)) if through else base["mlp_out"][n])
        stream = stream + (delta if n == sent.layer and sent.component == "mlp_out" else 0)
    return [*streams, stream]


SENDERS = {"z": Place(0, "z", 1), "attn_out": Place(0, "attn_out"), "mlp_out": Place(0, "mlp_out")}
RECEIVERS: dict[str, Any] = {
    "logits": "logits",
    "q": [Place(1, "q", 1)],
    "mixed": [Place(1, "q", 0), Place(1, "k", 1, (2,)), "logits", Place(1, "v", 1)],
}


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("receivers", RECEIVERS)
@pytest.mark.parametrize("sender", SENDERS)
def test_a_path_patch_from_the_same_tokens_changes_nothing(
    model: Any, sender: str, receivers: str, through: bool
) -> None:
    tokens = draw(model)
    clean = model(tokens).logits
    close(path_patch(model, tokens, tokens, SENDERS[sender], RECEIVERS[receivers], through), clean)
    other = path_patch(model, tokens, draw(model, 1), SENDERS[sender], RECEIVERS[receivers], through)
    assert (other - clean).abs().max() > 1e-3


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("sender", SENDERS)
@pytest.mark.parametrize("positions", [None, (4, 2)])
def test_path_patch_by_hand(model: Any, sender: str, through: bool, positions: Any) -> None:
    tokens, source, last = draw(model), draw(model, 1), model.config.n_layer - 1
    sent = SENDERS[sender]._replace(positions=positions)
    z = activation(model, source, sent.component, 0) - activation(model, tokens, sent.component, 0)
    moved = z[:, :, 1] @ head_weight(model, 0, 1) if sender == "z" else z
    keep = torch.zeros(tokens.shape[1], 1, dtype=torch.float64)
    keep[slice(None) if positions is None else list(positions)] = 1
    streams = direct(model, tokens, sent, moved * keep, through)
    base = activation(model, tokens, "resid_post", last)
    close(path_patch(model, tokens, source, sent, "logits", through), unembed(model, streams[-1]))
    edits, receivers = [], []
    for layer, part, head, where in ((last, "q", 0, None), (last, "k", 1, (1, 4)), (1, "v", 1, None)):
        block = model.transformer.h[layer]
        qkv = block.attn.c_attn(block.ln_1(streams[layer])).unflatten(-1, (3, model.config.n_head, -1))
        edits.append(patch_edit(qkv[:, :, "qkv".index(part)], part, layer, head, where))
        receivers.append((layer, part, head, where))
        one = path_patch(model, tokens, source, tuple(sent), [receivers[-1]], through)
        close(one, raw_hooks.run(model, tokens, edits[-1:]))
    close(path_patch(model, tokens, source, sent, receivers, through), raw_hooks.run(model, tokens, edits))
    end = activation(model, tokens, "resid_post", last, edits) + (streams[-1] - base)
    close(path_patch(model, tokens, source, sent, [*receivers, "logits"], through), unembed(model, end))


def test_the_direct_path_from_the_last_layer(model: Any) -> None:
    # Behind the last layer's attention only its own MLP stands; behind its MLP nothing.
    tokens, source, last = draw(model), draw(model, 1), model.config.n_layer - 1
    other = {c: activation(model, source, c, last) for c in ("z", "attn_out", "mlp_out")}
    for component, head in (("z", 1), ("attn_out", None), ("mlp_out", None)):
        patched = raw_hooks.run(model, tokens, [patch_edit(other[component], component, last, head)])
        for through in (True, False):
            sent = path_patch(model, tokens, source, Place(last, component, head), "logits", through)
            differs = (sent - patched).abs().max()
            assert differs > 1e-4 if component != "mlp_out" and not through else differs < 1e-10
        back = [Place(last, "q", 0), Place(0, "v", 1)]  # nothing flows backwards, or from attention to itself
        close(path_patch(model, tokens, source, Place(last, component, head), back, True), model(tokens).logits)


def test_all_paths_of_an_attention_only_model_make_the_whole_effect(model: Any) -> None:
    model = without_mlps(model)
    tokens, source, layer = draw(model), draw(model, 1), model.config.n_layer - 2
    receivers = [Place(layer + 1, part, head) for part in "qkv" for head in range(model.config.n_head)]
    whole = raw_hooks.run(model, tokens, [patch_edit(activation(model, source, "z", layer), "z", layer, 1)])
    for through in (False, True):
        sent = path_patch(model, tokens, source, Place(layer, "z", 1), [*receivers, "logits"], through)
        close(sent, whole)
        part = path_patch(model, tokens, source, Place(layer, "z", 1), receivers, through)
        assert (part - whole).abs().max() > 1e-3


def test_an_mlp_carries_the_path_only_when_it_may() -> None:
    # Head (0, 1) writes to a dimension that only layer 0's MLP reads, and what that MLP writes only the logits read.
    model = without_mlps(raw_hooks.random_gpt2(**SHAPES["2x3"]).requires_grad_(False).double())
    mlp, attn = model.transformer.h[0].mlp, model.transformer.h[1].attn
    for tensor in (model.transformer.h[0].attn.c_proj.weight, mlp.c_fc.weight, attn.c_attn.weight, attn.c_proj.weight):
        tensor.zero_()
    attn.c_attn.bias.zero_()
    mlp.c_fc.bias.zero_()
    mlp.act, model.transformer.ln_f, model.transformer.h[0].ln_2 = (torch.nn.Identity() for _ in range(3))
    model.transformer.h[0].attn.c_proj.weight[4, 7] = 3.0  # first dimension of head 1's z
    mlp.c_fc.weight[7, 0], mlp.c_proj.weight[0, 2] = 5.0, 2.0
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight), requires_grad=False)
    model.lm_head.weight[6, 2] = 1.0
    tokens, source = draw(model), draw(model, 1)
    z = (activation(model, source, "z", 0) - activation(model, tokens, "z", 0))[:, :, 1, 0]
    clean = model(tokens).logits
    close(path_patch(model, tokens, source, Place(0, "z", 1), "logits", False), clean)
    moved = path_patch(model, tokens, source, Place(0, "z", 1), "logits", True) - clean
    close(moved[..., 6], 3.0 * 5.0 * 2.0 * z)
    close(moved[..., :6], 0)


@pytest.mark.parametrize("through", [False, True])
def test_paths_of_the_planted_circuit(through: bool) -> None:
    # The previous token head speaks to the induction head's keys and to nobody else. A feature gives way to another of
    # the same size, so no LayerNorm changes its scale: other paths carry exactly nothing.
    model, (clean, corrupted) = planted.planted_model(), planted.repeated_prompts(6, seed=3)
    queries, base = range(LENGTH, 2 * LENGTH - 1), model(clean).logits
    k, sender = Place(*INDUCTION[:1], "k", INDUCTION[1]), Place(PREVIOUS[0], "z", PREVIOUS[1])
    noised = [planted.predicted_logit_diff_k_noised(i) for i in queries]
    untouched = [planted.predicted_logit_diff_clean()] * len(queries)
    third = [*untouched[:2], noised[2], *untouched[3:]]  # query L + 2 looks for its token at key 3
    first = [0.0, *untouched[1:]]  # query L does so at key 1, then at key 0, which copies t_0: not asked for

    def diffs(*arguments: Any) -> Tensor:
        logits = path_patch(model, clean, corrupted, *arguments, through)[:, list(queries)]
        targets, distractors = clean[:, LENGTH + 1 :], corrupted[:, 1:LENGTH]
        return (logits.gather(2, targets[..., None]) - logits.gather(2, distractors[..., None]))[..., 0]

    others = [k._replace(head=h, component=c) for c in "qkv" for h in range(planted.HEADS) if (c, h) != ("k", k.head)]
    for receivers, wanted in (
        ([k], noised),
        ([k, "logits"], noised),
        ([k, *others], noised),
        ([k._replace(positions=(3,))], third),
        ([k._replace(positions=(1,))], first),
        ([k._replace(positions=(0, 1))], [noised[0], *untouched[1:]]),
        ([k._replace(positions=(0, *range(LENGTH + 1, 2 * LENGTH)))], untouched),
        ([k._replace(component="q"), k._replace(component="v")], untouched),
        (others, untouched),
        ("logits", untouched),
    ):
        close(diffs(sender, receivers), np.array(wanted), 2e-4)
    close(diffs(sender._replace(positions=(3,)), [k]), np.array(third), 2e-4)
    close(diffs(sender._replace(positions=(1,)), [k]), np.array(first), 2e-4)
    close(path_patch(model, clean, corrupted, sender, [*others, "logits"], through), base, 1e-4)
    junk = Place(SELF[0], "z", SELF[1])
    close(path_patch(model, clean, corrupted, junk, [k, *others, "logits"], through), base, 1e-4)
    # The induction head's own direct path: on corrupted tokens it has no match, and writes what it sees there.
    induction = Place(INDUCTION[0], "z", INDUCTION[1])
    wanted = np.array([planted.predicted_logit_diff_corrupted(i) for i in queries])
    close(diffs(induction, "logits"), wanted, 2e-4)
