"""``headwise induction``: the flagship study, its file and its report."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError
from ..output.phrases import rounded
from .shared import PLAIN_WIDTH, add_command, add_model, fill, open_model, print_table, put, quiet_libraries, say, shown

if TYPE_CHECKING:
    import xarray as xr

EXAMPLES = """  headwise induction                                 the shipped model
  headwise induction --model gpt2                    GPT-2 from the Hub
  headwise induction --model ./my-gpt2 --n 16        a local folder
  headwise induction --step 512                      at a step of its training
  headwise induction --model gpt2 --plan             what each stage would take
  headwise induction --seed 1 --out results/seed-1.nc
  headwise induction --model gpt2 --remote           on NDIF
"""


def add(commands: Any) -> None:
    """Say how the command is called."""
    parser = add_command(
        commands,
        "induction",
        run,
        help="the whole induction-head analysis of a GPT-2-like model",
        description=(
            "Find previous-token and induction heads, ablate them against random controls, patch q, k and v, measure "
            "composition and what heads write, and say how sure the answer is. Writes a NetCDF file and an HTML report "
            "beside it. Stopped or killed, the same command again goes on where it was."
        ),
        examples=EXAMPLES,
    )
    add_model(parser)
    parser.add_argument(
        "--n", type=int, default=32, help="prompts of repeated random tokens, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--first",
        type=int,
        default=8,
        help="prompts that sweeps start with; doubled until verdicts are settled (default: %(default)s)",
    )
    parser.add_argument("--length", type=int, default=25, help="tokens in the half that repeats (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of prompts and random controls (default: %(default)s)"
    )
    parser.add_argument("--out", help="NetCDF file to write (default: results/induction-MODEL.nc)")
    parser.add_argument("--plan", action="store_true", help="say what each stage would cost, and run nothing")
    parser.add_argument("--fresh", action="store_true", help="run everything again, whatever is there")


def run(options: argparse.Namespace) -> int:
    """Run the study, write the report, print the summary."""
    started = time.monotonic()
    from ..analyses.induction import STAGES, InductionStudy
    from ..storage.files import check_writable

    study = InductionStudy(n=options.n, length=options.length, seed=options.seed, first=options.first)
    if options.plan:
        quiet_libraries()
        put(study.plan(open_model(options)))
        return 0
    out = Path(options.out or f"results/induction-{_stem(options)}.nc")
    if out.suffix != ".nc":
        raise DeclarationError(f"--out {out}: end it in .nc; the report beside it gets the same name in .html")
    out = check_writable(out)
    check_writable(out.with_suffix(".html"))
    say(f"opening {options.model}")
    from ..report.report import write_report

    quiet_libraries()
    model = open_model(options)
    names = list(STAGES)
    begun: list[str] = []

    def stage(name: str) -> None:
        """Say which stage begins; before the first one, what all will take."""
        if not begun:
            say(study.plan(model).line)
        begun.append(name)
        say(f"{names.index(name) + 1}/{len(names)} {STAGES[name]}")

    tree = study.run(model, stage, out=out, resume=not options.fresh)
    if not begun:
        say(f"{shown(out)} holds the whole result already; --fresh runs everything again")
    say("writing the report")
    report = write_report(tree, out.with_suffix(".html"))
    _print_summary(tree)
    put(f"\n{shown(out)}  results ({out.stat().st_size / 1e6:.1f} MB)")
    put(f"{shown(report)}  report ({report.stat().st_size / 1e6:.1f} MB)")
    put(f"{time.monotonic() - started:.0f} s in all")
    return 0


def _print_summary(tree: xr.DataTree) -> None:
    """Heads with a role as a table, then the conclusion."""
    from rich.table import Table

    from ..analyses.heads import ROLES
    from ..catalogue.listing import cell

    heads, ablation = tree["heads"].to_dataset(), tree["ablation"].to_dataset()
    change = (ablation["loss"] - ablation["baseline_loss"].sel(run="clean")).mean("example")
    scores = {"induction": "induction", "previous_token": "previous", "duplicate_token": "duplicate"}
    table = Table(
        title=cell(tree.attrs["title"]),
        caption="scores 0 to 1; loss: nats added when the head alone is ablated",
        box=None,
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
        changes = [rounded(value, "+.2f") for value in effects]
        table.add_row(name, cell(role), *map(rounded, values), *changes)
    print_table(lambda wide: table, PLAIN_WIDTH)
    if len(shown) < len(rows):
        put(f"{len(rows) - len(shown)} further heads are in the report.")
    put()
    findings = json.loads(tree.attrs["conclusion"])
    for finding in findings:
        if finding["group"] == "summary":
            put(fill(f"- {finding['text']}"))
    rest = sum(finding["group"] not in ("summary", "limits") for finding in findings)
    limits = sum(finding["group"] == "limits" for finding in findings)
    put(f"\nThe report has {rest} findings in full, and {limits} limits of what was shown.")


def _stem(options: argparse.Namespace) -> str:
    """The model's name with the revision or step that was asked for, as part of a file's name."""
    at = options.revision or ("" if options.step is None else f"step{options.step}")
    return "-".join(one for one in (Path(options.model).name or "model", at.replace("/", "-")) if one)
