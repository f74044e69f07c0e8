"""Models with other parts on a server: the same numbers as here, and the whole analysis from a folder to its report."""

import json

import numpy as np
import pytest
import xarray as xr
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.errors import ServerError
from headwise.interventions import Add, Grid, Head, Layer, Patch, PathPatch, ZeroAblate
from headwise.metrics import induction, loss
from headwise.studies import RepeatedTokens, capture, composition_scores, measure
from headwise.studies.cli.main import main
from tests.oracles import raw_families, raw_variants
from tests.support.architectures import build
from tests.support.heavy import heavy_but_few
from tests.support.loopback import Loopback
from tests.support.saved_models import kept

TASK = RepeatedTokens(n=3, length=5)
NAMES = [*raw_variants.MODELS]
STUDIED = ("gemma2", "gpt-oss", "mixtral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random models, saved with a tokenizer whose words are numbers."""
    made = {}
    for name in dict.fromkeys((*NAMES, *STUDIED)):
        folder = tmp_path_factory.mktemp(name).resolve()
        kept(build(name, 0) if name == "mixtral" else raw_families.random_model(name), folder)
        made[name] = folder
    return made


@pytest.fixture(scope="module")
def variant_server(request, tmp_path_factory, folders):
    paths = {str(folder): str(folder) for folder in folders.values()}
    server = Loopback(tmp_path_factory.mktemp("variants"), paths, apart=request.param == "apart").start()
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("variant_server", "name"),
    [
        *heavy_but_few(["trusted"], NAMES, often=[("trusted", "gpt-oss")]),
        *heavy_but_few(["apart"], ["gemma2", "gemma3", "olmo2"], often=[("apart", "gemma2")]),
    ],
    indirect=["variant_server"],
)
def test_a_variant_there_is_the_variant_here(variant_server, server, folders, name, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", variant_server.host)
    there, here = hw.load(folders[name], remote=True), hw.load(folders[name])
    last = here.shape.layers - 1
    grid = Grid(lambda part, head: Patch(Head(last, head).site(part)), part=["q", "pattern", "z"], head=here.heads)
    several = {
        "path": PathPatch(Head(0, 0), Head(last, 0).q),
        "zero": ZeroAblate(Head(0, 1)),
        "more": Add(Head(last, 0).head_out, [0.5] * here.shape.d_model) + ZeroAblate(Layer(last).mlp_in.at(3)),
    }
    for what, metrics in ((grid, [loss]), (several, [loss, induction])):
        found, wanted = (measure(model, TASK, what, metrics) for model in (there, here))
        for variable in wanted.data_vars:
            np.testing.assert_allclose(found[variable], wanted[variable], rtol=1e-6, atol=1e-5)
    for made in (
        [capture(model, TASK, [Head(0, 1).pattern, Head(last, 0).k_rot, Layer(1).head_out]) for model in (there, here)],
        [composition_scores(model, draws=3) for model in (there, here)],
        [circuits(model, last) for model in (there, here)],
    ):
        for variable in made[1].data_vars:
            np.testing.assert_allclose(made[0][variable], made[1][variable], rtol=1e-4, atol=1e-5)


def circuits(model, last):
    """The numbers of the QK circuit of a head."""
    made = hw.head_circuits(model, Head(last, 0), through={"k": "L0H1"}, tokens=[3], top=3, distance=2)[1]
    return made[[name for name in made if made[name].dtype != object and "imag" not in name]]


@pytest.mark.heavy
@pytest.mark.parametrize("variant_server", ["apart"], indirect=True)
@pytest.mark.parametrize("name", ["gpt-oss", "gptj"])
def test_attention_that_takes_weights_is_refused_where_there_are_none(
    variant_server, server, folders, name, monkeypatch
):
    monkeypatch.setattr(CONFIG.API, "HOST", variant_server.host)
    with pytest.raises(ServerError, match="apart from the weights, which attention of this model is made from"):
        measure(hw.load(folders[name], remote=True), TASK, ZeroAblate(Head(0, 1)), [loss])


@pytest.mark.parametrize(
    ("variant_server", "name"), heavy_but_few(["trusted"], STUDIED, often=[]), indirect=["variant_server"]
)
def test_the_whole_analysis_runs_from_a_folder_and_on_a_server(
    variant_server, server, folders, name, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(CONFIG.API, "HOST", variant_server.host)
    trees = []
    for place in ([], ["--remote"]):
        out = tmp_path / f"{len(place)}.nc"
        asked = ["induction", "--model", folders[name], "--n", 3, "--length", 5, "--out", out, *place]
        assert main([str(one) for one in asked]) == 0
        assert "in all" in capsys.readouterr().out
        trees.append(xr.open_datatree(out).load())
        page = out.with_suffix(".html").read_text()
        left_out = "goes through a norm before it is added to the stream"
        assert (left_out in page) == (name == "gemma2")
    here, there = trees
    for group in ("heads", "ablation", "composition"):
        for variable, wanted in here[group].data_vars.items():
            if wanted.dtype.kind == "f":
                np.testing.assert_allclose(there[group][variable], wanted, rtol=1e-4, atol=1e-5, err_msg=variable)
    one, two = (json.loads(tree.attrs["conclusion"]) for tree in trees)
    assert [finding["group"] for finding in one] == [finding["group"] for finding in two]


def test_a_model_whose_blocks_are_called_is_refused_before_any_pass(tmp_path, capsys):
    kept(build("falcon", 0), tmp_path / "falcon")
    assert main(["induction", "--model", str(tmp_path / "falcon"), "--out", str(tmp_path / "falcon.nc")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "the induction study needs weights of heads, and blocks of" in said
    assert "no table describes falcon models. Possible are measurements and captures" in said
    assert not (tmp_path / "falcon.nc").exists()
