"""What a module is made of: its configuration, its classes, their attributes, and what replaces their code.

Plain functions, as in `traces`: they run here, and on a server that does not have this package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import module as torch_module

SCALARS = (bool, int, float, complex, str, type(None))
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)
NOT_NUMBERS = (
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation",
    "attn_implementation",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Entries of a configuration that no number depends on, or that an identity states by themselves."""
OF_TORCH = {*vars(torch.nn.Module()), *HOOKS, "forward", "__nnsight__"}
"""Attributes that every module has, or that nnsight adds: parameters, hooks and the mode are read elsewhere."""
OF_LOADING = {
    "name_or_path",
    "generation_config",
    "warnings_issued",
    "loss_type",
    "all_tied_weights_keys",
    "is_loaded_in_8bit",
    "is_loaded_in_4bit",
    "hf_device_map",
    "_is_hf_initialized",
    "_weight_conversions",
    "_use_kernels",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keys_to_ignore_on_save",
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_tp_plan",
    "_ep_plan",
    "_pp_plan",
    "_fsdp_plan",
    "_hf_peft_config_loaded",
    "peft_config",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
}
"""Attributes that say how transformers loads, saves or shares out a model: no number depends on them."""


def modules_of(root: Any, told: Callable[[Any], str]) -> dict[str, str]:
    """Path of each module to the name of its class and a hash of what else its numbers may depend on.

    Parameters
    ----------
    root : torch.nn.Module
        With a ``config``, which is told elsewhere where modules hold that very object.
    told : callable
        Says in text what a class, a function, or another object without plain data is.
    """
    around = [told(one) for one in global_hooks()]
    found = {}
    for path, one in root.named_modules(remove_duplicate=False):
        rows = [*rows_of(one, root.config, told), *([] if path else around)]
        found[path] = f"{type(one).__name__} {hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}"
    return found


def rows_of(module: Any, config: Any, told: Callable[[Any], str]) -> list[str]:
    """What is told of a module."""
    replaced = [one for one in (own_forward(module), class_forward(type(module))) if one is not None]
    rows = [told(type(module)), *(f"forward {told(one)}" for one in replaced)]
    for name in HOOKS:
        rows += [f"{name} {told(hook)}" for hook in vars(module)[name].values()]
    for name, value in sorted(vars(module).items()):
        if name in OF_TORCH or name in OF_LOADING or value is config or isinstance(value, torch.device):
            continue
        if hasattr(value, "to_diff_dict"):  # a configuration of its own
            value = without_names(configuration_of(value))
        rows.append(f"{name} {json.dumps(value, sort_keys=True) if is_plain_data(value) else told(value)}")
    return rows


def global_hooks() -> list[Any]:
    """Hooks on every module there is, but for those of torch itself, which count or watch and change nothing."""
    found = [one for name in GLOBAL_HOOKS for one in vars(torch_module)[name].values()]
    return [one for one in found if not getattr(one, "__module__", "").startswith("torch.")]


def is_plain_data(value: Any) -> bool:
    """Whether a value is made of numbers, texts and lists of them alone."""
    if isinstance(value, list | tuple):
        return all([is_plain_data(one) for one in value])
    if isinstance(value, dict):
        return all([isinstance(key, str) and is_plain_data(one) for key, one in value.items()])
    return type(value) in SCALARS


def own_forward(module: Any) -> Any:
    """The `forward` that stands in for that of the module's class; None where the class's own runs.

    nnsight puts an object of its own there, which knows what it runs, inside a function where that was replaced before.
    """
    forward = vars(module).get("forward")
    state = vars(module).get("__nnsight__")
    if state is not None and type(forward).__module__.startswith("nnsight."):
        forward = state.original
        if getattr(forward, "__module__", "").startswith("nnsight.") and getattr(forward, "__closure__", None):
            forward = forward.__closure__[0].cell_contents
    if getattr(forward, "__self__", None) is module:
        forward = forward.__func__
    return None if forward is type(module).forward else forward


