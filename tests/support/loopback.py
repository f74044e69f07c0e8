"""Starts a server of `ndif_server` in a process of its own, points nnsight at it, and counts what it did."""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import httpx

KEY = "5a1f0e5c-7c0f-4d0e-9b59-3c0ffee0c0de"
OF_RAY = "ray/session_latest/logs/ray_client_server*.err"
SERVER = Path(__file__).with_name("ndif_server.py")


def last_words(folder, since=0.0, lines=25, width=400):
    """The end of what each process of `make ndif` has written since a time: what a test that fails is shown with."""
    found = [*folder.glob("*.log"), *folder.glob("ray/session_latest/logs/worker-*"), *folder.glob(OF_RAY)]
    told = []
    for path in found:
        if path.stat().st_size and path.stat().st_mtime >= since:
            end = path.read_text(errors="replace").splitlines()[-lines:]
            told.append("\n".join([f"-- {path.name}", *(line[:width] for line in end)]))
    return "\n".join(told) or "nothing"


@cache
def servers():
    """The process that forks servers, and ends them when this one ends."""
    command = [sys.executable, "-I", str(SERVER)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end():
        process.stdin.close()
        process.wait()
        process.stdout.close()

    atexit.register(end)
    return process


class Loopback:
    """A server on loopback.

    Parameters
    ----------
    folder : Path
        Where it keeps what it did; a server that is started again finds it there.
    models : mapping of repo id to folder
    config : what else `ndif_server` takes
    """

    def __init__(self, folder, models, **config):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config = {"folder": str(folder), "models": models, **config}
        self.process = None

    def start(self):
        (self.folder / "config.json").write_text(json.dumps(self.config))
        print(self.folder / "config.json", file=servers().stdin, flush=True)
        self.process, self.config["port"] = map(int, servers().stdout.readline().split())
        return self

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
            while True:
                os.kill(self.process, 0)
                time.sleep(0.01)

    @property
    def host(self):
        return f"http://127.0.0.1:{self.config['port']}"

    def fault(self, at, how, times=1, **more):
        for _ in range(times):
            httpx.post(f"{self.host}/faults", json={"at": at, "how": how, **more})

    def quiet(self):
        """No more faults."""
        httpx.delete(f"{self.host}/faults")

    def lines(self, name):
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def executed(self, what=""):
        """Keys of the jobs it ran; of those that do nothing only where they are asked for."""
        lines = [line for line in self.lines("executed") if line["what"].startswith(what)]
        return [line["key"] for line in lines if what == "marker" or line["what"] != "marker"]
