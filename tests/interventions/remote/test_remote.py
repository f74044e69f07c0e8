"""On a server that cannot import headwise, numbers are those of this machine, and only metrics come back."""

import io
import pickletools
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import zstandard
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.interventions import (
    Add,
    Grid,
    Head,
    Knockout,
    Layer,
    MeanAblate,
    Patch,
    PathPatch,
    ProjectOut,
    ResampleAblate,
    Scale,
    ZeroAblate,
)
from headwise.interventions.models import locate
from headwise.interventions.remote import protocol, queue
from headwise.metrics import Card, Metric, accuracy, induction, kl, logit_diff, loss, prob, rank
from headwise.studies import InductionStudy, Prompts, RepeatedTokens, capture, composition_scores, measure, plan
from headwise.studies.cli.main import main
from tests.support import loopback
from tests.support.loopback import Loopback

TASK = RepeatedTokens(n=4, length=8)
WHAT = {
    "steer": Add(Layer(1).resid_pre.at(-1), [0.1] * 64),
    "half": Scale(Head(1, 2), 0.5),
    "away": ProjectOut(Layer(1).resid_pre, range(64)) + ProjectOut(Head(1, 2).q.at(9), range(8)),
    "blind": sum(Knockout(Head(1, 2), query, query - 7) for query in range(8, 16)),
    "pattern": Patch(Head(1, 2).pattern),
    "mean pattern": MeanAblate(Head(1, 2).pattern),
    "path": PathPatch(Head(0, 3), Head(1, 2).k),
    "direct": PathPatch(Head(0, 3), "logits", through_mlps=False),
    "mean": MeanAblate(Head(0, 3)),
    "mean of all": MeanAblate(Head(0, 3), ("example", "position")),
    "resample": ResampleAblate(Head(1, 1)),
    "embedding": ZeroAblate(Layer(0).pos_embed.at(3)),
    "two": ZeroAblate(Head(0, 1)) + Patch(Head(1, 2).v),
    "late": ZeroAblate(Layer(0).attn_out.at(9)),
    "mlp": Patch(Layer(1).mlp_out),
    "last": ZeroAblate(Head(1, 2).z.at(-2)),
}
EVERY = Grid(
    lambda part, layer, head: Patch(Head(layer, head).site(part)),
    part=["q", "k", "v", "z", "pattern"],
    layer=range(2),
    head=range(8),
)


def _heads():
    return Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(8))


def same(found, wanted):
    assert set(found.data_vars) == set(wanted.data_vars)
    for name, values in wanted.data_vars.items():
        assert found[name].dims == values.dims
        if values.dtype.kind in "fiu":
            np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-6, err_msg=str(name))
        else:
            assert (found[name].values == values.values).all()


@pytest.fixture
def there(server):
    """The shipped model, on the server."""
    return hw.load("words-2l", remote=True)


def test_runs_and_random_sets_are_those_of_this_machine(server, words_model):
    there = hw.load("words-2l", remote=True)
    same(measure(there, TASK, None, [loss, induction]), measure(words_model, TASK, None, [loss, induction]))
    both = measure(there, TASK, None, "loss", runs="all")
    assert both["run"].values.tolist() == ["clean", "corrupted"]
    asked = {"metrics": "loss", "runs": "clean", "controls": 2}
    found = measure(there, TASK, [ZeroAblate(Head(0, 3))], **asked)
    assert found["run"].values.tolist() == ["clean"]
    same(found, measure(words_model, TASK, [ZeroAblate(Head(0, 3))], **asked))


def test_the_server_cannot_import_headwise(server):
    import httpx

    assert httpx.get(f"{server.host}/ping").json() == {"headwise": False, "isolated": 1}


def test_answers_labels_and_means_over_all_prompts_are_those_of_this_machine(there, words_model):
    over = ("example", "position")
    task = Prompts(
        [[5, 9, 11, 5], [7, 3], [2, 4, 6]],
        answers=[[3, 8], [9], [4]],
        distractors=[[2], [30, 12], [7]],
        labels={"S": [1, 0, -1]},
    )
    what = {"mean": MeanAblate("L0H3", over=over), "label": ZeroAblate("L0.resid_pre at S")}
    what["two"] = MeanAblate("L1H2.q at S", over=over) + Knockout("L0H1", query=-1, key=0)
    given = {"task": task, "what": what, "metrics": [loss, prob, logit_diff], "progress": False}
    same(measure(there, **given), measure(words_model, **given))
    sites = ["L0.resid_post at S", "L1H2.pattern at -1"]
    same(capture(there, task, sites), capture(words_model, task, sites))


