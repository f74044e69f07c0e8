"""A training that is measured, killed, and started again as its user would: the same script, from its last checkpoint.

Run as ``python killed_training.py FOLDER WHERE``; prints what was seen as JSON. WHERE is a number of kills at random
moments, or the name of a moment (see `MOMENTS`). A process of its own, since it forks before torch has done any work.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import xarray as xr
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import headwise as hw
from headwise.studies.dynamics.series import Series
from headwise.studies.storage.unfinished import UnfinishedResult

STUDY = hw.Sweep(hw.RepeatedTokens(n=3, length=6), {"a": hw.ZeroAblate("L0H0")}, metrics=["induction", "loss"])


class Twofold(hw.Sweep):
    """A study of two parts, so that a step is more than one file."""

    def run(self, *given, **named):
        """The same twice."""
        found = super().run(*given, **named)
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=found.attrs), "one": found, "other": found})


TREE = Twofold(STUDY.task, STUDY.what, STUDY.metrics)
STEPS = [0, 1, 2, 3, 5, 6, 8, 9, 11, 12]
LAST = 12


class Saved(Callback):
    """Saves a checkpoint before the study runs, where the other one saves after it."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, *given):
        if trainer.global_step == 6 and not self.path.exists():
            trainer.save_checkpoint(self.path)


def train(folder, name, study=STUDY, ahead=False):
    """The script of a user; `ahead` has a checkpoint of step 6 that is older than its measurement."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kept = folder / f"{name}-checkpoints"
    watch = hw.StudyCallback(study, steps=STEPS, out=folder / f"{name}.nc")
    save = ModelCheckpoint(kept, every_n_train_steps=100 if ahead else 4, save_last=True)
    early = [Saved(kept / "last.ckpt")] if ahead else []
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_steps=LAST, callbacks=[*early, watch, save], accelerator="cpu", **quiet)
    L.seed_everything(0, verbose=False)
    module = hw.CausalLM.tiny(2, 2, 16, vocabulary=40, context=32, learning_rate=0.01)
    trainer.fit(module, hw.RepeatedTokensData(length=8, batch_size=2, size=20), ckpt_path="last")
    torch.save(module.state_dict(), folder / f"{name}.pt")


def die():
    """As from outside: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def after(kind, method, count, before=False):
    """Be killed at a call of a method: the `count`-th one, once it is done, or before it begins."""
    original, calls = getattr(kind, method), []

    def called(self, *given, **named):
        calls.append(1)
        if before and len(calls) == count:
            die()
        result = original(self, *given, **named)
        if len(calls) == count:
            die()
        return result

    setattr(kind, method, called)


MOMENTS = {
    "the file is ahead of the checkpoint": lambda: after(Series, "add", 7),
    "the checkpoint is ahead of the file": lambda: after(Series, "add", 6, before=True),
    "a step is half written": lambda: after(UnfinishedResult, "save", 6),
    "the file is whole, the checkpoint is not": lambda: after(Series, "finish", 1),
    "the file is written, its parts are there": lambda: after(UnfinishedResult, "clear", 1, before=True),
}


def child(folder, name, moment=None, **options):
    """A process that trains; its number."""
    number = os.fork()
    if number == 0:
        status = 1
        try:
            if moment is not None:
                MOMENTS[moment]()
            train(folder, name, **options)
            status = 0
        finally:
            os._exit(status)
    return number


def main(folder, where):
    options = {"study": TREE if "half" in where or "whole" in where else STUDY, "ahead": "checkpoint is ahead" in where}
    started = time.monotonic()
    _, status = os.waitpid(child(folder, "whole", **options), 0)
    seconds = time.monotonic() - started
    killed, finished, name, moments = 0, 0, "killed-0", random.Random(0)
    if where in MOMENTS:
        _, ended = os.waitpid(child(folder, name, where, **options), 0)
        killed += os.WIFSIGNALED(ended)
    while where not in MOMENTS and killed < int(where):
        number = child(folder, name, **options)
        time.sleep(moments.uniform(0.2, 0.95) * seconds)
        os.kill(number, signal.SIGKILL)
        _, ended = os.waitpid(number, 0)
        killed += os.WIFSIGNALED(ended)
        if (folder / f"{name}.pt").is_file():  # it came to its end before: begin another training
            finished += 1
            name = f"killed-{finished}"
    _, last = os.waitpid(child(folder, name, **options), 0)
    names = sorted(path.name for path in folder.glob("*.nc*"))
    ends = [f"killed-{number}" for number in range(finished + 1)]
    print(json.dumps({"status": [status, last], "ends": ends, "killed": killed, "names": names}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
