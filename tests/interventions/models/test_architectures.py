"""Decoders of many architectures against raw hooks: what is offered of each is read and written, at its first and last
layer, planned together; and the table of architectures in the docs, which `make architectures` writes."""

import itertools
import os
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.errors import HeadwiseError
from headwise.interventions import Add, Component, Head, Layer, Neuron, Patch, Scale, ZeroAblate
from headwise.metrics import logit_diff, loss
from headwise.studies import Prompts, capture, measure, plan
from tests.oracles import raw_architectures as raw
from tests.oracles.architecture_parts import heads_of, parts
from tests.oracles.raw_architectures import PER_HEAD, PER_NEURON, Place
from tests.support.architectures import CASES, SHAPES, build, prompts
from tests.support.saved_models import kept

TABLE = Path(__file__).parents[3] / "docs" / "architectures.md"
LEAST = {"resid_pre", "resid_post", "attn_out", "mlp_out", "z"}
"""What can be read and written of every decoder with attention whose blocks add to the stream."""
NOT_OPENED = {"openai-gpt", "nanochat"}
"""Those that are refused, when they are opened or before the first number; one that is not must not stand here."""
LESS = {"xglm"}
"""Those of which less than `LEAST` is found; one of which all is found must not stand here."""
ALL = [one for one in CASES if one[0] not in NOT_OPENED]
OFTEN = [one for at, one in enumerate(ALL) if len(SHAPES[one[0]]) == 2 and at % 4 in (0, 3)]
OPENED = [pytest.param(*one, marks=() if one in OFTEN else pytest.mark.heavy) for one in ALL]
"""In `make test` one shape of each architecture, in turn; the other, and variants, in `make test-heavy`."""
LAID_OPEN = (
    "gemma2",
    "gemma3_text",
    "olmo2",
    "gpt_oss",
    "gptj",
    "mixtral",
    "qwen3_moe",
    "phi3",
    "nemotron",
    "ministral",
)
"""Of those that a table describes, the ones with parts that Llama has not."""
POSITIONS, KINDS = (2, 7), ("add", "zero", "patch")


class Case:
    """A random model, opened by headwise and as it is, and prompts."""

    def __init__(self, name, shape):
        self.raw = build(name, shape).requires_grad_(False)
        self.tokens = prompts(name, shape)
        self.corrupted = self.tokens.roll(1, 0).flip(1)
        self.model = opened(name, shape)
        self.task = Prompts(self.tokens.tolist(), corrupted=self.corrupted.tolist())
        self.last = self.model.shape.layers - 1
        self.known = raw.components(self.raw)
        with torch.no_grad():
            self.clean = self.raw(self.tokens, use_cache=False).logits
        self.scale = float(self.clean.abs().max())

    def conditions(self, layers, kinds):
        """`(intervention, changes of the oracle)` for each component, layer and kind of write."""
        heads, kv_heads = heads_of(self.raw)
        generator = torch.Generator().manual_seed(3)
        for layer, component, kind in itertools.product(layers, self.known, kinds):
            if "embed" in component and (layer or (component, kind) == ("pos_embed", "patch")):  # equal in all runs
                continue
            if (component, kind) == ("pattern", "add"):  # which is refused
                continue
            part, site = None, Layer(layer).site(component)
            if component in PER_HEAD:
                part = (kv_heads if component in ("k", "v", "k_rot") else heads) - 1
                site = Head(layer, part).site(component)
            elif component in PER_NEURON and kind != "add":
                part = 5
                site = Neuron(layer, part).site(component)
            place = Place(layer, component, part, None if kind == "zero" else POSITIONS)
            there = raw.read(self.raw, self.corrupted, place)[0]
            if kind == "add":
                vector = 0.3 * torch.randn(there.shape[-1], generator=generator)
                yield Add(site.at(POSITIONS), vector.tolist()), (place, lambda old, vector=vector: old + vector)
            elif kind == "zero":
                yield ZeroAblate(site), (place, torch.zeros_like)
            else:
                yield Patch(site.at(POSITIONS), "corrupted"), (place, lambda old, new=there: new)


def close(found, wanted, scale, message=""):
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5 * max(scale, 1.0), err_msg=message)


def opened(name, shape):
    """The first shape from a folder with a tokenizer, the second from memory."""
    if shape:
        return hw.load(build(name, shape))
    with tempfile.TemporaryDirectory() as folder:
        kept(build(name, shape), folder)
        return hw.load(folder, device="cpu")


case = cache(Case)


def is_refused(model, task, **options):
    try:
        plan(model, task, timed=False, **options)
    except HeadwiseError:
        return True
    return False


