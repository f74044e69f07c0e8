"""The engine against raw torch hooks: every intervention, every site, models of several shapes."""

import numpy as np
import pytest
import torch

from headwise.interventions import Component, Head, Layer, MeanAblate, Patch, ResampleAblate, Site, ZeroAblate
from headwise.interventions.run.deferred import derangement
from headwise.metrics import loss
from headwise.studies import Prompts, RepeatedTokens, capture, measure
from tests.oracles import raw_hooks, raw_paths

TASK = RepeatedTokens(n=5, length=7, seed=3)
WRITABLE = [Component(name) for name in raw_hooks.EDITABLE]
TOLERANCE = 1e-5


def hook_sites(model):
    """Each writable component in the first and in the last layer, whole and by head, at all and at some positions."""
    for layer in {0, model.shape.layers - 1}:
        for component in WRITABLE:
            yield Site(component, layer)
            yield Site(component, layer, None, (2, 9))
            if component.per_head:
                yield Site(component, layer, model.shape.heads - 1)
                yield Site(component, layer, 1, (8, 12))


def expected_loss(model, tokens, targets, scored, edits):
    logits = raw_hooks.run(model.module, tokens, edits)[:, scored]
    return -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].mean(-1)


def tokens_of(batch, run):
    return torch.as_tensor(batch.runs[run])


def check_losses(model, interventions, oracle_edits, base="clean"):
    """Per-example loss of each condition equals that of the raw hooks."""
    batch = TASK.draw(model)
    (group,) = batch.groups()
    targets = torch.as_tensor(batch.facts("clean", group).targets)
    named = {str(number): intervention for number, intervention in enumerate(interventions)}
    measured = measure(model, TASK, named, [loss], base=base)["loss"].values
    worst = 0.0
    for row, edits in enumerate(oracle_edits):
        wanted = expected_loss(model, tokens_of(batch, base), targets, list(group.scored), edits)
        worst = max(worst, float(np.abs(measured[row] - wanted.numpy()).max()))
        plain = expected_loss(model, tokens_of(batch, base), targets, list(group.scored), [])
        assert not np.allclose(plain, wanted, atol=1e-3), (
            f"{interventions[row]!r} changes nothing here: it tests nothing"
        )
    assert worst < TOLERANCE


def arguments(site):
    return str(site.component), site.layer, site.head, site.positions


def test_zero_ablation_equals_raw_hooks(random_model):
    sites = list(hook_sites(random_model))
    check_losses(
        random_model, [ZeroAblate(site) for site in sites], [[raw_hooks.zero_edit(*arguments(site))] for site in sites]
    )


@pytest.mark.parametrize(("base", "source"), [("clean", "corrupted"), ("corrupted", "clean")])
def test_patching_equals_raw_hooks(random_model, base, source):
    # sites that are the same in both runs, or hardly matter, are left out: they would test nothing
    sites = [site for site in hook_sites(random_model) if site.positions is None and str(site.component) != "q"]
    other = tokens_of(TASK.draw(random_model), source)
    edits = [
        [raw_hooks.patch_edit(raw_hooks.activation(random_model.module, other, *arguments(site)[:2]), *arguments(site))]
        for site in sites
    ]
    check_losses(random_model, [Patch(site, source=source) for site in sites], edits, base=base)


@pytest.mark.parametrize("over", [("example",), ("example", "position")])
def test_mean_ablation_equals_raw_hooks(random_model, over):
    sites = list(hook_sites(random_model))
    reference = tokens_of(TASK.reference(random_model), "clean")
    edits = [
        [
            raw_hooks.mean_edit(
                raw_hooks.activation(random_model.module, reference, *arguments(site)[:2]), *arguments(site), over=over
            )
        ]
        for site in sites
    ]
    given = over if len(over) > 1 else over[0]
    check_losses(random_model, [MeanAblate(site, over=given) for site in sites], edits)


def test_resample_ablation_equals_raw_hooks(random_model):
    sites = list(hook_sites(random_model))
    reference = tokens_of(TASK.reference(random_model), "clean")
    partners = derangement(len(reference), 4)[: TASK.n].tolist()
    edits = [
        [
            raw_hooks.resample_edit(
                raw_hooks.activation(random_model.module, reference, *arguments(site)[:2]), partners, *arguments(site)
            )
        ]
        for site in sites
    ]
    check_losses(random_model, [ResampleAblate(site, seed=4) for site in sites], edits)


def test_composition_equals_raw_hooks(random_model):
    last = random_model.shape.layers - 1
    other = tokens_of(TASK.draw(random_model), "corrupted")
    patched = raw_hooks.patch_edit(raw_hooks.activation(random_model.module, other, "v", last), "v", last, 1, None)
    edits = [
        raw_hooks.zero_edit("z", 0, 0, (3, 4)),
        raw_hooks.zero_edit("mlp_out", 0, None, None),
        patched,
        raw_hooks.zero_edit("resid_mid", last, None, (1,)),
    ]
    whole = (
        Patch(Head(last, 1).v)
        + ZeroAblate(Layer(0).mlp_out)
        + ZeroAblate(Head(0, 0).z.at([3, 4]))
        + ZeroAblate(Layer(last).resid_mid.at(1))
    )
    check_losses(random_model, [whole], [edits])


