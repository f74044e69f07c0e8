"""Models of other families on a server: the same numbers, with and without weights where jobs run."""

import numpy as np
import pytest
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.errors import ServerError
from headwise.interventions import Grid, Head, Layer, Neuron, Patch, PathPatch, ZeroAblate
from headwise.interventions.models import locate
from headwise.metrics import induction, loss
from headwise.studies import RepeatedTokens, capture, composition_scores, measure
from tests.oracles import raw_families
from tests.support.heavy import heavy_but_few
from tests.support.loopback import Loopback
from tests.support.saved_models import kept, saved

TASK = RepeatedTokens(n=3, length=5)
NAMES = ("pythia", "llama", "qwen3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random models, saved with a tokenizer whose words are numbers."""
    made = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name).resolve()
        saved(name, folder)
        made[name] = folder
    return made


@pytest.fixture(scope="module")
def family_server(request, tmp_path_factory, folders):
    paths = {str(folder): str(folder) for folder in folders.values()}
    server = Loopback(tmp_path_factory.mktemp("families"), paths, apart=request.param == "apart").start()
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("family_server", "name"),
    heavy_but_few(["trusted", "apart"], NAMES, often=[("trusted", "pythia"), ("apart", "qwen3")]),
    indirect=["family_server"],
)
def test_a_family_there_is_the_family_here(family_server, server, folders, name, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", family_server.host)
    there, here = hw.load(folders[name], remote=True), hw.load(folders[name])
    last = here.shape.layers - 1
    grid = Grid(lambda part, head: Patch(Head(last, head).site(part)), part=["q", "pattern", "z"], head=here.heads)
    path = {
        "path": PathPatch(Head(0, 0), Head(last, 0).q),
        "zero": ZeroAblate(Head(0, 1)),
        "circuit": hw.Circuit(hw.Graph.of(here).edges[::2]) + ZeroAblate(Head(last, 0)),
        "mean": hw.Circuit(hw.Graph.of(here).edges[::3], source="mean", positions=range(3)),
        "neuron": Patch(Neuron(0, 3).mlp_pre) + ZeroAblate(Layer(last).mlp_in.at(3)),
    }
    for what, metrics in ((grid, [loss]), (path, [loss, induction])):
        found, wanted = (measure(model, TASK, what, metrics) for model in (there, here))
        for variable in wanted.data_vars:
            np.testing.assert_allclose(found[variable], wanted[variable], rtol=1e-6, atol=1e-5)
    for made in (
        [
            capture(model, TASK, [Head(0, 1).pattern, Head(last, 0).q, Neuron(0, 2), Layer(1).mlp_pre])
            for model in (there, here)
        ],
        [composition_scores(model) for model in (there, here)],
        [hw.circuit_scores(model) for model in (there, here)],
        *zip(*(of_weights(model, last) for model in (there, here)), strict=True),
    ):
        for variable in made[1].data_vars:
            np.testing.assert_allclose(made[0][variable], made[1][variable], rtol=1e-4, atol=1e-5)


def of_weights(model, last):
    """The numbers of a head's circuits and of a layer's neurons."""
    through = {"k": "L0H1"} if last else None
    found = [
        *hw.head_circuits(model, Head(last, 0), through=through, tokens=[3], top=3, distance=2),
        hw.neuron_tokens(model, Layer(0), top=3),
    ]
    return [one[[name for name in one if one[name].dtype != object and "imag" not in name]] for one in found]


@pytest.mark.parametrize("family_server", ["trusted", pytest.param("apart", marks=pytest.mark.heavy)], indirect=True)
def test_what_parts_write_and_a_model_says_is_the_same_there(family_server, server, folders, monkeypatch, request):
    monkeypatch.setattr(CONFIG.API, "HOST", family_server.host)
    there, here = hw.load(folders["pythia"], remote=True), hw.load(folders["pythia"])
    said = [
        hw.predict(model, TASK, {"none": ZeroAblate(Head(0, 1))}, top=2, positions=[3, -1]) for model in (there, here)
    ]
    np.testing.assert_array_equal(said[0]["token_id"], said[1]["token_id"])
    np.testing.assert_allclose(said[0]["logit"], said[1]["logit"], rtol=1e-6, atol=1e-5)
    for of in ("stream", "heads"):
        lenses = [hw.logit_lens(model, TASK, of=of, top=2, metrics="loss") for model in (there, here)]
        np.testing.assert_array_equal(lenses[0]["token_id"], lenses[1]["token_id"])
        np.testing.assert_allclose(lenses[0]["loss"], lenses[1]["loss"], rtol=1e-6, atol=1e-5)
    moved = [hw.weighted_value_norms(model, TASK)["norm"] for model in (there, here)]
    np.testing.assert_allclose(*moved, rtol=1e-5, atol=1e-5)
    away = [hw.difference(model, TASK, ["L0.head_out", "L1.head_out"]) for model in (there, here)]
    np.testing.assert_allclose(*away, rtol=1e-5, atol=1e-5)
    if "apart" in request.node.name:
        with pytest.raises(ServerError, match="apart from the weights"):
            hw.direct_logit_attribution(there, TASK)
        return
    for parts in (None, [Layer(1), Head(0, 1)]):
        shares = [hw.direct_logit_attribution(model, TASK, parts=parts, per_position=True) for model in (there, here)]
        for name in ("attribution", "whole"):
            np.testing.assert_allclose(shares[0][name], shares[1][name], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=["float16", pytest.param("bfloat16", marks=pytest.mark.heavy)])
def half_server(request, tmp_path_factory):
    """Weights that are had by calls alone, in half precision: of the shipped model, and of one with large biases."""
    folder = tmp_path_factory.mktemp("qwen2").resolve()
    module = raw_families.random_model("qwen2")
    for block in module.model.layers:
        for side in "qkv":
            getattr(block.self_attn, f"{side}_proj").bias.data.mul_(100)
    kept(module, folder)
    shipped = str((locate.SHIPPED / "words-2l").resolve())
    paths = {str(folder): str(folder), shipped: shipped}
    server = Loopback(tmp_path_factory.mktemp("half"), paths, apart=True, dtype=request.param).start()
    yield server, folder, request.param
    server.stop()


def test_weights_had_by_calls_are_right_in_half_precision(half_server, server, monkeypatch):
    there, folder, dtype = half_server
    monkeypatch.setattr(CONFIG.API, "HOST", there.host)
    for name in ("words-2l", folder):
        models_of = hw.load(name, remote=True), hw.load(name, dtype=dtype)
        assert [model.dtype for model in models_of] == [dtype] * 2
        found, wanted = (composition_scores(model) for model in models_of)
        scores = found["composition"], wanted["composition"]
        np.testing.assert_array_equal(*(np.isfinite(one) for one in scores))
        raw, folded = ([one.sel(variant=variant).values for one in scores] for variant in ("raw", "folded"))
        np.testing.assert_allclose(*raw, atol=1e-4 if dtype == "float16" else 1e-7)
        np.testing.assert_allclose(*folded, atol=0.01)
