"""Hashes that decide what stored work is taken up again: the same in every process, another where anything differs."""

import operator
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.interventions import Head, ZeroAblate
from headwise.interventions.base.hashing import code_hash, data_hash
from headwise.interventions.traced.passes import server_jobs
from headwise.metrics import Metric, loss
from headwise.studies import RepeatedTokens, measure
from tests.oracles import raw_hooks

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


@pytest.mark.parametrize("seed", ["1", pytest.param("2", marks=pytest.mark.heavy)])
def test_another_process_finds_the_same(seed):
    """Sets of text have another order in each process."""
    code = (
        "from headwise.interventions.base.hashing import code_hash, data_hash\n"
        "from headwise.interventions.traced.passes import server_jobs as served\n"
        "import torch\n"
        "from tests.interventions.base import test_digest\n"
        "print(code_hash(served.passes), data_hash(lambda x: x in {'aa', 'bb', 'cc', 'dd'}), data_hash(torch.cat), "
        "test_digest.reading())"
    )
    env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert made.split() == [
        code_hash(server_jobs.passes),
        data_hash(lambda x: x in {"aa", "bb", "cc", "dd"}),
        data_hash(torch.cat),
        reading(),
    ]


READS = """
import dataclasses, enum, functools, types
import numpy as np
import mine
from mine import Base, Kind, Settings, cached, noise, table

class Own(Base):
    by = {by}
    @staticmethod
    def still(x): return x + {static}
    @classmethod
    def made(cls, x): return x + {clsmethod}
    @property
    def shown(self): return {shown}
    def __call__(self, x): return self.made(x) + self.still(x) + self.shown + self.by + self.inherited(x)

def kernel(x):
    from mine import later
    def inner(y): return y + {inner}
    if x > 3: return Own()(x)
    if x > 2: return inner(x) + mine.LIMIT + mine.other(x) + later + mine.sub.DEEP + kernel.extra
    if x > 1: return Settings(x).scale + Kind.ONE.value + cached(x) + table.get(x)
    return noise.normal() + getattr(mine, "NAMED")

kernel.extra = {extra}
"""
MINE = """
import dataclasses, enum, functools, types
import numpy as np
LIMIT = {limit}
NAMED = {named}
later = {later}
def other(x): return x
class Base:
    @staticmethod
    def inherited(x): return x + {inherited}
@dataclasses.dataclass
class Settings:
    x: float
    scale: float = {default}
    listed: list = dataclasses.field(default_factory=lambda: [{factory}])
class Kind(enum.Enum):
    ONE = {enum}
@functools.lru_cache
def cached(x): return x + {cached}
noise = np.random.default_rng({generator})
table = types.MappingProxyType({{1: {table}}})
sub = types.ModuleType("mine.sub")
sub.DEEP = {deep}
"""
PLACES = (
    *("by", "static", "clsmethod", "shown", "inner", "extra", "limit", "named", "later", "inherited", "default"),
    *("factory", "enum", "cached", "generator", "table", "deep"),
)


def reading(**change):
    """A kernel that reads a number from many places; `change` says which of them differs."""
    numbers = dict.fromkeys(PLACES, 1) | change
    mine = ModuleType("mine")
    sys.modules["mine"] = mine
    try:
        exec(MINE.format(**numbers), mine.__dict__)
        scope = {"__name__": "kernels"}
        exec(READS.format(**numbers), scope)
        return code_hash(scope["kernel"])
    finally:
        del sys.modules["mine"]


@pytest.mark.parametrize("place", PLACES)
def test_whatever_a_kernel_may_read_counts(place):
    assert reading(**{place: 2}) != reading() == reading()


class Steady:
    scale = 1.0

    def __call__(self, x):
        return x * self.scale