@pytest.mark.parametrize("component", [Component(name) for name in raw_hooks.READABLE])
def test_capture_equals_raw_hooks(random_model, component):
    batch = TASK.draw(random_model)
    layer = random_model.shape.layers - 1
    wanted = raw_hooks.activation(random_model.module, tokens_of(batch, "corrupted"), str(component), layer)
    found = capture(random_model, TASK, Layer(layer).site(component), run="corrupted")[f"L{layer}_{component}"]
    assert found.shape == tuple(wanted.shape)
    np.testing.assert_allclose(found.values, wanted.numpy(), atol=TOLERANCE)
    if component.per_head:
        one = capture(random_model, TASK, Head(layer, 1).site(component), run="corrupted")[f"L{layer}H1_{component}"]
        np.testing.assert_allclose(
            one.values, wanted.numpy().take(1, axis=1 if component == "pattern" else 2), atol=TOLERANCE
        )


@pytest.mark.parametrize("component", ["embed", "pos_embed"])
def test_captured_embeddings_equal_raw_hooks(random_model, component):
    tokens = tokens_of(TASK.draw(random_model), "clean")
    found = capture(random_model, TASK, Layer(0).site(component))[f"L0_{component}"]
    wanted = raw_paths.read(random_model.module, tokens, raw_paths.Place(0, component))
    np.testing.assert_allclose(found.values, wanted.numpy(), atol=TOLERANCE)


def test_capture_at_positions(small_model):
    whole = capture(small_model, TASK, [Head(1, 2).k, Head(1, 2).pattern, Layer(0).resid_post])
    some = capture(small_model, TASK, [Head(1, 2).k.at([4, -1]), Head(1, 2).pattern.at(5), Layer(0).resid_post.at(0)])
    keys, last = some["L1H2_k_at_m1_4"], whole["L1H2_k"]
    np.testing.assert_array_equal(keys.values[:, 0], last.values[:, -1])
    np.testing.assert_array_equal(keys.values[:, 1], last.values[:, 4])
    np.testing.assert_array_equal(some["L1H2_pattern_at_5"].values[:, 0], whole["L1H2_pattern"].values[:, 5])
    np.testing.assert_array_equal(some["L0_resid_post_at_0"].values[:, 0], whole["L0_resid_post"].values[:, 0])


def test_prompts_of_unequal_length_give_what_each_alone_gives(small_model):
    texts = ["3 4 5 3", "7 8", "9 10 11 12 9 10", "1 2 1", "5 6 7 5"]
    others = ["1 2 3 4", "4 3 2 1", "1 2", "3 4", "1 2 3 4 5 6", "6 5 4 3 2 1", "1 2 3", "3 2 1"]
    what = {"zero": ZeroAblate(Head(0, 1)), "mean": MeanAblate(Layer(1).mlp_out)}
    together = measure(small_model, Prompts(texts, others=others), what, [loss])
    for row, text in enumerate(texts):
        alone = measure(small_model, Prompts([text], others=others), what, [loss])
        np.testing.assert_allclose(together["loss"].values[:, row], alone["loss"].values[:, 0], atol=1e-6)
        np.testing.assert_allclose(
            together["baseline_loss"].values[0, row], alone["baseline_loss"].values[0, 0], atol=1e-6
        )


def test_resampling_from_fewer_reference_prompts_than_there_are_prompts(small_model):
    texts, others = ["1 2 3", "4 5 6", "7 8 9"], ["10 11 12", "13 14 15"]
    task = Prompts(texts, others=others)
    found = measure(small_model, task, ResampleAblate(Layer(1).resid_pre), [loss])["loss"].values
    reference = torch.tensor([[int(token) for token in text.split()] for text in others])
    tokens = torch.tensor([[int(token) for token in text.split()] for text in texts])
    stream = raw_hooks.activation(small_model.module, reference, "resid_pre", 1)
    edit = raw_hooks.resample_edit(stream, [1, 0, 1], "resid_pre", 1, None, None)
    wanted = expected_loss(small_model, tokens, tokens[:, 1:], [0, 1], [edit])
    np.testing.assert_allclose(found, wanted.numpy(), atol=TOLERANCE)


def test_attention_implementation_does_not_matter():
    eager, sdpa = (raw_hooks.random_gpt2(2, 3, 6, 40, 20) for _ in range(2))
    eager.set_attn_implementation("eager")
    import headwise as hw

    results = [
        measure(hw.load(module), RepeatedTokens(n=3, length=6), {"k": Patch(Head(1, 0).k)}, [loss])["loss"].values
        for module in (eager, sdpa)
    ]
    assert eager.config._attn_implementation != sdpa.config._attn_implementation
    np.testing.assert_allclose(*results, atol=TOLERANCE)


def test_the_pattern_is_that_of_the_model_with_scaled_scores():
    import headwise as hw

    module = raw_hooks.random_gpt2(3, 2, 6, 40, 20)
    for block in module.transformer.h:
        block.attn.scaling /= block.attn.layer_idx + 1
    module.config.scale_attn_by_inverse_layer_idx = True
    model, task = hw.load(module), RepeatedTokens(n=2, length=5)
    wanted = raw_hooks.activation(module, torch.as_tensor(task.draw(model).runs["clean"]), "pattern", 2)
    np.testing.assert_allclose(
        capture(model, task, Layer(2).pattern)["L2_pattern"].values, wanted.numpy(), atol=TOLERANCE
    )
