"""What is sent to a server, and what is known of it afterwards: shapes of kernels, jobs that were cut, other models."""

import json
import shutil

import pytest
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.interventions import Head, ZeroAblate
from headwise.interventions.base import memory
from headwise.interventions.models import locate
from headwise.interventions.remote import patience, queue, run
from headwise.interventions.remote.ledger import InMemoryLedger
from headwise.metrics import Card, Metric, loss
from headwise.studies import InductionStudy, RepeatedTokens, measure
from tests.support import remote_client
from tests.support.loopback import Loopback

TASK = RepeatedTokens(n=2, length=6)
WHAT = {"zero": ZeroAblate(Head(1, 2))}
MEMORY = "Traceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory."


@pytest.fixture
def there(server):
    return hw.load("words-2l", remote=True)


KERNELS = {
    "flat": (lambda logits, targets: logits[:, 0, 0], r"\(2,\)"),
    "longer": (lambda logits, targets: logits[:, [0, *range(logits.shape[1])], 0], r"\(2, 6\)"),
}


@pytest.mark.parametrize(("kernel", "shape"), KERNELS.values(), ids=KERNELS)
def test_a_kernel_of_another_shape_is_refused_as_here(there, words_model, kernel, shape):
    metric = Metric(Card("mine", "mine", "1", (0, 1)), "logits", kernel, loss.prepare)
    said = rf"mine: its kernel gives {shape}, where \(row, scored\) is \(2, 5\)"
    with pytest.raises(hw.errors.DeclarationError, match=said):
        measure(words_model, TASK, WHAT, [metric], check=False)
    with pytest.raises(hw.errors.ServerError, match=said):
        measure(there, TASK, WHAT, [metric], check=False)


def smallest(logits):
    return logits.min(-1).values


def above_smallest(logits, targets):
    """A kernel that calls another function of this module, which the server has not."""
    return logits.gather(-1, targets[..., None])[..., 0] - smallest(logits)


def test_a_kernel_of_ones_own_module_travels(there, words_model):
    metric = Metric(Card("mine", "mine", "1", (0, 100)), "logits", above_smallest, loss.prepare)
    found, wanted = (measure(model, TASK, WHAT, [metric]) for model in (there, words_model))
    assert abs(found["mine"] - wanted["mine"]).max() < 1e-5
    assert float(abs(wanted["mine"]).min()) > 1


def test_what_was_cut_for_want_of_memory_is_found_again(there, server, tmp_path, monkeypatch):
    """The client stops once the parts of a cut job are executed: the same call runs none of them again."""
    monkeypatch.setattr(patience, "LOST", 1.5)
    there.identity  # noqa: B018
    begun = len(server.executed("passes"))

    class Stopped(Exception):
        pass

    def stop_when_done(*given):
        raise Stopped

    server.fault("execute", "error", detail=MEMORY, skip=1)  # the first job asks which model the server has
    with monkeypatch.context() as patch:
        patch.setattr(run, "finished_values", stop_when_done)
        with pytest.raises(Stopped):
            remote_client.sweep(there, tmp_path / "out.nc")
    first = server.executed("passes")[begun:]
    assert first
    found = remote_client.sweep(hw.load("words-2l", remote=True), tmp_path / "out.nc")
    assert server.executed("passes")[begun:] == first
    wanted = remote_client.sweep(hw.load("words-2l"), None)
    assert abs(found["loss"] - wanted["loss"]).max() < 1e-6


def test_jobs_are_made_when_they_are_sent(there, monkeypatch):
    """Once to see whether the server knows them, and once more when it is their turn; not all at a time."""
    monkeypatch.setattr(run, "ROWS", 16)
    made, ended = [], []
    make, close = run.RemoteSweep.job, InMemoryLedger.drop_job
    monkeypatch.setattr(run.RemoteSweep, "job", lambda sweep, session: made.append(len(ended)) or make(sweep, session))
    monkeypatch.setattr(InMemoryLedger, "drop_job", lambda self, key: ended.append(key) or close(self, key))
    remote_client.sweep(there, None)
    assert len(set(ended)) == len(ended) > queue.AT_ONCE
    assert len(made) == 2 * (len(ended) - 1), "the first job asks which model the server has"
    assert max(made) >= len(ended) - queue.AT_ONCE


