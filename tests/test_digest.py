"""Hashes that decide what stored work is taken up again: the same in every process, another where anything differs."""

import subprocess
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch

from headwise.interventions import served
from headwise.interventions.digest import code_hash, data_hash

KERNEL = """
import mine
LIMIT = {limit}
def helper(x): return x + {helper}
def kernel(x, low={low}):
    inner = lambda y: helper(y) * 1 - 2
    return inner(x) if x in {{'aa', 'bb', 'cc'}} or x > LIMIT else mine.other(x) + low
"""


def kernel(limit=0.5, helper=1, low=3, other=4):
    mine = ModuleType("mine")
    exec(f"def other(x): return x + {other}", mine.__dict__)
    mine.other.__module__ = "mine"
    sys.modules["mine"] = mine
    try:
        scope = {"__name__": "kernels"}
        exec(KERNEL.format(limit=limit, helper=helper, low=low), scope)
    finally:
        del sys.modules["mine"]
    return scope["kernel"]


def test_a_function_made_again_has_the_same_hash():
    assert code_hash(kernel()) == code_hash(kernel())


@pytest.mark.parametrize("change", [{"limit": 0.25}, {"helper": 2}, {"low": 1}, {"other": 5}], ids=str)
def test_whatever_a_function_depends_on_counts(change):
    """Also a number that is a constant elsewhere in it; a global; a function of a module."""
    assert code_hash(kernel(**change)) != code_hash(kernel())


def test_all_of_large_arguments_counts():
    def scaled(x, by):
        return x * by

    one = torch.zeros(5000)
    other = one.clone()
    other[2500] = 7.0
    assert code_hash(partial(scaled, by=one)) != code_hash(partial(scaled, by=other))
    assert data_hash({"a": [np.zeros(3)]}) != data_hash({"a": [np.zeros(4)]})
    assert data_hash({1, 2}) == data_hash({2, 1}) != data_hash({2, 3})


def test_functions_that_call_each_other_end():
    scope = {}
    exec("def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)", scope)
    assert code_hash(scope["even"]) != code_hash(scope["odd"])


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_finds_the_same(seed):
    """Sets of text have another order in each process."""
    code = (
        "from headwise.interventions.digest import code_hash, data_hash; from headwise.interventions import served\n"
        "print(code_hash(served.passes), data_hash(lambda x: x in {'aa', 'bb', 'cc', 'dd'}))"
    )
    env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert made.split() == [code_hash(served.passes), data_hash(lambda x: x in {"aa", "bb", "cc", "dd"})]
