"""Starts the real NDIF server on loopback, runs a command against it, and ends everything it started.

``python tests/ndif/up.py VENV COMMAND...``: VENV holds ``ndif``, Ray and moto. Run with the Python that has headwise.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx

import headwise as hw

HERE = Path(__file__).resolve().parent
BUCKET = "ndif-results"


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

    def start(self, name, *command):
        with (self.folder / f"{name}.log").open("w") as log:
            one = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
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


def main(venv, command):
    where = Path(venv).resolve() / "bin"
    if not (where / "ray").exists():
        raise SystemExit(f"{venv} has no NDIF server: `make ndif` sets one up")
    redis = shutil.which("redis-server")
    if redis is None:
        raise SystemExit("redis-server is not installed: apt-get install -y redis-server")
    redis_port, store, api, gcs, client, *ray = free_ports(12)
    folder = Path(tempfile.mkdtemp(prefix="hwn"))
    folder.chmod(0o755)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("NDIF_", "RAY_", "PYTHON"))},
        "PATH": f"{where}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE),
        "HF_HUB_OFFLINE": "1",
        "NDIF_REDIS_URL": f"redis://127.0.0.1:{redis_port}",
        "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{store}",
        "NDIF_OBJECT_STORE_ACCESS_KEY": "test",
        "NDIF_OBJECT_STORE_SECRET_KEY": "test",
        "NDIF_OBJECT_STORE_BUCKET": BUCKET,
        "NDIF_API_PORT": str(api),
        "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{client}",
        "NDIF_DEFAULT_DTYPE": "float32",
        "NDIF_MODEL_IMPORT_PATH": "cpu_actor.CpuActor",
        "RAY_USAGE_STATS_ENABLED": "0",
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "OMP_NUM_THREADS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    stack = Stack(folder, env)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        stack.start(
            "redis", redis, "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"
        )
        stack.start("store", str(where / "moto_server"), "-H", "127.0.0.1", "-p", str(store))
        resources = json.dumps({"head": 10, "cuda_memory_bytes": 8 << 30, "cpu_memory_bytes": 2 << 30})
        stack.start(
            "ray", str(where / "ray"), "start", "--head", "--block", f"--resources={resources}", "--num-gpus=1",
            "--num-cpus=4", "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}",
            f"--object-manager-port={ray[0]}", f"--node-manager-port={ray[1]}", f"--dashboard-port={ray[2]}",
            f"--dashboard-agent-grpc-port={ray[3]}", f"--metrics-export-port={ray[4]}",
            f"--dashboard-agent-listen-port={ray[5]}", f"--runtime-env-agent-port={ray[6]}",
            "--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--object-store-memory={200 << 20}",
            f"--temp-dir={folder}/ray",
        )  # fmt: skip
        stack.wait("redis", lambda: answers(redis_port), 20)
        stack.wait("store", lambda: httpx.put(f"http://127.0.0.1:{store}/{BUCKET}").is_success, 60)
        stack.wait("ray", lambda: answers(gcs) and answers(client), 120)
        address = f"127.0.0.1:{gcs}"
        stack.env = env | {"RAY_ADDRESS": address}
        controller = [str(where / "python"), "-m", "ndif.services.ray.deployments.controller.controller"]
        done = subprocess.run(controller, env=stack.env, cwd=folder, capture_output=True, text=True, timeout=180)
        if done.returncode:
            raise SystemExit(f"the controller does not start:\n{done.stderr[-3000:]}")
        print("redis, object store, Ray and controller are up", flush=True)
        os.environ["NDIF_HOST"] = host = f"http://127.0.0.1:{api}"
        key = hw.load("words-2l", remote=True).office.model_key
        deploy = [str(where / "python"), str(HERE / "deploy.py"), address, key, str(2 << 20)]
        done = subprocess.run(deploy, env=stack.env, cwd=folder, capture_output=True, text=True, timeout=400)
        if done.returncode:
            raise SystemExit(f"the model is not served:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        print("the model is served", flush=True)
        stack.env = env
        stack.start("api", str(where / "gunicorn"), "--config", "python:ndif.services.api.gunicorn_conf",
                    "--bind", f"127.0.0.1:{api}", "ndif.services.api.app:app")  # fmt: skip
        stack.wait("api", lambda: httpx.get(f"{host}/status", timeout=30).is_success, 180)
        print(f"the server answers at {host}", flush=True)
        return subprocess.run(command, env={**os.environ, "NDIF_HOST": host, "HEADWISE_NDIF": host}).returncode
    except KeyboardInterrupt:
        return 130
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"no end after {error.timeout} s: {error.cmd[1:3]}") from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stack.stop()
        if "HEADWISE_NDIF_KEEP" in os.environ:
            print(f"logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
