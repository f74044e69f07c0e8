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


class Scaled:
    """A kernel that is an object; its repr does not say what it holds."""

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x * self.by

    def plus(self, x):
        return x + self.by


class Shifted(Scaled):
    def __call__(self, x):
        return x + self.by


def test_what_an_object_holds_and_does_counts():
    assert code_hash(Scaled(2)) == code_hash(Scaled(2))
    assert len({code_hash(one) for one in (Scaled(2), Scaled(3), Shifted(2))}) == 3
    assert code_hash(Scaled(2).plus) == code_hash(Scaled(2).plus) != code_hash(Scaled(3).plus)
    assert code_hash(Scaled(2).plus) != code_hash(Scaled(2))
    assert code_hash(Scaled(torch.nn.Linear(2, 2))) != code_hash(Scaled(torch.nn.Linear(2, 2)))


def test_an_object_that_does_not_say_what_it_holds_is_like_no_other():
    one, other = object(), object()
    assert data_hash(one) != data_hash(other)
    assert data_hash(torch.cat) == data_hash(torch.cat) != data_hash(torch.stack)


def test_an_object_that_holds_itself_ends():
    one = Scaled(2)
    one.by = one
    assert code_hash(one) == code_hash(one)


def test_functions_that_call_each_other_end():
    scope = {}
    exec("def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)", scope)
    assert code_hash(scope["even"]) != code_hash(scope["odd"])


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_finds_the_same(seed):
    """Sets of text have another order in each process."""
    code = (
        "from headwise.interventions.digest import code_hash, data_hash; from headwise.interventions import served\n"
        "import torch\n"
        "print(code_hash(served.passes), data_hash(lambda x: x in {'aa', 'bb', 'cc', 'dd'}), data_hash(torch.cat))"
    )
    env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert made.split() == [
        code_hash(served.passes),
        data_hash(lambda x: x in {"aa", "bb", "cc", "dd"}),
        data_hash(torch.cat),
    ]
