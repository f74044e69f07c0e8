"""Open a model: a shipped name, a Hub id, a local folder, or a module in memory; here, or on a server."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.modeling.transformers import TransformersModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import DeclarationError, ModelError, choices, whole
from . import selfcheck
from .models import architectures
from .models.checkpoints import check_step, step_of_revision, weights_at
from .models.family import Family, check_fits, check_quantised, family_of, replaced_in, why_called
from .models.finding import find_parts
from .models.locate import locate, shipped, why
from .models.model import Model
from .models.opening import check_python, options_of
from .models.turns import making, turn_of
from .run.backend import LocalBackend

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BUFFERS = (".attn.bias", ".attention.bias", ".masked_bias", ".rotary_emb.inv_freq")
"""Ends of names of masks and frequencies, which older files hold beside the weights, and models make themselves."""


def load(
    source: str | Path | PreTrainedModel,
    *,
    revision: str | None = None,
    step: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    tokenizer: Any = None,
    remote: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """Open a causal language model.

    Its blocks are *laid open*, where a table describes its family and gives the model's own logits on a short prompt:
    headwise computes them part by part. Else they are *called*: the model's own blocks run, and are read and written
    where its modules take and give; these are found by themselves. ``print(model)`` says which and why, and
    ``model.sites`` lists what can be read and written.

    Parameters
    ----------
    source : str, Path or PreTrainedModel
        A shipped name (``"words-2l"``), a Hugging Face Hub id (``"gpt2"``, ``"EleutherAI/pythia-70m"``), a folder
        with ``config.json``, weights and tokenizer, or a Hugging Face module in memory, which is used as it is: nothing
        of it is changed but that nnsight takes the place of each ``forward`` to hear what passes through. A folder goes
        before a Hub id of the same name.
    revision : str, optional
        Branch, tag or commit on the Hub; only for a Hub id.
    step : int, optional
        Opens the model as it was after so many steps of its training: a shipped name, a folder with
        ``checkpoints.safetensors``, or Pythia on the Hub (``step=1000`` is ``revision="step1000"``).
        `headwise.checkpoint_steps` says which steps there are.
    device : str
        ``"auto"`` (the GPU where there is one, else the CPU; a module in memory stays where it is), ``"cpu"``,
        ``"cuda"``, ``"cuda:1"``, ``"mps"``. On another device than its own, a module in memory is copied.
    dtype : {"float32", "float64", "bfloat16", "float16"}, optional
        float32 when left out; a module in memory keeps its own, and is copied where another one is asked for.
    tokenizer : PreTrainedTokenizerBase, optional
        Replaces the one in the folder. A module in memory needs one for prompts that are text, and for BOS; without it,
        token ids stand as words.
    remote : bool
        Leave the weights where they are: what is asked of the model runs on NDIF (or on the server that nnsight is set
        to, by ``NDIF_HOST``), and only metrics come back. The server says which number format it holds them in.
    trust_remote_code : bool
        Run the Python code that the folder or the repository brings with its model (``auto_map``), as you and with all
        that you may do; workers run it too. False refuses such a model, and no code of it runs.

    Returns
    -------
    Model

    Raises
    ------
    DeclarationError
        `source` is nothing that can be traced, such as a compiled module, or an option does not go with it.
    ModelError
        The model cannot be found or read whole, or neither is its family known nor are its parts found.
    UnknownNameError
        There is no checkpoint of `step`; the text lists those that exist.

    Examples
    --------
    >>> hw.load("words-2l", device="cpu")
    <Model words-2l (shipped): gpt2, 2 layers of 8 heads, float32 on cpu, runs here>
    >>> hw.load("words-2l", step=512, device="cpu")
    <Model words-2l (shipped, step 512): gpt2, 2 layers of 8 heads, float32 on cpu, runs here>
    """
    check_python()
    if tokenizer is not None and not all(hasattr(tokenizer, one) for one in ("encode", "decode", "get_vocab")):
        raise DeclarationError(
            f"tokenizer={tokenizer!r} is no tokenizer: give one of transformers, AutoTokenizer.from_pretrained(...)"
        )
    step = None if step is None else whole(step, "step")
    if remote:
        if isinstance(source, torch.nn.Module) or device != "auto" or dtype is not None:
            raise DeclarationError("remote=True takes the name of a model: a server has its own copy, device and dtype")
        name, where, place, revision = _located(str(source), revision, step)
        if step is not None and revision is None:
            raise DeclarationError(f"step={step} with remote=True is for a Hub id: {name} is {place}")
        from .remote.backend import open_model

        return open_model(name, where, revision or place, tokenizer, trust_remote_code)
    _device(device)
    if dtype is not None and dtype not in DTYPES:
        raise DeclarationError(f"dtype {dtype!r}: possible are {choices(DTYPES)}")
    if isinstance(source, torch.nn.Module) or not isinstance(source, str | Path):
        module = _plain_module(source)
        for option, value in (("revision", revision), ("step", step)):
            if value is not None:
                raise DeclarationError(f"{option}={value!r} is for a name or folder: a module in memory is as it is")
        return _in_memory(module, device, dtype, tokenizer)
    name, where, place, revision = _located(str(source), revision, step)
    opened = name if place in ("shipped", "main") else str(Path(where).resolve())
    step = step_of_revision(revision) if place == "main" else step
    trusted = bool(trust_remote_code)
    beside = None if place == "main" else step
    module, tokenizer = _read(name, where, revision, beside, DTYPES[dtype or "float32"], tokenizer, trusted)
    module = module.to(_device(device))
    family = _family(module, name, own=True)
    return _handle(module, name, revision or place, step, family, tokenizer, opened, trusted)


def _family(module: Any, name: str, own: bool = False) -> Family:
    """The family of a model, or what is found in it where no table describes it.

    A module that headwise itself has read is its `own`: where its blocks are called, its attention is made one that
    gives its weights, if it has one.
    """
    check_quantised(module, name, own)
    reason, unfit = why_called(module.config), None
    if not reason:
        family = family_of(module.config, name)
        try:
            check_fits(family, module, name)
            if not (reason := replaced_in(family, module)):
                return family
        except ModelError as error:
            if family not in architectures.TABLES:
                raise
            reason, unfit = f"the table of {family.name} does not fit its modules", error
    try:
        with turn_of(module):
            if own:
                with suppress(Exception):  # whatever a model raises that has no such attention
                    module.set_attn_implementation("eager")
            return find_parts(module, name, reason)
    except ModelError as error:
        found = str(error).removeprefix(f"{name}: ")
        raise unfit or ModelError(
            f"{name}: {reason}, and its parts are not found without one: {found}. A family is a table of parts, and "
            f"print(hw.Family.template({module.config.model_type!r})) shows one to start from"
        ) from None


def _located(source: str, revision: str | None, step: int | None) -> tuple[str, str, str, str | None]:
    """What `locate` says of a model, and the revision to open; checks both and the step."""
    name, where, place = locate(source)
    if revision is not None and place != "main":
        raise DeclarationError(f"revision={revision!r} is for a Hub id: {name} is {place}")
    if step is not None:
        if revision is not None:
            raise DeclarationError(f"step={step!r} and revision={revision!r} both say which weights: give one of them")
        check_step(source, step)
        revision = f"step{step}" if place == "main" else None
    return name, where, place, revision


def _handle(
    module: Any,
    name: str,
    revision: str,
    step: int | None,
    family: Family,
    tokenizer: Any,
    source: str | None,
    trusted: bool = False,
) -> Model:
    with turn_of(module, mode=False):  # nnsight puts itself in front of modules that a call may be using
        traced = TransformersModel(module, task="text-generation", tokenizer=tokenizer)
    shape = family.shape(module.config, module)
    made = Model(name, revision, family, shape, tokenizer, traced, source, trusted, step, backend_type=LocalBackend)
    return _as_it_computes(made) if family in architectures.TABLES else made


def _as_it_computes(model: Model) -> Model:
    """The model; where what its table says gives other logits than its own, and its parts are found, with these."""
    with turn_of(model.module):
        if selfcheck.off_by(model) <= 1:
            return model
        reason = f"the table of {model.family.name} gives other logits than the model"
        try:
            family = find_parts(model.module, model.name, reason)
            called = replace(model, family=family, shape=family.counts)
            return model if selfcheck.failures(called) else called
        except Exception:  # whatever a strange model raises; the check of its table says what is wrong, before a number
            return model


def _in_memory(module: PreTrainedModel, device: str, dtype: str | None, tokenizer: Any) -> Model:
    """The handle of a module in memory, or of a copy of it in another number format or on another device."""
    name = module.config.name_or_path or type(module).__name__
    spread = sorted({str(one) for one in (getattr(module, "hf_device_map", None) or {}).values()})
    if len(spread) > 1:
        raise ModelError(
            f"{name} is spread over the devices {choices(spread)} (device_map): headwise runs a model on one device, "
            'so load it with device_map={"": 0}, or leave it on NDIF with remote=True'
        )
    found = {one.dtype for one in module.parameters() if one.is_floating_point()}
    place = next(module.parameters()).device
    target = place if device == "auto" else _device(device)
    moves = target.type != place.type or (target.index is not None and target.index != place.index)
    if moves or (dtype is not None and found != {DTYPES[dtype]}):
        with turn_of(module, mode=False):  # in a call its modes are not those that it has
            module = copy.deepcopy(module)
        module = module.to(device=target, dtype=None if dtype is None else DTYPES[dtype])
    tokenizer = tokenizer if tokenizer is not None else _id_tokenizer(module.config.vocab_size)
    return _handle(module, name, "memory", None, _family(module, name), tokenizer, None)


def _plain_module(source: Any) -> PreTrainedModel:
    """`source` as a module that can be traced, or an error that says what to give instead."""
    kind = type(source).__name__
    if hasattr(source, "_orig_mod") or getattr(source, "_compiled_call_impl", None) is not None:
        raise DeclarationError(
            f"{kind} is compiled, and what is compiled cannot be traced: give the module that it was made from "
            "(model._orig_mod of torch.compile; after model.compile(), a new one)"
        )
    if isinstance(source, Envoy):
        raise DeclarationError(f"{kind} is a model of nnsight: give what it wraps, load(model._module)")
    if hasattr(source, "get_base_model"):
        if any(one.is_prompt_learning for one in source.peft_config.values()):
            raise DeclarationError(
                f"{kind} is a model of peft that puts something in front of prompts: headwise runs adapters that sit "
                "in modules, as LoRA does"
            )
        source = source.get_base_model()  # which has the adapter's modules in it
    if not isinstance(source, PreTrainedModel):
        raise DeclarationError(
            f"cannot load {kind}: give a shipped name ({choices(shipped())}), a Hub id, a folder, or a causal language "
            "model of transformers"
        )
    if any(one.is_inference() for one in source.parameters()):
        raise DeclarationError(
            f"{kind} was made under torch.inference_mode, where its weights can have no gradient: make it outside, or "
            "give load(copy.deepcopy(model))"
        )
    return source


def _read(
    name: str, where: str, revision: str | None, step: int | None, dtype: torch.dtype, tokenizer: Any, trusted: bool
) -> tuple[PreTrainedModel, Any]:
    """Module and tokenizer of a folder or Hub id, or one line that says why not.

    With a `step`, weights are those of the checkpoint beside the others.
    """
    options = options_of(name, where, revision, trusted, tokenizer=tokenizer is None, dtype=dtype)
    try:
        tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(where, **options)
        adapters = {"local_files_only": options.get("local_files_only", False)}
        with making(), _quiet():
            module, report = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, output_loading_info=True, adapter_kwargs=adapters, **options
            )
        if step is not None:
            weights = weights_at(where, step)
            module.load_state_dict(weights, strict=False)
            own = {key for key, _ in module.named_parameters()}  # each once, whatever it is tied to
            report |= {"missing_keys": own - weights.keys(), "unexpected_keys": weights.keys() - own}
    except ModelError:
        raise
    except Exception as error:  # whatever a broken file makes the loaders raise, the user gets one line
        raise ModelError(why(name, where, error)) from error
    for what, words in (("missing_keys", "lack"), ("unexpected_keys", "have, beyond the configuration,")):
        keys = sorted(key for key in map(str, report[what]) if what == "missing_keys" or not key.endswith(BUFFERS))
        if keys:
            raise ModelError(f"the weights of {name} {words} {len(keys)} tensors ({', '.join(keys[:3])}): is it whole?")
    if len(tokenizer) < 2:
        raise ModelError(f"{name} has no tokenizer: save one beside the weights, or give hw.load its tokenizer=")
    module.config.pad_token_id = None  # prompts are never padded, so no token stands for padding
    return module, tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar that transformers draws, and its table of tensors that do not fit: `_read` says which matter."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        found = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        raise ModelError(f"device {name!r} cannot be used here: possible are auto, {choices(found)}") from error
    return device


def _id_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the token ids, for modules that have none."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {str(token): token for token in range(size)} | {"<unk>": size}  # unknown words get an id no model has
    table = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=table, unk_token="<unk>")
