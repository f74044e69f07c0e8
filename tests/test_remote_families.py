"""Models of other families on a server: the same numbers, with and without weights where jobs run."""

import numpy as np
import pytest
import raw_families
from loopback import Loopback
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.interventions import Grid, Head, Patch, PathPatch, ZeroAblate, models
from headwise.metrics import induction, loss
from headwise.studies import RepeatedTokens, capture, composition_scores, measure

TASK = RepeatedTokens(n=3, length=5)
NAMES = ("pythia", "llama", "qwen3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random models, saved with a tokenizer whose words are numbers."""
    made = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name).resolve()
        module = raw_families.random_model(name)
        module.save_pretrained(folder)
        models._id_tokenizer(module.config.vocab_size).save_pretrained(folder)
        made[name] = folder
    return made


@pytest.fixture(scope="module", params=[False, True], ids=["trusted", "apart"])
def family_server(request, tmp_path_factory, folders):
    paths = {str(folder): str(folder) for folder in folders.values()}
    server = Loopback(tmp_path_factory.mktemp("families"), paths, apart=request.param).start()
    yield server
    server.stop()


@pytest.mark.parametrize("name", NAMES)
def test_a_family_there_is_the_family_here(family_server, server, folders, name, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", family_server.host)
    there, here = hw.load(folders[name], remote=True), hw.load(folders[name])
    last = here.shape.layers - 1
    grid = Grid(lambda part, head: Patch(Head(last, head).site(part)), part=["q", "pattern", "z"], head=here.heads)
    path = {"path": PathPatch(Head(0, 0), Head(last, 0).q), "zero": ZeroAblate(Head(0, 1))}
    for what, metrics in ((grid, [loss]), (path, [loss, induction])):
        found, wanted = (measure(model, TASK, what, metrics) for model in (there, here))
        for variable in wanted.data_vars:
            np.testing.assert_allclose(found[variable], wanted[variable], rtol=1e-6, atol=1e-5)
    for made in (
        [capture(model, TASK, [Head(0, 1).pattern, Head(last, 0).q]) for model in (there, here)],
        [composition_scores(model) for model in (there, here)],
    ):
        for variable in made[1].data_vars:
            np.testing.assert_allclose(made[0][variable], made[1][variable], rtol=1e-4, atol=1e-5)
