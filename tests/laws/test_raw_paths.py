"""Owns the self-test of `raw_paths`: hand values, limits, identities, and `raw_hooks` where the two overlap."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles import planted, raw_hooks, raw_paths
from tests.oracles.planted import INDUCTION, LENGTH, PREVIOUS, SELF
from tests.oracles.raw_hooks import Edit, activation, patch_edit
from tests.oracles.raw_paths import (
    Place,
    add,
    gradient_estimate,
    integrated_estimate,
    knockout,
    path_patch,
    read,
    run,
    scale,
    write,
)

SHAPES: dict[str, dict[str, Any]] = {
    "2x3": {"layers": 2, "heads": 3, "d_head": 4, "vocab": 17, "context": 8, "n_inner": 20, "seed": 1},
    "3x2": {"layers": 3, "heads": 2, "d_head": 6, "vocab": 11, "context": 9, "seed": 2, "scale": 0.2},
}
STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
SCALED = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
DIFFERENTIATED = (*SCALED, "head_out", "pattern", "embed", "pos_embed")


def close(actual: Any, wanted: Any, atol: float = 1e-10) -> None:
    actual, wanted = (np.asarray(torch.as_tensor(x).detach()) for x in (actual, wanted))
    np.testing.assert_allclose(actual, np.broadcast_to(wanted, actual.shape), rtol=0, atol=atol)


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Any:
    return raw_hooks.random_gpt2(**SHAPES[request.param]).requires_grad_(False).double()


def draw(model: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (3, model.config.n_positions - 1), generator=generator)


def place(component: str, layer: int = 1, positions: Sequence[int] | None = (4, 2)) -> Place:
    return Place(layer, component, 1 if component in raw_paths.PER_HEAD else None, positions)


def last_logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def curved(logits: Tensor) -> Tensor:
    """A score of every position that is not linear in the logits."""
    return logits.log_softmax(-1)[..., 2].sum(1)


def unembed(model: Any, stream: Tensor) -> Tensor:
    logits: Tensor = model.lm_head(model.transformer.ln_f(stream))
    return logits


def head_weight(model: Any, layer: int, head: int) -> Tensor:
    """W_O of one head, (d_head, d_model)."""
    d_head = model.config.n_embd // model.config.n_head
    weight: Tensor = model.transformer.h[layer].attn.c_proj.weight[head * d_head : (head + 1) * d_head]
    return weight


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


def without_mlps(model: Any) -> Any:
    model = copy.deepcopy(model)
    for block in model.transformer.h:
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.zero_()
    return model


# --- places, writes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("component", raw_paths.COMPONENTS)
def test_what_is_read_can_be_written_back_and_what_is_written_is_read(
    model: Any, component: str, attention: str
) -> None:
    model.set_attn_implementation(attention)
    tokens, clean = draw(model), model(draw(model)).logits
    for positions in (None, (4, 2)):
        where = place(component, positions=positions)
        old = read(model, tokens, where)
        for same in (write(model, tokens, where, old), add(model, tokens, where, 0.0), scale(model, tokens, where, 1)):
            close(same, clean)
        new, seen = old.flip(0) * 2 + 1, {}
        run(model, tokens, [(where, lambda _old, new=new: new), raw_paths._reader(seen, place(component))])
        if component not in raw_paths.ONE_HEAD:  # these are read from q and k, or z, which stay as they were
            close(seen[str(place(component))], new if positions else new[:, [4, 2]])
        shift = torch.linspace(-1, 1, old.shape[-1]).double()
        close(add(model, tokens, where, shift), write(model, tokens, where, old + shift))
        close(scale(model, tokens, where, -0.5), write(model, tokens, where, -0.5 * old))
        moved = (write(model, tokens, place(component, positions=(4, 2)), 0.3) - clean).abs().amax((0, 2))
        assert moved[:2].max() == 0
        assert moved[[2, 4]].min() > 1e-6


def test_places_agree_with_the_other_oracle_and_with_hand_values(model: Any) -> None:
    tokens, body = draw(model), model.transformer
    for component in (*SCALED, "head_out"):
        where, wanted = place(component), activation(model, tokens, component, 1)[:, [4, 2]]
        close(read(model, tokens, where), wanted if where.head is None else wanted[:, :, where.head])
        if component in raw_hooks.EDITABLE:
            new = torch.randn(3, 2, read(model, tokens, where).shape[-1], dtype=torch.float64)
            edited = raw_hooks.run(model, tokens, [Edit(component, 1, where.head, (4, 2), new)])
            close(write(model, tokens, where, new), edited)
    every = Place(1, "q", None, (0, 3))
    close(read(model, tokens, every), activation(model, tokens, "q", 1)[:, [0, 3]])
    close(read(model, tokens, Place(1, "pattern", 1)), activation(model, tokens, "pattern", 1)[:, 1])
    close(read(model, tokens, Place(0, "embed")), body.wte.weight[tokens])
    close(read(model, tokens, Place(0, "pos_embed")), body.wpe.weight[: tokens.shape[1]])
    for bad in (Place(0, "gate"), Place(0, "mlp_out", 1), Place(0, "pattern"), Place(0, "head_out")):
        with pytest.raises(ValueError, match=bad.component):
            read(model, tokens, bad)


def test_embeddings_stand_for_tokens_and_positions(model: Any) -> None:
    tokens, other, body = draw(model), draw(model, 1), model.transformer
    swapped = tokens.clone()
    swapped[:, [4, 2]] = other[:, [4, 2]]
    close(write(model, tokens, place("embed"), body.wte.weight[other[:, [4, 2]]]), model(swapped).logits)
    backwards = torch.arange(tokens.shape[1]).flip(0)
    wanted = model(tokens, position_ids=backwards[None]).logits
    close(write(model, tokens, Place(0, "pos_embed"), body.wpe.weight[backwards]), wanted)
    one = torch.stack([body.wpe.weight[[n, n + 1]] for n in range(3)])  # every example its own
    stream = read(model, tokens, Place(0, "resid_pre"))
    stream[:, [4, 2]] = stream[:, [4, 2]] - body.wpe.weight[[4, 2]] + one
    close(write(model, tokens, place("pos_embed"), one), write(model, tokens, Place(0, "resid_pre"), stream))


def test_head_out_is_the_heads_part_of_attn_out(model: Any) -> None:
    tokens, where, stream = draw(model), place("head_out"), place("attn_out")
    old, whole = read(model, tokens, where), read(model, tokens, stream)
    close(old, read(model, tokens, place("z")) @ head_weight(model, 1, 1))
    new = torch.randn(old.shape, dtype=torch.float64)
    close(write(model, tokens, where, new), write(model, tokens, stream, whole - old + new))
    close(add(model, tokens, where, new), add(model, tokens, stream, new))
    close(scale(model, tokens, where, 3), add(model, tokens, stream, 2 * old))
    close(scale(model, tokens, where, 3), scale(model, tokens, place("z"), 3))
    close(scale(model, tokens, where, 0), write(model, tokens, place("z"), 0.0))


def test_resid_mid_moves_the_skip_connection_and_the_mlp(model: Any) -> None:
    tokens, block = draw(model), model.transformer.h[1]
    where = Place(1, "resid_mid")
    mid = read(model, tokens, where) * 1.5
    wanted = write(model, tokens, Place(1, "resid_post"), mid + block.mlp(block.ln_2(mid)))
    close(scale(model, tokens, where, 1.5), wanted)


def test_pattern_written_by_hand(model: Any) -> None:
    tokens = draw(model)
    size = tokens.shape[1]
    v = activation(model, tokens, "v", 1)[:, :, 1]
    # Everything on key 0; then only query 4 on keys 1 and 3; then a row that looks ahead, which is taken as it is.
    first = torch.eye(size, dtype=torch.float64)[[0] * size]
    close(write(model, tokens, Place(1, "pattern", 1), first), write(model, tokens, Place(1, "z", 1), v[:, :1]))
    for row, wanted in (
        ({1: 0.25, 3: 0.75}, v[:, 1] * 0.25 + v[:, 3] * 0.75),
        ({5: 2.0}, v[:, 5] * 2),
        ({0: 1.0, 2: -1.0}, v[:, 0] - v[:, 2]),
    ):
        new = torch.zeros(size, dtype=torch.float64)
        new[list(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
        written = write(model, tokens, Place(1, "pattern", 1, (4,)), new)
        close(written, write(model, tokens, Place(1, "z", 1, (4,)), wanted[:, None]))


# --- knockout -------------------------------------------------------------------------------------------------------


def test_knockout_is_the_renormalized_softmax(model: Any) -> None:
    tokens, cells = draw(model), [(3, 1), (5, 0), (5, 5), (2, 4)]  # (2, 4) is in the future: nothing there
    heads, clean = range(model.config.n_head), model(tokens).logits
    patterns = [activation(model, tokens, "pattern", 1)[:, head] for head in heads]
    for pattern in patterns:
        for query, key in cells:
            pattern[:, query, key] = 0
        pattern /= pattern.sum(-1, keepdim=True)
    close(knockout(model, tokens, 1, [1], cells), write(model, tokens, Place(1, "pattern", 1), patterns[1]))
    every = [(Place(1, "pattern", head), lambda _old, new=new: new) for head, new in enumerate(patterns)]
    close(knockout(model, tokens, 1, heads, cells), run(model, tokens, every))
    close(knockout(model, tokens, 1, heads, [(2, 4)]), clean)
    close(knockout(model, tokens, 1, heads, []), clean, 0)
    close(knockout(model, tokens, 1, [0], cells)[:, :3], clean[:, :3], 1e-12)
    with pytest.raises(ValueError, match="no key left"):
        knockout(model, tokens, 1, [0], [(1, 0), (1, 1)])


def test_knockout_of_all_keys_but_one_and_of_a_key_for_everyone(model: Any) -> None:
    tokens = draw(model)
    v = activation(model, tokens, "v", 0)[:, :, 1]
    only = knockout(model, tokens, 0, [1], [(5, key) for key in range(6) if key != 2])
    close(only, write(model, tokens, Place(0, "z", 1, (5,)), v[:, 2:3]))
    # In a model of one layer, where no later query sees position 2, later logits cannot depend on its token.
    other = tokens.clone()
    other[:, 2] = (other[:, 2] + 1) % model.config.vocab_size
    cells, heads = [(query, 2) for query in range(3, tokens.shape[1])], range(model.config.n_head)
    model.transformer.h = model.transformer.h[:1]
    model.config.n_layer = model.config.num_hidden_layers = 1
    one, two = (knockout(model, which, 0, heads, cells) for which in (tokens, other))
    close(one[:, 3:], two[:, 3:])
    assert (one[:, 2] - two[:, 2]).abs().max() > 1e-3


def test_knockout_in_the_planted_circuit() -> None:
    # The induction head at query L + m is one-hot at key m + 1. Without that key the other scores all are 0, but key
    # 0's: uniform over the other i - 1 of keys 1 .. i. Those hold the target 0 times, t_1 .. t_m but the target twice.
    model, (clean, _) = planted.planted_model(), planted.repeated_prompts(5, seed=4)
    i = LENGTH + 4
    out = knockout(model, clean, INDUCTION[0], [INDUCTION[1]], [(i, i - LENGTH + 1)])
    squares = (3 * i - 2 * LENGTH - 1) / (i - 1) ** 2
    pick = torch.arange(5)
    close(out[pick, i, clean[:, i + 1 - LENGTH]], 0, 1e-4)
    twice = out[pick, i, clean[:, 1]]
    close(twice, 20 * 2 / (i - 1) * math.sqrt(10 / (8 + 2 * squares)), 1e-4)
    others = [n for n in range(LENGTH, 2 * LENGTH - 1) if n != i]
    for n in others:
        close(out[pick, n, clean[:, n + 1 - LENGTH]], 20, 1e-4)


# --- path patching --------------------------------------------------------------------------------------------------

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


# --- gradients ------------------------------------------------------------------------------------------------------


def test_the_estimate_is_exact_where_the_score_is_linear_with_its_sign(model: Any) -> None:
    model = without_mlps(model)
    model.transformer.ln_f = torch.nn.Identity()
    tokens, last = draw(model), model.config.n_layer - 1
    read_out = model.lm_head.weight[3] - model.lm_head.weight[5]
    clean, size = last_logit(model(tokens).logits), tokens.shape[1]
    for component in ("z", "head_out", "attn_out", "resid_mid", "mlp_out", "resid_post", "v", "pattern"):
        where = place(component, last, None)
        old = read(model, tokens, where)
        new = torch.randn(old.shape, dtype=torch.float64)
        estimate = gradient_estimate(model, tokens, last_logit, where, new)
        close(estimate, last_logit(write(model, tokens, where, new)) - clean)
        assert estimate.abs().min() > 1e-4
        early = Place(last, component, where.head, (0, 2))  # the score is read at the last position, which sees
        unseen = gradient_estimate(model, tokens, last_logit, early, 1.0)  # earlier ones through v alone
        assert (unseen.abs().max() > 1e-4) == (component == "v")
    end = Place(last, "resid_post", None, (size - 1,))
    old = read(model, tokens, end)
    step = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)  # new - old = step * read_out, per example
    estimate = gradient_estimate(model, tokens, last_logit, end, old + step[:, None, None] * read_out)
    close(estimate, step * read_out.pow(2).sum())
    close(gradient_estimate(model, tokens, last_logit, end, 0.0), -(old[:, 0] @ read_out))


@pytest.mark.parametrize("component", DIFFERENTIATED)
def test_the_estimate_is_the_slope_at_the_base_run(model: Any, component: str) -> None:
    tokens, where, small = draw(model), place(component), 1e-5
    old = read(model, tokens, where)
    direction = torch.randn(old.shape, dtype=torch.float64)
    up, down = (curved(write(model, tokens, where, old + sign * small * direction)) for sign in (1, -1))
    estimate = gradient_estimate(model, tokens, curved, where, old + direction)
    close(estimate, (up - down) / (2 * small), 1e-6)
    assert estimate.abs().min() > 1e-4
    close(gradient_estimate(model, tokens, curved, where, old), 0, 0)
    rows = [gradient_estimate(model, tokens[[n]], curved, where, (old + direction)[[n]]) for n in range(3)]
    close(torch.cat(rows), estimate)  # an example's estimate is its own
    model.requires_grad_(True)
    close(gradient_estimate(model, tokens, curved, where, old + direction), estimate)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_patterns_slope_is_that_of_eager_attentions_own_weights(model: Any) -> None:
    model.set_attn_implementation("eager")
    model.requires_grad_(True)
    tokens = draw(model)
    output = model(tokens, output_attentions=True)
    slope = torch.autograd.grad(curved(output.logits).sum(), output.attentions[1])[0][:, 1]
    old = output.attentions[1][:, 1]
    new = torch.randn(old.shape, dtype=torch.float64)
    wanted = ((new - old) * slope).sum((1, 2))
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        close(gradient_estimate(model, tokens, curved, Place(1, "pattern", 1), new), wanted)


@pytest.mark.parametrize("component", DIFFERENTIATED)
def test_the_integrated_estimate_is_complete(model: Any, component: str) -> None:
    tokens, source = draw(model), draw(model, 1)
    whole = place(component, positions=None)
    news = read(model, source, whole)
    if component == "pos_embed":  # the same in every run
        news = news.flip(1)
    clean = curved(model(tokens).logits)
    (one,) = integrated_estimate(model, tokens, curved, [place(component)], [news[:, [4, 2]]], 100)
    effect = curved(write(model, tokens, place(component), news[:, [4, 2]])) - clean
    close(one, effect, 1e-3)
    assert effect.abs().max() > 1e-2
    # Two places that move together share the effect of both, and one step is the slope half way.
    places = [place(component), place(component, positions=(5,))]
    parts = [news[:, [4, 2]], news[:, [5]]]
    shares = integrated_estimate(model, tokens, curved, places, parts, 100)
    both = run(model, tokens, [(p, lambda _old, new=new: new) for p, new in zip(places, parts, strict=True)])
    close(sum(shares), curved(both) - clean, 1e-3)
    single = gradient_estimate(model, tokens, curved, place(component), news[:, [4, 2]])
    assert (single - effect).abs().max() > 1e-3


def test_integrated_steps_are_taken_at_their_middle() -> None:
    # One dimension of the final residual, squared by the score: f(x) = x**2, f' = 2 x, exact at the middle of a step.
    model = raw_hooks.random_gpt2(**SHAPES["2x3"]).requires_grad_(False).double()
    model.transformer.ln_f = torch.nn.Identity()
    model.lm_head = torch.nn.Identity()
    tokens, where = draw(model), Place(1, "resid_post", None, (3,))
    old = read(model, tokens, where)[:, 0, 0]

    def power(exponent: int) -> Any:
        return lambda logits: logits[:, 3, 0] ** exponent

    new = torch.zeros(3, 1, model.config.n_embd, dtype=torch.float64)
    new[..., 0] = 4.0
    move = 4.0 - old
    for steps in (1, 2, 5):
        (estimate,) = integrated_estimate(model, tokens, power(2), [where], [new], steps)
        close(estimate, 16 - old**2)
        points = [old + (n + 0.5) / steps * move for n in range(steps)]
        (estimate,) = integrated_estimate(model, tokens, power(3), [where], [new], steps)
        close(estimate, move * sum(3 * x**2 for x in points) / steps)
    close(gradient_estimate(model, tokens, power(2), where, new), 2 * old * move)


def test_integrated_heads_move_together_from_the_base_run(model: Any) -> None:
    tokens, source = draw(model), draw(model, 1)
    places = [Place(1, "z", 0), Place(1, "z", 1, (1, 4))]
    news = [read(model, source, p) for p in places]
    olds = [read(model, tokens, p) for p in places]
    shares = integrated_estimate(model, tokens, curved, places, news, 1)
    half = [(p, lambda _old, x=(new + old) / 2: x) for p, new, old in zip(places, news, olds, strict=True)]
    for n, (p, new, old) in enumerate(zip(places, news, olds, strict=True)):
        ends = []
        for sign in (1, -1):
            nudged = (new + old) / 2 + sign * 1e-5 * (new - old)
            ends.append(curved(run(model, tokens, [*half, (p, lambda _old, x=nudged: x)])))
        close(shares[n], (ends[0] - ends[1]) / 2e-5, 1e-6)
