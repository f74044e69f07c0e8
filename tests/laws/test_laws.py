"""Laws that hold for every model and every intervention."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import DeclarationError
from headwise.interventions import Compose, Head, Layer, MeanAblate, Patch, ResampleAblate, ZeroAblate
from headwise.interventions.run.deferred import derangement
from headwise.metrics import kl, logit_diff, loss
from headwise.studies import RepeatedTokens, measure
from tests.oracles import raw_hooks

TASK = RepeatedTokens(n=4, length=6, seed=1)
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@st.composite
def sites(draw):
    """A writable site of the two-layer model with four heads."""
    layer = draw(st.integers(0, 1))
    positions = draw(st.none() | st.sets(st.integers(0, 11), min_size=1, max_size=5))
    if draw(st.booleans()):
        site = Head(layer, draw(st.integers(0, 3))).site(draw(st.sampled_from(["q", "k", "v", "z"])))
    else:
        site = Layer(layer).site(draw(st.sampled_from(STREAM)))
    return site if positions is None else site.at(positions)


edits = st.one_of(
    sites().map(ZeroAblate), sites().map(MeanAblate), sites().map(ResampleAblate), sites().map(lambda site: Patch(site))
)


def losses(model, what, **options):
    return measure(model, TASK, what, [loss], **options)["loss"].values


@given(sites())
def test_a_patch_from_the_same_run_changes_nothing(small_model, site):
    measured = measure(small_model, TASK, Patch(site, source="clean"), [loss, kl])
    np.testing.assert_allclose(measured["loss"], measured["baseline_loss"].sel(run="clean"), atol=1e-5)
    np.testing.assert_allclose(measured["kl"], 0, atol=1e-5)


@given(st.lists(edits, min_size=2, max_size=3))
def test_batched_is_unbatched(small_model, several):
    named = {str(number): edit for number, edit in enumerate(several)}
    together = losses(small_model, named)
    for row, edit in enumerate(several):
        np.testing.assert_allclose(together[row], losses(small_model, edit), atol=1e-5)
    for batch_size in (1, 3, 5):
        np.testing.assert_allclose(together, losses(small_model, named, batch_size=batch_size), atol=1e-5)


@given(edits, edits)
def test_composing_commutes(small_model, one, two):
    if one.site.overlaps(two.site):
        return
    both = losses(small_model, one + two)
    np.testing.assert_array_equal(both, losses(small_model, two + one))
    np.testing.assert_array_equal(both, losses(small_model, Compose(two, one)))


@given(sites().filter(lambda site: site.head is not None))
def test_an_ablation_of_a_layer_is_that_of_all_its_heads(small_model, site):
    whole = Layer(site.layer).site(site.component)
    whole = whole if site.positions is None else whole.at(site.positions)
    each = [Head(site.layer, head).site(site.component) for head in range(4)]
    each = each if site.positions is None else [one.at(site.positions) for one in each]
    for kind in (ZeroAblate, MeanAblate, ResampleAblate, Patch):
        np.testing.assert_allclose(
            losses(small_model, kind(whole)), losses(small_model, Compose(*map(kind, each))), atol=1e-5
        )


@given(sites())
def test_an_ablation_again_downstream_of_itself_is_once(small_model, site):
    """Zeroing a head's z, and zeroing it again position by position, is the same intervention."""
    once = losses(small_model, ZeroAblate(site))
    places = site.positions or tuple(range(2 * TASK.length))
    again = Compose(*(ZeroAblate(site.at(place)) for place in places))
    np.testing.assert_allclose(once, losses(small_model, again), atol=1e-6)