def offered(name, shape):
    """`(components that can be read, that can be written)`."""
    model = case(name, shape).model
    return [str(one) for one in Component if not model.shape.missing(one)], [str(one) for one in model.sites]


@pytest.mark.parametrize("name", sorted(NOT_OPENED))
def test_what_is_not_opened_is_refused(name):
    for shape in range(len(SHAPES[name])):
        module = build(name, shape)
        with pytest.raises(HeadwiseError, match=type(module).__name__):
            capture(hw.load(module), Prompts(prompts(name, shape).tolist()), "logits")


@pytest.mark.parametrize("name", LAID_OPEN)
def test_what_a_table_describes_is_laid_open(name):
    assert not any(case(name, shape).model.shape.called for shape in (0, 1))


@pytest.mark.parametrize(("name", "shape"), OPENED)
def test_what_is_offered_is_what_plans_take_and_what_each_decoder_has(name, shape):
    there, (readable, writable) = case(name, shape), offered(name, shape)
    for component in Component:
        site = Layer(there.last * ("embed" not in component)).site(component)
        assert is_refused(there.model, there.task, capture=site) == (component not in readable), component
        assert is_refused(there.model, there.task, what=ZeroAblate(site)) == (component not in writable), component
    least = LEAST & set(there.known) if parts(there.raw).sums else {"resid_pre", "resid_post"}
    assert (least <= {*writable}) == (name not in LESS)
    alone = () if "pattern" in there.known else raw.INSIDE  # of GPT-Neo and GPT-J: see test_families
    assert {*writable} <= {*readable} <= {*there.known, *alone}
    assert row(name, shape) in TABLE.read_text(), "make architectures writes it anew"


@pytest.mark.parametrize(("name", "shape"), OPENED)
def test_what_is_read_equals_raw_hooks(name, shape):
    there = case(name, shape)
    components = [one for one in there.known if one in offered(name, shape)[0]]
    places = [
        Place(layer, one)
        for layer, one in itertools.product(range(there.last + 1), components)
        if not ("embed" in one and layer)
    ]
    sites = {place: Layer(place.layer).site(place.component) for place in places}
    found = capture(there.model, there.task, [*sites.values(), "logits"])
    close(found["logits"].values, there.clean, there.scale)
    heads = range(heads_of(there.raw)[0])
    for place, site in sites.items():
        single, axis = place.component in ("head_out", "pattern"), 1 if place.component == "pattern" else 2
        several = [place._replace(head=head) for head in heads] if single else [place]
        wanted = torch.stack(raw.read(there.raw, there.tokens, *several), axis)
        wanted = wanted if single else wanted.squeeze(2)
        values = found[str(site).replace(" ", "_")].values
        close(values, wanted, float(wanted.abs().max()), str(place))


def check_writes(name, shape, layers, kinds, turn=None):
    there = case(name, shape)
    every = [one for one in there.conditions(layers, kinds) if one[1][0].component in offered(name, shape)[1]]
    every = every if turn is None else [one for number, one in enumerate(every) if turn(number)]
    what = {str(number): edit for number, (edit, _) in enumerate(every)}
    what["two"] = every[0][0] + every[-1][0]
    found = capture(there.model, there.task, ["logits"], what=what)["logits"]
    for number, (edit, change) in enumerate(every):
        wanted = raw.run(there.raw, there.tokens, [change])
        assert (wanted - there.clean).abs().max() > 1e-4 * there.scale, edit
        close(found.sel(condition=str(number)).values, wanted, there.scale, str(edit))
    both = raw.run(there.raw, there.tokens, [every[0][1], every[-1][1]])
    close(found.sel(condition="two").values, both, there.scale, "two")


@pytest.mark.parametrize(("name", "shape"), OPENED)
def test_a_write_to_each_component_equals_raw_hooks(name, shape):
    """Two of six writes to each component of the first and of the last layer; all of them in the heavy test."""
    first = (len(name) + shape) % 3
    check_writes(name, shape, (0, case(name, shape).last), KINDS, lambda number: (number + first) % 3 == 0)


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "shape"), ALL)
def test_every_write_equals_raw_hooks(name, shape):
    check_writes(name, shape, range(case(name, shape).last + 1), KINDS)


