"""A training that is killed and resumed: one file, each step once, equal to the undisturbed one to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr

import headwise as hw

PROGRAM = Path(__file__).parents[2] / "support" / "killed_training.py"
STEPS = [0, 1, 2, 3, 5, 6, 8, 9, 11, 12]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started as on POSIX")


def same(one, other):
    """Equal to the last bit but for dates and durations."""
    parts = [each.subtree if isinstance(each, xr.DataTree) else [each] for each in (one, other)]
    for left, right in zip(*map(list, parts), strict=True):
        assert {*left.data_vars} == {*right.data_vars}
        for name in {*left.data_vars} - {"step_seconds", "step_created"}:
            xr.testing.assert_identical(left[name].drop_attrs(), right[name].drop_attrs())


@pytest.mark.heavy
@pytest.mark.parametrize(
    "where",
    [
        "the file is ahead of the checkpoint",
        "10",
        "the checkpoint is ahead of the file",
        "a step is half written",
        "the file is whole, the checkpoint is not",
        "the file is written, its parts are there",
    ],
)
def test_killed_and_resumed_it_ends_with_the_same_file_and_weights(tmp_path, where):
    run = subprocess.run(
        [sys.executable, PROGRAM, tmp_path, where],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["status"] == [0, 0], run.stderr[-2000:]
    assert seen["killed"] == (int(where) if where.isdigit() else 1)
    assert seen["names"] == sorted([*(f"{name}.nc" for name in seen["ends"]), "whole.nc"])
    whole = hw.open_result(tmp_path / "whole.nc", load=True)
    weights = torch.load(tmp_path / "whole.pt", weights_only=True)
    for name in seen["ends"]:
        found = hw.open_result(tmp_path / f"{name}.nc", load=True)
        assert found["step"].values.tolist() == STEPS
        same(found, whole)
        trained = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert all(torch.equal(trained[key], weights[key]) for key in weights)
