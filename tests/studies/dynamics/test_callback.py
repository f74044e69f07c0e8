"""A study inside a training run: the training is as it would be without, and each step is measured once."""

import copy
import random
from datetime import timedelta

import lightning as L
import numpy as np
import pytest
import torch
import xarray as xr
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import Logger

import headwise as hw
from headwise.errors import DeclarationError, HeadwiseError, ResultWarning

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Lightning are not ours
TASK = hw.RepeatedTokens(n=3, length=6)
STUDY = hw.Sweep(TASK, metrics=[hw.metrics.induction, hw.metrics.loss])
SIZES = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
CONFIG = {"model_type": "gpt2", **SIZES, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))}


CERTAIN = CONFIG | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
"""Without dropout: a checkpoint of Lightning holds no state of random generators."""


def trainer(callbacks=(), steps=6, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(max_steps=steps, accelerator="cpu", callbacks=[*callbacks], **(quiet | options))


def data(**options):
    return hw.RepeatedTokensData(length=8, batch_size=2, size=40, **options)


def fit(callbacks=(), module=None, resume=None, **options):
    L.seed_everything(0, verbose=False)
    module = hw.CausalLM(CONFIG, learning_rate=0.01) if module is None else module()  # with dropout
    run = trainer(callbacks, **options)
    run.fit(module, data(), ckpt_path=resume)
    return module, run


def equal(one, two):
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Kept(Callback):
    """Copies of the model, by steps done."""

    def __init__(self):
        self.models = {}

    def on_train_batch_end(self, trainer, pl_module, *given):
        self.models.setdefault(trainer.global_step, copy.deepcopy(pl_module.model))


def test_each_step_is_measured_as_the_model_then_was(tmp_path):
    kept = Kept()
    fit([kept, hw.StudyCallback(STUDY, steps=[0, 2, 5], out=tmp_path / "a.nc")])
    found = hw.open_result(tmp_path / "a.nc")
    assert found["step"].values.tolist() == [0, 2, 5]
    assert found["induction"].dims == ("step", "layer", "head", "example")
    for step in (2, 5):
        alone = STUDY.run(hw.load(kept.models[step]))
        xr.testing.assert_equal(found["induction"].sel(step=step, drop=True), alone["induction"])
        xr.testing.assert_equal(found["loss"].sel(step=step, drop=True), alone["loss"])
        assert found["step_weight_hash"].sel(step=step).item() == alone.attrs["weight_hash"]
    assert hw.Sweep.from_json(found.attrs["study"]) == STUDY


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=["each batch", "accumulated"])
def test_training_gives_the_weights_that_it_gives_without(tmp_path, options):
    seen = []

    class Watched(hw.Sweep):
        def run(self, *given, **named):
            seen.append(1)
            torch.rand(3)  # and NumPy, and Python
            random.random()
            return super().run(*given, **named)

    watch = hw.StudyCallback(Watched(TASK, metrics="loss"), every_n_train_steps=2, out=tmp_path / "a.nc")
    measured, _ = fit([watch], **options)
    plain, _ = fit(**options)
    assert equal(measured, plain)
    assert len(seen) == 3
    assert hw.open_result(tmp_path / "a.nc")["step"].values.tolist() == [2, 4, 6]


def test_a_compiled_model_is_trained_as_without_and_measured(tmp_path):
    def compiled():
        module = hw.CausalLM(CONFIG, learning_rate=0.01)
        module.model = torch.compile(module.model, backend="aot_eager")
        return module

    measured, _ = fit([hw.StudyCallback(STUDY, steps=[0, 1, 3], out=tmp_path / "a.nc")], compiled, steps=3)
    plain, _ = fit((), compiled, steps=3)
    assert equal(measured, plain)
    assert hw.open_result(tmp_path / "a.nc")["step"].size == 3


