"""What a worker sends back is taken only where it was asked for."""

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

import headwise as hw
from headwise.errors import ModelError
from headwise.studies import RepeatedTokens
from headwise.studies.measuring import executors
from tests.support import mortal
from tests.support.workers import Here, sweep


class Liar(Here):
    """Runs each piece, and gives something else for those of some numbers."""

    def __init__(self, lie, at=(2,)):
        super().__init__()
        self.lie, self.at, self.first = lie, at, None

    def submit(self, function, item):
        future = super().submit(function, item)
        pieces = future.result()
        self.first = self.first or pieces
        if len(self.items) not in self.at:
            return future
        lied = Future()
        lied.set_result(self.lie(pieces, self.first))
        return lied


def with_values(change):
    """A lie: the values of all conditions changed."""

    def lie(pieces, first):
        last = pieces[-1]
        return [*pieces[:-1], replace(last, values={name: change(value) for name, value in last.values.items()})]

    return lie


LIES = {
    "another item's": (lambda pieces, first: first, "the answer to another question"),
    "no list": (lambda pieces, first: tuple(pieces), "a tuple, which is no list"),
    "a piece alone": (lambda pieces, first: pieces[-1], "a FinishedValues, which is no list"),
    "None": (lambda pieces, first: None, "a NoneType, which is no list"),
    "nothing": (lambda pieces, first: [], "0 pieces, which are not the 3"),
    "None within": (lambda pieces, first: [*pieces[:-1], None], "a NoneType, which is no piece"),
    "fewer": (lambda pieces, first: pieces[1:], "2 pieces, which are not the 3"),
    "one twice": (lambda pieces, first: [*pieces, pieces[-1]], "4 pieces, which are not the 3"),
    "another order": (lambda pieces, first: pieces[::-1], "3 pieces, which are not the 3"),
    "one condition": (
        lambda pieces, first: [
            *pieces[:-1],
            replace(
                pieces[-1],
                conditions=pieces[-1].conditions[:1],
                values={name: value[:1] for name, value in pieces[-1].values.items()},
            ),
        ],
        "3 pieces, which are not the 3",
    ),
    "rows of one condition": (with_values(lambda value: value[:1]), "logit_diff as float32 .1, 4, 5., where float32 "),
    "one example": (with_values(lambda value: value[:, :1]), "logit_diff as float32 "),
    "a mean": (with_values(lambda value: value.mean(-1, keepdims=True)), "logit_diff as float32 "),
    "transposed": (with_values(lambda value: value.transpose(2, 1, 0)), "logit_diff as float32 .5, 4, "),
    "float64": (with_values(lambda value: value.astype("float64")), "logit_diff as float64 "),
    "half": (
        with_values(lambda value: value.astype("float16")),
        "logit_diff as float16, where an array of float32 or ",
    ),
    "objects": (with_values(lambda value: value.astype(object)), "logit_diff as object, where an array"),
    "texts": (with_values(lambda value: value.astype(str)), "logit_diff as <U32, where an array"),
    "lists": (with_values(lambda value: value.tolist()), "logit_diff as list, where an array"),
    "masked": (with_values(lambda value: np.ma.masked_array(value)), "logit_diff as MaskedArray, where an array"),
    "other names": (
        lambda pieces, first: [replace(one, values={"loss": one.values["loss"]}) for one in pieces],
        "values of 'loss' in place of logit_diff, loss",
    ),
    "more names": (
        lambda pieces, first: [replace(one, values={**one.values, "kl": one.values["loss"]}) for one in pieces],
        "in place of logit_diff, loss",
    ),
    "no names": (lambda pieces, first: [replace(one, values={}) for one in pieces], "values of nothing in place of"),
    "no values": (
        lambda pieces, first: [replace(one, values=None) for one in pieces],
        "a FinishedValues, which is no piece",
    ),
    "another group": (lambda pieces, first: [replace(one, group=1) for one in pieces], "group 1 of 1"),
    "a negative group": (lambda pieces, first: [replace(one, group=-1) for one in pieces], "group -1 of 1"),
    "other examples": (lambda pieces, first: [replace(one, examples=(1, 5)) for one in pieces], "examples .1, 5. of 4"),
    "no examples": (lambda pieces, first: [replace(one, examples=(2, 2)) for one in pieces], "examples .2, 2. of 4"),
    "another run": (lambda pieces, first: [replace(pieces[0], run="dirty"), *pieces[1:]], "run 'dirty' with"),
    "no such condition": (
        lambda pieces, first: [*pieces[:-1], replace(pieces[-1], conditions=(99,))],
        r"conditions \(99,\) of 24",
    ),
    "numbers from the end": (
        lambda pieces, first: [*pieces[:-1], replace(pieces[-1], conditions=(-1,))],
        r"conditions \(-1,\) of 24",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_what_a_worker_was_not_asked_for_is_not_taken(folder, tmp_path, name):
    lie, told = LIES[name]
    model, out = hw.load(folder), tmp_path / "sweep.nc"
    wanted = sweep(model, None)
    liar, rest = Liar(lie), Here()
    with pytest.raises(ModelError, match=f"^a worker gave what it was not asked for: .*{told}") as caught:
        sweep(model, liar, out=out)
    assert "\n" not in str(caught.value)
    xr.testing.assert_equal(sweep(model, rest, out=out), wanted)
    assert [mortal.passes_of(one) for one in rest.items] == [mortal.passes_of(liar.items[1])], "the others are kept"


def test_what_answered_another_call_is_not_taken(folder):
    """Though it has the same groups, examples and conditions."""
    model, other = hw.load(folder), Here()
    sweep(model, other, task=RepeatedTokens(n=4, length=6, seed=5))
    before = executors.run_item(other.items[1])
    with pytest.raises(ModelError, match="gave what it was not asked for: the answer to another question"):
        sweep(model, Liar(lambda pieces, first: before))


def test_a_first_worker_that_lies_does_not_make_the_others_liars(folder):
    with pytest.raises(ModelError, match="gave what it was not asked for: logit_diff as float64"):
        sweep(hw.load(folder), Liar(with_values(lambda value: value.astype("float64")), at=(1,)))
    with pytest.raises(ModelError, match="gave what it was not asked for: logit_diff as float32"):
        sweep(hw.load(folder), Liar(with_values(lambda value: value[..., :1]), at=(1,)))


def test_values_that_are_no_numbers_may_come_back(folder):
    nothing = Liar(with_values(lambda value: np.full_like(value, np.nan)))
    found = sweep(hw.load(folder), nothing)
    passes = nothing.items[1].chunks[0].passes
    lost = found["loss"].isnull().all(["example", "position"])
    assert int(lost.sum()) == sum(len(one.conditions) for one in passes) == 4
