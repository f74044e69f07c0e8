"""A study inside a training run of two processes: the weights are those without it, and rank 0 writes the file."""

import os
import subprocess
import sys

import pytest
import torch

import headwise as hw

CHILD = """
import sys
import lightning as L
import torch
import headwise as hw

if __name__ == "__main__":
    folder, watched, strategy, accelerator = sys.argv[1:]
    L.seed_everything(0, verbose=False)
    study = hw.Sweep(hw.RepeatedTokens(n=3, length=6), metrics=["induction", "loss"])
    callbacks = [hw.StudyCallback(study, steps=[0, 2, 6], out=f"{folder}/a.nc")] if watched == "with" else []
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    where = {"devices": 2, "accelerator": accelerator, "strategy": strategy}
    trainer = L.Trainer(max_steps=6, callbacks=callbacks, **where, **quiet)
    sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    module = hw.CausalLM({"model_type": "gpt2", **sizes}, learning_rate=0.01)  # with dropout
    trainer.fit(module, hw.RepeatedTokensData(length=8, batch_size=2, size=40))
    state = trainer.strategy.lightning_module_state_dict()  # all processes take part
    if trainer.is_global_zero:
        torch.save(state, f"{folder}/{watched}.pt")
"""


GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.heavy
@pytest.mark.skipif(os.name != "posix", reason="processes are started as on POSIX")
@pytest.mark.parametrize(
    ("strategy", "accelerator"),
    [("ddp", "cpu"), pytest.param("ddp", "gpu", marks=GPUS), pytest.param("fsdp", "gpu", marks=GPUS)],
)
def test_two_processes_train_as_without(tmp_path, strategy, accelerator):
    program = tmp_path / "child.py"
    program.write_text(CHILD)
    for watched in ("with", "without"):
        done = subprocess.run(
            [sys.executable, program, tmp_path, watched, strategy, accelerator],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("with", "without"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert hw.open_result(tmp_path / "a.nc")["step"].values.tolist() == [0, 2, 6]
