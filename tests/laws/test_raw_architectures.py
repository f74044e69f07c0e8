"""Owns the self-test of `raw_architectures`: reads add up, heads are where the table says, writes are seen.

Nothing of headwise is used here.
"""

from operator import attrgetter

import pytest
import torch

from tests.oracles import raw_architectures as raw
from tests.oracles.architecture_parts import QKV, heads_of, is_parallel, parts
from tests.oracles.raw_architectures import PER_HEAD, PER_NEURON, Place, add, components, read, write
from tests.support.architectures import CASES, SHAPES, build, prompts

MORE = [pytest.param(case, marks=pytest.mark.heavy) if len(SHAPES[case[0]]) == 1 else case for case in CASES]


@pytest.fixture(params=MORE, ids=[" ".join(map(str, case)) for case in CASES], scope="module")
def case(request):
    return build(*request.param).requires_grad_(False), prompts(*request.param)


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol * max(1.0, float(wanted.abs().max())))


def kind(model):
    return model.config.model_type


def layers(model):
    return range(len(attrgetter(parts(model).blocks)(model)))


def through(module, value):
    """What a matrix makes of a value: by its weights, not by its forward pass."""
    weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
    bias = getattr(module, "bias", None)
    return value @ weight + (0 if bias is None else bias)


def added(model, layer, side, value):
    """What is added to the stream for what a projection wrote."""
    own, block = parts(model), raw.block_of(model, layer)
    path = getattr(own, side)
    around = f"{own.attention}.".startswith(f"{path}.")  # attention, or what has it in it
    if not around and path not in (own.out, own.mlp) and path != (own.neurons or [""])[-1]:
        value = attrgetter(path)(block)(value)  # a norm
    return value * (getattr(model.config, own.multiplier) if own.multiplier else 1.0)


def test_what_is_added_leads_from_block_to_block(case):
    model, tokens = case
    before = None
    for layer in layers(model):
        pre, post = read(model, tokens, (layer, "resid_pre"), (layer, "resid_post"))
        if before is not None:
            close(pre, before, 0)
        before = post
        if "attn_out" not in components(model) or not parts(model).sums:
            continue
        attention, mlp = read(model, tokens, (layer, "attn_out"), (layer, "mlp_out"))
        close(pre + attention + mlp, post)
        if not is_parallel(model):
            close(read(model, tokens, (layer, "resid_mid"))[0] + mlp, post)


def test_z_through_the_output_projection_is_what_attention_adds(case):
    model, tokens = case
    for layer in layers(model) if "z" in components(model) else ():
        z, attention = read(model, tokens, (layer, "z"), (layer, "attn_out"))
        out = attrgetter(parts(model).out)(raw.block_of(model, layer))
        written = through(out, z.flatten(2))
        close(added(model, layer, "attn_out", written), attention)
        heads, _ = heads_of(model)
        of_heads = sum(read(model, tokens, *((layer, "head_out", head) for head in range(heads))))
        close(of_heads, written - (0 if getattr(out, "bias", None) is None else out.bias))


def test_neurons_through_the_last_matrix_are_what_the_mlp_adds(case):
    model, tokens = case
    for layer in layers(model) if parts(model).neurons else ():
        neurons, mlp = read(model, tokens, (layer, "mlp_post"), (layer, "mlp_out"))
        last = attrgetter(parts(model).neurons[1])(raw.block_of(model, layer))
        close(added(model, layer, "mlp_out", through(last, neurons)), mlp)
        with_change = [(Place(layer, "mlp_pre", 3), lambda old: old * 0 - 1e4)]
        seen = {}
        raw.run(model, tokens, [*with_change, raw._reader(seen, Place(layer, "mlp_post"))])
        (after,) = seen.values()
        assert neurons[..., 3].abs().max() > 1e-3
        if kind(model) not in ("bitnet", "apertus"):  # which norms its neurons; whose activation is not 0 there
            assert after[..., 3].abs().max() < 1e-30  # each activation gives 0 there, and a gate alone decides that
            close(after[..., 4:], neurons[..., 4:], 0)


def test_the_columns_of_a_projection_belong_to_the_heads_that_the_table_says(case):
    """A changed q moves z of its head alone, a changed k or v those of the heads that share it; v = 0 gives z = 0."""
    model, tokens = case
    heads, kv_heads = heads_of(model)
    if kind(model) in ("bitnet", "diffllama"):  # which norm z of all heads together; pairs heads
        return
    normed_together = kind(model) in ("olmo2", "olmo3", "olmoe")  # q and k of all heads in one norm
    layer = len(layers(model)) - 1
    for part in set(QKV) & set(components(model)):
        (z,) = read(model, tokens, (layer, "z"))
        for head in range(heads if part == "q" else kv_heads):
            (old,) = read(model, tokens, (layer, part, head))
            seen = {}
            changes = [(Place(layer, part, head), lambda old, part=part: old * 0 if part == "v" else old.flip(-1) + 1)]
            raw.run(model, tokens, [*changes, raw._reader(seen, Place(layer, "z"))])
            (after,) = seen.values()
            moved = (after - z).abs().amax((0, 1, 3)) > 1e-4
            assert old.abs().max() > 1e-3
            group = heads // kv_heads if part != "q" else 1
            mine = torch.arange(heads) // group == head
            assert moved[mine].all()
            assert (normed_together and part != "v") or not moved[~mine].any()
            if part == "v":
                assert after[:, :, mine].abs().max() < 1e-6


def test_the_stand_in_for_attention_is_the_models_own(case):
    """Its weights are those that the model returns under eager attention."""
    model, tokens = case
    if "pattern" not in components(model):
        return
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own = model(tokens, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(usual)
    heads, _ = heads_of(model)
    for layer in layers(model):
        found = read(model, tokens, *((layer, "pattern", head) for head in range(heads)))
        close(torch.stack(found, 1), own[layer], 1e-5)


def test_a_write_is_seen_from_its_position_on_and_nothing_changes_nothing(case):
    model, tokens = case
    with torch.no_grad():
        clean = model(tokens, use_cache=False).logits
    close(raw.run(model, tokens), clean, 0)
    for number, component in enumerate(components(model)):
        layer = 0 if "embed" in component or number % 2 else len(layers(model)) - 1
        whole = Place(layer, component, 0 if component in PER_HEAD else 1 if component in PER_NEURON else None)
        close(add(model, tokens, whole, torch.zeros(())), clean)
        new = 2.0 if component in PER_NEURON else 0.0  # many a neuron is off: its activation gives 0 anyway
        moved = (write(model, tokens, whole._replace(positions=(5, 8)), new) - clean).abs().amax((0, 2))
        assert moved[:5].max() < 1e-5 * clean.abs().max(), whole
        assert moved[5:].max() > 1e-3 * clean.abs().max(), whole


def test_models_are_the_same_each_time_and_their_shapes_differ():
    for name, _ in [case for case in CASES if case[1]]:
        first, again, second = build(name, 0), build(name, 0), build(name, 1)
        assert all(torch.equal(one, two) for one, two in zip(first.parameters(), again.parameters(), strict=True))
        assert len(layers(first)) != len(layers(second))
        assert first.config.vocab_size <= 200
        small = [one for one in first.parameters() if one.dim() == 1]
        assert all(len(one.unique()) == len(one) for one in small), name