class SomebodyElses(L.LightningModule):
    """A module as others write them: the model is two levels down."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleDict({"inner": torch.nn.Module(), "probe": torch.nn.Linear(3, 3)})
        self.parts["inner"].net = hw.CausalLM(CONFIG).model

    def training_step(self, batch, batch_idx):
        return self.parts["inner"].net(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_model_of_somebody_elses_module_is_found(tmp_path):
    def fitted(name, **options):
        L.seed_everything(0, verbose=False)
        run = trainer([hw.StudyCallback(STUDY, steps=[2], out=tmp_path / name, **options)], steps=2)
        run.fit(SomebodyElses(), torch.utils.data.DataLoader(data(vocabulary=40).train_dataloader().dataset, 2))
        return hw.open_result(tmp_path / name)["loss"]

    told = fitted("told.nc", model=lambda module: module.parts["inner"].net)
    np.testing.assert_array_equal(fitted("found.nc"), told)


def test_what_is_logged_is_seen_by_other_callbacks(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="headwise/loss", mode="min", every_n_train_steps=2, filename="{step}")
    stop = EarlyStopping("headwise/induction", mode="max", patience=99, check_on_train_epoch_end=True)
    watch = hw.StudyCallback(STUDY, every_n_train_steps=2, out=tmp_path / "a.nc")
    _, run = fit([watch, best, stop], enable_checkpointing=True)
    found = hw.open_result(tmp_path / "a.nc")
    last = found.isel(step=-1)
    assert run.callback_metrics["headwise/loss"].item() == pytest.approx(float(last["loss"].mean()), rel=1e-6)
    largest = float(last["induction"].mean("example").max())
    assert run.callback_metrics["headwise/induction"].item() == pytest.approx(largest, rel=1e-6)
    assert best.best_model_score.item() == pytest.approx(float(found["loss"].mean("example").min()), rel=1e-6)


class Pictures(Logger):
    """A logger that takes images."""

    name, version = "pictures", 0

    def __init__(self):
        super().__init__()
        self.images, self.numbers = {}, {}

    def log_image(self, key, images, step):
        self.images[key, step] = images

    def log_metrics(self, metrics, step=None):
        self.numbers.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *given):
        """Nothing."""


class Board(Logger):
    """A logger that takes images as those of TensorBoard do."""

    name, version = "board", 0

    def __init__(self):
        super().__init__()
        self.images, self.numbers = {}, {}

    @property
    def experiment(self):
        """What it writes with."""
        return self

    def add_image(self, key, image, step, dataformats):
        assert dataformats == "HWC"
        self.images[key, step] = [image]

    log_metrics, log_hyperparams = Pictures.log_metrics, Pictures.log_hyperparams


@pytest.mark.parametrize("kind", [Pictures, Board])
def test_loggers_get_numbers_and_a_grid_of_each_score(tmp_path, kind):
    logger = kind()
    fit([hw.StudyCallback(STUDY, steps=[0, 2], out=tmp_path / "a.nc")], steps=2, logger=logger, log_every_n_steps=1)
    found = hw.open_result(tmp_path / "a.nc")
    assert {*logger.images} == {("headwise/induction", 0), ("headwise/induction", 2)}
    (image,) = logger.images["headwise/induction", 2]
    wanted = (255 * found["induction"].sel(step=2).mean("example").transpose("layer", "head").values).astype(np.uint8)
    np.testing.assert_array_equal(image[::16, ::16, 0], wanted)
    for step in (0, 2):
        logged = [one["headwise/loss"] for one in logger.numbers.values() if "headwise/loss" in one]
        assert pytest.approx(float(found["loss"].sel(step=step).mean()), rel=1e-6) in logged


def test_a_configuration_of_lightning_describes_it_all(tmp_path):
    """What ``LightningCLI`` does with a YAML file."""
    pytest.importorskip("jsonargparse")
    import yaml
    from lightning.pytorch.cli import LightningCLI

    task = {"class_path": "headwise.RepeatedTokens", "init_args": {"n": 3, "length": 6}}
    study = {"class_path": "headwise.Sweep", "init_args": {"task": task, "metrics": ["induction", "loss"]}}
    watch = {"steps": [0, 3], "out": str(tmp_path / "a.nc"), "study": study}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    callbacks = [{"class_path": "headwise.StudyCallback", "init_args": watch}]
    config = {
        "seed_everything": 0,
        "trainer": {"max_steps": 3, "accelerator": "cpu", "callbacks": callbacks} | dict.fromkeys(quiet, False),
        "model": {"class_path": "headwise.CausalLM", "init_args": {"model": CONFIG, "learning_rate": 0.01}},
        "data": {"class_path": "headwise.RepeatedTokensData", "init_args": {"length": 8, "batch_size": 2}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    modes = {"subclass_mode_model": True, "subclass_mode_data": True, "save_config_callback": None}
    run = LightningCLI(
        L.LightningModule, L.LightningDataModule, args=["fit", "--config", str(tmp_path / "run.yaml")], **modes
    )
    found = hw.open_result(tmp_path / "a.nc")
    assert hw.Sweep.from_json(found.attrs["study"]) == STUDY
    np.testing.assert_array_equal(found["loss"].sel(step=3), STUDY.run(hw.load(run.model.model))["loss"])


def test_averaged_weights_are_measured_where_they_are_asked_for(tmp_path):
    average = WeightAveraging(avg_fn=lambda old, new, count: 0.9 * old + 0.1 * new)
    watch = hw.StudyCallback(STUDY, steps=[4], out=tmp_path / "a.nc", weights="average")
    seen = {}

    class Late(Callback):
        def on_train_batch_end(self, trainer, pl_module, *given):
            if trainer.global_step == 4:
                seen["model"] = copy.deepcopy(average._average_model.module.model)

    fit([average, watch, Late()], steps=5)
    np.testing.assert_array_equal(
        hw.open_result(tmp_path / "a.nc")["loss"].isel(step=0), STUDY.run(hw.load(seen["model"]))["loss"]
    )
    with pytest.raises(DeclarationError, match="the trainer has no WeightAveraging callback"):
        fit([hw.StudyCallback(STUDY, steps=[4], out=tmp_path / "b.nc", weights="average")])


def test_a_held_intervention_is_off_while_the_model_is_measured(tmp_path):
    def blind():
        return hw.CausalLM(CONFIG, during=hw.ZeroAblate(hw.Head(0, 0)))

    kept = Kept()
    module, _ = fit([kept, hw.StudyCallback(STUDY, steps=[3], out=tmp_path / "a.nc")], blind, steps=3)
    clean = hw.CausalLM(CONFIG)
    clean.load_state_dict(module.state_dict())
    np.testing.assert_array_equal(
        hw.open_result(tmp_path / "a.nc")["loss"].isel(step=0), STUDY.run(hw.load(clean.model))["loss"]
    )


@pytest.mark.parametrize("stopped", [4, 5])
def test_a_resumed_run_goes_on_in_the_same_file(tmp_path, stopped):
    steps = [0, 1, 2, 4, 5, 6]

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, *given):
            if trainer.global_step == stopped:
                raise RuntimeError("power cut")

    def module():
        return hw.CausalLM(CERTAIN, learning_rate=0.01)

    def watch(name):
        return hw.StudyCallback(STUDY, steps=steps, out=tmp_path / name)

    save = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    with pytest.raises(RuntimeError, match="power cut"):
        fit([save, watch("a.nc"), Stop()], module, enable_checkpointing=True)
    assert not (tmp_path / "a.nc").exists()
    again = ModelCheckpoint(tmp_path / "again", every_n_train_steps=3)
    resumed, _ = fit(
        [again, watch("a.nc")], module, resume=tmp_path / "kept" / "step=3.ckpt", enable_checkpointing=True
    )
    whole, _ = fit([watch("b.nc")], module)
    assert equal(resumed, whole)
    one, two = (hw.open_result(tmp_path / name, load=True) for name in ("a.nc", "b.nc"))
    assert one["step"].values.tolist() == steps
    for name in ("induction", "loss", "step_weight_hash"):
        xr.testing.assert_equal(one[name], two[name])
    assert not (tmp_path / "a.nc.parts").exists()


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, *given):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("power cut")


@pytest.mark.parametrize("ahead", ["checkpoint", "file"])
def test_the_step_of_the_checkpoint_is_measured_once_whichever_was_written_first(tmp_path, ahead):
    def watch(name, **options):
        return hw.StudyCallback(STUDY, out=tmp_path / name, **(options or {"every_n_train_steps": 3}))

    stop = Stop()
    stop.path = tmp_path / "a.ckpt"
    order = [stop, watch("a.nc")] if ahead == "checkpoint" else [watch("a.nc"), stop]
    with pytest.raises(RuntimeError, match="power cut"):
        fit(order, lambda: hw.CausalLM(CERTAIN, learning_rate=0.01))
    resumed, _ = fit([watch("a.nc")], lambda: hw.CausalLM(CERTAIN, learning_rate=0.01), resume=stop.path)
    whole, _ = fit([watch("b.nc")], lambda: hw.CausalLM(CERTAIN, learning_rate=0.01))
    assert equal(resumed, whole)
    one, two = (hw.open_result(tmp_path / name, load=True) for name in ("a.nc", "b.nc"))
    assert one["step"].values.tolist() == [3, 6]
    when = ["step_seconds", "step_created"]
    xr.testing.assert_equal(one.drop_vars(when), two.drop_vars(when))


def test_a_checkpoint_of_the_last_step_is_enough_to_write_the_file(tmp_path):
    def watch():
        return hw.StudyCallback(STUDY, steps=[0, 2, 3], out=tmp_path / "a.nc")

    stop = Stop()
    stop.path = tmp_path / "a.ckpt"
    with pytest.raises(RuntimeError, match="power cut"):
        fit([watch(), stop], steps=3)
    assert not (tmp_path / "a.nc").exists()
    fit([watch()], steps=3, resume=stop.path)
    assert hw.open_result(tmp_path / "a.nc")["step"].values.tolist() == [0, 2, 3]
    assert not (tmp_path / "a.nc.parts").exists()


def test_what_was_measured_and_is_gone_is_said(tmp_path):
    def watch():
        return hw.StudyCallback(STUDY, steps=[0, 2, 6], out=tmp_path / "a.nc")

    stop = Stop()
    stop.path = tmp_path / "a.ckpt"
    with pytest.raises(RuntimeError, match="power cut"):
        fit([watch(), stop])
    for path in (tmp_path / "a.nc.parts").glob("*-2-*"):
        path.unlink()
    with pytest.warns(ResultWarning, match=r"a\.nc lacks step 2: it was measured, and what was kept is gone"):
        fit([watch()], resume=stop.path)
    assert hw.open_result(tmp_path / "a.nc")["step"].values.tolist() == [0, 6]


def test_a_study_of_several_parts_gives_a_tree_over_steps(tmp_path):
    study = hw.InductionStudy(n=2, length=6, draws=2)
    fit([hw.StudyCallback(study, steps=[0, 2], out=tmp_path / "a.nc")], steps=2)
    tree = hw.open_result(tmp_path / "a.nc")
    assert tree["heads"]["induction"].dims[0] == "step"
    assert tree["heads"]["induction"].sizes["step"] == 2
    assert tree["step_conclusion"].sizes == {"step": 2}


def test_neither_the_sanity_check_nor_a_dry_run_measures(tmp_path):
    class Never:
        def run(self, *given):
            raise AssertionError("measured")

        def to_json(self):
            return "{}"

    fit([hw.StudyCallback(Never(), every_n_train_steps=1, out=tmp_path / "a.nc")], fast_dev_run=True)
    watch = hw.StudyCallback(Never(), every_n_epochs=9, out=tmp_path / "a.nc")
    trainer([watch], steps=1, num_sanity_val_steps=1).fit(hw.CausalLM(CONFIG), data(validation=2))
    assert not (tmp_path / "a.nc").exists()


def test_epochs_and_time(tmp_path):
    fit([hw.StudyCallback(STUDY, every_n_epochs=2, out=tmp_path / "a.nc")], steps=80)  # 20 batches an epoch
    assert hw.open_result(tmp_path / "a.nc")["step"].values.tolist() == [40, 80]
    fit([hw.StudyCallback(STUDY, train_time_interval=timedelta(0), out=tmp_path / "b.nc")], steps=3)
    assert hw.open_result(tmp_path / "b.nc")["step"].values.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of steps, .*: none of them given"),
        ({"steps": [1], "every_n_epochs": 1}, "steps and every_n_epochs given"),
        ({"steps": []}, "steps names no step"),
        ({"steps": [-1]}, "a step"),
        ({"steps": [1], "weights": "mean"}, "weights='mean': possible are model and average"),
    ],
)
def test_what_cannot_be_is_refused(options, message, tmp_path):
    with pytest.raises(DeclarationError, match=message):
        hw.StudyCallback(STUDY, out=tmp_path / "a.nc", **options)


def test_a_module_without_a_model_and_one_with_two_are_refused_before_training(tmp_path):
    class Two(SomebodyElses):
        def __init__(self):
            super().__init__()
            self.other = hw.CausalLM(CONFIG).model

    with pytest.raises(
        HeadwiseError, match=r"Two holds 2 causal language models .*\(parts\.inner\.net, other\): say which"
    ):
        fit([hw.StudyCallback(STUDY, steps=[1], out=tmp_path / "a.nc")], Two)
