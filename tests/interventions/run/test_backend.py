"""Backends: each handle has its own; calls say where jobs are written down; what a pass leaves out is filled in."""

import dataclasses

import numpy as np
import pytest
import torch

import headwise as hw
from headwise.interventions import Head, Patch
from headwise.interventions.begin import begin
from headwise.interventions.remote.ledger import InMemoryLedger
from headwise.interventions.run.backend import LocalBackend
from headwise.interventions.traced.passes import server_jobs
from headwise.metrics import loss
from headwise.studies import RepeatedTokens, measure
from headwise.studies.measuring import context


def test_each_handle_has_a_backend_of_its_own(small_model):
    other = dataclasses.replace(small_model, name="other")
    assert isinstance(other.backend, LocalBackend)
    assert other.backend.model is other
    assert small_model.backend.model is small_model


def test_positions_before_a_pass_are_those_of_the_base_run():
    base = {"loss": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "seen": torch.zeros(2, 1, 1)}
    made = {"loss": torch.tensor([[30.0], [60.0], [31.0], [61.0]]), "seen": torch.ones(4, 1, 1)}
    found = server_jobs.with_all_positions(made, base, 2)
    wanted = [[1, 2, 30], [4, 5, 60], [1, 2, 31], [4, 5, 61]]
    np.testing.assert_array_equal(found["loss"], np.array(wanted, dtype=np.float32))
    np.testing.assert_array_equal(found["seen"], made["seen"])


@pytest.mark.parametrize(("positions", "wanted"), [(True, [[1.0, 2.0]]), (False, [[1.5]])])
def test_what_a_server_sends_back(positions, wanted):
    values = {"loss": torch.tensor([[1.0, 2.0]], dtype=torch.float64), "seen": torch.ones(1, 2, 3)}
    found = server_jobs.reduced(values, positions)
    assert {value.dtype for value in found.values()} == {torch.float32}
    np.testing.assert_array_equal(found["loss"], wanted)
    np.testing.assert_array_equal(found["seen"], values["seen"])


def test_a_call_inside_a_call_writes_jobs_down_where_the_outer_one_does(small_model):
    memory, one, two = small_model._memory, InMemoryLedger(), InMemoryLedger()
    with begin(small_model, check=False, ledger=one) as outer:
        with begin(small_model, check=False, quiet=True) as inner:
            assert inner is outer
            assert (memory.ledger, memory.quiet) == (one, True)
        with pytest.raises(ZeroDivisionError), begin(small_model, check=False, ledger=two):  # noqa: PT012
            assert (memory.ledger, memory.quiet) == (two, False)
            raise ZeroDivisionError
        assert (memory.ledger, memory.quiet) == (one, False)
    assert (memory.call, memory.ledger, memory.quiet) == (None, None, False)


def test_how_a_study_is_carried_out_holds_for_what_is_measured_in_it():
    with context.using(quiet=True), context.using(executor="workers") as both:
        assert both == context.current() == context.Execution("workers", None, True)
    assert context.current() == context.Execution()


def test_passes_of_a_study_are_kept_beside_its_result(words_model, tmp_path):
    """Measured again beside the same unfinished result, no pass is run; the numbers are those of the first time."""
    from headwise.studies.storage import unfinished

    task, what = RepeatedTokens(n=3, length=6), {"one": Patch(Head(0, 1)), "two": Patch(Head(1, 0))}
    calls = []
    with unfinished.keeping(tmp_path / "study.nc", True) as kept, context.using(store=kept):
        first = measure(words_model, task, what, [loss])
        again = measure(words_model, task, what, [loss], progress=lambda *at: calls.append(at))
    assert calls == []
    np.testing.assert_array_equal(again["loss"], first["loss"])
    np.testing.assert_array_equal(first["loss"], measure(hw.load("words-2l"), task, what, [loss])["loss"])
