"""What runs of a plan, here and on a server: a server gets a program for one session, and gives back numbers only.

Plain functions, as in `traces`: they run where torch and nnsight are but this package is not. A function that takes a
``program``, a dict of plain data and of such functions, is a whole job of a server. The local backend calls the
functions below that take ``parts``, one trace at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..head_weights import (
    output_weights,
    score_weights,
)
from ..logits import with_base_logits
from ..rows import no_tokens
from ..structure import configuration_of, modules_of, names_of
from .gradients import attribution, edge_estimates
from .inside import capture, direct_of, read_in_batches, read_in_pass, weighted_sums
from .planned_pass import resolve_values
from .traces import (
    as_it_is,
    by_itself,
    lens,
    misshapen,
    opened,
    planned,
    read,
    run_with_writes,
    short_run,
    sketch,
)

if TYPE_CHECKING:
    from ..specs import (
        CaptureProgram,
        CheckProgram,
        ChunkSpec,
        DirectProgram,
        LensProgram,
        LogitsSpec,
        ModelDescription,
        ModelParts,
        PassSpec,
        Points,
        Program,
        ReadSite,
        ReferenceRead,
        RowChange,
        RunCache,
        RunSpec,
        SumsProgram,
        SweepProgram,
        WeightsProgram,
    )

SAMPLE = 4096
"""Numbers of each tensor of weights that a fingerprint looks at."""
MODULUS = 2**61 - 1


def answered(root: Any, program: Program) -> Any:
    """What ``program["job"]`` gives, and a sketch of what the model that gave it computes on ``program["prompt"]``."""
    found = program["job"](root, program)
    parts, device = where(root, program["parts"])
    return {**found, "fingerprint": sketch(short_run(root, parts, program["prompt"].to(device)))}


def passes(root: Any, program: SweepProgram) -> Any:
    """Runs as they are, then the passes that start from them, chunk by chunk."""
    parts, device = where(root, program["parts"])
    program = moved(program, device)
    found = []
    for chunk in program["chunks"]:
        cache, values = run_unmodified(
            root, parts, chunk["runs"], reference_of(root, parts, chunk), program["compares"]
        )
        base = values[chunk["runs"][0]["name"]]
        found += [reduced(one, program["positions"]) for one in values.values()]
        for one in chunk["passes"]:
            spec = one["spec"]
            made = run_pass(root, parts, cache, spec, one["points"], device)
            found.append(reduced(with_all_positions(made, base, spec["conditions"]), program["positions"]))
    return in_one_tensor(found)


def estimates(root: Any, program: SweepProgram) -> Any:
    """Runs as they are, then what every condition changes of each metric's mean, estimated from gradients."""
    parts, device = where(root, program["parts"])
    if parts["apart"]:
        raise RuntimeError("this server runs jobs apart from the weights, where nothing has a gradient: use exact")
    program = moved(program, device)
    found = []
    for chunk in program["chunks"]:
        cache, values = run_unmodified(
            root, parts, chunk["runs"], reference_of(root, parts, chunk), program["compares"]
        )
        found += [reduced(one, program["positions"]) for one in values.values()]
        if "edges" in chunk:
            found.append(edge_estimates(root, parts, cache, chunk["edges"], device))
        else:
            found.append(attribution(root, parts, cache, chunk["estimate"], device))
    return in_one_tensor(found)


def reference_of(root: Any, parts: ModelParts, chunk: ChunkSpec) -> ReferenceRead:
    """What is read of the reference draw of a chunk; nothing where it has none."""
    draw = chunk["reference"]
    if draw is None:
        return {"alike": {}, "whole": []}
    points = draw["points"]
    return {
        "alike": read_in_batches(root, parts, draw["tokens"], points) if len(draw["tokens"]) else {},
        "whole": [read_in_batches(root, parts, tokens, points) for tokens in draw["whole"]],
    }