def test_models_of_one_server_are_told_apart_without_their_weights(server, tmp_path, monkeypatch):
    """Where jobs see no weights, two folders with the same configuration are two models all the same."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        shutil.copytree(locate.SHIPPED / "words-2l", folder, ignore=shutil.ignore_patterns("checkpoints*"))
    apart = Loopback(tmp_path / "server", {str(folder): str(folder) for folder in folders}, apart=True).start()
    try:
        monkeypatch.setattr(CONFIG.API, "HOST", apart.host)
        one, two = (hw.load(folder, remote=True) for folder in folders)
        assert one.weight_hash != two.weight_hash
        assert all(model.weight_hash.startswith("revision:") for model in (one, two))
        measure(one, TASK, WHAT, [loss], out=tmp_path / "out.nc")
        with pytest.warns(hw.errors.ResultWarning, match="begun with another model than the one in hand: weights rev"):
            measure(two, TASK, WHAT, [loss], out=tmp_path / "out.nc")
        assert hw.open_result(tmp_path / "out.nc", load=True).attrs["model"] == "two"
    finally:
        apart.stop()


@pytest.fixture
def own_server(tmp_path, monkeypatch):
    """A server whose model a test may change: its folder, and the model while it is served."""
    folder = tmp_path / "served"
    shutil.copytree(locate.SHIPPED / "words-2l", folder, ignore=shutil.ignore_patterns("checkpoints*"))
    own = Loopback(tmp_path / "server", {str(folder): str(folder)}).start()
    monkeypatch.setattr(CONFIG.API, "HOST", own.host)
    yield own, folder
    own.stop()


def test_a_model_that_changes_in_the_middle_of_a_call_is_refused(own_server, monkeypatch):
    own, folder = own_server
    monkeypatch.setattr(run, "ROWS", 32)
    there = hw.load(folder, remote=True)
    there.identity  # noqa: B018
    own.fault("model", "weight", skip=2, part="transformer.h.1.mlp.c_proj", factor=1.5)
    with pytest.raises(hw.errors.ServerError, match="is not the model that it was when this began: what it computes"):
        remote_client.sweep(there, None)
    found = remote_client.sweep(there, None)  # which asks which model is there now
    changed = hw.load(folder)
    changed.module.transformer.h[1].mlp.c_proj.weight.data.mul_(1.5)
    assert abs(found["loss"] - remote_client.sweep(changed, None)["loss"]).max() < 1e-6


@pytest.mark.parametrize("how", ["weight", "eps"])
def test_what_another_model_of_a_server_gave_is_not_taken(own_server, tmp_path, how):
    """Changed while it is served, so that name and revision are the same; by a number, or by an attribute of a norm."""
    own, folder = own_server
    out, part = tmp_path / "out.nc", {"weight": "transformer.h.1.mlp.c_proj", "eps": "transformer.h.0.ln_1"}[how]
    first = remote_client.sweep(hw.load(folder, remote=True), out)
    own.fault("model", how, part=part, factor=1.5)
    with pytest.warns(hw.errors.ResultWarning, match="begun with another model than the one in hand"):
        found = remote_client.sweep(hw.load(folder, remote=True), out)
    changed = hw.load(folder)
    module = changed.module.get_submodule(part)
    module.weight.data.mul_(1.5) if how == "weight" else setattr(module, "eps", 0.5)
    wanted = remote_client.sweep(changed, None)
    assert abs(found["loss"] - wanted["loss"]).max() < 1e-6
    assert abs(found["loss"] - first["loss"]).max() > 1e-3


def test_a_server_with_another_configuration_is_refused(own_server, tmp_path):
    _, folder = own_server
    there = hw.load(folder, remote=True)
    config = json.loads((folder / "config.json").read_text()) | {"layer_norm_epsilon": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        hw.errors.ModelError, match=r"another configuration \(layer_norm_epsilon 1e-05 here, 0.5 on http"
    ):
        remote_client.sweep(there, None)


def test_untrained_models_that_do_not_fit_are_refused_first(there, server, monkeypatch):
    begun = len(server.executed())
    monkeypatch.setattr(memory, "free_memory", lambda: 100_000)
    told = r"of the shape of words-2l takes 0\.\d MiB, and there is room for 0\.1 MiB"
    with pytest.raises(hw.errors.ModelError, match=told):
        InductionStudy(n=2, length=6, draws=2).run(there)
    assert len(server.executed()) == begun