LIES = """
import os, runpy, sys
folder, server = sys.argv[1:]
site = next(one for one in sys.path if os.path.isdir(os.path.join(one, "torch")))
os.symlink(site, os.path.join(folder, "headwise", "site"))
sys.path = [folder, *(os.path.join(folder, "headwise", "site") if one == site else one for one in sys.path)]
runpy.run_path(server)
import torch
try:
    import headwise
except ModuleNotFoundError:
    print(torch.__file__)
"""


def test_the_server_has_everything_else_wherever_it_lies(tmp_path):
    (tmp_path / "headwise").mkdir()
    (tmp_path / "headwise" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-I", "-c", LIES, tmp_path, loopback.SERVER], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith(str(tmp_path / "headwise" / "site")), done.stderr


@pytest.mark.parametrize("by_address", [False, True])
def test_the_server_speaks_to_nnsight_itself(there, server, by_address, monkeypatch):
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    if by_address:
        server.fault("deliver", "by address")
    tokens = torch.tensor([[1, 2, 3]])
    root = there.traced
    with root.trace(tokens, remote=True):
        logits = root.output.logits.save()
    here = hw.load("words-2l").module(tokens).logits
    torch.testing.assert_close(logits, here)


def test_it_says_where_it_runs(there, server):
    assert repr(there) == (
        f"<Model words-2l (shipped): gpt2, 2 layers of 8 heads, runs on a server of NDIF's kind, {server.host}>"
    )
    assert next(there.module.parameters()).is_meta
    assert there.weight_hash.startswith("sample:")
    assert there.dtype == "float32"
    with pytest.raises(hw.errors.ModelError, match="head_circuits and neuron_tokens are computed there"):
        there.head_weights(0)


@pytest.mark.parametrize("per_position", [False, True])
def test_every_intervention_and_metric(there, words_model, per_position):
    metrics = [loss, accuracy, kl, rank, prob]
    found, wanted = (measure(model, TASK, WHAT, metrics, per_position=per_position) for model in (there, words_model))
    same(found, wanted)
    assert found.attrs["executed"].startswith("http://127.0.0.1")
    assert {name for name in found.attrs if found.attrs[name] != wanted.attrs[name]} <= {
        "executed",
        "weight_hash",
        "buffer_hash",
        "module_hash",
        "configuration",
        "fingerprint",
        "created",
        "seconds",
    }


@pytest.mark.parametrize("metrics", [[logit_diff], [induction], [induction, loss]])
def test_few_logits_and_patterns(there, words_model, metrics):
    same(measure(there, TASK, WHAT, metrics), measure(words_model, TASK, WHAT, metrics))


def test_the_other_direction_and_lengths_that_differ(there, words_model):
    back = [
        measure(model, TASK, {"v": Patch(Head(1, 2).v, "clean")}, [loss], base="corrupted")
        for model in (there, words_model)
    ]
    same(*back)
    task = Prompts(["apple banana cherry apple", "cat dog cat", "sun moon sun"], answers=[" banana", " dog", " moon"])
    same(*(measure(model, task, {"zero": ZeroAblate(Head(1, 2))}, [loss]) for model in (there, words_model)))


@pytest.mark.parametrize("estimator", ["gradient", "integrated"])
def test_estimates(there, words_model, estimator):
    same(*(measure(model, TASK, EVERY, [loss], estimator=estimator) for model in (there, words_model)))


@pytest.mark.parametrize("estimator", ["eap-ig", "eap-ig-activations", "atp*", "relp"])
def test_estimates_of_edges(there, words_model, estimator):
    given = {"estimator": estimator, "steps": 2}
    same(*(measure(model, TASK, hw.EdgePatches(), [logit_diff], **given) for model in (there, words_model)))
    few = hw.EdgePatches(["m1->logits", "a0.h3->a1.h1<k>"])
    same(*(measure(model, TASK, few, [logit_diff], **given) for model in (there, words_model)))


def test_captured(there, words_model):
    sites = [
        Head(1, 2).pattern,
        Head(0, 1),
        Layer(1).pattern,
        Layer(0).resid_post,
        Head(1, 3).k.at([2, -1]),
        Layer(1).q,
    ]
    sites += [Head(0, 1).head_out, Layer(0).head_out, Head(1, 2).pattern.at([8, 9])]
    same(capture(there, TASK, sites), capture(words_model, TASK, sites))


def test_composition_is_computed_there(there, words_model, server):
    before = len(server.lines("sent"))
    same(composition_scores(there), composition_scores(words_model))
    assert sum(line["bytes"] for line in server.lines("sent")[before:]) < 12_000


def test_all_heads_send_back_little(there, words_model, server):
    task = RepeatedTokens(n=32, length=25)
    heads = _heads()
    there.identity  # noqa: B018
    before = len(server.lines("sent")), len(server.executed("passes"))
    found = measure(there, task, heads, [loss, accuracy])
    sent = [line["bytes"] for line in server.lines("sent")[before[0] :]]
    assert sum(sent) < 10_000
    assert len(server.executed("passes")) == before[1] + 1
    same(found, measure(words_model, task, heads, [loss, accuracy]))


def test_the_whole_study(there, words_model, server, tmp_path):
    study = InductionStudy(n=6, length=8, draws=4)
    begun = len(server.lines("executed"))
    found = study.run(there, out=tmp_path / "there.nc")
    wanted = study.run(words_model, out=tmp_path / "here.nc")
    keys = [line["key"] for line in server.lines("executed")[begun:]]
    assert len(keys) == len(set(keys))
    stored = [hw.open_result(tmp_path / f"{name}.nc", load=True) for name in ("there", "here")]
    assert [node.path for node in stored[0].subtree] == [node.path for node in stored[1].subtree]
    for one, other in zip(stored[0].subtree, stored[1].subtree, strict=True):
        same(one.to_dataset(), other.to_dataset())
    assert found.attrs["heads"] == wanted.attrs["heads"]
    assert found.attrs["conclusion"] == wanted.attrs["conclusion"]
    assert not (tmp_path / "there.nc.parts").exists()
    again = len(server.lines("executed"))
    study.run(hw.load("words-2l", remote=True), out=tmp_path / "there.nc")
    assert {line["what"] for line in server.lines("executed")[again:]} <= {"facts"}


def test_the_command_line_opens_models_there(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--remote"]) == 0
    assert capsys.readouterr().out.startswith("words-2l: 16 conditions on 32 prompts")
    monkeypatch.setattr(
        InductionStudy, "run", lambda study, model, *given, **more: 1 / (study.n - 4) if model.remote else 0
    )
    with pytest.raises(ZeroDivisionError):
        main(["induction", "--remote", "--n", "4", "--length", "8", "--out", "there.nc"])


@pytest.mark.heavy
def test_the_command_line_runs_there_too(server, words_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["induction", "--remote", "--n", "4", "--length", "8", "--out", "there.nc"]) == 0
    tree = hw.open_result("there.nc", load=True)
    assert tree.attrs["executed"].startswith("http://127.0.0.1")
    wanted = InductionStudy(n=4, length=8).run(words_model)
    same(tree["ablation"].to_dataset(), wanted["ablation"].to_dataset())
    assert tree.attrs["conclusion"] == wanted.attrs["conclusion"]


def test_nothing_of_ours_is_named_in_what_is_sent(there):
    names = []
    real = protocol.serialize_session

    def watched(root, served, program):
        blob = real(root, served, program)
        content = zstandard.ZstdDecompressor().decompressobj().decompress(blob)
        strings = []
        for code, argument, _ in pickletools.genops(io.BytesIO(content)):
            if "UNICODE" in code.name:
                strings.append(argument)
            elif code.name == "STACK_GLOBAL":
                names.append(strings[-2:])
            elif code.name == "GLOBAL":
                names.append(argument.split())
        return blob

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "serialize_session", watched)
        measure(there, TASK, WHAT, [loss, induction], check=False)
    assert names
    assert not [name for name in names if name[0].startswith("headwise")]
    assert not [name for name in names if "skeleton" in name[-1]], "a class was sent"


def test_a_kernel_that_cannot_be_sent(there):
    lock = threading.Lock()

    def locked(logits, targets):
        with lock:
            return logits.gather(-1, targets[..., None])[..., 0]

    mine = Metric(Card("mine", "mine", "1", (0, 1)), "logits", locked, lambda facts: {"targets": facts.targets})
    with pytest.raises(
        hw.errors.DeclarationError, match=r"locked cannot travel to a server \(cannot pickle '_thread.lock' "
    ):
        measure(there, TASK, WHAT, [mine], check=False)


def test_what_cannot_be_meant(there, words_model, tmp_path):
    with pytest.raises(
        hw.errors.DeclarationError, match=r"remote=True: words-2l was opened here; open it with load\(name, remo"
    ):
        measure(words_model, TASK, WHAT, [loss], remote=True)
    with pytest.raises(hw.errors.DeclarationError, match="remote=False: words-2l has no weights here"):
        capture(there, TASK, Head(0, 1), remote=False)
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(hw.errors.DeclarationError, match="runs on a server, which shares out"),
    ):
        measure(there, TASK, WHAT, [loss], executor=pool)
    for wrong in ({"device": "cpu"}, {"dtype": "float32"}):
        with pytest.raises(hw.errors.DeclarationError, match="has its own copy, device and dtype"):
            hw.load("words-2l", remote=True, **wrong)
    with pytest.raises(hw.errors.DeclarationError, match="revision='step100' is for a Hub id"):
        hw.load("words-2l", remote=True, revision="step100")
    assert "16 conditions on 32 prompts" in str(plan(there, RepeatedTokens(), _heads(), [loss]))
    with pytest.raises(hw.errors.ModelError, match="cannot get words-3l from the Hugging Face Hub"):
        hw.load("words-3l", remote=True)
    with pytest.raises(hw.errors.ModelError, match="cannot get nobody/nothing from the Hugging Face Hub"):
        hw.load("nobody/nothing", remote=True)


