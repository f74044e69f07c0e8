"""Workers on several devices of this machine: an executor whose processes Lightning Fabric starts."""

from __future__ import annotations

import itertools
import os
import pickle
import queue
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from threading import Lock, Thread
from typing import Any

from ...errors import DeclarationError, choices

STRATEGIES = ("ddp_spawn", "ddp_fork")
"""Ways of Fabric to start processes from one that runs already."""
LOOK = 5.0
"""Seconds after which a process that waits looks whether the one that started it is still there."""


class FabricExecutor(Executor):
    """A process for each device, started by Lightning Fabric, for ``executor=`` of `measure` and studies.

    Each process has a device of its own and opens the model there, from where it was loaded; passes are shared out one
    by one as processes are free, so that devices of different speed are all kept at work. What comes back is kept by
    the process that called. In a script it is made below ``if __name__ == "__main__":``.

    Parameters
    ----------
    devices : int, list of int or str
        As in Fabric: how many, which ones, or ``"auto"`` for all.
    accelerator : str
        ``"auto"``, ``"cuda"``, ``"cpu"`` (``devices`` processes on it).
    strategy : {"ddp_spawn", "ddp_fork"}

    Raises
    ------
    DeclarationError
        There is no such device, or Fabric cannot start processes in this way.

    Examples
    --------
    >>> executor = hw.FabricExecutor(devices=2, accelerator="cpu")
    >>> executor.processes
    2
    >>> executor.shutdown()
    """

    def __init__(
        self, devices: int | list[int] | str = "auto", accelerator: str = "auto", strategy: str = "ddp_spawn"
    ) -> None:
        if strategy not in STRATEGIES:
            raise DeclarationError(
                f"strategy={strategy!r}: an executor starts its processes from the one that runs, possible are "
                f"{choices(STRATEGIES)}"
            )
        from lightning.fabric import Fabric

        try:
            self._fabric = Fabric(accelerator=accelerator, devices=devices, strategy=strategy)
        except Exception as error:  # of many kinds, where there is no such device
            raise DeclarationError(f"devices={devices!r}, accelerator={accelerator!r}: {error}") from error
        self.processes = int(self._fabric.world_size)
        """How many there are."""
        self._numbers, self._lock = itertools.count(), Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._thread: Thread | None = None
        self._broken = self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a function called by a process that is free.

        Raises
        ------
        BrokenExecutor
            A process has died.
        RuntimeError
            After `shutdown`.
        """
        program = pickle.dumps((fn, args, kwargs))
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot submit after shutdown")
            if self._broken:
                raise BrokenExecutor("a process of Fabric has died: make a new executor")
            if self._thread is None:
                self._start()
            number = next(self._numbers)
            self._waiting[number] = future
        self._tasks.put((number, program))
        return future

    def _start(self) -> None:
        from torch.multiprocessing import get_context

        context = get_context("fork" if self._fabric.strategy.launcher._start_method == "fork" else "spawn")
        self._tasks, self._results = context.Queue(), context.Queue()
        self._thread = Thread(target=self._run, name="headwise fabric", daemon=True)
        self._reader = Thread(target=self._read, name="headwise fabric results", daemon=True)
        self._thread.start()
        self._reader.start()

    def _run(self) -> None:
        """Run the processes until they are done, or one dies."""
        error = "it ended"
        try:
            self._fabric.launch(_work, self._tasks, self._results)
        except Exception as caught:
            error = str(caught)
        self._results.put((-1, False, error))

    def _read(self) -> None:
        """Hand over what comes back."""
        while True:
            number, right, payload = self._results.get()
            if number == -1:
                break
            with self._lock:
                future = self._waiting.pop(number, None)
            if future is not None and future.set_running_or_notify_cancel():
                value = pickle.loads(payload)
                future.set_result(value) if right else future.set_exception(value)
        with self._lock:
            self._broken, left = True, [*self._waiting.values()]
            self._waiting.clear()
        for future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(BrokenExecutor(f"a process of Fabric has died: {payload}"))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes once they have done what was submitted."""
        with self._lock:
            self._closed, thread = True, self._thread
        if cancel_futures:
            for future in [*self._waiting.values()]:
                future.cancel()
        if thread is None:
            return
        for _ in range(self.processes):
            self._tasks.put(None)
        if wait:
            thread.join()
            self._reader.join()


def _work(fabric: Any, tasks: Any, results: Any) -> None:
    """What each process does, on its own device, until it is told to end."""
    import torch

    if fabric.device.type == "cuda":
        torch.cuda.set_device(fabric.device)
    parent = os.getppid()
    while True:
        try:
            given = tasks.get(timeout=LOOK)
        except queue.Empty:
            if os.getppid() != parent:  # who started it has gone
                return
            continue
        if given is None:
            return
        number, program = given
        try:
            fn, args, kwargs = pickle.loads(program)
            answer = (number, True, pickle.dumps(fn(*args, **kwargs)))
        except BaseException as error:
            answer = (number, False, _pickled(error))
        results.put(answer)


def _pickled(error: BaseException) -> bytes:
    try:
        return pickle.dumps(error)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
