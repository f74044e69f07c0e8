"""``headwise dynamics`` and ``headwise train``, as a user runs them."""

import builtins
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

import headwise as hw
from headwise.studies.cli.main import main, make_parser
from tests.support.commands import printed, rows

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Lightning are not ours
SMALL = ["--n", "5", "--length", "6", "--steps", "0,2000"]


def test_dynamics_measures_each_checkpoint_and_prints_what_it_found(tmp_path, capsys):
    out = tmp_path / "a.nc"
    said = printed(capsys, "dynamics", *SMALL, "--out", out)
    found = hw.open_result(out)
    assert found["step"].values.tolist() == [0, 2000]
    last = hw.Sweep(hw.RepeatedTokens(n=5, length=6), metrics=["induction", "previous_token", "loss"]).run(
        hw.load("words-2l", step=2000)
    )
    np.testing.assert_array_equal(found["induction"].sel(step=2000), last["induction"])
    means = [float(last[name].mean("example").max()) for name in ("induction", "previous_token", "loss")]
    assert rows(said.out)[1][:4] == ["2000", *(f"{mean:.3f}" for mean in means)]
    assert f"{out}  results" in said.out
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")


def test_dynamics_of_a_study_in_a_file_as_json(tmp_path, capsys):
    study = hw.Sweep(hw.RepeatedTokens(n=5, length=6), {"a": hw.ZeroAblate("L0H3")}, metrics=["loss"])
    (tmp_path / "study.json").write_text(study.to_json())
    given = ("--study", tmp_path / "study.json", "--steps", "2000", "--out", tmp_path / "a.nc", "--json")
    said = json.loads(printed(capsys, "dynamics", *given).out)
    wanted = float(study.run(hw.load("words-2l", step=2000))["loss"].mean())
    assert said["steps"] == [{"step": 2000, "loss/a": pytest.approx(wanted, rel=1e-12)}]
    assert hw.Sweep.from_json(hw.open_result(said["file"]).attrs["study"]) == study


def test_dynamics_says_what_a_checkpoint_costs_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = printed(capsys, "dynamics", *SMALL, "--plan").out
    assert said.startswith("2 checkpoints of words-2l, steps 0 to 2000; each:\n\nwords-2l: 0 conditions on 5 prompts")
    assert not [*tmp_path.iterdir()]


def test_dynamics_goes_on_where_it_was_unless_it_is_to_begin_anew(tmp_path, monkeypatch):
    from headwise.studies.dynamics import checkpoints

    asked = []

    def stopped(model, study, steps, *, out, resume):
        asked.append((steps, out, resume))
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "over_checkpoints", stopped)
    for more in ([], ["--fresh"]):
        assert main(["dynamics", *SMALL, "--out", str(tmp_path / "x.nc"), *more]) == 130
    assert asked == [([0, 2000], tmp_path / "x.nc", True), ([0, 2000], tmp_path / "x.nc", False)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dynamics", "--model", "no such"], "headwise: no model is called 'no such'"),
        (["dynamics", "--steps", "7"], "headwise: there is no checkpoint of step 7: there are 0, 8"),
        (["dynamics", "--steps", "few"], "headwise: --steps few: give all, or whole numbers with commas"),
        (["dynamics", "--metrics", "nope"], "headwise: there is no metric 'nope': possible are accuracy"),
        (["dynamics", "--study", "nowhere.json"], "headwise: cannot read nowhere.json: No such file or directory"),
        (["dynamics", "--study", "list.json"], "headwise: --study list.json: this JSON holds no Sweep"),
        (["dynamics", "--out", "x.html"], "headwise: --out x.html: end it in .nc"),
        (["dynamics", "--out", "/proc/none/x.nc"], "headwise: cannot write /proc/none/x.nc"),
        (["dynamics", "--length", "999"], "headwise: "),
        (["train", "--config", "nowhere.yaml"], "headwise: there is no file nowhere.yaml"),
        (["train", "--config", "run.yaml", "max_steps"], "headwise: max_steps: write a name and its value"),
        (["train", "--config", "run.yaml", "trainer.max_stepz=3"], "headwise: run.yaml: unrecognized arguments"),
        (
            ["train", "--config", "run.yaml", "model.init_args.learning_rate=-1"],
            "headwise: run.yaml: learning_rate=-1.0: give a number above 0",
        ),
        (
            ["train", "--config", "run.yaml", "data.class_path=headwise.Nope"],
            "headwise: run.yaml: Problem with given class_path 'headwise.Nope'",
        ),
        (["train", "--config", "list.json"], "headwise: list.json: "),
    ],
)
def test_errors_are_one_line_and_status_1(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "run.yaml").write_text(configuration(3))
    said = printed(capsys, *arguments, status=1)
    assert said.err.splitlines()[-1].startswith(message)
    assert said.out == ""