@pytest.fixture(scope="module")
def _apart(tmp_path_factory):
    folder = str((locate.SHIPPED / "words-2l").resolve())
    server = Loopback(tmp_path_factory.mktemp("apart"), {folder: folder}, apart=True).start()
    yield server
    server.stop()


@pytest.fixture
def apart(_apart, server, monkeypatch):
    """The shipped model, on a server that runs jobs where there are no weights."""
    monkeypatch.setattr(CONFIG.API, "HOST", _apart.host)
    return hw.load("words-2l", remote=True)


@pytest.mark.parametrize("metrics", [[loss, kl], [logit_diff], [induction, loss]])
def test_without_weights_where_it_runs(apart, words_model, metrics):
    same(measure(apart, TASK, WHAT, metrics), measure(words_model, TASK, WHAT, metrics))
    assert apart.weight_hash.startswith("revision:")


def test_weights_that_are_read_by_calls(apart, words_model):
    sites = [Head(0, 1).head_out, Head(1, 2).pattern]
    same(capture(apart, TASK, sites), capture(words_model, TASK, sites))
    same(composition_scores(apart), composition_scores(words_model))
    with pytest.raises(hw.errors.ServerError, match="apart from the weights, where nothing has a gradient"):
        measure(apart, TASK, EVERY, [loss], estimator="gradient")


