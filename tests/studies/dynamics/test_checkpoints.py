"""A study over checkpoints: of the shipped model, of folders, of files of Lightning, and of models in hand."""

import dataclasses

import lightning as L
import numpy as np
import pytest
import torch
import xarray as xr
from lightning.pytorch.callbacks import ModelCheckpoint

import headwise as hw
from headwise.errors import DeclarationError, ModelError, UnknownNameError
from tests.support.workers import Here

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Lightning are not ours
STUDY = hw.Sweep(hw.RepeatedTokens(n=3, length=6), metrics=["induction", "loss"])
CONFIG = {"model_type": "gpt2", "vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}


def same(found, wanted, step):
    for name in ("induction", "loss"):
        np.testing.assert_array_equal(found[name].sel(step=step), wanted[name])


def test_the_checkpoints_of_the_shipped_model(tmp_path):
    found = hw.over_checkpoints("words-2l", STUDY, [0, 512, 2000], out=tmp_path / "a.nc")
    for step in (0, 512, 2000):
        same(found, STUDY.run(hw.load("words-2l", step=step)), step)
    stored = hw.open_result(tmp_path / "a.nc")
    assert stored["induction"].dims == ("step", "layer", "head", "example")
    assert stored["induction"].mean("example").max(("layer", "head")).values[-1] > 0.9
    xr.testing.assert_equal(stored["loss"].load(), hw.over_checkpoints("words-2l", STUDY, [0, 512, 2000])["loss"])
    with pytest.raises(UnknownNameError, match="there is no checkpoint of step 7: there are 0, "):
        hw.over_checkpoints("words-2l", STUDY, [7])


def test_what_is_done_is_not_done_again(tmp_path):
    runs = []

    class Once(hw.Sweep):
        def run(self, model, *given, **named):
            runs.append(model.step)
            if len(runs) == 2:
                raise KeyboardInterrupt
            return super().run(model, *given, **named)

    study = Once(STUDY.task, metrics="loss")
    with pytest.raises(KeyboardInterrupt):
        hw.over_checkpoints("words-2l", study, [0, 512, 2000], out=tmp_path / "a.nc")
    found = hw.over_checkpoints("words-2l", study, [0, 512, 2000], out=tmp_path / "a.nc")
    assert runs == [0, 512, 512, 2000]
    more = hw.over_checkpoints("words-2l", study, [0, 448, 512, 2000], out=tmp_path / "a.nc")
    assert runs[4:] == [448]
    xr.testing.assert_equal(more["loss"].sel(step=[0, 512, 2000]), found["loss"])


def test_a_metric_that_does_something_else_is_measured_anew(tmp_path):
    def metric(times):
        def kernel(*arguments, **named):
            return times * hw.metrics.loss.kernel(*arguments, **named)

        card = dataclasses.replace(hw.metrics.loss.card, name="mine")
        return dataclasses.replace(hw.metrics.loss, card=card, kernel=kernel)

    once, thrice = (
        hw.over_checkpoints("words-2l", hw.Sweep(STUDY.task, metrics=metric(times)), [0, 512], out=tmp_path / "a.nc")
        for times in (1, 3)
    )
    np.testing.assert_allclose(thrice["mine"], 3 * once["mine"], rtol=1e-6)
    named_alike = dataclasses.replace(metric(2), card=hw.metrics.loss.card)
    with pytest.raises(DeclarationError, match=r"a metric of your own is called 'loss', like hw[.]metrics[.]loss"):
        hw.Sweep(STUDY.task, metrics=named_alike).to_json()


def test_the_passes_of_checkpoints_run_on_an_executor(tmp_path):
    """Each worker opens the checkpoint itself; the numbers are those of this process."""
    study, workers = hw.Sweep(STUDY.task, hw.ZeroAblate("L0H3"), "loss"), Here()
    found = hw.over_checkpoints("words-2l", study, [0, 512], out=tmp_path / "a.nc", executor=workers)
    assert len(workers.items) >= 2
    wanted = hw.over_checkpoints("words-2l", study, [0, 512])
    np.testing.assert_array_equal(found["loss"], wanted["loss"])
    assert float(np.abs(np.diff(found["loss"].mean("example"))).max()) > 0.01  # of two checkpoints, not of one


def test_files_of_lightning_and_folders_of_transformers(tmp_path):
    kept = ModelCheckpoint(tmp_path / "lightning", every_n_train_steps=2, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    module = hw.CausalLM(CONFIG, learning_rate=0.01)
    L.Trainer(max_steps=4, callbacks=[kept], **quiet).fit(module, hw.RepeatedTokensData(length=8, batch_size=2))
    found = hw.over_checkpoints(tmp_path / "lightning", STUDY)
    assert found["step"].values.tolist() == [2, 4]
    same(found, STUDY.run(hw.load(module.model)), 4)
    given = hw.over_checkpoints(tmp_path / "lightning", STUDY, like=module.model)
    xr.testing.assert_equal(given["loss"], found["loss"])
    for step, scale in ((10, 1.0), (9, 2.0)):
        with torch.no_grad():
            module.model.transformer.wte.weight.mul_(scale)
        module.model.save_pretrained(tmp_path / "folders" / f"checkpoint-{step}")
    tokenizer = hw.load(module.model).tokenizer
    found = hw.over_checkpoints(tmp_path / "folders", STUDY, tokenizer=tokenizer)
    assert found["step"].values.tolist() == [9, 10]
    same(found, STUDY.run(hw.load(module.model)), 9)


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"state_dict": {}, "global_step": 1, "more": Evil()}, tmp_path / "a.ckpt")
    with pytest.raises(ModelError, match=r"a\.ckpt cannot be read without unpickling objects"):
        hw.over_checkpoints(tmp_path, STUDY)
    assert not (tmp_path / "touched").exists()
    torch.save({"state_dict": {}, "global_step": 1}, tmp_path / "a.ckpt")
    with pytest.raises(DeclarationError, match="does not say which model it holds: give like="):
        hw.over_checkpoints(tmp_path, STUDY)
    with pytest.raises(ModelError, match="does not hold the weights of GPT2LMHeadModel"):
        hw.over_checkpoints(tmp_path, STUDY, like="words-2l")


def test_models_in_hand():
    models = [hw.CausalLM(CONFIG).model for _ in range(2)]
    found = hw.over_checkpoints(models, STUDY)
    by_step = hw.over_checkpoints({50: models[1], 7: models[0]}, STUDY)
    assert found["step"].values.tolist() == [0, 1]
    assert by_step["step"].values.tolist() == [7, 50]
    for place, step in ((0, 7), (1, 50)):
        wanted = STUDY.run(hw.load(models[place]))
        same(found, wanted, place)
        same(by_step, wanted, step)
