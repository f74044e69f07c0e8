"""TransformerLens: ``TransformerBridge`` over the same module, its own patching functions where it has them.

The bridge is left as it boots: no folding, no centring, so zero ablation of a head means what it means elsewhere. It
forces eager attention, which sums in another order than the fused kernel; that is where its differences come from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.cases import Job, Place

patching.tqdm = iter  # its patching functions draw a bar for each call
HOOKS = {"z": "attn.hook_z", "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "resid_pre": "hook_resid_pre"}
HOOKS["mlp_post"] = "mlp.hook_post"
PATCH = {
    "q": patching.get_act_patch_attn_head_q_all_pos,
    "k": patching.get_act_patch_attn_head_k_all_pos,
    "v": patching.get_act_patch_attn_head_v_all_pos,
    "resid_pre": patching.get_act_patch_resid_pre,
}

LEFT_OUT = {"edges": "it would be the hooks again: two passes for each edge"}


def prepare(job: Job) -> Callable[[Sequence[Place]], np.ndarray]:
    """``run_with_hooks`` for each ablation, ``get_act_patch_*`` for patching, ``run_with_cache`` for scores."""
    bridge = TransformerBridge.boot_transformers(
        "gpt2", hf_model=job.twin("eager"), tokenizer=job.tokenizer, device="cpu"
    )  # the name says which family it is: nothing is looked up, since module and tokenizer are given
    bridge.eval()
    work = {"ablation": _ablate, "neurons": _ablate, "scores": _scores}.get(job.case.name, _patch)
    return torch.no_grad()(functools.partial(work, bridge, job))


def _ablate(bridge: Any, job: Job, places: Sequence[Place]) -> np.ndarray:
    def zero(z: torch.Tensor, hook: Any, head: int | None) -> torch.Tensor:
        z[:, :, head] = 0
        return z

    return job.table(
        [
            job.value(
                bridge.run_with_hooks(job.clean, fwd_hooks=[(_name(place), functools.partial(zero, head=place.head))])
            )
            for place in places
        ]
    )


def _patch(bridge: Any, job: Job, places: Sequence[Place]) -> np.ndarray:
    """What TransformerLens calls the corrupted run is the run that is patched: here, in noising, the clean one."""
    names = sorted({_name(place) for place in job.places})
    _, cache = bridge.run_with_cache(job.source, names_filter=names)
    found: dict[Place, np.ndarray] = {}
    for what in dict.fromkeys(place.what for place in places):
        wanted = [place for place in places if place.what == what]
        inner = "pos" if what == "resid_pre" else "head"
        index = pd.DataFrame({
            "layer": [place.layer for place in wanted],
            inner: [place.position if what == "resid_pre" else place.head for place in wanted],
        })  # fmt: skip
        result = PATCH[what](
            bridge,
            job.clean,
            cache,
            lambda logits: torch.from_numpy(job.value(logits)),
            index_axis_names=None,
            index_df=index,
            reduce="none",
        )
        found |= dict(zip(wanted, result.values.numpy(), strict=True))
    return job.table([found[place] for place in places])


def _scores(bridge: Any, job: Job, places: Sequence[Place]) -> np.ndarray:
    """Its head detector takes one text at a time and defines the scores otherwise, so patterns are read instead."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in job.layers]
    _, cache = bridge.run_with_cache(job.clean, names_filter=names)
    return job.scores([cache[name] for name in names], places)


def _name(place: Place) -> str:
    return f"blocks.{place.layer}.{HOOKS[place.what]}"