@given(st.lists(edits, min_size=1, max_size=4), st.sampled_from(["clean", "corrupted"]), st.booleans())
def test_any_composition_equals_raw_hooks(small_model, several, base, zeroed):
    """Random compositions over layers and sites, both base runs, alone and beside another condition."""
    try:
        whole = Compose(*several)
    except DeclarationError:
        return  # they meet
    batch, reference = TASK.draw(small_model), TASK.reference(small_model)
    partners = derangement(len(reference.lengths), 0)[: TASK.n].tolist()
    runs = {run: torch.as_tensor(batch.runs[run]) for run in batch.runs}
    drawn = torch.as_tensor(reference.runs[base])

    def oracle(edit):
        place = (str(edit.site.component), edit.site.layer, edit.site.head, edit.site.positions)
        if isinstance(edit, ZeroAblate):
            return raw_hooks.zero_edit(*place)
        source = runs["corrupted"] if isinstance(edit, Patch) else drawn
        value = raw_hooks.activation(small_model.module, source, *place[:2])
        if isinstance(edit, Patch):
            return raw_hooks.patch_edit(value, *place)
        if isinstance(edit, MeanAblate):
            return raw_hooks.mean_edit(value, *place)
        return raw_hooks.resample_edit(value, partners, *place)

    logits = raw_hooks.run(small_model.module, runs[base], [oracle(edit) for edit in whole.edits()])
    (group,) = batch.groups()
    facts = batch.facts(base, group)
    scored = logits[:, list(group.scored)]
    wanted = -scored.log_softmax(-1).gather(-1, torch.as_tensor(facts.targets)[..., None])[..., 0].mean(-1)
    plain = raw_hooks.run(small_model.module, runs[base])[:, list(group.scored)].log_softmax(-1)
    divergence = (plain.exp() * (plain - scored.log_softmax(-1))).sum(-1).mean(-1)
    what = {"it": whole, "beside": ZeroAblate(Layer(0).resid_mid)} if zeroed else {"it": whole}
    measured = measure(small_model, TASK, what, [loss, kl], base=base).sel(condition="it")
    np.testing.assert_allclose(measured["loss"], wanted.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(measured["kl"], divergence.numpy(), rtol=1e-4, atol=1e-4)


def test_without_heads_and_mlps_only_embeddings_and_biases_are_left(random_model):
    module = random_model.module
    everything = Compose(
        *(ZeroAblate(Layer(layer).z) for layer in random_model.layers),
        *(ZeroAblate(Layer(layer).mlp_out) for layer in random_model.layers),
    )
    measured = measure(random_model, TASK, everything, [loss])["loss"].values
    batch = TASK.draw(random_model)
    tokens = torch.as_tensor(batch.runs["clean"])
    with torch.no_grad():
        stream = module.transformer.wte(tokens) + module.transformer.wpe(torch.arange(tokens.shape[1]))
        for block in module.transformer.h:
            stream = stream + block.attn.c_proj.bias
        logits = module.lm_head(module.transformer.ln_f(stream))
    (group,) = batch.groups()
    scored = list(group.scored)
    targets = torch.as_tensor(batch.facts("clean", group).targets)
    wanted = -logits[:, scored].log_softmax(-1).gather(-1, targets[..., None])[..., 0].mean(-1)
    np.testing.assert_allclose(measured, wanted.numpy(), atol=1e-5)


def test_patching_the_whole_stream_is_the_other_run(random_model):
    """Denoising resid_post of the last layer gives the clean run's logits exactly; so does resid_pre of the first."""
    last = random_model.shape.layers - 1
    for site in (Layer(last).resid_post, Layer(0).resid_pre, Layer(last).resid_mid):
        measured = measure(random_model, TASK, Patch(site, source="clean"), [logit_diff], base="corrupted")
        clean = measured["baseline_logit_diff"].sel(run="clean")
        np.testing.assert_allclose(measured["logit_diff"], clean, atol=1e-4)
        assert not np.allclose(clean, measured["baseline_logit_diff"].sel(run="corrupted"), atol=1e-2)


@given(st.integers(2, 60), st.integers(0, 1000))
def test_a_derangement_moves_everything(size, seed):
    order = derangement(size, seed)
    assert sorted(order.tolist()) == list(range(size))
    assert not (order == np.arange(size)).any()
    assert (order == derangement(size, seed)).all()


def test_measuring_leaves_the_model_as_it_was(small_model):
    before = small_model.module.state_dict()["transformer.h.0.attn.c_attn.weight"].clone()
    plain = measure(small_model, TASK, None, [loss])["baseline_loss"].values
    losses(small_model, ZeroAblate(Head(0, 0)))
    np.testing.assert_array_equal(plain, measure(small_model, TASK, None, [loss])["baseline_loss"].values)
    assert torch.equal(before, small_model.module.state_dict()["transformer.h.0.attn.c_attn.weight"])