def class_forward(kind: type) -> Any:
    """The `forward` of a class, where somebody put another in the place of the one that was written there."""
    owner = next((one for one in kind.__mro__ if "forward" in vars(one)), None)
    forward = None if owner is None else vars(owner)["forward"]
    if owner is None or getattr(forward, "__qualname__", "") in (
        f"{owner.__qualname__}.forward",
        "_forward_unimplemented",
    ):
        return None
    return forward


def is_bare(module: Any) -> bool:
    """Whether nothing stands between a module and its class: no hook, no parametrisation, no other forward.

    Its weights may be read then, if its class is one whose arithmetic is known.
    """
    return (
        own_forward(module) is None
        and class_forward(type(module)) is None
        and not any(vars(module)[name] for name in HOOKS[:2])
        and not global_hooks()
        and "_hf_hook" not in vars(module)
        and "parametrizations" not in vars(module)["_modules"]
    )


def is_linear(module: Any) -> bool:
    """Whether a module is a plain linear layer, so that rows of its weight give some of its outputs."""
    kind = type(module)
    named = (kind.__module__, kind.__name__)
    known = (("torch.nn.modules.linear", "Linear"), ("transformers.pytorch_utils", "Conv1D"))
    return named in known and is_bare(module)


def names_of(value: Any) -> str:
    """What a server says of a class, a function or an object: its name."""
    kind = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"


def weight_hash(module: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of the state of a module (first 16 hexadecimal digits)."""
    return tensors_hash(sorted(module.state_dict().items()))


def buffer_hash(module: torch.nn.Module) -> str:
    """The same over its buffers, those that no file holds too, and over parameters that its state leaves out."""
    state = {name: one for name, one in module.state_dict().items() if isinstance(one, torch.Tensor)}
    hidden = [
        (name, one)
        for name, one in module.named_parameters(remove_duplicate=False)
        if name not in state or state[name].data_ptr() != one.data_ptr()
    ]
    return tensors_hash(sorted([*module.named_buffers(remove_duplicate=False), *hidden]))


def tensors_hash(tensors: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 over names, shapes and bytes (first 16 hexadecimal digits)."""
    digest = hashlib.sha256()
    for name, tensor in (part for one in tensors for part in plain_parts(*one)):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(bytes_of(tensor))
        else:  # what a module of its own kind puts into its state
            digest.update(f"{name} {tensor!r}".encode())
    return digest.hexdigest()[:16]


def plain_parts(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """A tensor with its name; of one that is made of others, as quantised weights are, these."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, facts = tensor.__tensor_flatten__()
        yield f"{name} {type(tensor).__qualname__}", facts
        for inner in names:
            yield from plain_parts(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor


def bytes_of(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor, without a copy where it lies in order on this machine."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Meanwhile every module below `module` is in evaluation mode; then each has the mode it had.

    The flag alone is set; but where a class has a `train` of its own, which may do more, that is called.
    """
    modes = [(one, one.training) for one in module.modules() if hasattr(one, "training")]
    special = [one for one, training in modes if training and type(one).train is not torch.nn.Module.train]
    for one in special:
        one.train(False)
    for one, _ in modes:
        if one.training:  # to read is cheaper than to set, which torch looks at
            one.training = False
    try:
        yield
    finally:
        for one in special:
            one.train(True)
        for one, training in modes:
            if one.training != training:
                one.training = training


def configuration_of(config: Any) -> str:
    """A configuration as JSON text, without the place it was read from."""
    found = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "_commit_hash")}
    return json.dumps(
        found, sort_keys=True, default=lambda one: sorted(map(str, one)) if isinstance(one, set) else str(one)
    )


def without_names(configuration: str) -> dict[str, Any]:
    """The entries of a configuration that numbers may depend on."""
    return {key: value for key, value in json.loads(configuration).items() if key not in NOT_NUMBERS}
