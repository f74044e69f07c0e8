"""Has the server load a model, and waits until it has: ``python deploy.py RAY_ADDRESS MODEL_KEY BYTES``."""

import sys
import time

import ray
from ndif.common.schema.controller import DeploymentConfig

address, key, size = sys.argv[1:]
ray.init(address=address, namespace="NDIF", logging_level="error")
end = time.monotonic() + 180
while True:
    try:
        controller = ray.get_actor("Controller", namespace="NDIF")
        break
    except ValueError:
        if time.monotonic() > end:
            raise
        time.sleep(1)
config = DeploymentConfig(size_bytes=int(size), pinned=True, dtype="float32", actor_class="cpu_actor.CpuActor")
response = ray.get(controller._deploy.remote({key: config}), timeout=120)
result = response.results[key]
if result.error or not result.replicas:
    sys.exit(f"the server does not take the model: {result.error}")
for replica in result.replicas:
    name = f"{replica}:ModelActor:{key}"
    while True:
        try:
            ray.get(ray.get_actor(name, namespace="NDIF").__ray_ready__.remote(), timeout=180)
            break
        except ValueError:
            if time.monotonic() > end:
                raise
            time.sleep(1)
print("ready")
