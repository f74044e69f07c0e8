"""Processes that are started here and ended with everything that they started; Linux only."""

import os
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx


def free_ports(count):
    with ExitStack() as held:
        found = []
        for _ in range(count):
            one = held.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            found.append(one.getsockname()[1])
    return found


class Stack:
    """What was started, each in a session of its own, so that nothing else is ended with it."""

    def __init__(self, folder, env):
        self.folder, self.env, self.started = folder, env, []

    def start(self, name, *command, **how):
        with (self.folder / f"{name}.log").open("w") as log:
            how = {"env": self.env, "cwd": self.folder, "stdout": log, "stderr": subprocess.STDOUT, **how}
            one = subprocess.Popen(command, start_new_session=True, **how)
        self.started.append((name, one))

    def wait(self, name, ready, seconds):
        end = time.monotonic() + seconds
        while True:
            try:
                if ready():
                    return
            except (OSError, httpx.HTTPError):
                pass
            for other, one in self.started:
                if one.poll() is not None:
                    self.fail(other, f"ended with {one.returncode}")
            if time.monotonic() > end:
                self.fail(name, f"is not ready after {seconds} s")
            time.sleep(0.3)

    def fail(self, name, why):
        path = self.folder / f"{name}.log"
        said = path.read_text(errors="replace")[-3000:] if path.is_file() else ""
        raise SystemExit(f"{name} {why}; the end of what it said:\n{said}")

    def stop(self):
        for how in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.running():
                with suppress(ProcessLookupError):
                    os.kill(pid, how)
            end = time.monotonic() + 10
            while time.monotonic() < end and self.running():
                time.sleep(0.1)

    def running(self):
        """All that is left of the sessions: Ray's workers are groups of their own, which outlive it."""
        for _, one in self.started:
            one.poll()
        ours = {one.pid for _, one in self.started}
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                pid, state, session = fields(path.read_text())
                if session in ours and state != "Z":
                    found.append(pid)
        return found


def fields(stat):
    """Process, state and session of a line of /proc."""
    rest = stat.rpartition(")")[2].split()
    return int(stat.split()[0]), rest[0], int(rest[3])


def answers(port):
    with socket.create_connection(("127.0.0.1", port), 1):
        return True