def run_unmodified(
    root: Any,
    parts: ModelParts,
    runs: list[RunSpec],
    reference: ReferenceRead,
    compares: bool,
    refusal: type[Exception] = ValueError,
) -> tuple[RunCache, dict[str, dict[str, torch.Tensor]]]:
    """Run every run of a chunk without intervention.

    Parameters
    ----------
    root : nnsight model
    parts : ModelParts
    runs : list of RunSpec
        The base run first.
    reference : ReferenceRead
        What was read of the reference draw.
    compares : bool
        Whether a kernel compares with the logits of the base run.
    refusal : type of Exception
        Is raised where a kernel gives values of the wrong shape.

    Returns
    -------
    tuple of RunCache and dict
        What was read; and for each run the values by reader, ``(example, scored)`` of
        logits and ``(example, layer, head)`` of patterns.

    Raises
    ------
    Exception
        Of type `refusal`: a kernel gives values of the wrong shape.
    """
    sources: dict[str, Points] = {}
    found: dict[str, dict[str, torch.Tensor]] = {}
    logits = None
    for run in runs:
        spec: LogitsSpec = {**run["logits"], "apart": parts["apart"]}
        compared: RunSpec = {**run, "logits": with_base_logits(spec, logits)}
        points, values, made = as_it_is(root, parts, compared, compares and logits is None)
        if wrong := misshapen(parts, run, values):
            raise refusal(wrong)
        sources[run["name"]] = points
        if not found:
            logits = made
            cache: RunCache = {
                "tokens": run["tokens"],
                "base": points,
                "sources": sources,
                "reference": reference,
                "pattern_kernels": run["pattern_kernels"],
                "logits": with_base_logits(spec, logits),
                "base_attended": {kernel["name"]: values[kernel["name"]] for kernel in run["pattern_kernels"]},
            }
        found[run["name"]] = values
    return cache, found


def run_pass(
    root: Any, parts: ModelParts, cache: RunCache, spec: PassSpec, points: dict[ReadSite, ReadSite], device: Any
) -> dict[str, torch.Tensor]:
    """Run one planned pass.

    Parameters
    ----------
    root, parts
        As for `run_unmodified`.
    cache : RunCache
        What that read.
    spec : PassSpec
    points : dict of ReadSite to ReadSite
        What the pass takes from the base run: its own name, and that of the model's own pass.
    device : torch.device
        Of the activations.

    Returns
    -------
    dict
        Values by reader, ``(condition * example, scored from the pass's first position on)`` of logits and ``(condition
        * example, layer, head)`` of patterns.
    """
    base, resolved = {site: cache["base"][own] for site, own in points.items()}, resolve_values(spec, cache)
    if spec["inside"] is not None:  # the kernels are for what is read
        resolved = {**resolved, "logits": {**resolved["logits"], "kernels": []}}
    if spec["first"] > spec["layers"]:  # no condition changes what is read
        return read_in_pass(root, parts, cache, resolved, {}, device)
    values, kept = planned(root, parts, base, resolved, device)
    return {**values, **read_in_pass(root, parts, cache, resolved, kept, device)}


def with_all_positions(
    values: dict[str, torch.Tensor], base: dict[str, torch.Tensor], conditions: int
) -> dict[str, torch.Tensor]:
    """Values of a pass, the scored positions before its first one as in the base run.

    Those of logits become ``(condition * example, scored)``; those of patterns, ``(row, layer, head)``, stay as they
    are. `base` holds the base run's values of these examples.
    """
    found = {}
    for name, value in values.items():
        missing = base[name].shape[1] - value.shape[1] if name in base and value.dim() == 2 else 0
        before = [base[name].repeat(conditions, 1)[:, :missing]] if missing else []
        found[name] = torch.cat([*before, value], 1) if missing else value
    return found


def reduced(values: dict[str, torch.Tensor], positions: bool) -> dict[str, torch.Tensor]:
    """Values as a server gives them: of logits the mean over scored positions, ``(row, 1)``, unless all are wanted.

    The mean is NumPy's, which rounds as it does where results are made.
    """
    found = {}
    for name, value in values.items():
        full = value.float()
        if full.dim() == 2 and not positions:
            full = torch.from_numpy(full.cpu().numpy().mean(axis=-1, keepdims=True))
        found[name] = full
    return found


