"""Starts the real NDIF server on loopback, runs a command against it, and ends everything it started.

``python tests/ndif/up.py VENV COMMAND...``: VENV holds ``ndif``, Ray and moto. Run with the Python that has headwise.
The command finds the server's address in ``HEADWISE_NDIF`` and, where Postgres is installed, a key that the server does
not trust with the weights in ``HEADWISE_NDIF_UNTRUSTED``; what the server's processes write in ``HEADWISE_NDIF_LOGS``;
and the bucket of its object store in ``HEADWISE_NDIF_STORE``.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import keys
from stack import Stack, answers, free_ports

import headwise as hw

HERE = Path(__file__).resolve().parent
BUCKET = "ndif-results"
LIMIT = 3600
"""Seconds that the command may take."""


def main(venv, command):
    where, redis = Path(venv).resolve() / "bin", shutil.which("redis-server")
    if not (where / "ray").exists():
        raise SystemExit(f"{venv} has no NDIF server: `make ndif` sets one up")
    if redis is None:
        raise SystemExit("redis-server is not installed: apt-get install -y redis-server")
    folder = Path(tempfile.mkdtemp(prefix="hwn"))
    folder.chmod(0o755)
    stack = Stack(folder, environment(where))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        found = served(stack, where, redis) | {"HEADWISE_NDIF_LOGS": str(folder)}
        return subprocess.run(command, env={**os.environ, **found}, timeout=LIMIT).returncode
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


def environment(where):
    """What the server's processes find in their environment, but for addresses."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("NDIF_", "RAY_", "PYTHON"))}
    return ours | {
        "PATH": f"{where}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE),
        "HF_HUB_OFFLINE": "1",
        "NDIF_OBJECT_STORE_ACCESS_KEY": "test",
        "NDIF_OBJECT_STORE_SECRET_KEY": "test",
        "NDIF_OBJECT_STORE_BUCKET": BUCKET,
        "NDIF_DEFAULT_DTYPE": "float32",
        "NDIF_MODEL_IMPORT_PATH": "cpu_actor.CpuActor",
        "RAY_USAGE_STATS_ENABLED": "0",
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "OMP_NUM_THREADS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def served(stack, where, redis):
    """Start everything, in the order in which one needs the other; what the command finds in its environment."""
    redis_port, store, api, gcs, client, postgres, *ray = free_ports(13)
    host, address = f"http://127.0.0.1:{api}", f"127.0.0.1:{gcs}"
    stack.env |= {
        "NDIF_REDIS_URL": f"redis://127.0.0.1:{redis_port}",
        "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{store}",
        "NDIF_API_PORT": str(api),
        "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{client}",
    }
    found = {"NDIF_HOST": host, "HEADWISE_NDIF": host, "HEADWISE_NDIF_STORE": f"http://127.0.0.1:{store}/{BUCKET}"}
    stack.start("redis", redis, "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
    stack.start("store", str(where / "moto_server"), "-H", "127.0.0.1", "-p", str(store))
    resources = json.dumps({"head": 10, "cuda_memory_bytes": 8 << 30, "cpu_memory_bytes": 2 << 30})
    stack.start(
        "ray", str(where / "ray"), "start", "--head", "--block", f"--resources={resources}", "--num-gpus=1",
        "--num-cpus=4", "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}",
        f"--object-manager-port={ray[0]}", f"--node-manager-port={ray[1]}", f"--dashboard-port={ray[2]}",
        f"--dashboard-agent-grpc-port={ray[3]}", f"--metrics-export-port={ray[4]}",
        f"--dashboard-agent-listen-port={ray[5]}", f"--runtime-env-agent-port={ray[6]}",
        "--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--object-store-memory={200 << 20}",
        f"--temp-dir={stack.folder}/ray",
    )  # fmt: skip
    if keys.programs() is None:
        print("Postgres is not installed: this server takes any key and trusts it")
    else:
        url, trusted, untrusted = keys.start(stack, postgres)
        stack.env["NDIF_POSTGRES_URL"] = url
        found |= {"NDIF_API_KEY": trusted, "HEADWISE_NDIF_UNTRUSTED": untrusted}
    stack.wait("redis", lambda: answers(redis_port), 20)
    stack.wait("store", lambda: httpx.put(f"http://127.0.0.1:{store}/{BUCKET}").is_success, 60)
    stack.wait("ray", lambda: answers(gcs) and answers(client), 120)
    in_ray = stack.env | {"RAY_ADDRESS": address}
    controller = [str(where / "python"), "-m", "ndif.services.ray.deployments.controller.controller"]
    finish("the controller does not start", controller, stack, in_ray, 180)
    print("redis, object store, Ray and controller are up", flush=True)
    os.environ["NDIF_HOST"] = host
    key = hw.load("words-2l", remote=True).queue.model_key
    deploy = [str(where / "python"), str(HERE / "deploy.py"), address, key, str(2 << 20)]
    finish("the model is not served", deploy, stack, in_ray, 400)
    print("the model is served", flush=True)
    stack.start("api", str(where / "gunicorn"), "--config", "python:ndif.services.api.gunicorn_conf",
                "--bind", f"127.0.0.1:{api}", "ndif.services.api.app:app")  # fmt: skip
    stack.wait("api", lambda: httpx.get(f"{host}/status", timeout=30).is_success, 180)
    print(f"the server answers at {host}", flush=True)
    return found


def finish(otherwise, command, stack, env, seconds):
    """Run a command to its end."""
    done = subprocess.run(command, env=env, cwd=stack.folder, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise SystemExit(f"{otherwise}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
