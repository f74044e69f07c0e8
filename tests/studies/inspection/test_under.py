"""Direct attribution and the logit lens under interventions, against plain hooks that change the model's own pass."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise import Add, Head, Knockout, Layer, MeanAblate, Neuron, Patch, PathPatch, ProjectOut, Scale, ZeroAblate
from headwise.errors import DeclarationError
from tests.oracles import raw_families, raw_paths
from tests.oracles.raw_direct import Parts, _last_norm, head_logits, shares_inside, shares_under
from tests.oracles.raw_hooks import random_gpt2
from tests.oracles.raw_paths import Place

TASK = hw.RepeatedTokens(n=3, length=4, seed=2)
QUICK = ("pythia", "gemma")
VECTOR = torch.linspace(-1, 2, 32)


def nothing(old):
    return torch.zeros_like(old)


def more(old):
    return old + VECTOR


def without_key(pattern):
    kept = pattern.clone()
    kept[..., 2] = 0
    return kept / kept.sum(-1, keepdim=True)


def of_gpt2(module, tokens, corrupted, drawn):
    """Kind of intervention to the intervention, the changes that it makes, and what a source is made to write."""

    def there(place, ids=corrupted):
        return raw_paths.read(module, ids, place)

    sent = (there(Place(0, "z", 1)) - there(Place(0, "z", 1), tokens)) @ Parts(module, tokens).rows(0, 1)
    mean = there(Place(1, "attn_out"), drawn).mean(0, keepdim=True)
    end = Place(2, "resid_post")
    mlp, stream = there(Place(0, "mlp_out")), there(end)
    return {
        "None": (None, [], None),
        "ZeroAblate": (ZeroAblate(Head(1, 2)), [(Place(1, "z", 2), nothing)], None),
        "ZeroAblate neuron": (ZeroAblate(Neuron(2, 3)), [(Place(2, "mlp_post", 3), nothing)], None),
        "MeanAblate": (MeanAblate(Layer(1).attn_out), [(Place(1, "attn_out"), lambda old: mean.expand_as(old))], None),
        "Patch": (Patch(Layer(0).mlp_out), [(Place(0, "mlp_out"), lambda old: mlp)], None),
        "Patch stream": (Patch(Layer(2).resid_post), [(end, lambda old: stream)], None),
        "Add": (Add(Layer(1).resid_mid.at(-2), VECTOR), [(Place(1, "resid_mid", None, [6]), more)], None),
        "Add head": (
            Add(Head(1, 0).head_out, VECTOR),
            [(Place(1, "attn_out"), more)],
            {"L1H0": VECTOR},
        ),
        "Scale": (Scale(hw.Site("embed", 0), 0.3), [(Place(0, "embed"), lambda old: 0.3 * old)], None),
        "ProjectOut": (
            ProjectOut(Layer(2).resid_pre, VECTOR),
            [(Place(2, "resid_pre"), lambda old: raw_paths.without_direction(old, VECTOR))],
            None,
        ),
        "Knockout": (Knockout(Head(2, 1), 6, 2), [(Place(2, "pattern", 1, [6]), without_key)], None),
        "PathPatch": (
            PathPatch(Head(0, 1), "logits", through_mlps=False), [(end, lambda old: old + sent)], None,
        ),
    }  # fmt: skip


def compared(module, task, what, changes_of):
    """Shares under conditions as one dataset, against those of plain hooks one by one."""
    model = hw.load(module)
    batch = task.draw(model)
    tokens, plus, minus = (torch.tensor(one) for one in (batch.runs["clean"], batch.targets, batch.distractors))
    ds = hw.direct_logit_attribution(model, task, what=what, per_position=True)
    assert ds["attribution"].dims == ("condition", "source", "example", "position")
    summed = ds["attribution"].sum("source").where(ds["whole"].notnull())
    np.testing.assert_allclose(summed, ds["whole"], atol=1e-4)
    rests = {}
    for name, (changes, added) in changes_of.items():
        wanted, said, rests[name] = shares_under(module, tokens, plus, minus, changes, added)
        assert ds["source"].values.tolist() == list(wanted)
        found = ds.sel(condition=name)
        for source, value in wanted.items():
            expected = np.where(batch.scored, value.numpy(), np.nan)
            given = found["attribution"].sel(source=source)
            np.testing.assert_allclose(given, expected, atol=3e-4, err_msg=f"{name} {source}")
        np.testing.assert_allclose(found["whole"], np.where(batch.scored, said.numpy(), np.nan), atol=3e-4)
    return ds, rests


def test_shares_under_every_kind_of_intervention():
    module = random_gpt2(3, 4, 8, 40, 30)
    model = hw.load(module)
    batch = TASK.draw(model)
    runs = (torch.tensor(one) for one in (batch.runs["clean"], batch.runs["corrupted"]))
    cases = of_gpt2(module, *runs, torch.tensor(TASK.reference(model).runs["clean"]))
    what = {name: edit for name, (edit, _, _) in cases.items()}
    ds, rests = compared(module, TASK, what, {name: case[1:] for name, case in cases.items()})
    assert {name for name, rest in rests.items() if rest.abs().max() > 1e-3} == {
        "MeanAblate", "Patch stream", "Add", "ProjectOut", "PathPatch",
    }  # fmt: skip
    np.testing.assert_allclose(rests["Add"][:, 6], VECTOR.expand(3, -1), atol=1e-5)
    clean = hw.direct_logit_attribution(model, TASK, per_position=True)
    np.testing.assert_allclose(ds["attribution"].sel(condition="None")[:-1], clean["attribution"], atol=1e-5)
    assert float(abs(ds["attribution"].sel(condition="ZeroAblate", source="L1H2")).max()) == 0


FAMILIES = [pytest.param(one, marks=() if one in QUICK else pytest.mark.heavy) for one in raw_families.MODELS]


@pytest.mark.parametrize("name", FAMILIES)
def test_shares_in_every_family(name):
    module = raw_families.random_model(name)
    vector = torch.linspace(-1, 2, 24)
    what = {
        "head": ZeroAblate(Head(0, 1)),
        "stream": Add(Layer(0).resid_pre, vector),
        "mlp": Scale(Layer(0).mlp_out, 0.5),
    }
    changes = {
        "head": [(Place(0, "z", 1), nothing)],
        "stream": [(Place(0, "resid_pre"), lambda old: old + vector)],
        "mlp": [(Place(0, "mlp_out"), lambda old: old * 0.5)],
    }
    if name == "gemma":  # its oracle takes the stream for the embedding
        del what["stream"], changes["stream"]
    _, rests = compared(module, TASK, what, {one: (each, None) for one, each in changes.items()})
    assert rests["head"].abs().max() < 1e-4


def inside_compared(module, task, what, changes_of, layer, head):
    """Neurons and keys under conditions, against those of plain hooks one by one; they sum to the MLP and the head."""
    model = hw.load(module)
    batch = task.draw(model)
    tokens, plus, minus = (torch.tensor(one) for one in (batch.runs["clean"], batch.targets, batch.distractors))
    parts = [Layer(layer), Head(layer, head)]
    ds = hw.direct_logit_attribution(model, task, what=what, parts=parts, per_position=True)
    whole = hw.direct_logit_attribution(model, task, what=what, per_position=True)
    np.testing.assert_allclose(ds["whole"], whole["whole"], atol=1e-4)
    for name, (changes, added) in changes_of.items():
        own = None if added is None else added.get(f"L{layer}H{head}")
        wanted = shares_inside(module, tokens, plus, minus, layer, head, changes, own)
        assert ds["source"].values.tolist() == list(wanted)
        expected = np.stack([np.where(batch.scored, value.numpy(), np.nan) for value in wanted.values()])
        np.testing.assert_allclose(ds["attribution"].sel(condition=name), expected, atol=3e-4, err_msg=name)
        for source in (f"L{layer}.mlp", f"L{layer}H{head}"):
            some = ds.sel(condition=name)["attribution"]
            of = (some["head"] == head) if "H" in source else (some["head"] == -1)
            summed = some.where(of, drop=True).sum("source", skipna=False)
            there = whole["attribution"].sel(condition=name, source=source)
            np.testing.assert_allclose(summed, there, atol=1e-4, err_msg=f"{name} {source}")
    return ds


@pytest.mark.parametrize(("layer", "head"), [(1, 2), (2, 1), (1, 0)])
def test_neurons_and_keys_under_every_kind_of_intervention(layer, head):
    module = random_gpt2(3, 4, 8, 40, 30)
    model = hw.load(module)
    batch = TASK.draw(model)
    runs = (torch.tensor(one) for one in (batch.runs["clean"], batch.runs["corrupted"]))
    cases = of_gpt2(module, *runs, torch.tensor(TASK.reference(model).runs["clean"]))
    cases["Scale values"] = (
        Scale(Head(layer, head).v, 2.0), [(Place(layer, "v", head), lambda old: 2 * old)], None,
    )  # fmt: skip
    cases["Scale MLP"] = (
        Scale(Layer(layer).mlp_out, 0.5), [(Place(layer, "mlp_out"), lambda old: 0.5 * old)], None,
    )  # fmt: skip
    what = {name: edit for name, (edit, _, _) in cases.items()}
    ds = inside_compared(module, TASK, what, {name: case[1:] for name, case in cases.items()}, layer, head)
    rest = abs(ds["attribution"].sel(source=[f"L{layer}.mlp intervention", f"L{layer}H{head} intervention"]))
    assert float(rest.sel(condition="None").max()) < 1e-4
    assert float(rest.sel(condition="Scale MLP")[0].max()) > 1e-3
    clean = hw.direct_logit_attribution(model, TASK, parts=[Layer(layer), Head(layer, head)], per_position=True)
    kept = ds["attribution"].sel(condition="None", source=clean["source"].values)
    np.testing.assert_allclose(kept, clean["attribution"], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_and_keys_in_every_family(name):
    module = raw_families.random_model(name)
    last = module.config.num_hidden_layers - 1
    changes = {
        "head": [(Place(0, "z", 1), nothing)],
        "neuron": [(Place(last, "mlp_post", 3), nothing)],
        "mlp": [(Place(0, "mlp_out"), lambda old: old * 0.5)],
    }
    what = {"head": ZeroAblate(Head(0, 1)), "neuron": ZeroAblate(Neuron(last, 3)), "mlp": Scale(Layer(0).mlp_out, 0.5)}
    inside_compared(module, TASK, what, {one: (each, None) for one, each in changes.items()}, last, 1)


def test_neurons_and_keys_of_prompts_of_several_lengths(words_model):
    task = hw.Prompts(["apple banana cherry apple", "dog cat dog"], ["banana", "cat"], ["dog", "apple"])
    what = {"clean": None, "without": ZeroAblate("L0H3")}
    ds = hw.direct_logit_attribution(words_model, task, what=what, parts=["L1H2", "L0N5"])
    clean = hw.direct_logit_attribution(words_model, task, parts=["L1H2", "L0N5"])
    kept = ds["attribution"].sel(condition="clean", source=clean["source"].values)
    np.testing.assert_allclose(kept, clean["attribution"], atol=1e-5)
    assert ds["attribution"].sel(source="L1H2 from 3").isnull().values.tolist() == [[False, True]] * 2
    assert "L0.mlp intervention" not in ds["source"]


@torch.no_grad()
def streams(module, tokens, changes):
    known = Parts(module, tokens, changes)
    layers = range(module.config.num_hidden_layers)
    read = [known.read(0, "resid_pre"), *(known.read(layer, "resid_post") for layer in layers)]
    return torch.stack([module.lm_head(_last_norm(module)(one)) for one in read])


@pytest.mark.parametrize("name", ["gpt2", *FAMILIES])
def test_the_lens(name):
    module = random_gpt2(3, 4, 6, 40, 30) if name == "gpt2" else raw_families.random_model(name)
    model, vector = hw.load(module), torch.linspace(-1, 2, 24)
    batch = TASK.draw(model)
    tokens, at = torch.tensor(batch.runs["clean"]), np.flatnonzero(batch.scored[0])
    last = model.layers[-1]
    what = {"clean": None, "head": ZeroAblate(Head(0, 1)), "end": Add(Layer(last).resid_post.at([5, 6]), vector)}
    changes = {
        "clean": [],
        "head": [(Place(0, "z", 1), nothing)],
        "end": [(Place(last, "resid_post", None, [5, 6]), lambda old: old + vector)],
    }
    ds = hw.logit_lens(model, TASK, what=what, top=3, metrics=["loss"])
    heads = hw.logit_lens(model, TASK, of="heads", what=what, top=1)
    assert ds["token"].dims == ("condition", "layer", "example", "position", "rank")
    assert heads["token"].dims == ("condition", "layer", "head", "example", "position", "rank")
    for one, each in changes.items():
        logits = streams(module, tokens, each)[:, :, at]
        np.testing.assert_allclose(ds["logit"].sel(condition=one), logits.topk(3).values, atol=3e-4)
        loss = -logits.log_softmax(-1).gather(
            -1, torch.tensor(batch.targets)[:, at].expand(logits.shape[:-1])[..., None]
        )
        np.testing.assert_allclose(ds["loss"].sel(condition=one), loss[..., 0], atol=3e-4)
        alone = head_logits(module, tokens, each)[..., at, :].max(-1).values
        np.testing.assert_allclose(heads["logit"].sel(condition=one)[..., 0], alone, atol=3e-4)
    clean = hw.logit_lens(model, TASK, top=3, metrics=["loss"])
    np.testing.assert_array_equal(ds["token_id"].sel(condition="clean"), clean["token_id"])


def test_a_grid_of_heads_keeps_its_axes(words_model):
    heads = hw.Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=[1], head=[2, 5])
    ds = hw.direct_logit_attribution(words_model, TASK, what=heads)
    assert ds["attribution"].dims == ("layer", "head", "source", "example")
    alone = hw.direct_logit_attribution(words_model, TASK, what=ZeroAblate("L1H5"))
    assert alone["attribution"].dims == ("source", "example")
    one = ds.sel(layer=1, head=5)
    np.testing.assert_allclose(one["attribution"], alone["attribution"], atol=1e-5)
    (grid,) = (each for each in hw.plots.attribution(one) if "layer" in map(str, each.dimensions()))
    drawn = grid.dframe().set_index(["layer", "head"])["value"]
    np.testing.assert_allclose(
        drawn.loc[(0, 3)], float(one["attribution"].mean("example").sel(source="L0H3")), rtol=1e-6
    )
    with pytest.raises(DeclarationError, match="select layer, 1"):
        hw.plots.attribution(ds)
    lens = hw.logit_lens(words_model, TASK, what=heads, top=1)
    assert lens["token"].dims == ("layer", "head", "read_layer", "example", "position", "rank")
    cells = hw.plots.token_grid(lens.sel(layer=1, head=2)).dframe()
    assert sorted(set(cells["layer"])) == [-1, 0, 1]
    with pytest.raises(DeclarationError, match="select head, 2 or 5"):
        hw.plots.token_grid(lens)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"what": ZeroAblate("L5H2")}, "L5H2 z: words-2l has layers 0 to 1"),
        ({"what": {}}, "the mapping of conditions is empty"),
        ({"what": hw.Grid(lambda source: ZeroAblate(Head(0, source)), source=[0])}, "cannot be called 'source' here"),
        ({"what": ZeroAblate("L1H2"), "parts": "L5"}, "words-2l has layers 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(words_model, given, says):
    with pytest.raises(DeclarationError, match=says):
        hw.direct_logit_attribution(words_model, TASK, **given)


def test_what_memory_does_not_hold_is_refused_before_any_pass(words_model, monkeypatch):
    monkeypatch.setattr("headwise.interventions.base.memory.free_memory", lambda: 20_000)
    monkeypatch.setattr("headwise.interventions.begin.begin", None)
    says = "what is asked for takes 0.0 MiB, and there is room for 0.0 MiB at once: name fewer parts"
    with pytest.raises(DeclarationError, match=says):
        hw.direct_logit_attribution(words_model, TASK, parts=["L0", "L1"])
    with pytest.raises(DeclarationError, match="what is asked for takes"):
        hw.logit_lens(words_model, TASK, of="heads", top=20)