def in_one_tensor(found: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Many small tensors as one, with their names and shapes."""
    flat = [one.detach().float().cpu().flatten() for values in found for one in values.values()]
    return {
        "numbers": torch.cat(flat) if flat else torch.zeros(0),
        "shapes": [[[name, list(one.shape)] for name, one in values.items()] for values in found],
    }


def activations(root: Any, program: CaptureProgram) -> Any:
    """The values of sites, as `capture` takes them, for each group of prompts, and nothing else."""
    parts, device = where(root, program["parts"])
    out_of = output_weights(root, parts, program["sites"])
    program = moved(program, device)
    return in_one_tensor([capture(root, parts, tokens, program["sites"], out_of) for tokens in program["tokens"]])


def sums(root: Any, program: SumsProgram) -> Any:
    """What `weighted_sums` gives, and nothing else."""
    parts, device = where(root, program["parts"])
    tokens, weights = moved([program["tokens"], program["weights"]], device)
    return in_one_tensor([weighted_sums(root, parts, tokens, weights, program["sites"])])


def direct(root: Any, program: DirectProgram) -> Any:
    """What each part of the model adds to a linear function of the logits, for each group of prompts."""
    parts, device = where(root, program["parts"])
    program = moved(program, device)
    return in_one_tensor([{"shares": direct_of(root, parts, group)} for group in program["groups"]])


def lenses(root: Any, program: LensProgram) -> Any:
    """What `traces.lens` gives of each run."""
    parts, device = where(root, program["parts"])
    runs: list[RunSpec] = moved(program["runs"], device)
    for run in runs:
        run["logits"]["apart"] = parts["apart"]
    return in_one_tensor([lens(root, parts, run, program["heads"]) for run in runs])


def scores_of_weights(root: Any, program: WeightsProgram) -> Any:
    """What ``program["score"]`` makes of the weights, which stay here."""
    parts, _ = where(root, program["parts"])
    found = score_weights(root, parts, program["vocabulary"], program["score"])
    return {"table": torch.from_numpy(found)}


def facts(root: Any, program: Program) -> Any:
    """What this copy of the model is: number format, device, configuration, modules, and samples of its numbers."""
    weights = sorted(root._module.state_dict().items())
    if any([weight.is_meta for _, weight in weights]):  # its format is the configuration's, and not the server's
        like = where(root, program["parts"])[0]["like"]
        return {"dtype": str(like.dtype)[6:], "device": "", "weights": [], "buffers": [], "modules": {}}
    buffers = sorted(root._module.named_buffers())
    return {
        "dtype": str(weights[0][1].dtype)[6:],
        "device": weights[0][1].device.type,
        "weights": sampled(weights),
        "buffers": sampled(buffers),
        "modules": modules_of(root._module, names_of),
        "configuration": configuration_of(root._module.config),
        "attention": str(root._module.config._attn_implementation),
    }


def sampled(tensors: list[tuple[str, torch.Tensor]]) -> list[Any]:
    """Names, shapes, formats and a sum over a sample of the bytes of tensors."""
    prints = []
    for name, weight in tensors:
        flat = weight.detach().reshape(-1)
        chosen = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).long()
        sample = flat[chosen.to(flat.device)].cpu().contiguous().view(torch.uint8).long()
        order = torch.arange(1, sample.numel() + 1)
        total = int((sample * (order * 2654435761 % 1000003 + 1)).sum() % MODULUS)
        prints.append([name, list(weight.shape), str(weight.dtype), total])
    return prints


def check(root: Any, program: CheckProgram) -> Any:
    """The passes of a self-check, with the model's own pass and the family's own functions beside them."""
    planned_here = passes(root, program)
    parts, device = where(root, program["parts"])
    rows, writes, scored = moved([program["rows"], program["writes"], program["scored"]], device)
    own, deviation, off = own_pass(
        root, parts, rows, writes, scored, program["wanted"], program["layers"], program["probe"], device
    )
    return {"planned": planned_here, "own": own, "deviation": deviation, "off": off}


def own_pass(
    root: Any,
    parts: ModelParts,
    rows: torch.Tensor,
    writes: dict[ReadSite, list[RowChange]],
    scored: list[int],
    wanted: list[ReadSite],
    layers: list[int],
    probe: Any,
    device: Any,
) -> tuple[torch.Tensor, float, list[Any]]:
    """What a self-check compares planned passes with.

    Parameters
    ----------
    root, parts
        As for `run_unmodified`.
    rows : Tensor (row, position)
        Tokens; the first row is without writes.
    writes : dict
        What is added in the model's own pass, as `traces.run_with_writes` takes it.
    scored : list of int
        Positions of the logits.
    wanted : list of ReadSite
        What `traces.by_itself` needs of the first row.
    layers : list of int
        Layers whose parts are looked at.
    probe : callable
        Gives a number for the logits of each row and position.
    device : torch.device

    Returns
    -------
    tuple of (Tensor, float, list)
        Probes ``(row, scored)``, float32 on the CPU; the deviation of the logits; and what `traces.by_itself` gives.
    """
    logits, deviation = run_with_writes(root, parts, rows, writes, scored)
    points = read_in_batches(root, parts, rows[:1], wanted) if wanted else {}
    off = by_itself(root, parts, points, layers, device)
    return probe(logits).float().cpu(), float(deviation), off


def where(root: Any, described: ModelDescription) -> tuple[ModelParts, torch.device]:
    """The handles of a model, and the device on which its activations are."""
    parts: ModelParts = {**opened(root, described), "apart": next(iter(root._module.parameters())).is_meta}
    like = read(root, parts, no_tokens("cpu"), {(0, "resid_pre")})[(0, "resid_pre")]
    return {**parts, "like": like}, like.device


def moved(value: Any, device: Any) -> Any:
    """Plain data with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(one, device) for key, one in value.items()}
    if isinstance(value, list):
        return [moved(one, device) for one in value]
    if isinstance(value, tuple):
        return tuple([moved(one, device) for one in value])
    return value


def do_nothing(root: Any, program: dict[str, Any]) -> dict[str, Any]:
    """What a marker does on the server."""
    return {}
