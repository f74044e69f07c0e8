"""Random calls for as long as one likes (``make soak``): nothing is wrong, lost, left or hung; else status 1.

``python tests/soak/run.py --minutes 120 --seed 0``. A process does rounds (`rounds`), each drawn from the seed and its
number; this one watches it, begins another where it broke down, and tells what was seen.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
KINDS = ["threads", "kills", "interruptions", "full_disk", "slow_server", "executors", "catalogue", "mixed"]
PLANTS = ["wrong", "descriptor", "thread", "process", "part", "crash", "hang"]
"""Faults that can be put in, to see that they are found."""
COLUMNS = ["rounds", "calls", "results", "kills", "interruptions", "faults", "skipped", "mismatches", "leaks"]


def parser():
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--minutes", type=float, default=120)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of rounds that are drawn from")
    made.add_argument("--first", type=int, default=0, help="number of the first round")
    made.add_argument("--rounds", type=int, default=10**9, help="how many at most")
    made.add_argument("--limit", type=float, default=300, help="seconds that a round may take")
    made.add_argument("--plant", nargs="*", choices=PLANTS, default=[], help="faults to put in, which are to be found")
    made.add_argument("--requests", nargs="+", help="requests that are made, of `child.ALL`")
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # these are for the process that does the rounds
    made.add_argument("--until", type=float, help=argparse.SUPPRESS)
    made.add_argument("--last", type=int, help=argparse.SUPPRESS)
    return made


class Watch:
    """Begins processes that do rounds until the time is over, and adds up what they tell."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.begun, self.told = time.monotonic(), 0.0
        self.next, self.read, self.kind = options.first, 0, "the start"
        self.seen, self.wrong, self.known, self.final = {}, [], set(), {}

    def note(self):
        """Read what was written since."""
        events = self.folder / "events"
        lines = events.read_text().split("\n")[:-1] if events.exists() else []
        for line in map(json.loads, lines[self.read :]):
            self.kind = line["kind"]
            of = self.seen.setdefault(self.kind, Counter())
            if "begin" in line:
                self.next = line["begin"] + 1
                of["rounds"] += 1
                continue
            if "wrong" in line:
                self.say(line["wrong"], line["text"])
                continue
            self.final = line
            of.update(line["done"])
        self.read = len(lines)
        minutes = int((time.monotonic() - self.begun) / 60)
        if minutes > self.told:
            self.told = minutes
            print(f"{minutes} min, {self.next - self.options.first} rounds, {len(self.wrong)} wrong", flush=True)

    def say(self, kind, text):
        """Something was wrong in the latest round."""
        number = "" if self.kind in ("the start", "the end") else f"round {self.next - 1}, "
        self.seen.setdefault(self.kind, Counter())["leaks" if kind == "leak" else "mismatches"] += 1
        self.wrong.append((self.next - 1, kind))
        pattern = re.sub("[0-9.]+", "#", text)
        first = text.partition("\n")[0]
        print(f"{number}{self.kind}: {kind}: {f'as before: {first}' if pattern in self.known else text}", flush=True)
        self.known.add(pattern)

    def process(self, seconds):
        """Let a process do rounds; whether another one has to."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        last = self.options.first + self.options.rounds
        given = ["--folder", self.folder, "--until", time.time() + seconds, "--first", self.next, "--last", last]
        with (self.folder / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], *map(str, given)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        before, self.final = self.next, {}
        try:
            while process.poll() is None:
                time.sleep(0.1)
                self.note()
            self.note()
        finally:
            left = end_session(process, patience=10 if "held" in self.final else 0)
        if "held" not in self.final:
            kind, words = last_words((self.folder / "log").read_text(errors="replace"))
            self.say(kind, f"the process ended with {process.returncode}\n{words}")
            return self.next > before
        if left:
            self.say("leak", f"processes that do not end: {left}")
        return False

    def run(self):
        """Until the time is over; the status."""
        with suppress(KeyboardInterrupt):
            while self.process(max(0.0, self.options.minutes * 60 - (time.monotonic() - self.begun))):
                pass
        return self.report()

    def report(self):
        """The table; whether all was well."""
        minutes = (time.monotonic() - self.begun) / 60
        rows = [["", *COLUMNS], *([kind, *(of[name] for name in COLUMNS)] for kind, of in sorted(self.seen.items()))]
        rows.append(["all", *(sum(of[name] for of in self.seen.values()) for name in COLUMNS)])
        print(f"\nseed {self.options.seed}, {minutes:.1f} minutes")
        for row in rows:
            print(
                f"{row[0]:<14}" + "  ".join(f"{one:>{len(name)}}" for name, one in zip(COLUMNS, row[1:], strict=True))
            )
        if "held" in self.final:
            held = ", ".join(f"{many} {name}" for name, many in sorted(self.final["held"].items()))
            print(f"at the end: {self.final['memory']:.0f} MiB (bound {self.final['bound']:.0f}); {held}")
        if not Path("/proc/self/fd").is_dir():
            print("there is no /proc here: threads of Python were checked, and no descriptor, process or memory")
        if not self.wrong:
            print("nothing was wrong, lost or left")
            return 0
        rounds = sorted({number for number, _ in self.wrong})
        print(f"{len(self.wrong)} things were wrong, in rounds {rounds}; all is in {self.folder}; the first again:")
        print(f"  {sys.executable} {Path(__file__)} --seed {self.options.seed} --rounds 1 --first {rounds[0]}", end="")
        print("" if self.options.kinds == KINDS else f" --kinds {' '.join(self.options.kinds)}", end="")
        print(f" --requests {' '.join(self.options.requests)}" if self.options.requests else "")
        return 1


def last_words(text):
    """How a process broke down, and where all its threads were; without the list of modules that follows."""
    begins = [at for at in (text.find("Timeout ("), text.find("Fatal Python error")) if at >= 0]
    told = text[min(begins) :] if begins else text[-3000:]
    return "hang" if told.startswith("Timeout") else "crash", told.partition("Extension modules")[0][:5000].strip()


def end_session(process, patience):
    """End whatever a process has begun and not ended; the names of those, after some seconds."""
    until, left = time.monotonic() + patience, [""]
    while left and time.monotonic() <= until:
        left = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                name, session = re.match(r"\d+ \((.*)\) \S \d+ \d+ (\d+)", stat.read_text()).groups()
                left += [name] * (int(session) == process.pid)
        time.sleep(0.2 if left else 0)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return left


def main():
    options = parser().parse_args()
    if not hasattr(os, "killpg"):
        sys.exit("soak kills and interrupts processes as Unix does: run it on Linux or macOS")
    if options.until:
        from tests.soak.worker import work

        return work(options)
    folder = Path(tempfile.mkdtemp(prefix="headwise-soak-"))
    status = Watch(options, folder).run()
    if not status:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
