"""``headwise plan``: what a sweep would cost."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError, ResultError, choices
from .shared import add_command, add_json, add_model, open_model, print_json, put, quiet_libraries

if TYPE_CHECKING:
    from ...interventions.models.model import Model
    from ...interventions.plan.plan import Plan

SWEEPS = ("heads", "qkv", "resid")
EXAMPLES = """  headwise plan                                      every head ablated
  headwise plan --what qkv --metric logit_diff       q, k, v of every head
  headwise plan --what mine.json --n 8               interventions of a file
  headwise plan --model gpt2 --json
"""
WHAT = """the file of --what holds what hw.to_json(...) writes of an intervention, a
mapping of names to interventions, a list of them, or a Grid:
  import headwise as hw
  what = {"without L0H3": hw.ZeroAblate(hw.Head(0, 3))}
  with open("mine.json", "w") as file:
      file.write(hw.to_json(what))
which is
  {"type": "mapping", "items": [["without L0H3", {"type": "ZeroAblate",
    "site": {"type": "Site", "component": "z", "layer": 0, "head": 3,
      "positions": null}}]]}
"""
KEYS = {
    "conditions": "interventions that would be measured",
    "passes_run": "passes that would be run for them, beside the runs as they are",
    "rows": "most rows of a pass",
    "positions": "most positions of a pass",
    "base": "floating-point operations of the runs as they are",
    "passes": "those of the passes with interventions",
    "total": "both",
    "naive": "those of a plain forward pass with all its logits for each condition and prompt",
    "share": "total / naive; null where nothing is changed",
    "forward": "those of a plain forward pass of one prompt, the mean over prompts",
    "memory": "bytes of tensors at most, beside the weights",
    "advice": "sentences on how it should be measured otherwise",
    "seconds": "estimate of the time; null where the speed was not measured, as of a server",
}
"""What ``--json`` prints."""


def add(commands: Any) -> None:
    """Say how the command is called."""
    parser = add_command(
        commands,
        "plan",
        run,
        help="what a sweep would cost, before it runs",
        description=(
            "Explain the plan of a sweep on repeated random tokens: passes, rows, work against one forward pass for "
            "each condition, memory, and an estimate of the time. In Python: print(hw.plan(...))."
        ),
        examples=f"{EXAMPLES}\n{WHAT}\nkeys of --json:\n{_keys()}",
    )
    add_model(parser)
    parser.add_argument(
        "--what",
        default="heads",
        help=(
            "heads (zero ablation of each), qkv (patching q, k and v of each), resid (patching the residual stream at "
            "each layer and position), or a JSON file with interventions, see below (default: %(default)s)"
        ),
    )
    parser.add_argument("--metric", action="append", help="loss, logit_diff, ...; may be given again (default: loss)")
    parser.add_argument("--n", type=int, default=32, help="prompts (default: %(default)s)")
    parser.add_argument("--length", type=int, default=25, help="tokens in the half that repeats (default: %(default)s)")
    parser.add_argument("--batch-size", default="auto", help="rows of a pass (default: %(default)s)")
    add_json(parser, "print the figures as JSON, see below")


def run(options: argparse.Namespace) -> int:
    """Make the plan of a sweep on repeated tokens and print it."""
    from ..measuring.measure import plan as plan_of
    from ..tasks.tasks import RepeatedTokens

    quiet_libraries()
    model = open_model(options)
    size = options.batch_size
    plan = plan_of(
        model,
        RepeatedTokens(n=options.n, length=options.length),
        _grid(model, options.what, 2 * options.length),
        options.metric or ["loss"],
        batch_size=int(size) if size.isdigit() else size,
    )
    if options.json:
        print_json(_figures(plan))
    else:
        put(plan)
    return 0


def _figures(plan: Plan) -> dict[str, Any]:
    """What a plan costs, by the names of `KEYS`."""
    cost = plan.cost()
    known = {"conditions": len(plan.conditions), "passes_run": plan.passes, "advice": plan.advice}
    return {name: known[name] if name in known else getattr(cost, name) for name in KEYS}


def _keys() -> str:
    """`KEYS` in lines of a terminal."""
    return "\n".join(
        textwrap.fill(words, 79, initial_indent=f"  {name:12}", subsequent_indent=14 * " ")
        for name, words in KEYS.items()
    )


def _grid(model: Model, what: str, positions: int) -> Any:
    """The interventions of a sweep of this name, or those in a JSON file as `to_json` writes it."""
    from ...interventions.declare.codec import from_json
    from ...interventions.declare.edits import Patch, ZeroAblate
    from ...interventions.declare.grid import Grid
    from ...interventions.declare.sites import Head, Layer

    layers, heads = model.layers, model.heads
    if what == "heads":
        return Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=layers, head=heads)
    if what == "qkv":
        return Grid(
            lambda component, layer, head: Patch(model.read_by(Head(layer, head), component)),
            component=["q", "k", "v"],
            layer=layers,
            head=heads,
        )
    if what == "resid":
        return Grid(
            lambda layer, position: Patch(Layer(layer).resid_pre.at(position)), layer=layers, position=range(positions)
        )
    path = Path(what).expanduser()
    if not path.is_file():
        raise DeclarationError(f"--what {what}: possible are {choices(SWEEPS)}, and a JSON file with interventions")
    try:
        return from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"cannot read {path}: {error}") from error
    except DeclarationError as error:
        raise DeclarationError(f"--what {what}: {error}; the file holds what hw.to_json(...) writes") from error
