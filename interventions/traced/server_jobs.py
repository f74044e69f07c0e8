"""What runs of a plan, here and on a server: a server gets a program for one session, and gives back numbers only.

Plain functions, as in `traces`: they run where torch and nnsight are but this package is not. A function that takes a
``program``, a dict of plain data and of such functions, is a whole job of a server. The local backend calls the
functions below that take ``parts``, one trace at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .activations import pattern_at, pattern_between, split_heads
from .configuration import configuration_of
from .gradients import attribution
from .head_weights import (
    ends_made,
    ends_read,
    neurons_made,
    neurons_read,
    vector_of,
    weights_made,
    weights_read,
)
from .logits import direct_shares, shares_of_rows, with_base_logits
from .projections import is_readable
from .rows import write_into
from .structure import modules_of, names_of
from .traces import (
    as_it_is,
    by_itself,
    lens,
    lens_of_rows,
    logits_of,
    misshapen,
    no_tokens,
    opened,
    planned,
    read,
    run_with_writes,
    short_run,
    sketch,
)
from .values import resolve_values

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .specs import (
        CapturedSite,
        CaptureProgram,
        CheckProgram,
        ChunkSpec,
        DirectProgram,
        DirectSpec,
        LensProgram,
        LogitsSpec,
        ModelDescription,
        ModelParts,
        NormsProgram,
        PassSpec,
        Points,
        Program,
        ReadSite,
        ReferenceRead,
        ResolvedPass,
        RowChange,
        RunCache,
        RunSpec,
        SumsProgram,
        SweepProgram,
        TensorWrite,
        WeightsProgram,
        WeightsRead,
        WriteSite,
    )

SAMPLE = 4096
"""Numbers of each tensor of weights that a fingerprint looks at."""
MODULUS = 2**61 - 1
AT_ONCE = 64
"""Prompts that are read together."""
FEW = 8
"""Prompts of which every part is read together."""


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


def read_in_pass(
    root: Any, parts: ModelParts, cache: RunCache, spec: ResolvedPass, kept: dict[WriteSite, Any], device: Any
) -> dict[str, torch.Tensor]:
    """The values of the sites that a pass reads, by name: ``(condition * example, ...)``.

    Rows that did not join before a site, and positions that were not computed, are those of the base run.

    Parameters
    ----------
    root, parts, cache, device
        As for `run_pass`.
    spec : ResolvedPass
    kept : dict
        WriteSite to what is there, of the rows at work; None, or nothing, where there is none.

    Returns
    -------
    dict
        Name of a site to its value.
    """
    if spec["inside"] is not None:
        return inside_of(root, parts, cache, spec, kept, device)
    found, out_of = {}, output_weights(root, parts, spec["reads"])
    for site in spec["reads"]:
        where, whole = site["planned"], all_rows(cache, spec, kept, site)
        made = shaped(whole, site, out_of, spec["writes"].get(where["added"], []) if where["added"] else [])
        if site["kind"] == "logits":
            made = logits_of(root, parts, made, site["tokens"], device)
        found[where["name"]] = made
    return found


def all_rows(cache: RunCache, spec: ResolvedPass, kept: dict[WriteSite, Any], site: CapturedSite) -> torch.Tensor:
    """The columns of a site in every row of a pass, at all positions, before what is added to it afterwards.

    Parameters
    ----------
    cache, spec, kept
        As for `read_in_pass`.
    site : CapturedSite
        One that the pass reads.

    Returns
    -------
    tensor (row, position, column)
        Of a pattern ``(row, head, query, key)``.
    """
    where, before = site["planned"], cache["base"][site["site"]]
    value = kept.get(where["at"]) if where["at"] is not None else None
    at = spec["out"] if where["scored"] else slice(spec["start"], spec["stop"])
    if site["pattern"] is not None:
        whole = pattern_between(before, **site["pattern"]).repeat(spec["conditions"], 1, 1, 1)
        if value is not None:
            whole[: len(value), :, at, : spec["stop"]] = value[:, where["columns"]].to(whole.dtype)
    else:
        whole = before[..., site["columns"]].repeat(spec["conditions"], 1, 1)
        if value is not None:
            whole[: len(value), at] = value[..., where["columns"]].to(whole.dtype)
    return whole


def inside_of(
    root: Any, parts: ModelParts, cache: RunCache, spec: ResolvedPass, kept: dict[WriteSite, Any], device: Any
) -> dict[str, torch.Tensor]:
    """What is made of the sites that a pass reads: shares of parts, or what the logit lens says.

    Parameters
    ----------
    root, parts, cache, spec, kept, device
        As for `read_in_pass`.

    Returns
    -------
    dict
        ``shares``, ``(row, source + 1, scored)``, see `logits.shares_of_rows`; or for each kernel, with `` inside``
        behind its name, ``(row, layer + 1, scored)`` or ``(row, layer, head, scored)``.
    """
    asked = spec["inside"]
    assert asked is not None
    points: Points = {}
    added: dict[int, torch.Tensor] = {}  # by layer, what heads are made to write, (row, scored, head, d_model)
    for site in spec["reads"]:
        (layer, _), more = site["site"], site["planned"]["added"]
        whole = all_rows(cache, spec, kept, site)
        if more is not None:
            whole = write_into(whole, spec["writes"].get(more, []))
        points[site["site"]] = whole[:, asked["scored"]]
        of_heads = spec["writes"].get((layer, "head_out read"), []) if site["kind"] == "heads" else []
        if of_heads:
            blank = whole.new_zeros(*whole.shape[:2], parts["heads"], parts["d_model"])
            added[layer] = write_into(blank, of_heads)[:, asked["scored"]]
    if asked["direct"] is None:
        return lens_of_rows(root, parts, cache["logits"], points, added, spec, device)
    check_linear(parts)
    with torch.no_grad():
        out_of = {layer: weights_of(root, parts, layer)[3] for layer in range(parts["layers"])}
        before = {at: value[:, asked["scored"]] for at, value in cache["base"].items() if at[1] in ("z", "attn_out")}
        return {"shares": shares_of_rows(parts, points, before, added, out_of, asked["direct"], device)}


def read_in_batches(root: Any, parts: ModelParts, tokens: torch.Tensor, wanted: Iterable[ReadSite]) -> Points:
    """Read points of many prompts in passes without intervention, `AT_ONCE` prompts at a time.

    Parameters
    ----------
    root, parts
        As for `run_unmodified`.
    tokens : Tensor (example, position)
    wanted : iterable of ReadSite

    Returns
    -------
    dict
        ReadSite to a tensor ``(example, position, width)``.
    """
    points, starts = set(wanted), range(0, len(tokens), AT_ONCE)
    batches = [read(root, parts, tokens[start : start + AT_ONCE], points) for start in starts]
    return {at: torch.cat([batch[at] for batch in batches]) for at in points}


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


def output_weights(root: Any, parts: ModelParts, sites: list[CapturedSite]) -> dict[ReadSite, Any]:
    """``W_O``, ``(head, d_head, d_model)``, of the layer of each site that is what heads write."""
    wanted = sorted({site["site"] for site in sites if site["kind"] == "head_out"})
    return {(layer, point): weights_of(root, parts, layer)[3] for layer, point in wanted}


def capture(
    root: Any, parts: ModelParts, tokens: torch.Tensor, sites: list[CapturedSite], out_of: dict[ReadSite, Any]
) -> dict[str, torch.Tensor]:
    """The values of sites, by their number.

    Parameters
    ----------
    root, parts
        As for `run_unmodified`.
    tokens : Tensor (example, position)
    sites : list of CapturedSite
    out_of : dict
        As `output_weights` gives it.

    Returns
    -------
    dict
        Number of a site, as text, to its value, in the shape that its component states.
    """
    points = read_in_batches(root, parts, tokens, [site["site"] for site in sites])
    return {str(number): value_at(points, site, out_of) for number, site in enumerate(sites)}


def value_at(points: Points, site: CapturedSite, out_of: dict[ReadSite, Any]) -> torch.Tensor:
    """The value of a site, in the shape that its component states."""
    value = points[site["site"]]
    if site["pattern"] is not None:
        return shaped(pattern_between(value, **site["pattern"]), site, out_of, [])
    return shaped(value[..., site["columns"]], site, out_of, [])


def shaped(
    value: torch.Tensor, site: CapturedSite, out_of: dict[ReadSite, Any], added: list[TensorWrite]
) -> torch.Tensor:
    """The columns of a site, at all positions, in the shape that its component states; at its own positions.

    Parameters
    ----------
    value : tensor (row, position, column)
        Of a pattern ``(row, head, query, key)``.
    site : CapturedSite
    out_of : dict
        As `output_weights` gives it.
    added : list of TensorWrite
        What is written to it after it was made.

    Returns
    -------
    tensor (row, ...)
    """
    head, at = site["head"], site["positions"]
    if site["pattern"] is not None:
        pattern = value if head is None else value[:, 0]
        return pattern if at is None else pattern[..., at, :]
    if site["kind"] == "head_out":
        weight = out_of[site["site"]].to(value.device)
        value = torch.einsum("ephd,hdm->ephm", split_heads(value, site["heads"]), weight)
        value = write_into(value, added)
        value = value if head is None else value[:, :, head]
    elif site["kind"] == "heads":
        value = split_heads(value, site["heads"]) if head is None else value
    elif site["kind"] == "neuron":
        value = value.squeeze(-1)
    else:
        value = write_into(value, added)
    return value if at is None else value[:, at]


def sums(root: Any, program: SumsProgram) -> Any:
    """What `weighted_sums` gives, and nothing else."""
    parts, device = where(root, program["parts"])
    tokens, weights = moved([program["tokens"], program["weights"]], device)
    return in_one_tensor([weighted_sums(root, parts, tokens, weights, program["sites"])])


def weighted_sums(
    root: Any,
    parts: ModelParts,
    tokens: list[torch.Tensor],
    weights: list[torch.Tensor],
    sites: list[CapturedSite],
) -> dict[str, torch.Tensor]:
    """The values of sites times a weight for each position, summed over groups, examples and positions.

    Parameters
    ----------
    root, parts
        As for `run_unmodified`.
    tokens, weights : list of Tensor (example, position)
        By group.
    sites : list of CapturedSite

    Returns
    -------
    dict
        Number of a site, as text, to its sum, float64 on the CPU.
    """
    out_of, wanted = output_weights(root, parts, sites), [site["site"] for site in sites]
    found: dict[str, Any] = {str(number): 0.0 for number in range(len(sites))}
    for ids, by_position in zip(tokens, weights, strict=True):
        for start in range(0, len(ids), AT_ONCE):
            points = read(root, parts, ids[start : start + AT_ONCE], set(wanted))
            each = by_position[start : start + AT_ONCE].cpu().double()
            for number, site in enumerate(sites):
                value = value_at(points, site, out_of).cpu().double()
                found[str(number)] = found[str(number)] + torch.tensordot(each, value, 2)
    return found


def norms(root: Any, program: NormsProgram) -> Any:
    """What `norms_of` gives of each group of prompts."""
    parts, device = where(root, program["parts"])
    return in_one_tensor(
        [{"norms": norms_of(root, parts, ids.to(device), program["layers"])} for ids in program["tokens"]]
    )


def norms_of(root: Any, parts: ModelParts, tokens: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """How long the vectors are that heads move from each key to each query.

    They are the attention weight times what ``W_O`` makes of the value at the key.

    Parameters
    ----------
    root, parts
        As for `run_unmodified`.
    tokens : Tensor (example, position)
    layers : list of int

    Returns
    -------
    Tensor (layer, head, example, query, key)
        At least float32.
    """
    points = read_in_batches(root, parts, tokens, [(layer, point) for layer in layers for point in ("qkv", "rotated")])
    heads, kept, found = parts["heads"], parts["kv_heads"], []
    for layer in layers:
        pattern = pattern_at(parts, layer, points[(layer, "rotated")])
        values = split_heads(points[(layer, "qkv")], heads + 2 * kept)[:, :, heads + kept :].to(pattern.dtype)
        matrices: Any = weights_of(root, parts, layer)[3]
        long = [(values[:, :, head * kept // heads] @ matrices[head].to(pattern)).norm(dim=-1) for head in range(heads)]
        found.append((pattern * torch.stack(long, 1)[:, :, None]).transpose(0, 1))
    return torch.stack(found)


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


def check_linear(parts: ModelParts) -> None:
    """Refuse direct attribution where weights are not at hand, or the unembedding is more than a linear layer."""
    if parts["apart"]:
        raise RuntimeError("this server runs jobs apart from the weights, of which direct attribution needs some")
    if not is_readable(False, parts["unembed"]):
        raise ValueError("the unembedding is more than a linear layer, so that what parts add to logits has no sum")


def direct_of(root: Any, parts: ModelParts, spec: DirectSpec) -> torch.Tensor:
    """What each part adds, ``(source + 1, example, scored)``; see `logits.direct_shares`."""
    check_linear(parts)
    layers, tokens = range(parts["layers"]), spec["tokens"]
    inside, wanted = spec["parts"], {(layers[-1], "resid_post")}
    if inside is None:
        wanted |= {(0, "resid_pre")} | {(0, name) for name, _ in parts["embeddings"] if name == "pos_embed"}
        wanted |= {(layer, point) for layer in layers for point in ("z", "attn_out", "mlp_out")}
    else:
        wanted |= {(one["layer"], "mlp_post") for one in inside if one["head"] is None}
        wanted |= {(one["layer"], point) for one in inside if one["head"] is not None for point in ("qkv", "rotated")}
    found = []
    with torch.no_grad():
        needed = layers if inside is None else sorted({one["layer"] for one in inside if one["head"] is not None})
        out_of = {layer: weights_of(root, parts, layer)[3] for layer in needed}
        for start in range(0, len(tokens), FEW):
            some = slice(start, start + FEW)
            part: DirectSpec = {
                **spec,
                "tokens": tokens[some],
                "answers": None if spec["answers"] is None else spec["answers"][some],
                "others": None if spec["others"] is None else spec["others"][some],
            }
            points = read(root, parts, part["tokens"], wanted)
            found.append(direct_shares(parts, points, out_of, part, tokens.device))
    return torch.cat(found, 1)


def scores_of_weights(root: Any, program: WeightsProgram) -> Any:
    """What ``program["score"]`` makes of the weights, which stay here."""
    parts, _ = where(root, program["parts"])
    found = score_weights(root, parts, program["vocabulary"], program["score"])
    return {"table": torch.from_numpy(found)}


def score_weights(root: Any, parts: ModelParts, vocabulary: int, score: Any) -> Any:
    """What ``score(read)`` gives. Nothing is read that it does not ask for.

    Parameters
    ----------
    root, parts
        As for `run_unmodified`.
    vocabulary : int
        Tokens.
    score : callable
        Takes a `WeightsRead`.

    Returns
    -------
    array
        Float64.
    """
    read: WeightsRead = {
        "ends": lambda: ends_of(root, parts, vocabulary),
        "heads": lambda layer: weights_of(root, parts, layer),
        "neurons": lambda layer: neurons_of(root, parts, layer),
        "angles": lambda distance: angles_of(root, parts, distance),
    }
    return score(read)


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


def weights_of(root: Any, parts: ModelParts, layer: int) -> list[torch.Tensor | None]:
    """The fields of `HeadWeights` of a layer, read; or what its modules make of unit vectors, where they cannot be."""
    block = parts["blocks"][layer]
    if not parts["apart"]:
        return weights_read(parts, block._module)
    like = parts["like"]
    with torch.no_grad(), root.trace(no_tokens(like.device), use_cache=False):
        made = weights_made(parts, block, like)
    return made


def ends_of(root: Any, parts: ModelParts, vocabulary: int) -> list[torch.Tensor]:
    """Embedding and unembedding ``(token, d_model)``, and the gain of the last norm; read, or found by calls."""
    paths = [path for name, path in parts["embeddings"] if name == "embed"]
    if not parts["apart"]:
        return ends_read(parts, paths, root._module, vocabulary)
    like = parts["like"]
    with torch.no_grad(), root.trace(no_tokens(like.device), use_cache=False):
        made = ends_made(parts, paths, root, vocabulary, like)
    return made


def neurons_of(root: Any, parts: ModelParts, layer: int) -> list[torch.Tensor | None]:
    """What the neurons of a layer read and write, as `neurons_read` gives it; or found by calls."""
    block = parts["blocks"][layer]
    if not parts["apart"]:
        return neurons_read(parts, block._module)
    like = parts["like"]
    with torch.no_grad(), root.trace(no_tokens(like.device), use_cache=False):
        made = neurons_made(parts, block, like)
    return made


def angles_of(root: Any, parts: ModelParts, distance: int) -> Any:
    """Cosines and sines by which a position turns against one `distance` before it; None without rotation."""
    if parts["rotary"] is None:
        return None
    if not parts["apart"]:
        with torch.no_grad():
            return angles_made(parts["rotary"]._module, vector_of(parts, root._module), distance)
    like = parts["like"]
    with torch.no_grad(), root.trace(no_tokens(like.device), use_cache=False):
        made = angles_made(parts["rotary"], like, distance)
    return made


def angles_made(rotary: Any, like: torch.Tensor, distance: int) -> list[torch.Tensor]:
    """The same from a rotary embedding; some kinds stretch all vectors alike, which is left out."""
    cos, sin = rotary(like, torch.arange(distance + 1, device=like.device)[None])
    return [cos[0, distance] / cos[0, 0], sin[0, distance] / cos[0, 0]]


def do_nothing(root: Any, program: dict[str, Any]) -> dict[str, Any]:
    """What a marker does on the server."""
    return {}
