"""The command line. Imports models, studies and pictures only once a command needs them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DeclarationError, HeadwiseError
from ..version import version

if TYPE_CHECKING:
    import xarray as xr

EXAMPLES = """examples:
  headwise induction                                     the model that ships with headwise
  headwise induction --model openai-community/gpt2       GPT-2 from the Hugging Face Hub
  headwise induction --model ./my-gpt2 --n 16            a local folder, fewer prompts
  headwise plan --what qkv --metric logit_diff           what patching q, k, v of every head would cost
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its status: 0 done, 1 an error that was explained, 2 wrong usage, 130 stopped."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return int(options.run(options))
    except HeadwiseError as error:
        print(f"headwise: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"headwise: {str(error) or 'stopped'}; no file was left half-written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwise",
        allow_abbrev=False,
        description="Declare interventions on a transformer, run them, and get labelled, stored, drawn results.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"headwise {version()}", help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    induction = commands.add_parser(
        "induction",
        help="the whole induction-head analysis of a GPT-2-like model",
        allow_abbrev=False,
        description=(
            "Find previous-token and induction heads, ablate them against random controls, patch q, k and v, measure "
            "composition, and say how sure the answer is. Writes a NetCDF file and an HTML report beside it."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    induction.add_argument("--model", default="words-2l", help="shipped name, Hub id or folder (default: %(default)s)")
    induction.add_argument("--n", type=int, default=32, help="prompts of repeated random tokens (default: %(default)s)")
    induction.add_argument(
        "--length", type=int, default=25, help="tokens in the half that repeats (default: %(default)s)"
    )
    induction.add_argument(
        "--seed", type=int, default=0, help="seed of prompts and random controls (default: %(default)s)"
    )
    induction.add_argument("--out", help="NetCDF file to write (default: results/induction-MODEL.nc)")
    induction.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    induction.add_argument("--revision", help="branch, tag or commit on the Hub")
    induction.set_defaults(run=_induction)
    planning = commands.add_parser(
        "plan",
        help="what a sweep would cost, before it runs",
        allow_abbrev=False,
        description=(
            "Explain the plan of a sweep on repeated random tokens: passes, rows, work against one forward pass for "
            "each condition, memory, and an estimate of the time. In Python: print(headwise.studies.plan(...))."
        ),
    )
    planning.add_argument("--model", default="words-2l", help="shipped name, Hub id or folder (default: %(default)s)")
    planning.add_argument(
        "--what",
        default="heads",
        help=(
            "heads (zero ablation of each), qkv (patching q, k and v of each), resid (patching the residual stream at "
            "each layer and position), or a JSON file with interventions (default: %(default)s)"
        ),
    )
    planning.add_argument("--metric", action="append", help="loss, logit_diff, ...; may be given again (default: loss)")
    planning.add_argument("--n", type=int, default=32, help="prompts (default: %(default)s)")
    planning.add_argument(
        "--length", type=int, default=25, help="tokens in the half that repeats (default: %(default)s)"
    )
    planning.add_argument("--batch-size", default="auto", help="rows of a pass (default: %(default)s)")
    planning.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    planning.add_argument("--json", action="store_true", help="print the figures as JSON")
    planning.set_defaults(run=_plan)
    return parser


def _induction(options: argparse.Namespace) -> int:
    started = time.monotonic()
    from .induction import STAGES, InductionStudy
    from .results import check_writable, write_netcdf

    study = InductionStudy(n=options.n, length=options.length, seed=options.seed)
    out = Path(options.out or f"results/induction-{_stem(options.model)}.nc")
    if out.suffix != ".nc":
        raise DeclarationError(f"--out {out}: end it in .nc; the report beside it gets the same name in .html")
    out = check_writable(out)
    check_writable(out.with_suffix(".html"))
    _say(f"opening {options.model}")
    from ..interventions.models import load
    from .report import write_report

    _quiet_libraries()
    model = load(options.model, revision=options.revision, device=options.device)
    names = list(STAGES)
    tree = study.run(model, lambda name: _say(f"{names.index(name) + 1}/{len(names)} {STAGES[name]}"))
    _say("writing the results and the report")
    write_netcdf(tree, out)
    report = write_report(tree, out.with_suffix(".html"))
    _summary(tree)
    print(f"\n{_shown(out)}  results ({out.stat().st_size / 1e6:.1f} MB)")
    print(f"{_shown(report)}  report ({report.stat().st_size / 1e6:.1f} MB)")
    print(f"{time.monotonic() - started:.0f} s in all")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from ..interventions.models import load
    from .planning import figures, sweep

    _quiet_libraries()
    model = load(options.model, device=options.device)
    size = options.batch_size
    plan = sweep(
        model,
        options.what,
        options.metric or ["loss"],
        n=options.n,
        length=options.length,
        batch_size=int(size) if size.isdigit() else size,
    )
    print(figures(plan) if options.json else plan)
    return 0


def _say(text: str) -> None:
    """Say what is being done, on standard error. Long stages show a bar of their own below it (see `Progress`)."""
    print(text, file=sys.stderr, flush=True)


def _summary(tree: xr.DataTree) -> None:
    """Heads with a role as a table, then the conclusion."""
    import json

    from rich.console import Console
    from rich.table import Table

    from .heads import ROLES

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    heads, ablation = tree["heads"].to_dataset(), tree["ablation"].to_dataset()
    change = (ablation["loss"] - ablation["baseline_loss"].sel(run="clean")).mean("example")
    scores = {"induction": "induction", "previous_token": "previous", "duplicate_token": "duplicate"}
    table = Table(
        title=tree.attrs["title"], caption="scores 0 to 1; loss: nats added when the head alone is ablated", box=None
    )
    for title in ("head", "role", *scores.values(), "loss, zero", "loss, mean"):
        table.add_column(title, justify="left" if title in ("head", "role") else "right")
    rows = []
    for layer in heads["layer"].values:
        for head in heads["head"].values:
            here, lost = heads.sel(layer=layer, head=head), change.sel(layer=layer, head=head)
            values = [float(here[name].mean()) for name in scores]
            effects = [float(lost.sel(ablation=name)) for name in ("zero", "mean")]
            rows.append((str(here["role"].values), f"L{layer}H{head}", values, effects))
    order = list(ROLES.values())
    named = [row for row in rows if row[0] in order]
    by_role = sorted(named, key=lambda row: (order.index(row[0]), -max(row[2])))
    shown = by_role[:24] or sorted(rows, key=lambda row: -max(row[2]))[:5]
    for role, name, values, effects in shown:
        effects = [round(value, 2) + 0.0 for value in effects]  # no -0.00
        table.add_row(name, role, *(f"{value:.2f}" for value in values), *(f"{value:+.2f}" for value in effects))
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"{len(rows) - len(shown)} further heads are in the report.")
    console.print()
    findings = json.loads(tree.attrs["conclusion"])
    for finding in findings:
        if finding["group"] == "summary":
            console.print(f"- {finding['text']}", markup=False)
    rest = sum(finding["group"] not in ("summary", "limits") for finding in findings)
    limits = sum(finding["group"] == "limits" for finding in findings)
    console.print(f"\nThe report has {rest} findings in full, and {limits} limits of what was shown.")


def _stem(model: str) -> str:
    return Path(model).name or "model"


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _quiet_libraries() -> None:
    """Keep the advice of transformers off the terminal; `load` draws no bar."""
    from transformers.utils import logging

    logging.set_verbosity_error()
