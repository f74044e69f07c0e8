"""``headwise plan``: what a sweep would cost."""

from __future__ import annotations

import argparse
from typing import Any

from .shared import add_command, add_json, add_model, open_model, put, quiet_libraries

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
    """Make the plan and print it."""
    from .planning import figures, sweep

    quiet_libraries()
    model = open_model(options)
    size = options.batch_size
    plan = sweep(
        model,
        options.what,
        options.metric or ["loss"],
        n=options.n,
        length=options.length,
        batch_size=int(size) if size.isdigit() else size,
    )
    put(figures(plan) if options.json else plan)
    return 0