def test_the_study_without_gradients(apart, words_model):
    study = InductionStudy(n=4, length=6, draws=2)
    found, wanted = study.run(apart), study.run(words_model)
    assert set(wanted.children) - set(found.children) == {"attribution", "estimates"}
    assert found.attrs["heads"] == wanted.attrs["heads"]


def test_a_stored_result_is_repeated_there(there, server, tmp_path):
    from headwise.studies.catalogue.description import when_of
    from headwise.studies.reproduce.recipe import recipe
    from headwise.studies.reproduce.rerun import rerun
    from headwise.studies.storage.record import Record

    ds = measure(there, TASK, {"zero": ZeroAblate(Head(1, 2))}, [loss], out=tmp_path / "there.nc")
    again = recipe(ds.attrs, ds, "there.nc")
    assert "model = hw.load('words-2l', remote=True)" in again.python
    assert again.notes == (f"It ran on {server.host}: NDIF_HOST in the environment names the server.",)
    assert f"on cpu at {server.host}" in when_of(Record.from_attrs(ds.attrs))
    begun = len(server.executed("passes"))
    assert rerun(tmp_path / "there.nc", yes=True).agrees
    assert len(server.executed("passes")) == begun + 1


def test_captured_under_interventions(there, words_model, server, tmp_path):
    sites = [Head(1, 2).pattern, Head(0, 1).head_out.at(-1), Layer(1).q, "logits at -1", hw.Logits([3, 5])]
    what = {"clean": None, "zero": ZeroAblate(Head(0, 3)), "k": Patch(Head(1, 2).k, source="corrupted")}
    same(capture(there, TASK, sites, what=what), capture(words_model, TASK, sites, what=what))
    there.identity  # noqa: B018
    before = len(server.lines("sent"))
    found = capture(there, TASK, sites[0], what=what, out=tmp_path / "there.nc")
    numbers = found["L1H2_pattern"].nbytes
    assert sum(line["bytes"] for line in server.lines("sent")[before:]) < numbers + 6_000
    same(found, capture(words_model, TASK, sites[0], what=what))
    assert hw.rerun(tmp_path / "there.nc", model=there, yes=True).agrees
