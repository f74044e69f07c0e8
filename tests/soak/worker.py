"""The process of `run.py` that does rounds, and sees after each that all is well."""

import faulthandler
import gc
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from random import Random

import torch

import headwise as hw
from headwise.interventions.models.locate import SHIPPED
from tests.soak import child as child
from tests.soak.rounds import ROUNDS
from tests.soak.run import last_words
from tests.support.loopback import KEY, Loopback

POOLS = 16
"""Threads that libraries may keep: torch begins some when it first computes gradients, or in parallel."""
ROOM = 256
"""MiB by which memory may grow."""
START = 600
"""Seconds that beginning may take, and ending."""


class Soak:
    """Does rounds, and counts what was done and what was wrong.

    Parameters
    ----------
    folder : Path
        Its own.
    seed : int
    plants : collection of str
        Faults that it should find.
    names : sequence of str
        Requests that are made.
    """

    def __init__(self, folder, seed, plants=(), names=child.ALL):
        self.names, self.kept = names, [name for name in names if name in child.KEPT]
        self.folder, self.seed, self.plants = folder, seed, plants
        self.work, self.library, self.logs = (folder / name for name in ("work", "library", "logs"))
        for one in (self.work, self.library, self.logs):
            one.mkdir(exist_ok=True)
        self.kind, self.done, self.numbers, self.turn = "the start", Counter(), count(), threading.Lock()
        self.warm, self.before, self.rss = set(), Counter(), 0.0  # what was seen after rounds
        os.environ["SOAK_WARM"] = "1"
        self.fork = multiprocessing.get_context("forkserver")
        self.fork.set_forkserver_preload(["tests.soak.child"])
        kept = folder / "reference"
        status, text = (0, "") if kept.exists() else self.run("reference", kept, self.library, names)
        if status:
            raise RuntimeError(f"the wanted numbers could not be had: {text}")
        self.wanted = pickle.loads(kept.read_bytes())
        self.model = hw.load("words-2l")
        same = hw.load(self.model.module, tokenizer=self.model.tokenizer)
        self.handles = [self.model, self.model, same, hw.load("words-2l")]
        self.server = None

    def wrong(self, kind, text):
        self.tell(wrong=kind, text=text[: 5000 if kind in ("hang", "crash") else 700])

    def run(self, work, *given, signals=(), after=None):
        """A process that does some work of `child`, and gets signals after some seconds, or from `after()` on.

        Its status, None where that it broke down is told already, and its words.
        """
        log = self.logs / str(next(self.numbers))
        process = self.fork.Process(target=child.body, args=(str(log), work, given))
        with self.turn:
            process.start()
        self.done["calls"] += 1
        while after and not after() and not self._ended(process, 0.0):
            pass
        begun = time.monotonic()
        for number, moment in signals:
            if not self._ended(process, begun + moment):
                os.kill(process.pid, number)
                self.done["kills" if number == signal.SIGKILL else "interruptions"] += 1
        if not self._ended(process, begun + child.LIMIT + 30):
            process.kill()
        self._ended(process, time.monotonic() + 30)
        text = log.read_text(errors="replace") if log.exists() else ""
        log.unlink(missing_ok=True)
        with self.turn:
            status = process.exitcode
            process.close()
        if "Timeout (" in text or "Fatal Python error" in text:
            kind, words = last_words(text)
            self.wrong(kind, f"{work} {given[:2]}: {words}")
            return None, text
        return status, text

    def _ended(self, process, until):
        while True:
            with self.turn:  # `multiprocessing` asks after all processes wherever one begins
                if process.exitcode is not None:
                    return True
            if time.monotonic() > until:
                return False
            time.sleep(0.005)

    def same(self, name, found, where, tolerance=None):
        """See that a result has the wanted numbers."""
        found = child.numbers(found)
        if "wrong" in self.plants:
            first = next(one for one in found if found[one].dtype.kind == "f")
            found[first] = found[first] * (1 + 2e-6)
        if why := child.unlike(found, self.wanted[name]["numbers"], tolerance):
            self.wrong("mismatch", f"{name}, {where}: {why}")

    def out(self, name):
        """A name for a result that is being made; it says which, so that a later process can end it."""
        return self.work / f"{name}-{os.getpid()}-{next(self.numbers)}.nc"

    def parts(self, out):
        """What is finished of a result."""
        with suppress(FileNotFoundError):  # taken away while it is looked at
            return list(Path(f"{out}.parts").glob("*.nc"))
        return []

    def finish(self, name, out, where, tolerance=None):
        """The same call again, in a process of its own: it ends, does nothing twice, and leaves no parts."""
        had = len(self.parts(out)) > 2 and name != "study"  # of the runs as they are, and of stages without passes
        if "part" in self.plants:
            shutil.rmtree(f"{out}.parts", ignore_errors=True)
        status, text = self.run("keep", name, out)
        last = (text.splitlines() or [""])[-1]
        if status:
            self.wrong("lost", f"{out.name}, {where}: the same call again ends with {status}: {last}")
        elif int(last) + had > self.wanted[name]["passes"]:
            self.wrong("lost", f"{out.name}, {where}: what was finished is computed again, all {last} passes")
        self.settle(name, out, where, tolerance)

    def settle(self, name, out, where, tolerance=None):
        """A result that should be whole: right numbers, nothing left beside it; then it is removed."""
        try:
            self.same(name, hw.open_result(out, load=True), where, tolerance)
        except hw.errors.HeadwiseError as error:
            self.wrong("lost", f"{out.name}, {where}: {error}")
        self.done["results"] += 1
        for one in [path for path in self.work.iterdir() if path.name.startswith((f"{out.stem}.", f".{out.stem}."))]:
            if one.suffix not in (".nc", ".html"):
                held = sorted(path.name for path in one.iterdir()) if one.is_dir() else ""
                self.wrong("leak", f"{one.name} is left, {where}: {held}")
            shutil.rmtree(one) if one.is_dir() else one.unlink()

    def finish_all(self, where):
        """End what was begun by a process that broke down."""
        names = {one.name.removesuffix(".parts") for one in self.work.iterdir() if one.name.endswith((".nc", ".parts"))}
        self.kind, self.done = where, Counter()
        for name in sorted(names):
            self.finish(name.split("-")[0], self.work / name, where, 1e-6)

    def reached(self):
        """The address of a server on loopback."""
        if self.server is None:
            shipped = str((SHIPPED / "words-2l").resolve())
            self.server = Loopback(self.folder / "ndif", {shipped: shipped}, key=KEY).start()
            child.at_server(self.server.host)
        return self.server.host

    def census(self):
        """What this process and its children hold."""
        gc.collect()
        held = Counter(f"thread {plain(one.name)}" for one in threading.enumerate())
        if not Path("/proc/self/fd").is_dir():
            return held
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                held[f"descriptor {plain(os.readlink(f'/proc/self/fd/{number}'))}"] += 1
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                name, state, _, _, session = re.match(r"\d+ \((.*)\) (\S) (\d+) (\d+) (\d+)", stat.read_text()).groups()
                if int(session) == os.getsid(0) and stat.parent.name != str(os.getpid()):
                    held[f"process {name}{' that is not waited for' if state == 'Z' else ''}"] += 1
        held["native threads"] = max(POOLS, len(os.listdir("/proc/self/task")))
        return held

    def memory(self):
        """MiB."""
        pages = Path("/proc/self/statm")
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if pages.exists() else 0.0

    def look(self):
        """See that nothing grew; the first round of a kind may leave what stays once, but no file of ours open."""
        known = self.kind in self.warm
        for wait in (0, 0.1, 0.3, 1, 3, 10)[: 6 if known else 4]:
            time.sleep(wait)
            now = self.census()
            if not (grew := now - self.before):
                break
        for name in grew:
            if self.before and (known or plain(str(self.folder)) in name):
                self.wrong("leak", f"{name}: {now[name]}, there were {self.before[name]}")
        self.before |= now
        if known and self.memory() > self.rss + ROOM:
            self.wrong("leak", f"memory: {self.memory():.0f} MiB, there were {self.rss:.0f}")
        if not known or self.memory() > self.rss + ROOM:
            self.rss = self.memory()
        self.warm.add(self.kind)

    def round(self, number, kinds):
        """One round, as drawn."""
        rng = Random(f"{self.seed}/{number}")
        self.kind, self.done = rng.choice(kinds), Counter()
        self.tell(begin=number)
        with self.judged(self.kind):
            self.planted(number)
            ROUNDS[self.kind](self, rng)
        self.look()
        self.tell(done=self.done)

    def planted(self, number):
        """Put in what is to be found."""
        if "descriptor" in self.plants:
            os.open(os.devnull, os.O_RDONLY)
        if "thread" in self.plants:
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        if "process" in self.plants:
            os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600")
        if breaks := [one for one in self.plants if one in ("crash", "hang")]:
            faulthandler._sigsegv() if breaks[number % len(breaks)] == "crash" else time.sleep(600)

    @contextmanager
    def judged(self, where):
        """No error comes of what is done here."""
        try:
            yield
        except Exception as error:
            at = "".join(traceback.format_exception(error)[-3:])[-1500:]
            self.wrong("mismatch", f"{where}: {type(error).__name__}: {error}\n{at}")

    def tell(self, **what):
        line = json.dumps({"kind": self.kind} | what) + "\n"
        with (self.folder / "events").open("a") as file:
            file.write(line)


def plain(name):
    """Without its numbers, which are others each time."""
    return re.sub("[0-9]+", "#", name)


def work(options):
    """Do rounds until the time is over, and end what was begun; the folder says what was seen."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(START, exit=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    soak = Soak(options.folder, options.seed, options.plant, options.requests or child.ALL)
    soak.finish_all("the start")
    number = options.first
    while number < options.last and (time.time() < options.until or number == 0):  # one in any case
        faulthandler.dump_traceback_later(options.limit, exit=True)
        soak.round(number, options.kinds)
        number += 1
    faulthandler.dump_traceback_later(START, exit=True)
    soak.finish_all("the end")
    for left in soak.work.iterdir():
        soak.wrong("leak", f"{left.name} is left at the end")
    if soak.server:
        soak.server.stop()
    if left := [one.name for one in threading.enumerate() if one is not threading.main_thread()]:
        soak.wrong("leak", f"threads at the end: {left}")
    held = Counter()
    for name, many in soak.census().items():
        held[name.split()[0]] += many
    soak.tell(held=held, memory=soak.memory(), bound=soak.rss + ROOM, done=soak.done)
    shutil.rmtree(multiprocessing.util.get_temp_dir())
    os._exit(0)  # at once: a thread that is left would be waited for