def test_a_class_attribute_that_changes_makes_another_kernel(monkeypatch):
    kernel = Steady()
    before = code_hash(kernel), code_hash(kernel.__call__), code_hash(lambda x: Steady.scale * x)
    monkeypatch.setattr(Steady, "scale", 2.0)
    after = code_hash(kernel), code_hash(kernel.__call__), code_hash(lambda x: Steady.scale * x)
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_a_file_of_another_kernel_is_not_taken_up(monkeypatch, tmp_path):
    """Not from the finished file, and not from its parts."""

    class Scaled:
        by = 1.0

        def __call__(self, logits, targets):
            return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * self.by

    metric = Metric(replace(loss.card, name="scaled"), "logits", Scaled(), loss.prepare)
    model, task = hw.load(raw_hooks.random_gpt2(1, 2, 4, 30, 20)), RepeatedTokens(n=2, length=4)
    out = tmp_path / "scaled.nc"
    one = measure(model, task, ZeroAblate(Head(0, 0)), metric, out=out)["scaled"]
    again = measure(model, task, ZeroAblate(Head(0, 0)), metric, out=out)
    np.testing.assert_array_equal(again["scaled"], one)
    monkeypatch.setattr(Scaled, "by", 3.0)
    other = measure(model, task, ZeroAblate(Head(0, 0)), metric, out=out)["scaled"]
    np.testing.assert_allclose(other, 3 * one, rtol=1e-6)


def test_what_hangs_on_an_object_counts():
    """Also what its attributes alone do not say: a list's items, a module's own settings, a generator's state."""

    class Listed(list):
        pass

    class Slotted:
        __slots__ = ("by",)

        def __init__(self, by):
            self.by = by

    drawn = np.random.default_rng(1)
    drawn.normal()
    pairs = [
        (Listed([1]), Listed([2])),
        (Slotted(1), Slotted(2)),
        (np.random.default_rng(1), drawn),
        (torch.nn.LayerNorm(2, eps=1e-5), torch.nn.LayerNorm(2, eps=1e-3)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[1, 0])),
        (np.array([1, "a"], dtype=object), np.array([1, "b"], dtype=object)),
        ({1: 2}.get, {1: 3}.get),
        (torch.func.vmap(partial(max, 1)), torch.func.vmap(partial(max, 2))),
        (np.float32(1), np.float32(2)),
        (slice(1, 2), slice(1, 3)),
        (np.array(1.0), np.array([1.0])),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (np.vectorize(lambda x: x + 1), np.vectorize(lambda x: x + 2)),
        (np.random.RandomState(1), np.random.RandomState(2)),
        (SimpleNamespace(by=1), SimpleNamespace(by=2)),
        (torch.float32, torch.float64),
        (np.exp, np.log),
        (torch.nn.functional.gelu, torch.nn.functional.relu),
        (operator.itemgetter(1), operator.itemgetter(2)),
    ]
    for one, other in pairs:
        assert data_hash(one) == data_hash(one) != data_hash(other), one
    assert data_hash(Listed([1])) == data_hash(Listed([1])) != data_hash([1])


def test_what_nobody_can_see_into_is_like_no_other():
    def counting():
        yield 1

    lock = __import__("threading").Lock()
    for one in (
        lock,
        counting(),
        object(),
        lambda x: x * float(open("factor.txt").read()),  # noqa: SIM115
        lambda x: eval("x"),
        lambda x: x * int(__import__("os").environ["FACTOR"]),
        lambda x: lock.acquire(),
    ):
        assert data_hash(one) != data_hash(one), one


def test_containers_that_hold_themselves_end():
    one = [1]
    one.append(one)
    other = [2]
    other.append(other)
    assert data_hash(one) == data_hash(one) != data_hash(other)


def test_what_is_nested_too_deep_is_like_no_other():
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert data_hash(deep) != data_hash(deep)


def test_hashes_of_plain_data_stay_what_they_were():
    """The weights of a model on a server are known by one."""
    assert data_hash([["a.weight", [2, 3], "torch.float32", 12345]]) == "35df21083e9c801e"
