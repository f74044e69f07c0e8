"""Workers that Lightning Fabric starts, a process for each device: here two on the CPU."""

import os
from concurrent.futures import BrokenExecutor

import numpy as np
import pytest

import headwise as hw
from headwise.errors import DeclarationError

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Lightning are not ours
TASK = hw.RepeatedTokens(n=3, length=6)


def test_two_processes_give_what_one_gives(words_model):
    heads = hw.Grid(lambda layer, head: hw.ZeroAblate(hw.Head(layer, head)), layer=range(2), head=range(8))
    with hw.FabricExecutor(2, "cpu") as executor:
        assert len({executor.submit(os.getpid).result() for _ in range(20)} - {os.getpid()}) in (1, 2)
        found = hw.measure(words_model, TASK, heads, ["loss", "induction"], executor=executor)
        with pytest.raises(ZeroDivisionError):
            executor.submit(divmod, 1, 0).result()
        dead = executor.submit(os._exit, 3)
        with pytest.raises(BrokenExecutor, match="a process of Fabric has died"):
            dead.result(60)
        with pytest.raises(BrokenExecutor):
            executor.submit(os.getpid)
    alone = hw.measure(words_model, TASK, heads, ["loss", "induction"])
    for name in ("loss", "induction", "baseline_loss"):
        np.testing.assert_array_equal(found[name], alone[name])


def test_what_cannot_be_is_refused():
    with pytest.raises(DeclarationError, match="strategy='fsdp': an executor starts its processes from the one that"):
        hw.FabricExecutor(2, "cpu", "fsdp")
    with pytest.raises(DeclarationError, match="accelerator='abacus'"):
        hw.FabricExecutor(2, "abacus")
    executor = hw.FabricExecutor(2, "cpu")
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(os.getpid)
