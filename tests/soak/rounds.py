"""What `run.py` does at random: a function for each kind of round, which gets what it has (`Soak`) and a seed."""

import asyncio
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from random import Random

import headwise as hw
from headwise.studies import Results, summary
from tests.soak import child as child

FAULTS = [
    *[(at, how) for at in ("request", "response") for how in ("drop", "500", "503", "delay")],
    *[(at, how) for at in ("received", "result") for how in ("drop", "503")],
    *[("execute", how) for how in ("delay", "lose", "cut", "error")],
    ("response", "page"),
    ("request", "429"),
    ("deliver", "empty"),
]


def together(works, rng):
    """Do this in a thread each, all from seeds of their own."""
    begun = [threading.Thread(target=work, args=(Random(rng.random()),)) for work in works]
    for one in begun:
        one.start()
    for one in begun:
        one.join()


def threads(soak, rng):
    """Threads that measure on one model, and others that read results meanwhile."""

    def asking(rng):
        for _ in range(rng.randint(2, 6)):
            name, model = rng.choice(soak.names), rng.choice(soak.handles)
            with soak.judged(f"{name} in a thread"):
                for one in asyncio.run(away(name, model)) if rng.random() < 0.3 else [child.ask(name, model)]:
                    soak.same(name, one, "in a thread")
            soak.done["calls"] += 1

    async def away(name, model):
        return await asyncio.gather(*[asyncio.to_thread(child.ask, name, model) for _ in range(2)])

    def reading(rng):
        for _ in range(rng.randint(4, 12)):
            how, name = rng.choice(list(child.READ)), rng.choice(soak.kept)
            with soak.judged(f"{name} read {how}, in a thread"):
                found = child.READ[how](name, soak.library)
                if how in soak.wanted[name]:
                    why = "" if found == soak.wanted[name][how] else f"it is {found[:300]}"
                else:
                    why = child.unlike(found, soak.wanted[name]["numbers"])
                if why:
                    soak.wrong("mismatch", f"{name} read {how}, in a thread: {why}")
            soak.done["calls"] += 1

    works = [asking] * rng.randint(1, 4) + [reading] * rng.randint(0, 3)
    together(works, rng)


def moment_of(soak, rng, name, out):
    """When to disturb a process: some seconds after it begins, or soon after some more parts are finished."""
    seconds, enough = soak.wanted[name]["seconds"], len(soak.parts(out)) + rng.randint(1, 5)
    if rng.random() < 0.5:
        return rng.uniform(0, 1.1) * seconds, None
    return rng.uniform(0, 0.3) * seconds, lambda: len(soak.parts(out)) >= enough


def kills(soak, rng):
    """A process that is killed at random moments, until it comes to its end."""
    name = rng.choice(soak.kept)
    out = soak.out(name)
    for _ in range(rng.randint(1, 4)):
        moment, after = moment_of(soak, rng, name, out)
        status, text = soak.run("keep", name, out, signals=[(signal.SIGKILL, moment)], after=after)
        if status not in (0, None, -signal.SIGKILL):
            soak.wrong("lost", f"{out.name} after a kill: {text[-500:]}")
    soak.finish(name, out, "after kills")


def interruptions(soak, rng):
    """Ctrl-C, once or several times, or SIGTERM; at the command line, in a call and in a process that goes on."""
    if rng.random() < 0.3:
        folder = soak.folder / f"writes-{next(soak.numbers)}"
        folder.mkdir()
        soak.done["interruptions"] += 1
        status, text = soak.run("interrupted_writes", rng.random(), folder)
        if status:
            soak.wrong("mismatch", f"Ctrl-C in writes: {text[-1500:]}")
        shutil.rmtree(folder)
        return
    work, name = rng.choice(["keep", "command"]), rng.choice(soak.kept)
    name = "study" if work == "command" else name
    out = soak.out(name)
    given = (work, out) if work == "command" else (work, name, out)
    number = rng.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
    moment, after = moment_of(soak, rng, name, out)
    times = rng.choice([1, 1, 2, 4]) if number == signal.SIGINT else 1
    moments = [moment + at * rng.uniform(0, 0.1) for at in range(times)]
    status, text = soak.run(*given, signals=[(number, at) for at in moments], after=after)
    wanted = {signal.SIGINT: (0, 130, 1)[: 2 + (times > 1)], signal.SIGTERM: (0, 143, -signal.SIGTERM)}[number]
    told = f"{work} {out.name} after {times} x {number.name}"
    if status not in (None, *wanted):
        soak.wrong("mismatch", f"{told}: status {status}: {text[-700:]}")
    elif status and times == 1 and soak.parts(out) and ".parts" not in text:
        soak.wrong("mismatch", f"{told}: it is not said where finished work is kept: {text[-300:]!r}")
    soak.finish(name, out, told)


def full_disk(soak, rng):
    """No room for what is written; then there is."""
    name = rng.choice(soak.kept)
    if rng.random() < 0.5:
        out, largest = soak.out(name), rng.choice([0, 5_000, 15_000, 25_000, 60_000])
        status, text = soak.run("limited", name, out, largest)
        soak.settle(name, out, f"after files of {largest} bytes at most")
    else:
        folder, room = soak.folder / f"disk-{next(soak.numbers)}", rng.choice([0, 20_000, 100_000, 300_000])
        folder.mkdir()
        status, text = soak.run("filled", name, folder, soak.wanted[name]["numbers"], room)
        soak.done["skipped"] += "skipped" in text
        shutil.rmtree(folder)
    soak.done["faults"] += "full" in text.split()
    if status:
        soak.wrong("mismatch", f"{name} on a full disk: {text[-1500:]}")


