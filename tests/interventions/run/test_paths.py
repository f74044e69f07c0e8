"""Every new kind of intervention against plain hooks, on random models, and on the planted circuit."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import DeclarationError
from headwise.interventions import (
    Add,
    Component,
    Compose,
    Head,
    Knockout,
    Layer,
    MeanAblate,
    Patch,
    PathPatch,
    ResampleAblate,
    Scale,
    ZeroAblate,
)
from headwise.interventions.declare.codec import from_json, to_json
from headwise.interventions.run.deferred import derangement
from headwise.metrics import loss
from headwise.studies import Prompts, RepeatedTokens, measure
from headwise.studies.storage.registry import TASKS
from tests.oracles import raw_hooks, raw_paths
from tests.oracles.raw_paths import Place

TASK = RepeatedTokens(n=3, length=7, seed=2, score="all")
PER_HEAD = ("q", "k", "v", "z", "head_out")
STREAM = ("embed", "pos_embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
TOLERANCE = 1e-5


def runs(model):
    batch = TASK.draw(model)
    return torch.as_tensor(batch.runs["clean"]), torch.as_tensor(batch.runs["corrupted"])


def per_token(model, logits):
    tokens, _ = runs(model)
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return -chosen.numpy()


def check(model, what, logits):
    """Losses at every position, whole grids at once, against logits of one condition each."""
    found = measure(model, TASK, {str(n): one for n, one in enumerate(what)}, [loss], per_position=True)
    wanted = np.stack([per_token(model, one) for one in logits])
    np.testing.assert_allclose(found["loss"].values[..., :-1], wanted, atol=TOLERANCE, rtol=2e-6)
    base = found["baseline_loss"].sel(run="clean").values[:, :-1]
    assert np.abs(wanted - base).max() > 1e-3, "the conditions must change something"


def places(model, components):
    last = model.shape.layers - 1
    for component in components:
        for layer in [0] if component in ("embed", "pos_embed") else sorted({0, last}):
            for head in (0, model.shape.heads - 1) if component in PER_HEAD else (None,):
                for positions in (None, (2, 5, 12)):
                    yield Place(layer, component, head, positions)


def site(place):
    whole = Layer(place.layer).site(place.component)
    one = whole if place.head is None else Head(place.layer, place.head).site(place.component)
    return one if place.positions is None else one.at(place.positions)


def test_add_equals_raw_hooks(random_model):
    random, (tokens, _) = np.random.RandomState(0), runs(random_model)
    what, logits = [], []
    for place in places(random_model, PER_HEAD + STREAM):
        narrow = place.component in ("q", "k", "v", "z")
        width = random_model.shape.d_head if narrow else random_model.shape.d_model
        vector = random.standard_normal(width)
        what.append(Add(site(place), vector))
        logits.append(raw_paths.add(random_model.module, tokens, place, torch.tensor(vector, dtype=torch.float32)))
    check(random_model, what, logits)


def test_scale_equals_raw_hooks(random_model):
    tokens, _ = runs(random_model)
    some = list(places(random_model, PER_HEAD + STREAM))
    some += [Place(0, "pattern", 1, None), Place(random_model.shape.layers - 1, "pattern", 0, (4, 9))]
    what = [Scale(site(place), -1.5) for place in some]
    check(random_model, what, [raw_paths.scale(random_model.module, tokens, place, -1.5) for place in some])


def test_writes_of_the_new_sites_equal_raw_hooks(random_model):
    """Pattern, head output and embeddings: zeros, patches, means and resampled values."""
    tokens, other = runs(random_model)
    reference = torch.as_tensor(TASK.reference(random_model).runs["clean"])
    partners = derangement(len(reference), 5)[: TASK.n]
    last = random_model.shape.layers - 1
    some = list(places(random_model, ("head_out", "embed", "pos_embed")))
    some += [Place(0, "pattern", 1, None), Place(last, "pattern", 0, (4, 9)), Place(last, "pattern", 1, None)]
    what, logits = [], []
    for place in some:
        there = {
            name: raw_paths.read(random_model.module, ids, place) for name, ids in (("c", other), ("r", reference))
        }
        news = {
            ZeroAblate: torch.zeros_like(there["c"]),
            Patch: there["c"],
            MeanAblate: there["r"].mean(0, keepdim=True),
            lambda where: ResampleAblate(where, seed=5): there["r"][partners],
        }
        for kind, new in news.items():
            if place.component == "pos_embed" and kind is not ZeroAblate:
                continue  # the same in every prompt
            what.append(kind(site(place)))
            logits.append(raw_paths.write(random_model.module, tokens, place, new))
    check(random_model, what, logits)


def test_knockout_equals_raw_hooks(random_model):
    tokens, _ = runs(random_model)
    last, module = random_model.shape.layers - 1, random_model.module
    heads = list(random_model.heads)
    what = [
        Knockout(Head(0, 1), query=range(3, 14), key=2),
        Knockout(Head(last, 0), query=-1, key=[0, 5]),
        Knockout(Layer(last), query=range(5, 12), key=(1, 3)),
        Knockout(Head(last, 1), query=None, key=range(1, 14)),
        sum(Knockout(Head(0, 0), query, query - 6) for query in range(7, 14)),
    ]
    logits = [
        raw_paths.knockout(module, tokens, 0, [1], [(query, 2) for query in range(3, 14)]),
        raw_paths.knockout(module, tokens, last, [0], [(13, 0), (13, 5)]),
        raw_paths.knockout(module, tokens, last, heads, [(query, key) for query in range(5, 12) for key in (1, 3)]),
        raw_paths.knockout(module, tokens, last, [1], [(q, k) for q in range(14) for k in range(1, 14)]),
        raw_paths.knockout(module, tokens, 0, [0], [(query, query - 6) for query in range(7, 14)]),
    ]
    check(random_model, what, logits)


def test_mixtures_in_one_pass_equal_raw_hooks(random_model):
    """A knockout on a pass already under way, below other edits; values are read where the edits before them left."""
    tokens, other = runs(random_model)
    last, module = random_model.shape.layers - 1, random_model.module
    what = (
        Scale(Layer(0).resid_pre.at([1, 2]), 2.0)
        + Scale(Head(last, 0).z, 0.5)
        + Patch(Head(last, 1).pattern.at(range(4, 8)))
        + Add(Layer(last).mlp_out.at(9), np.ones(random_model.shape.d_model))
    )
    pattern = raw_paths.read(module, other, Place(last, "pattern", 1, tuple(range(4, 8))))
    logits = raw_paths.run(
        module,
        tokens,
        [
            (Place(0, "resid_pre", None, (1, 2)), lambda old: old * 2.0),
            (Place(last, "pattern", 1, tuple(range(4, 8))), lambda old: pattern),
            (Place(last, "z", 0, None), lambda old: old * 0.5),
            (Place(last, "mlp_out", None, (9,)), lambda old: old + 1),
        ],
    )
    check(random_model, [what], [logits])


SENDERS = [
    (Head(0, 1), (0, "z", 1)),
    (Layer(0).attn_out, (0, "attn_out", None)),
    (Layer(0).mlp_out, (0, "mlp_out", None)),
    (Layer(0).embed, (0, "embed", None)),
]


@pytest.mark.parametrize("through_mlps", [True, False])
@pytest.mark.parametrize(("sender", "raw_sender"), SENDERS, ids=["head", "attention", "mlp", "embedding"])
def test_path_patching_equals_brute_force(random_model, sender, raw_sender, through_mlps):
    tokens, other = runs(random_model)
    last, module = random_model.shape.layers - 1, random_model.module
    if last == 0:
        pytest.skip("one layer: only the logits receive")
    receivers = [
        [Head(last, 1).q],
        [Head(last, 0).k.at([2, 4, 9]), Head(last, 0).v],
        "logits",
        [Head(1, 0).q, Head(1, 1).k, Head(last, 0).v] if last > 1 else [Head(1, 0).q, Head(1, 1).k],
        [Head(last, 1).v, "logits"],
        [Layer(last).mlp_in],
        [Head(1, 0).v, Layer(last).mlp_in.at([2, 4, 9]), "logits"],
    ]
    if sender != Layer(0).mlp_out:
        receivers.append([Layer(0).mlp_in])
    if sender == Layer(0).embed:
        receivers += [[Head(0, 0).k], [Head(0, 1).q, Head(0, 0).v.at([3, 4]), Layer(0).mlp_in]]
    what = [PathPatch(sender, several, through_mlps=through_mlps) for several in receivers]
    what.append(PathPatch(as_site(sender).at([1, 3]), [Head(last, 1).k], through_mlps=through_mlps))
    wanted = [
        raw_paths.path_patch(module, tokens, other, raw_sender, _raw(several), through_mlps) for several in receivers
    ]
    at = (*raw_sender, (1, 3))
    wanted.append(raw_paths.path_patch(module, tokens, other, at, _raw([Head(last, 1).k]), through_mlps))
    check(random_model, what, wanted)


def as_site(sender):
    return sender.z if isinstance(sender, Head) else sender


def _raw(receivers):
    if isinstance(receivers, str):
        return receivers
    return [
        one if isinstance(one, str) else (one.layer, str(one.component), one.head, one.positions) for one in receivers
    ]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_pattern_patches_do_not_depend_on_the_attention_implementation(implementation):
    module = raw_hooks.random_gpt2(2, 3, 6, 40, 20)
    module.set_attn_implementation(implementation)
    what = {"one": Patch(Head(1, 0).pattern), "all": Patch(Layer(0).pattern), "out": Knockout(Head(1, 2), 5, [0, 3])}
    found = measure(hw.load(module), RepeatedTokens(n=3, length=6), what, [loss])["loss"].values
    module.set_attn_implementation("eager")
    wanted = measure(hw.load(module), RepeatedTokens(n=3, length=6), what, [loss])["loss"].values
    assert module.config._attn_implementation == "eager"
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_two_paths_into_one_head_at_different_positions(random_model):
    """Each brings its own sender's change; together they are what either brings alone, at its positions."""
    if len(random_model.layers) == 1:
        pytest.skip("one layer: no head receives")
    tokens, other = runs(random_model)
    module = random_model.module
    two = PathPatch(Head(0, 0), Head(1, 0).q.at([8])) + PathPatch(Head(0, 1), Head(1, 0).q.at([9, 10]))
    changes = []
    for head, positions in ((0, (8,)), (1, (9, 10))):
        place = Place(1, "q", 0, positions)
        start = Place(0, "z", head, None)
        sent = raw_paths.read(module, other, start)
        value = _after(module, tokens, start, sent, place)
        changes.append((place, lambda old, value=value: value))
    check(random_model, [two], [raw_paths.run(module, tokens, changes)])


