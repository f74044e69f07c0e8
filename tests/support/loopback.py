"""Starts the server of `ndif_server` in a process of its own, points nnsight at it, and counts what it did."""

import json
import subprocess
import sys
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
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(SERVER), str(self.folder / "config.json")],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.config["port"] = int(self.process.stdout.readline())
        return self

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

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