def slow_server(soak, rng):
    """A server that is slow, drops connections and loses jobs, and clients of it that are killed."""
    host = soak.reached()
    name = rng.choice([name for name in soak.names if name not in ("study", "estimates", "attention")])
    for _ in range(rng.randint(0, 3)):
        at, how = rng.choice(FAULTS)
        soak.server.fault(at, how, times=rng.randint(1, 2), skip=rng.randint(0, 4), seconds=rng.random())
        soak.done["faults"] += 1
    kept = name in soak.kept and rng.random() < 0.6
    out = soak.out(name) if kept else None
    if kept and rng.random() < 0.5:
        soak.run("remotely", name, out, host, signals=[(signal.SIGKILL, rng.uniform(0, 3))])
    for last in (False, True):
        soak.done["calls"] += 1
        try:
            found = child.ask(name, hw.load("words-2l", remote=True), out)
            break
        except hw.errors.HeadwiseError as error:
            if last or "\n" in str(error):
                raise
            soak.server.quiet()
    soak.server.quiet()
    soak.same(name, found, "from a server", 1e-6)
    if kept:
        soak.settle(name, out, "from a server", 1e-6)


def executors(soak, rng):
    """Workers, some of which are killed."""
    name = rng.choice([name for name in soak.kept if name not in ("study", "slopes")])
    if rng.random() < 0.3:
        with ThreadPoolExecutor(3) as pool:
            soak.same(name, child.ask(name, soak.model, executor=pool), "on threads")
        return
    out = soak.out(name)
    for victim in (rng.random() < 0.7, False):
        with ProcessPoolExecutor(2, mp_context=soak.fork) as pool:
            killer = threading.Timer(rng.uniform(0, 1.0), lambda pool=pool: kill_one(soak, pool))
            if victim:
                killer.start()
            soak.done["calls"] += 1
            with suppress(hw.errors.ModelError if victim else ()):
                soak.same(name, child.ask(name, soak.model, out, executor=pool), "on processes")
            killer.cancel()
            if victim:
                killer.join()
    soak.settle(name, out, "on processes")


def kill_one(soak, pool):
    if numbers := list(pool._processes or ()):
        with suppress(ProcessLookupError):
            os.kill(numbers[0], signal.SIGKILL)
            soak.done["kills"] += 1


def catalogue(soak, rng):
    """A folder that is read while its files appear, are replaced, cut short and removed, hostile ones among them."""
    shelf = soak.folder / f"shelf-{next(soak.numbers)}"
    shelf.mkdir()
    steady = [f"steady-{name}" for name in rng.sample(soak.kept, min(3, len(soak.kept)))]
    for name in steady:
        shutil.copy(soak.library / f"{name[7:]}.nc", shelf / f"{name}.nc")
    until = time.monotonic() + rng.uniform(1, 3)

    def changing(rng):
        while time.monotonic() < until:
            path, beside = shelf / f"moving-{rng.randrange(6)}.nc", shelf / f"moving-{rng.random()}.part"
            how = rng.choice(["replace", "replace", "cut", "remove", "hostile"])
            if how == "replace":
                shutil.copy(soak.library / f"{rng.choice(soak.kept)}.nc", beside)
                os.replace(beside, path)
            elif how == "cut":
                with suppress(FileNotFoundError):  # another thread has removed it
                    os.truncate(path, rng.randrange(path.stat().st_size + 1))
            elif how == "remove":
                path.unlink(missing_ok=True)
            elif how == "hostile":
                with suppress(FileExistsError):
                    child.hostile(shelf, rng, soak.wanted["attrs"])
                    soak.done["faults"] += 1
            time.sleep(rng.uniform(0, 0.05))

    def reading(rng):
        while time.monotonic() < until:
            soak.done["calls"] += 1
            name, how = (
                rng.choice(steady),
                rng.choice(["lazily", "tree", "folder", "summary", "table", "list", "moving"]),
            )
            with soak.judged(f"{name} {how} in a folder that changes"):
                if how == "list":
                    listed = {entry.path for entry in Results(shelf)}
                    if missing := {f"{one}.nc" for one in steady} - listed:
                        soak.wrong("lost", f"{missing} are no longer listed beside files that change")
                elif how in ("moving", "table"):
                    moving = rng.choice([path for path in shelf.iterdir() if path.suffix == ".nc"])
                    with suppress(hw.errors.HeadwiseError):
                        found = Results(shelf)
                        str(found.table("loss")) if how == "table" else str(summary(moving))
                elif how == "summary":
                    str(summary(shelf / f"{name}.nc"))
                elif why := child.unlike(child.READ[how](name, shelf), soak.wanted[name[7:]]["numbers"]):
                    soak.wrong("mismatch", f"{name} {how} in a folder that changes: {why}")

    works = [changing] * rng.randint(1, 2) + [reading] * rng.randint(1, 3)
    together(works, rng)
    status, text = soak.run("listed", shelf)
    if status or any(name not in text for name in steady) or child.CONTROL.search(text):
        soak.wrong("mismatch", f"results ls ends with {status} and says {text[-1500:]!r}")
    shutil.rmtree(shelf)


def mixed(soak, rng):
    """Several of these at once."""
    kinds = rng.sample([threads, kills, interruptions, full_disk, slow_server, catalogue], 3)

    def work(kind, rng):
        with soak.judged(f"{kind.__name__} in a mixed round"):
            kind(soak, rng)

    together([partial(work, kind) for kind in kinds], rng)


KINDS = (threads, kills, interruptions, full_disk, slow_server, executors, catalogue, mixed)
ROUNDS = {one.__name__: one for one in KINDS}