def _after(module, tokens, start, sent, place):
    """What is at a place once `start` is set."""
    found = []

    def note(old):
        found.append(old.clone())
        return old

    raw_paths.run(module, tokens, [(start, lambda old: sent), (place, note)])
    return found[0]


def test_a_key_is_knocked_out_for_all_that_can_do_without(small_model):
    """The first token attends to itself alone, and goes on doing so."""
    tokens, _ = runs(small_model)
    cells = [(query, 0) for query in range(1, 14)]
    check(small_model, [Knockout(Head(1, 1), key=0)], [raw_paths.knockout(small_model.module, tokens, 1, [1], cells)])
    late = Knockout(Head(1, 1), query=5, key=13)  # nobody attends to what comes later
    found = measure(small_model, TASK, {"late": late, "seen": Knockout(Head(1, 1), 5, 2)}, [loss])
    np.testing.assert_allclose(found["loss"][0], found["baseline_loss"].sel(run="clean"), atol=1e-5)


def test_several_source_runs_meet_in_one_pass(small_model):
    """A patch from each run, and one condition with both: the second brings the base back where it is written."""
    both = Patch(Layer(0).mlp_out, source="corrupted") + Patch(Head(1, 2).v, source="clean")
    tokens, other = runs(small_model)
    module = small_model.module
    corrupted = raw_paths.read(module, other, Place(0, "mlp_out", None, None))
    clean = raw_paths.read(module, tokens, Place(1, "v", 2, None))
    logits = raw_paths.run(
        module,
        tokens,
        [(Place(0, "mlp_out", None, None), lambda old: corrupted), (Place(1, "v", 2, None), lambda old: clean)],
    )
    check(small_model, [both], [logits])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Add(Head(0, 1).pattern, [1.0]), "L0H1 pattern: Add takes no pattern; Patch, Scale and Knockout do"),
        (lambda: Add(Layer(0).q, [1.0]), "L0 q: Add takes one head; compose several for several"),
        (lambda: Add(Head(0, 1), [1.0, float("nan")]), "all are finite"),
        (lambda: Add(Head(0, 1), "ab"), "a vector is a flat sequence of numbers, got 'ab'"),
        (lambda: Scale(Head(0, 1), "big"), "L0H1 z: a factor is a finite number, got 'big'"),
        (lambda: Knockout(Head(0, 1).q, 3, 1), "L0H1 q: attention is knocked out of a head or a layer"),
        (lambda: Knockout(Head(0, 1), 3, []), "keys must be at least one position"),
        (
            lambda: Knockout(Head(0, 1), 3, 1.5),
            "keys must be whole numbers, such as range(25, 50), or labels of positions, got (1.5,)",
        ),
        (lambda: PathPatch(Head(0, 1).q, Head(1, 0).q), "L0H1 q cannot send: possible are a head"),
        (lambda: PathPatch(Head(0, 1), Head(1, 0).z), "cannot receive: possible are q, k and v of a head"),
        (lambda: PathPatch(Head(1, 1), Head(1, 0).q), "no direct path from L1H1 z to L1H0 q"),
        (lambda: PathPatch(Head(0, 1), Head(1, 2)), "Head(1, 2) cannot receive: possible are q, k and v of a head"),
        (lambda: PathPatch(Head(0, 1), None), "None cannot receive"),
        (lambda: PathPatch(Head(0, 1), "logits", through_mlps="no"), "through_mlps='no': possible are True and False"),
        (lambda: Knockout(Head(0, 1)), "L0H1 pattern: name the queries or the keys that are knocked out"),
        (lambda: PathPatch(Head(0, 1), []), "a path needs receivers that differ"),
        (lambda: MeanAblate(Head(0, 1).pattern, over=("example", "position")), "the mean of a pattern over positions"),
        (lambda: Layer(1).embed, "embed enters before layer 0, not layer 1: write Layer(0).embed"),
        (
            lambda: Knockout(Head(0, 1), [3, 4], 1) + Knockout(Head(0, 1), 4, [0, 1]),
            "and Knockout(Head(0, 1), query=4, key=(0, 1)); keep one",
        ),
        (lambda: Knockout(Head(0, 1), 4, 1) + Patch(Head(0, 1).pattern), "two edits of one place"),
        (
            lambda: PathPatch(Head(0, 1), "logits") + PathPatch(Head(0, 2), "logits"),
            "two edits of one place: PathPatch(sender=Head(0, 1).z, receivers=('logits',)",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(DeclarationError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (Add(Head(0, 1), [1.0, 2.0]), "L0H1 z of two layers takes 8 numbers, got 2"),
        (
            Add(Layer(0).mlp_out, [0.5] * 9),
            "vector=<9 numbers of norm 1.5>): L0 mlp_out of two layers takes 32 numbers",
        ),
        (
            Knockout(Head(0, 1), 3, 14),
            "Knockout(Head(0, 1), query=3, key=14): position 14 does not exist in a prompt of 14 tokens",
        ),
        (Knockout(Head(0, 1), 0, 0), "query 0 is left without any key to attend to"),
        (Knockout(Head(0, 1), 2, [0, 1]) + Knockout(Layer(0), 2, 2), "query 2 is left without any key"),
        (ZeroAblate(Layer(2**31).mlp_out), "two layers has layers 0 to 1"),
        (PathPatch(Head(0, 9), Head(1, 0).q), "L0H9 z: two layers has heads 0 to 3"),
        (PathPatch(Head(0, 1), Head(2, 0).q), "L2H0 q: two layers has layers 0 to 1"),
    ],
)
def test_what_the_model_lacks_is_refused(small_model, what, message):
    with pytest.raises(DeclarationError) as caught:
        measure(small_model, TASK, what, [loss])
    assert message.replace("two layers", small_model.name) in str(caught.value)