def configuration(steps, **more):
    """The file that the help shows, smaller and quiet."""
    commands = next(action for action in make_parser()._actions if getattr(action, "choices", None))
    text = commands.choices["train"].epilog.split("the file, as LightningCLI reads it:\n")[1]
    config = yaml.safe_load(text)
    config["trainer"] |= {"max_steps": steps, "accelerator": "cpu"} | more
    config["trainer"] |= dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    config["trainer"]["callbacks"][0]["init_args"] |= {"every_n_train_steps": 2}
    return yaml.safe_dump(config)


def test_train_runs_the_file_that_its_help_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(configuration(99))
    said = printed(capsys, "train", "--config", "run.yaml", "trainer.max_steps=4")
    assert re.fullmatch(r"results/formation\.nc  results \(0\.\d MB\)\n", said.out)
    assert hw.open_result("results/formation.nc")["step"].values.tolist() == [2, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "results"}


def test_train_prints_the_whole_configuration_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(configuration(3))
    config = yaml.safe_load(printed(capsys, "train", "--config", "run.yaml", "--print_config").out)
    assert (config["trainer"]["max_steps"], config["model"]["init_args"]["learning_rate"]) == (3, 1e-3)
    assert not (tmp_path / "results").exists()


def test_train_says_what_it_needs_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(configuration(3))
    importing = builtins.__import__

    def without(name, *given, **named):
        if name == "jsonargparse":
            raise ImportError(name)
        return importing(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    said = printed(capsys, "train", "--config", "run.yaml", status=1)
    assert said.err == "headwise: train needs jsonargparse: pip install 'headwise[train]'\n"


def test_train_is_stopped_as_other_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(configuration(3))

    def stopped(self, *given):
        raise KeyboardInterrupt

    monkeypatch.setattr(hw.CausalLM, "training_step", stopped)
    said = printed(capsys, "train", "--config", "run.yaml", status=130)
    assert said.err.splitlines()[-1].startswith("headwise: stopped")


WITHOUT = """
import sys
from importlib.machinery import PathFinder
MISSING = {"jsonargparse", "accelerate", "tensorboard", "tensorboardX", "panel", "peft", "distributed"}

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in MISSING else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import headwise as hw
names = ["StudyCallback", "TrainerStudyCallback", "CausalLM", "FabricExecutor", "RepeatedTokensData"]
print(*(getattr(hw, name).__name__ for name in names))
"""


@pytest.mark.heavy
def test_without_extras_the_names_are_there():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    wanted = "StudyCallback TrainerStudyCallback CausalLM FabricExecutor RepeatedTokensData"
    assert done.stdout.strip() == wanted


def test_dynamics_of_the_formation_study_trains_and_then_takes_what_is_there(tmp_path, capsys):
    tiny = {"heads": 2, "width": 8, "vocabulary": 16, "context": 16, "lead": 2, "batch": 2, "n": 2, "length": 4}
    tiny |= {"period": (3, 6)}
    study = hw.FormationStudy(**tiny, steps=4, measured=6, seeds=1, trainings=("main",))
    (tmp_path / "tiny.json").write_text(study.to_json())
    given = ["dynamics", "--study", tmp_path / "tiny.json", "--out", tmp_path / "a.nc"]
    assert printed(capsys, *given, "--plan").out == "1 trainings from 1 seeds, 4 steps each, measured at 5 of them\n"
    said = printed(capsys, *given).out
    tree = hw.open_result(tmp_path / "a.nc")
    last = float(tree["changes"]["last"].sel(training="main", curve="induction", seed=0))
    assert f"the best head ends at a score of {last:.2f}." in " ".join(said.split())
    page = (tmp_path / "a.html").read_text()
    assert "<h1>How induction forms in a GPT-2 of 2 layers</h1>" in page
    assert "No curve of the training “main” has a change point." in page
    again = json.loads(printed(capsys, *given, "--json").out)
    assert again["findings"][0] in " ".join(said.split())
    assert hw.open_result(tmp_path / "a.nc").attrs["created"] == tree.attrs["created"]
