"""``headwise plan``: what a sweep would cost."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError, ResultError, choices
from .shared import add_command, add_json, add_model, open_model, put, quiet_libraries

if TYPE_CHECKING:
    from ...interventions.models.model import Model

SWEEPS = ("heads", "qkv", "resid")
EXAMPLES = """  headwise plan                                      every head ablated
  headwise plan --what qkv --metric logit_diff       q, k, v of every head
  headwise plan --model openai-community/gpt2 --json
"""


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
        examples=EXAMPLES,
    )
    add_model(parser)
    parser.add_argument(
        "--what",
        default="heads",
        help=(
            "heads (zero ablation of each), qkv (patching q, k and v of each), resid (patching the residual stream at "
            "each layer and position), or a JSON file with interventions (default: %(default)s)"
        ),
    )
    parser.add_argument("--metric", action="append", help="loss, logit_diff, ...; may be given again (default: loss)")
    parser.add_argument("--n", type=int, default=32, help="prompts (default: %(default)s)")
    parser.add_argument("--length", type=int, default=25, help="tokens in the half that repeats (default: %(default)s)")
    parser.add_argument("--batch-size", default="auto", help="rows of a pass (default: %(default)s)")
    add_json(parser, "print the figures as JSON")


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
        found = plan.cost()
        put(
            json.dumps(
                asdict(found)
                | {
                    "total": found.total,
                    "share": found.share,
                    "passes_run": plan.passes,
                    "conditions": len(plan.conditions),
                },
                indent=2,
            )
        )
    else:
        put(plan)
    return 0


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
