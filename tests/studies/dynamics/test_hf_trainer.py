"""A study inside a run of transformers' Trainer."""

import pytest
import torch
import xarray as xr

import headwise as hw

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers are not ours
STUDY = hw.Sweep(hw.RepeatedTokens(n=3, length=6), metrics=["induction", "loss"])
STEPS = [0, 1, 3, 5, 6]


class Sequences(torch.utils.data.Dataset):
    def __init__(self):
        self.data = hw.RepeatedTokensData(length=8, vocabulary=40)

    def __len__(self):
        return 64

    def __getitem__(self, number):
        tokens = torch.as_tensor(self.data.sequence(number, False))
        return {"input_ids": tokens, "labels": tokens}


def train(folder, callbacks=(), resume=None):
    from transformers import Trainer, TrainingArguments

    model = hw.CausalLM.tiny(2, 2, 16, vocabulary=40, context=32, seed=0).model
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 4}
    arguments = TrainingArguments(folder, use_cpu=True, report_to=[], disable_tqdm=True, seed=1, **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=Sequences(), callbacks=[*callbacks])
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_the_training_is_not_disturbed_and_goes_on_in_the_same_file(tmp_path):
    def watch(name):
        return hw.TrainerStudyCallback(STUDY, steps=STEPS, out=tmp_path / name)

    measured, trainer = train(tmp_path / "a", [watch("a.nc")])
    plain, _ = train(tmp_path / "b")
    assert all(torch.equal(one, plain.state_dict()[name]) for name, one in measured.state_dict().items())
    found = hw.open_result(tmp_path / "a.nc", load=True)
    assert found["step"].values.tolist() == STEPS
    last = STUDY.run(hw.load(measured))
    xr.testing.assert_equal(found["loss"].sel(step=6, drop=True), last["loss"])
    logged = [one for one in trainer.state.log_history if "headwise/loss" in one]
    assert [one["step"] for one in logged] == STEPS
    assert logged[-1]["headwise/loss"] == pytest.approx(float(last["loss"].mean()), rel=1e-6)
    train(tmp_path / "a", [watch("a.nc")], resume=str(tmp_path / "a" / "checkpoint-4"))
    again = hw.open_result(tmp_path / "a.nc", load=True)
    for name in ("loss", "induction", "step_weight_hash"):
        xr.testing.assert_equal(again[name], found[name])