@pytest.mark.parametrize(("name", "shape"), OPENED)
def test_metrics_are_of_the_models_own_logits(name, shape):
    """Caps, scales and projections after the last block, where a metric needs a few logits only."""
    there = case(name, shape)
    answers, others = there.tokens[:, 3].tolist(), there.tokens[:, 4].tolist()
    task = Prompts(there.tokens.tolist(), answers=answers, distractors=others)
    place, rows = Place(there.last, "resid_post", None, (10,)), torch.arange(3)
    vector = torch.linspace(-1, 1, there.model.shape.d_model)
    what = {"more": Add(Layer(there.last).resid_post.at(10), vector.tolist()), "none": None}
    moved = raw.add(there.raw, there.tokens, place, vector)
    found = measure(there.model, task, what, [logit_diff, loss])
    for condition, logits in (("more", moved), ("none", there.clean)):
        final, row = logits[:, -1], found.sel(condition=condition)
        close(row["logit_diff"].values, final[rows, answers] - final[rows, others], there.scale)
        close(row["loss"].values, -final.log_softmax(-1)[rows, answers], there.scale)


FEW = ("falcon", "gemma2", "gpt_oss", "mamba")
AFTER = [pytest.param(*one, marks=() if one[0] in FEW else pytest.mark.heavy) for one in ALL]
"""Falcon's blocks add to what its MLP gives in place."""


@pytest.mark.parametrize(("name", "shape"), AFTER)
def test_what_is_read_after_a_write_equals_raw_hooks(name, shape):
    there = case(name, shape)
    components = [one for one in there.known if one in offered(name, shape)[0] and "embed" not in one]
    places = [Place(there.last, one, 0 if one in ("head_out", "pattern") else None) for one in components]
    sites = [(Head(there.last, 0) if place.head == 0 else Layer(there.last)).site(place.component) for place in places]
    found = capture(there.model, there.task, sites, what=Scale(Layer(0).resid_post.at(POSITIONS), 2.0))
    doubled = (Place(0, "resid_post", None, POSITIONS), lambda old: old * 2)
    for place, site in zip(places, sites, strict=True):
        seen = {}
        raw.run(there.raw, there.tokens, [doubled, raw._reader(seen, place)])
        (wanted,) = seen.values()
        close(found[str(site).replace(" ", "_")].values, wanted, float(wanted.abs().max()), str(place))


@pytest.mark.parametrize(("name", "shape"), AFTER)
def test_estimates_from_gradients_equal_raw_hooks(name, shape):
    there, rows = case(name, shape), torch.arange(3)
    answers, others = there.tokens[:, 3].tolist(), there.tokens[:, 4].tolist()
    options = {"answers": answers, "distractors": others, "corrupted": there.corrupted.tolist()}
    task = Prompts(there.tokens.tolist(), **options)

    def score(logits):
        return logits[rows, -1, answers] - logits[rows, -1, others]

    components = [one for one in (*sorted(LEAST), "q", "v", "mlp_post") if one in offered(name, shape)[1]]
    layer = there.last - 1
    heads = {one: 0 if one in PER_HEAD else None for one in components}
    sites = {one: (Layer(layer) if heads[one] is None else Head(layer, 0)).site(one) for one in components}
    what = {one: Patch(site, "corrupted") for one, site in sites.items()}
    found = measure(there.model, task, what, [logit_diff], estimator="gradient")["logit_diff"]
    for component in components:
        place = Place(layer, component, heads[component])
        old, slope = raw.slope(there.raw, there.tokens, score, place)
        moves = raw.read(there.raw, there.corrupted, place)[0] - old
        wanted = score(there.clean) + (moves * slope).flatten(1).sum(1)
        close(found.sel(condition=component).values, wanted, float(wanted.abs().max()), component)


def rows(name):
    """The rows of an architecture in the table of the docs."""
    if name in NOT_OPENED:
        return [f"| `{name}` | not opened | | |"]
    each = dict.fromkeys(row(name, shape) for shape in range(len(SHAPES[name])))
    return [f"| `{name}`{', second shape' if number else ''}{one}" for number, one in enumerate(each)]


def row(name, shape):
    readable, writable = offered(name, shape)
    alone = " ".join(one for one in readable if one not in writable)
    return f" | {way(case(name, shape).model)} | {' '.join(writable)} | {alone} |"


def way(model):
    return "called" if model.shape.called else "laid open"


@pytest.mark.heavy
def test_the_table_in_the_docs_is_current():
    top = "| architecture | blocks | read and written | read only |\n| --- | --- | --- | --- |\n"
    head, _, _ = TABLE.read_text().partition(top)
    text = head + top + "".join(f"{one}\n" for name in SHAPES for one in rows(name))
    if os.environ.get("HEADWISE_ARCHITECTURES"):
        TABLE.write_text(text)
    assert TABLE.read_text() == text, "make architectures writes it anew"
