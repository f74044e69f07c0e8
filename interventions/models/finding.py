"""Finds the parts of a model that no table describes, from its modules, its configuration and one short prompt.

`recording` says what each tensor is as a sum of what entered a block and of what modules gave. The expression of what
leaves a block says what attention and MLP add to the stream, wherever the model adds it. Imports called, recording,
declare, traced, errors and torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...errors import ModelError, first_line
from ..base.shape import Shape
from ..declare.components import Component
from ..traced.projections import head_by_head, side_by_side
from .called import CalledFamily, Places
from .recording import LENGTH, STREAM, Call, Expression, Record, Spot, Watch, recorded


def find_parts(module: Any, name: str, reason: str) -> CalledFamily:
    """Find where the parts of a causal language model are.

    Parameters
    ----------
    module : PreTrainedModel
        In evaluation mode; a prompt goes through it.
    name : str
        For messages.
    reason : str
        Why its blocks are not laid open.

    Returns
    -------
    CalledFamily

    Raises
    ------
    ModelError
        Its blocks, final norm or unembedding cannot be found, or the stream is not one tensor.
    """
    config = module.config.get_text_config(decoder=True)
    where = _blocks(module, config, name)
    blocks = module.get_submodule(where)
    paths = {f"{where}.{number}": number for number in range(len(blocks))}
    device = next(module.parameters()).device
    vocabulary = int(module.get_input_embeddings().weight.shape[0])
    tokens = (torch.arange(LENGTH, device=device) * 7919 % (vocabulary - 1) + 1)[None]
    try:
        with torch.no_grad(), recorded(module, paths) as record, Watch(record):
            logits = module(tokens, use_cache=False).logits
        with torch.no_grad(), Watch(Record()), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(tokens, use_cache=False)  # by products that are counted on every device
    except Exception as error:
        raise ModelError(f"{name} cannot be run on {LENGTH} tokens to find its parts: {first_line(error)}") from error
    own = {call.path: call for call in record.calls}
    ends = [own[path] for path in paths if path in own]
    if len(ends) < len(paths) or any(not _is_stream(end.given) or not _is_stream(end.taken) for end in ends):
        raise ModelError(f"{name}: what its blocks at {where} take and give is no stream of one vector for each token")
    width = int(ends[0].given.shape[-1])
    found = [_of_block(record, path, end, width, config) for path, end in zip(paths, ends, strict=True)]
    norm, unembed, tail = _after(record, module, ends[-1], logits, name)
    embeddings = _before(record, module, ends[0])
    for block in found:
        block.layout = found[0].layout
    _check_projections(module, tokens, where, found)
    points, lacks = _in_all(found)
    if not embeddings:
        lacks["embed"] = "what enters layer 0 is not the sum of embeddings"
    known = min(vocabulary, int(logits.shape[-1]))
    made = _shape(config, found, points, lacks, width, known, "pos_embed" in embeddings)
    seen = counter.get_total_flops() - 2 * LENGTH * width * vocabulary
    seen -= len(blocks) * 4 * made.heads * LENGTH * LENGTH * made.d_head
    made = replace(made, work=max(1, seen // (len(blocks) * LENGTH)), tail=tail)
    first = found[0]
    return CalledFamily(
        name=f"{config.model_type}, called",
        model_types=(config.model_type,),
        blocks=where,
        embeddings=embeddings,
        modules={**first.modules, "norm": norm, "unembed": unembed},
        layout=first.layout,
        reason=reason,
        places=points,
        factors=first.factors,
        gives=ends[0].several,
        counts=made,
    )


@dataclass
class Block:
    """What was found in a block.

    Attributes
    ----------
    places : dict of str to (int, Places)
        Point to the time at which a pass comes by, and where.
    lacks : dict of str to str
        Component to why it is not there.
    modules : dict of str to str
    factors : dict of str to float
    layout : str
    heads, kv_heads, d_head, d_mlp : int
    """

    places: dict[str, tuple[int, Places]]
    lacks: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    layout: Any = "apart"
    heads: int = 0
    kv_heads: int = 0
    d_head: int = 0
    d_mlp: int = 0


def _blocks(module: Any, config: Any, name: str) -> str:
    """The path of the list of blocks: the heaviest list of so many modules as there are layers."""
    layers = getattr(config, "num_hidden_layers", None)
    lists = [
        (sum(weight.numel() for weight in one.parameters()), path)
        for path, one in module.named_modules()
        if isinstance(one, torch.nn.ModuleList) and len(one) == layers
    ]
    if not lists:
        raise ModelError(f"{name} has no list of {layers} blocks (num_hidden_layers) that headwise can find")
    return str(max(lists)[1])


def _is_stream(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 3 and tuple(value.shape[:2]) == (1, LENGTH)


def _is_flat(value: Any) -> bool:
    """Whether a tensor has a vector for each token, be they of one prompt or of all in a row."""
    return _is_stream(value) or (isinstance(value, torch.Tensor) and value.dim() == 2 and len(value) == LENGTH)


def _is_linear(call: Call) -> bool:
    """Whether a call is of a leaf with a matrix, from vectors to vectors."""
    weight = getattr(call.module, "weight", None)
    leaf = not any(True for _ in call.module.children())
    return leaf and weight is not None and weight.dim() == 2 and _is_flat(call.taken) and _is_flat(call.given)


def _of_block(record: Record, path: str, end: Call, width: int, config: Any) -> Block:
    """What is in one block."""
    start = f"{path}."
    calls = [call for call in record.calls if call.path.startswith(start)]
    found = Block({"resid_pre": (end.began, (("", "input"),)), "resid_post": (end.ended, (("", "output"),))})
    stream, whole = f"{STREAM} {path}", end.parts
    added = {atom: by for atom, by in whole.items() if atom != stream}
    spots = [spot for spot in record.spots if any(one.startswith(start) for one in spot.within)]
    if whole.get(stream) != 1.0 or any(atom.startswith("#") for atom in added):
        why = "what its blocks give is not what they take and something more, that one module gives"
        added = {}
    else:
        why = f"its blocks add {len(added)} things to the stream"
    by_path = {call.path: call for call in calls}
    parts = sorted((by_path[atom] for atom in added if atom in by_path), key=lambda call: call.ended)
    attended = _attention(found, calls, spots, start, config)
    attention: Call | None = None
    if attended is not None:
        attention = next((call for call in parts if call.ended >= attended.ended), None)
    others = [call for call in parts if call is not attention]
    for point, some in (("attn_out", [attention] if attention is not None else []), ("mlp_out", others)):
        if len(some) != 1 or (point == "mlp_out" and attention is None):
            found.lacks[point] = why if attended is not None else "it has no attention that headwise can find"
            continue
        found.places[point] = (some[0].ended, ((some[0].path.removeprefix(start), "output"),))
        if added[some[0].path] != 1.0:
            found.factors[point] = added[some[0].path]
    if attention is not None:
        _middle(record, found, calls, {stream: 1.0, attention.path: added[attention.path]}, start)
    if "mlp_out" in found.places:
        _mlp(found, calls, others[0], start)
    else:
        found.lacks |= dict.fromkeys(("mlp_in", "mlp_pre", "mlp_post"), found.lacks["mlp_out"])
    return found


def _attention(found: Block, calls: list[Call], spots: list[Spot], start: str, config: Any) -> Call | None:
    """Find attention, what it reads, its projections and its heads; gives the call of the output projection."""
    per_head = [str(one) for one in Component if one.per_head]
    if len({spot.within[-1] for spot in spots}) != 1:
        many = "more than one attention" if spots else "no attention that headwise can find"
        found.lacks |= dict.fromkeys((*per_head, "attn_in"), f"its blocks have {many}")
        return None
    spot = spots[0]
    top = next(one for one in spot.within if one.startswith(start))
    inside = sorted((call for call in calls if call.path.startswith(f"{top}.")), key=lambda call: call.began)
    outer = next(call for call in calls if call.path == top)
    linear = [call for call in inside if _is_linear(call)]
    out = next((call for call in linear if call.began > spot.when), None)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    if out is None or not heads or out.taken.shape[-1] % heads or spot.heads != heads:
        why = f"no linear module reads what {heads} heads give, side by side"
        found.lacks |= dict.fromkeys(per_head, why)
        return None
    found.modules |= {"attention": top.removeprefix(start), "out": out.path.removeprefix(start)}
    found.heads, found.d_head = heads, int(out.taken.shape[-1]) // heads
    found.places["z"] = (out.began, ((found.modules["out"], "input"),))
    if _is_stream(outer.taken):
        found.places["attn_in"] = (outer.began, ((found.modules["attention"], "input"),))
        found.modules["norm_1"] = found.modules["attention"]
    else:
        found.lacks["attn_in"] = "attention does not take the stream first"
    found.lacks |= dict.fromkeys(("q_rot", "k_rot", "head_out"), "its blocks are called, not laid open")
    if getattr(outer.weights, "shape", None) == (1, heads, LENGTH, LENGTH):
        found.places["rotated"] = (outer.ended, ((found.modules["attention"], "weights"),))
    else:
        found.lacks["pattern"] = "attention does not give its weights; with attn_implementation='eager' most do"
    _projections(found, [call for call in linear if call.ended < spot.when], start)
    return out


def _projections(found: Block, linear: list[Call], start: str) -> None:
    """Find what gives q, k and v: three modules, or one."""
    sizes = [int(call.given.shape[-1]) for call in linear]
    width, d_head = found.heads * found.d_head, found.d_head
    found.kv_heads = found.heads
    places: Places = tuple((call.path.removeprefix(start), "output") for call in linear)
    if len(linear) == 3 and sizes[0] == width and sizes[1] == sizes[2] and sizes[1] % d_head == 0:
        found.kv_heads, found.layout = sizes[1] // d_head, "apart"
        found.modules |= dict(zip(("q", "k", "v"), (place[0] for place in places), strict=True))
    elif len(linear) == 1 and (sizes[0] - width) % (2 * d_head) == 0 and sizes[0] > width:
        found.kv_heads, found.layout = (sizes[0] - width) // (2 * d_head), "side by side"
        found.modules["qkv"] = places[0][0]
    if found.heads % found.kv_heads or not {"v", "qkv"} & {*found.modules}:
        found.kv_heads = found.heads
        found.lacks |= dict.fromkeys(("q", "k", "v"), "no modules give q, k and v of all heads, and nothing else")
        return
    found.places["qkv"] = (linear[-1].ended, places)


def _check_projections(module: Any, tokens: torch.Tensor, where: str, found: list[Block]) -> None:
    """See in the first and the last block that q, k and v are where they seem to be, in one of the known layouts."""
    ends = {0: found[0], len(found) - 1: found[-1]}
    if any("qkv" not in block.places for block in ends.values()):
        return
    layouts = ["apart"] if found[0].layout == "apart" else ["side by side", "by head"]
    for layout in layouts if not tokens.is_meta else layouts[:1] * (layouts == ["apart"]):
        if tokens.is_meta or all(
            _is_so(module, tokens, f"{where}.{number}.", block, layout) for number, block in ends.items()
        ):
            for block in found:
                block.layout = layout
            return
    for block in found:
        block.places.pop("qkv", None)
        block.lacks |= dict.fromkeys(("q", "k", "v"), "what gives q, k and v has them in no order that headwise knows")


def _is_so(module: Any, tokens: torch.Tensor, start: str, block: Block, layout: str) -> bool:
    """Whether changes of q, k and v reach those heads and positions that they have to.

    Values with the opposite sign turn the sign of what the heads give that read them. A query changes its head at its
    position; a key changes later positions of the heads that read it. Norms of all heads together let it reach others.
    """
    heads, kv_heads, d_head = block.heads, block.kv_heads, block.d_head
    widths = {"q": heads * d_head, "k": kv_heads * d_head, "v": kv_heads * d_head}
    before = _z_of(module, tokens, start, block, layout, widths, "", slice(0), slice(0))
    size = before.float().std().item() or 1.0
    same, moved = (0.02, 0.05) if before.dtype in (torch.float16, torch.bfloat16) else (1e-4, 1e-3)
    for key_head in sorted({0, kv_heads - 1}):
        readers = range(key_head * (heads // kv_heads), (key_head + 1) * (heads // kv_heads))
        for name, at in (("v", slice(None)), ("q", slice(3, 4)), ("k", slice(2, 3))):
            head = readers[-1] if name == "q" else key_head
            of_head = slice(head * d_head, (head + 1) * d_head)
            after = _z_of(module, tokens, start, block, layout, widths, name, at, of_head)
            mine = torch.zeros(heads, dtype=torch.bool)
            mine[[head] if name == "q" else [*readers]] = True
            wanted, there = (one.reshape(1, LENGTH, heads, d_head).clone() for one in (before, after))
            if name == "v":
                wanted[:, :, mine] *= -1
                off = (there - wanted).abs().max()
            else:
                by = (there - wanted).abs().amax((0, 3))  # (position, head)
                reached = by[3:4] if name == "q" else by[3:]
                if not reached[:, mine].amax(0).min() > moved * size:
                    return False
                still = [by[:3] if name == "q" else by[:2], *([by[4:]] if name == "q" else [])]
                off = torch.stack([one.max() for one in still]).max()
                off = off if layout == "apart" else torch.maximum(off, by[:, ~mine].max() if (~mine).any() else off)
            if not off <= same * size:
                return False
    return True


def _z_of(
    module: Any,
    tokens: torch.Tensor,
    start: str,
    block: Block,
    layout: str,
    widths: dict[str, int],
    name: str,
    at: slice,
    columns: slice,
) -> torch.Tensor:
    """What the output projection of a block reads, where some of q, k or v has the opposite sign."""
    kept: list[torch.Tensor] = []

    def turned(one: Any, args: Any, given: torch.Tensor) -> torch.Tensor:
        flat = given.dim() == 2
        value = (given[None] if flat else given).clone()
        first = 0
        if layout != "apart":
            value = side_by_side(value, block.heads, block.kv_heads) if layout == "by head" else value
            first = {"q": 0, "k": widths["q"], "v": widths["q"] + widths["k"]}[name]
        value[:, at, first + columns.start : first + columns.stop] *= -1
        value = head_by_head(value, block.heads, block.kv_heads) if layout == "by head" else value
        return value[0] if flat else value

    hooks = [
        module.get_submodule(start + block.modules["out"]).register_forward_pre_hook(
            lambda _, args: kept.append(args[0])
        )
    ]
    if name:
        path = start + block.modules[name if layout == "apart" else "qkv"]
        hooks.append(module.get_submodule(path).register_forward_hook(turned))
    try:
        with torch.no_grad():
            module(tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return kept[0].reshape(1, LENGTH, -1)


def _middle(record: Record, found: Block, calls: list[Call], wanted: Expression, start: str) -> None:
    """Find where the stream between attention and MLP enters or leaves a module."""
    for call in calls:
        sides = (("input", call.taken, call.began), ("output", call.given, call.ended))
        for side, tensor, when in sides:
            if isinstance(tensor, torch.Tensor) and record.known.get(id(tensor)) == wanted:
                place = (when, ((call.path.removeprefix(start), side),))
                found.places["resid_mid"] = min(found.places.get("resid_mid", place), place)
    if "resid_mid" not in found.places:
        found.lacks["resid_mid"] = "no module takes or gives the stream between attention and MLP"


def _mlp(found: Block, calls: list[Call], end: Call, start: str) -> None:
    """Find the MLP, what it reads, and its neurons."""
    top = f"{start}{found.modules['attention']}"
    rest = [call for call in calls if call.path != top and not call.path.startswith(f"{top}.")]
    children = [call for call in rest if "." not in call.path.removeprefix(start) and [*call.module.children()]]
    sizes = {call.path: sum(weight.numel() for weight in call.module.parameters()) for call in children}
    mlp = max(children, key=lambda call: sizes[call.path], default=None)
    linear = sorted((call for call in rest if _is_linear(call)), key=lambda call: call.began)
    if mlp is not None:
        linear = [call for call in linear if call.path.startswith(f"{mlp.path}.")]
    first = mlp if mlp is not None else linear[0] if linear else None
    if first is not None and _is_flat(first.taken):
        found.places["mlp_in"] = (first.began, ((first.path.removeprefix(start), "input"),))
        found.modules["mlp"] = found.modules["norm_2"] = first.path.removeprefix(start)
    else:
        found.lacks["mlp_in"] = "the MLP does not take the stream first"
    ends = [end.given, *([mlp.given] if mlp is not None else [])]
    down = linear[-1] if len(linear) > 1 and any(linear[-1].given is one for one in ends) else None
    if down is None:
        found.lacks |= dict.fromkeys(("mlp_pre", "mlp_post"), "its MLPs end in no linear module that reads neurons")
        return
    found.d_mlp = int(down.taken.shape[-1])
    found.modules["down"] = down.path.removeprefix(start)
    found.places["mlp_post"] = (down.began, ((found.modules["down"], "input"),))
    within = mlp.path if mlp is not None else start.removesuffix(".")
    acts = [
        call
        for call in rest
        if call.path.startswith(f"{within}.")
        and first is not None
        and first.began <= call.began < down.began
        and not [*call.module.parameters()]
        and not [*call.module.children()]
        and call.given is not call.taken
        and _is_flat(call.taken)
        and call.taken.shape[-1] == found.d_mlp
    ]
    if len(acts) == 1:
        found.modules["act"] = acts[0].path.removeprefix(start)
        found.places["mlp_pre"] = (acts[0].began, ((found.modules["act"], "input"),))
    else:
        found.lacks["mlp_pre"] = "no module takes what the activation function is applied to"


def _in_all(found: list[Block]) -> tuple[tuple[tuple[str, Places], ...], dict[str, str]]:
    """The points that are at one place in all blocks, in forward order, and what is lacking."""
    first, lacks = found[0], dict[str, str]()
    for number, block in enumerate(found):
        for part, why in block.lacks.items():
            lacks.setdefault(part, why if number == 0 else f"in layer {number}, {why}")
    kept = []
    for name, (when, places) in first.places.items():
        factor = first.factors.get(name)
        if all(
            block.places.get(name, (0, ()))[1] == places
            and block.factors.get(name) == factor
            and (
                name != "qkv"
                or (block.layout, block.kv_heads, block.d_head) == (first.layout, first.kv_heads, first.d_head)
            )
            and (name not in ("mlp_pre", "mlp_post") or block.d_mlp == first.d_mlp)
            for block in found
        ):
            kept.append((when, name, places))
        else:
            parts = ("q", "k", "v") if name == "qkv" else (name,)
            lacks |= {part: "its layers differ in where that is" for part in parts if part not in lacks}
    order = ["resid_pre", "resid_mid", *(str(one) for one in Component)]  # it is read before what is written there
    kept.sort(key=lambda one: (one[0], order.index(one[1]) if one[1] in order else 0))
    return tuple((name, places) for _, name, places in kept), lacks


def _after(record: Record, module: Any, end: Call, logits: Any, name: str) -> tuple[str, str, Any]:
    """The final norm, with what follows it, the unembedding, and what becomes of the logits."""
    unembed = module.get_output_embeddings()
    call = next((one for one in record.calls if one.module is unembed), None)
    if call is None:
        raise ModelError(f"{name}: headwise does not find the module that gives its logits")
    chain: list[str] = []
    target: Any = call.taken
    later = sorted(
        (one for one in record.calls if one.began > end.ended and one.ended < call.began), key=lambda one: -one.ended
    )
    while target is not end.given:
        atoms = record.of(target)
        one = next((one for one in later if atoms == {one.path: 1.0}), None)
        if one is None or record.of(end.given) == atoms:
            break
        chain.insert(0, one.path)
        target = one.taken
    if not chain or record.of(target) != record.of(end.given):
        raise ModelError(
            f"{name}: between its last block and its unembedding there is not one norm that gives the rest"
        )
    return " ".join(chain), call.path, _tail(record, call, logits, name)


def _tail(record: Record, call: Call, logits: Any, name: str) -> tuple[float, bool, float] | None:
    """What becomes of the logits of the unembedding."""
    last = record.of(logits)
    if last == {call.path: 1.0}:
        return None
    atom = next(iter(last))
    if len(last) == 1 and atom == call.path:
        return last[atom], False, 1.0
    within = record.caps.get(atom, {})
    if len(last) != 1 or [*within] != [call.path]:
        raise ModelError(f"{name}: what becomes of its logits after the unembedding is nothing that headwise knows")
    return within[call.path], True, last[atom]


def _before(record: Record, module: Any, start: Call) -> dict[str, str]:
    """The embeddings whose sum enters the first block; empty where that is more than a sum."""
    # what entered became an atom of its own when the block began; before that it was a sum
    embed = module.get_input_embeddings()
    path = next((call.path for call in record.calls if call.module is embed), "")
    parts = record.entered or {}
    others = [atom for atom in parts if atom != path]
    if path not in parts or any(by != 1.0 for by in parts.values()) or len(others) > 1:
        return {}
    if others and not any(call.path == others[0] for call in record.calls):
        return {}
    return {"embed": path, **({"pos_embed": others[0]} if others else {})}


def _shape(
    config: Any,
    found: list[Block],
    points: tuple[tuple[str, Places], ...],
    lacks: dict[str, str],
    width: int,
    vocabulary: int,
    pos_embed: bool,
) -> Shape:
    """The counts, from what was found and the configuration."""
    first, names = found[0], {name for name, _ in points}
    if not pos_embed:
        lacks.setdefault("pos_embed", "no embedding of the position is added before layer 0")
    context = next(
        (
            getattr(config, key)
            for key in ("max_position_embeddings", "max_seq_len", "n_positions")
            if getattr(config, key, None)
        ),
        2048,
    )
    kept = {"pattern": "its blocks are called, not laid open"} if "rotated" in names else {}
    if "resid_mid" in names and "attn_out" in first.factors:  # what is written there is a change of attn_out
        kept["resid_mid"] = "the model multiplies attn_out before it adds it, so that rounding would be left over"
    return Shape(
        layers=len(found),
        heads=first.heads if "z" in names else 0,
        d_model=width,
        d_head=first.d_head,
        d_mlp=first.d_mlp if "mlp_post" in names else 4 * width,
        vocabulary=vocabulary,
        context=int(context),
        kv_heads=first.kv_heads if "qkv" in names else 0,
        parallel="resid_mid" not in names,
        rotary=False,
        pos_embed=pos_embed,
        neurons="mlp_post" in names,
        called=True,
        lacks=tuple(sorted(lacks.items())),
        read_only=tuple(kept.items()),
    )
