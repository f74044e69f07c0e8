"""The server's model actor on a machine without a GPU: what it says to one is left out. Needs Ray and ndif, no more.

Jobs of keys that are not trusted run in a process of their own, which has the model's modules without its weights.
"""

import gc

import ray
import torch
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel


class OnCpu(SandboxModelDeployment):
    CACHEABLE = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, pool_size=1, **kwargs)

    def load_from_disk(self):
        torch.set_num_threads(1)
        self.gpu_mem_bytes_by_id = {}  # the card it was given is only there for the planner
        model = HuggingFaceModel.from_model_key(self.model_key, dispatch=True, dtype=self.dtype_name, **self.kwargs)
        model._module.requires_grad_(False)
        return model

    def cleanup(self):
        self.discard_sandbox()
        self.kill_switch.clear()
        self.kill_reason = self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


@ray.remote(num_cpus=1, max_restarts=-1)
class CpuActor(OnCpu):
    pass
