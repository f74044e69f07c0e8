"""capture under interventions: values equal to those of the model's own forward pass under plain hooks."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions import (
    Add,
    Compose,
    Grid,
    Head,
    Knockout,
    Layer,
    Logits,
    MeanAblate,
    Neuron,
    Patch,
    PathPatch,
    ResampleAblate,
    Scale,
    ZeroAblate,
)
from headwise.interventions.base import memory as free
from headwise.interventions.run import memory
from headwise.studies import Prompts, RepeatedTokens, capture
from headwise.studies.measuring.capture import CaptureRequest
from tests.oracles import planned_cases as cases
from tests.oracles.raw_paths import Place
from tests.support.families import NAMES
from tests.support.sweeps import Halt, parts, stop_after

OFTEN = ("two layers", "pythia", "llama")
"""One model of each kind of block."""
RARELY = [name for name in NAMES if name not in OFTEN]
randoms = st.randoms(use_true_random=True)
TASK = RepeatedTokens(n=3, length=5, seed=3)


def every_site(world):
    """Every component of every layer, of a part and of the whole, and the logits."""
    sites = [Logits(), Logits([1, 4]).at([-1, 2])]
    for layer in range(world.shape.layers):
        for component in world.components:
            if component in ("embed", "pos_embed") and layer:
                continue
            sites.append(Layer(layer).site(component))
            if component in cases.PER_HEAD:
                sites.append(Head(layer, world.heads(component) - 1).site(component))
            if component in cases.PER_NEURON:
                sites.append(Neuron(layer, 3).site(component))
    return sites


def place(world, site):
    """Where hooks find a site."""
    if isinstance(site, Logits):
        return Place(0, "logits")
    layer, component = site.layer, str(site.component)
    if component == "resid_post" and layer < world.shape.layers - 1:
        layer, component = layer + 1, "resid_pre"  # one place
    return Place(layer, component, site.part)


def at_positions(site, found, group):
    """The values of a whole site as `capture` gives them: of some tokens, at some positions."""
    if getattr(site, "tokens", None) is not None:
        found = found[..., list(site.tokens)]
    if site.positions is None:
        return found.numpy()
    at = group.count_out(site.positions)
    return (found[..., at, :] if getattr(site, "component", "") == "pattern" else found[:, at]).numpy()


def check(world, several, sites, **options):
    """Every value under every condition is that under plain hooks."""
    what = {str(number): one for number, one in enumerate(several)}
    ds = capture(world.model, world.task, sites, what=what, run=world.base, **options)
    for (number, one), group in product(enumerate(several), world.naive.groups):
        edits = one.edits() if one is not None else ()
        every = world.naive.captured(edits, group.length, [place(world, site) for site in sites])
        for name, site, whole in zip([name for name in ds.data_vars], sites, every, strict=True):
            wanted, found = at_positions(site, whole, group), ds[name].values[number, list(group.examples)]
            assert ds[name].dims[:2] == ("condition", "example")
            inside = found[tuple(slice(size) for size in wanted.shape)]
            size = max(1.0, np.abs(wanted).max())
            np.testing.assert_allclose(inside, wanted, rtol=0, atol=1e-5 * size, err_msg=f"{name}, {one}")
            assert np.isnan(found).sum() == found.size - inside.size
    return ds


def conditions(world):
    """Each kind of write, in an early and a late place of the model."""
    last, d_model = world.shape.layers - 1, world.shape.d_model
    vector = np.linspace(-1, 1, d_model).tolist()
    several = [
        None,
        ZeroAblate(Head(0, 1)),
        Patch(Head(last, 0).k if world.shape.kv_heads > 1 else Head(0, 0).q, source="corrupted"),
        MeanAblate(Layer(0).mlp_out.at(3)),
        ResampleAblate(Layer(last).attn_out),
        Add(Layer(last).resid_pre.at([2, -1]), vector),
        Scale(Layer(0).mlp_in, 0.5),
        ZeroAblate(Neuron(last, 3)),
        Knockout(Head(0, 0), query=[4, 6], key=1),
        Scale(Head(last, 1).pattern, 0.5),
        Add(Head(0, 1).head_out, vector),
        Compose(ZeroAblate(Head(0, 0)), Scale(Layer(last).resid_post, 2.0)),
        Patch(Layer(0).embed.at(2), source="corrupted"),
        PathPatch(Head(0, 0).z, Head(last, 1).q if last else "logits", source="corrupted"),
        PathPatch(Head(0, 0).z, "logits", source="corrupted"),
    ]
    return several


@pytest.mark.parametrize("name", [*OFTEN, *(pytest.param(name, marks=pytest.mark.heavy) for name in RARELY)])
def test_every_place_under_every_kind_of_write_is_as_hooks_see_it(name):
    world = cases.World(name, "eager", TASK, "clean", ())
    check(world, conditions(world), every_site(world))


def random_sites(random, world):
    """Some sites, at some positions."""
    found = []
    every = [site if site.positions is None else Logits(site.tokens) for site in every_site(world)]
    for site in random.sample(every, random.randint(1, 4)):
        at = cases.positions(random, world.lengths)
        found.append(site if at is None else site.at(at))
    named = {str(site): site for site in found}
    return [*named.values()]


@given(randoms)
@settings(max_examples=5)
def test_any_place_under_any_condition(random):
    """Prompts of any length, any conditions, any sites at any positions, packed in any way."""
    world = cases.world(random, ("two layers", "deep, narrow", "one layer", "pythia"))
    several = [None, *(cases.condition(random, world) for _ in range(random.choice([1, 3])))]
    layout = cases.layout(random)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("budget", "overhead"):
            if layout.get(name) is not None:
                patch.setattr(memory, name, lambda device, value=layout[name]: value)
        check(world, several, random_sites(random, world), batch_size=layout.get("batch_size", "auto"))


WHAT = {"clean": None, "without L0H3": ZeroAblate(Head(0, 3))}
SITES = ["L1H2.pattern", "logits at -1", Layer(0).resid_post.at(3)]


def test_each_way_of_saying_what_gives_the_dims_of_measure(words_model):
    sites, alone = ["L1H2.pattern", Layer(1).z], WHAT["without L0H3"]
    whole = capture(words_model, TASK, sites, what=WHAT)
    assert whole["L1H2_pattern"].dims == ("condition", "example", "query", "key")
    one = capture(words_model, TASK, sites, what=alone)
    assert one["L1_z"].dims == ("example", "position", "head", "d_head")
    several = capture(words_model, TASK, sites, what=[alone])
    assert several["condition"].values.tolist() == ["L0H3 zero"]
    heads = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(8))
    grid = capture(words_model, TASK, sites, what=heads)
    assert grid["L1_z"].dims == ("layer", "head", "example", "position", "read_head", "d_head")
    clean = capture(words_model, TASK, sites)
    for name in ("L1H2_pattern", "L1_z"):
        changed = whole[name].sel(condition="without L0H3").values
        assert np.abs(changed - clean[name].values).max() > 0.1
        np.testing.assert_allclose(whole[name].sel(condition="clean"), clean[name], rtol=0, atol=1e-6)
        for same in (one[name], several[name][0], grid[name].sel(layer=0, head=3)):
            np.testing.assert_allclose(same, changed, rtol=0, atol=1e-6)


def test_nothing_is_computed_after_the_last_layer_that_is_read(words_model):
    seen = []
    mlps = [block.mlp.c_fc for block in words_model.module.transformer.h]
    handles = [mlp.register_forward_hook(lambda *_, at=at: seen.append(at)) for at, mlp in enumerate(mlps)]
    try:
        capture(words_model, TASK, ["L0H3.z"], what=WHAT)  # looks at the model first
        seen.clear()
        capture(words_model, TASK, Layer(0).resid_post, what=WHAT)
        assert seen == [0, 1, 0, 0]  # what the model is; the run as it is; the pass
        seen.clear()
        capture(words_model, TASK, "L1H2.pattern", what={"MLP": ZeroAblate(Layer(0).mlp_out), "late": Scale("L1H0", 2)})
        assert seen == [0, 1, 0]
    finally:
        for handle in handles:
            handle.remove()


def test_logits_are_of_some_tokens_at_some_positions(words_model):
    task = Prompts(["apple banana cherry apple", "sun moon sun"], labels={"first": 0, "last": [(2, 3), 2]})
    whole = capture(words_model, task, "logits")["logits"]
    assert whole.sizes == {"example": 2, "position": 4, "logits_token": words_model.shape.vocabulary}
    plain = words_model.module(torch.tensor([words_model.encode("sun moon sun")])).logits[0].detach().numpy()
    np.testing.assert_allclose(whole[1, :3], plain, rtol=0, atol=1e-4)
    assert np.isnan(whole[1, 3]).all()
    some = capture(words_model, task, Logits(["moon", 2]).at("last"))["logits_at_last"]
    assert some["logits_at_last_position"].values.tolist() == ["last 0", "last 1"]
    ids = some["logits_at_last_token_id"].values.tolist()
    assert ids == [*words_model.encode("moon"), 2]
    np.testing.assert_allclose(some[0], whole[0, 2:, ids], rtol=0, atol=1e-4)
    np.testing.assert_allclose(some[1, 0], whole[1, 2, ids], rtol=0, atol=1e-4)
    assert np.isnan(some[1, 1]).all()


def test_a_file_is_the_same_as_memory_and_is_made_again(words_model, tmp_path, monkeypatch):
    out, wanted = tmp_path / "found.nc", capture(words_model, TASK, SITES, what=WHAT)
    monkeypatch.setattr(memory, "budget", lambda device: 200_000)
    found = capture(words_model, TASK, SITES, what=WHAT, out=out)
    for name in wanted.data_vars:
        assert found[name].dims == wanted[name].dims
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5)
    assert not out.with_name("found.nc.parts").exists()
    assert hw.rerun(out).agrees
    assert "under ZeroAblate" in str(hw.summary(out))
    monkeypatch.setattr(CaptureRequest, "_by_passes", None)  # what is there is not computed
    assert capture(words_model, TASK, SITES, what=WHAT, out=out)["logits_at_m1"].shape == (2, 3, 1, 857)


def test_a_file_without_intervention(words_model, tmp_path):
    found = capture(words_model, TASK, "L1H2.pattern", out=tmp_path / "found.nc")
    wanted = capture(words_model, TASK, "L1H2.pattern")
    assert found["L1H2_pattern"].dims == wanted["L1H2_pattern"].dims
    np.testing.assert_allclose(found["L1H2_pattern"], wanted["L1H2_pattern"], rtol=0, atol=1e-6)
    assert hw.rerun(tmp_path / "found.nc").agrees


def test_stopped_work_goes_on_pass_by_pass(words_model, tmp_path):
    out, heads = tmp_path / "found.nc", [ZeroAblate(Head(0, head)) for head in range(6)]
    options = {"what": heads, "out": out, "batch_size": 3}
    with pytest.raises(Halt):
        capture(words_model, TASK, SITES, progress=stop_after(4), **options)
    kept = len(parts(out))
    assert 1 < kept < 7
    assert not out.exists()
    done = []
    found = capture(words_model, TASK, SITES, progress=lambda *count: done.append(count), **options)
    assert done[0][0] >= kept
    wanted = capture(words_model, TASK, SITES, what=heads)
    np.testing.assert_allclose(found["logits_at_m1"], wanted["logits_at_m1"], rtol=0, atol=1e-4)


def test_the_size_is_told_and_refused_beforehand(words_model, monkeypatch, tmp_path):
    planned = hw.plan(words_model, TASK, WHAT, capture=SITES, timed=False)
    found = capture(words_model, TASK, SITES, what=WHAT)
    assert planned.cost().result == sum(one.nbytes for one in found.data_vars.values())
    assert "logits at -1: 2 x 3 x 1 x 857 numbers" in str(planned)
    monkeypatch.setattr(free, "free_memory", lambda: 30_000)
    with pytest.raises(DeclarationError, match=r"what is captured takes 0.0 MiB, and .* out='NAME.nc', or name fewer"):
        capture(words_model, TASK, SITES, what=WHAT)
    assert capture(words_model, TASK, SITES, what=WHAT, out=tmp_path / "found.nc")["logits_at_m1"].size == 2 * 3 * 857


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        (Logits("apple banana"), {}, "token 'apple banana' is 2 tokens of words-2l: 'apple' 'banana'"),
        (Logits(857), {}, "has the token id 857: words-2l has 0 to 856"),
        (Logits(["apple", "zzz"]), {}, "token 'zzz' is not in the vocabulary of words-2l"),
        (["logits", Logits(3)], {}, "logits is named twice"),
        ("logits at 10", {}, r"logits at 10: position 10 does not exist in a prompt of 10 tokens"),
        ("L0H1", {"what": "zero"}, "cannot measure 'zero'"),
        ("L0H1", {"what": ZeroAblate(Head(2, 0))}, "L2H0 z: words-2l has layers 0 to 1"),
        ("L0H1", {"out": "found.txt"}, "results are NetCDF files"),
        (
            "L0H1",
            {"what": Grid(lambda position: ZeroAblate(Head(0, 0).at(position)), position=[1, 2])},
            "a grid axis cannot be called 'position' here",
        ),
    ],
)
def test_what_cannot_be_captured_is_said_before_any_pass(words_model, sites, options, message):
    with pytest.raises(DeclarationError, match=message):
        capture(words_model, TASK, sites, **options)


def test_only_the_run_that_was_read_is_named(words_model):
    task = RepeatedTokens(n=2, length=5)
    ds = capture(words_model, task, "L1H2.pattern", run="corrupted")
    assert ds["run"].values.tolist() == ["corrupted"]
    with pytest.raises(KeyError):
        ds.sel(run="clean")