def test_composing_several_heads_of_every_component_counts_each_once(small_model):
    """All heads of a layer, one by one, are the layer."""
    for component in (Component.pattern, Component.head_out):
        each = Compose(*(Patch(Head(1, head).site(component)) for head in range(4)))
        found = measure(small_model, TASK, {"each": each, "whole": Patch(Layer(1).site(component))}, [loss])["loss"]
        np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_patches_from_runs_of_one_s_own(small_model):
    """Two counterfactual prompts for each prompt, patched from in one condition and in two."""
    prompts = ["3 4 5 6", "7 8 9 10"]
    runs = {"names": ["3 14 5 6", "7 18 9 10"], "places": ["3 4 25 6", "7 8 29 10"]}
    task = Prompts(prompts, answers=["1", "2"], runs=runs)
    what = {
        "names": Patch(Layer(0).resid_post.at(1), source="names"),
        "both": Patch(Layer(0).resid_post.at(1), source="names") + Patch(Head(1, 0).v, source="places"),
    }
    found = measure(small_model, task, what, [loss])["loss"].values
    tokens = {
        name: torch.tensor([[int(one) for one in text.split()] for text in texts]) for name, texts in runs.items()
    }
    clean = torch.tensor([[int(one) for one in text.split()] for text in prompts])
    stream, value = Place(0, "resid_post", None, (1,)), Place(1, "v", 0, None)
    names = raw_paths.read(small_model.module, tokens["names"], stream)
    places = raw_paths.read(small_model.module, tokens["places"], value)
    changes = [(stream, lambda old: names), (value, lambda old: places)]
    for row, count in zip(found, (1, 2), strict=True):
        logits = raw_paths.run(small_model.module, clean, changes[:count])[:, -1]
        wanted = -logits.log_softmax(-1)[[0, 1], [1, 2]]
        np.testing.assert_allclose(row, wanted.numpy(), atol=TOLERANCE)
    assert from_json(to_json(task, TASKS), TASKS) == task


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"clean": ["1 2"]}, "names must differ, from clean and corrupted too"),
        ({"other": ["1 2", "3 4"]}, "2 prompts of the run other for 1 prompts: give one for each"),
        (3, "runs=3: give a mapping of names to lists of texts"),
    ],
)
def test_runs_that_cannot_be_are_refused(runs, message):
    with pytest.raises(DeclarationError) as caught:
        Prompts(["1 2"], runs=runs)
    assert message in str(caught.value)


def test_runs_of_another_length_are_refused(small_model):
    with pytest.raises(DeclarationError, match="has 2 tokens, its other one 3: make them equal"):
        measure(small_model, Prompts(["1 2"], runs={"other": ["1 2 3"]}), None, [loss])
