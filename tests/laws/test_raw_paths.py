"""`raw_paths` itself, places and knockouts: hand values, limits, identities, and `raw_hooks` where the two overlap."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.oracles import planted, raw_hooks, raw_paths
from tests.oracles.planted import INDUCTION, LENGTH
from tests.oracles.raw_hooks import Edit, activation
from tests.oracles.raw_paths import (
    Place,
    add,
    knockout,
    read,
    run,
    scale,
    write,
)
from tests.support.raw_places import SCALED, close, draw, head_weight, place


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
