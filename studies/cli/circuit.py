"""``headwise circuit``: the circuit of a behaviour at the level of edges, its file and its report."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DeclarationError, HeadwiseError, ResultError
from ..output.phrases import rounded
from .induction import _stem
from .shared import (
    PLAIN_WIDTH,
    add_command,
    add_json,
    add_model,
    fill,
    open_model,
    print_json,
    print_table,
    put,
    quiet_libraries,
    say,
    shown,
)

if TYPE_CHECKING:
    import xarray as xr

    from ...interventions.models.model import Model
    from ..circuits.study import CircuitStudy

SHOWN = 12
"""Edges of the table."""
REPEATED, TEXT = "repeated", "text"
METRIC, N, LENGTH, CONTEXT = "logit_diff", 32, 25, 64
OF_TASKS = {
    "text": (None, (TEXT,)),
    "n": (N, (REPEATED, TEXT)),
    "length": (LENGTH, (REPEATED,)),
    "context": (None, (TEXT,)),
}
"""Options that not every task has: the default, and the tasks that they go with."""
EXAMPLES = """  headwise circuit                                   the shipped model
  headwise circuit --model code-4l --task text       on text it has not read
  headwise circuit --task prompts.txt --model gpt2 --estimator eap-ig
  headwise circuit --task task.json --metric loss
  headwise circuit --model gpt2 --plan               what each stage takes
"""
TASKS = """--task is one of
  repeated   random tokens, repeated once; corrupted, the first half is another
  text       prompts from text that end where a pair of tokens recurs;
             corrupted, the first pair is another (--text, or held_out of the
             model)
  FILE.json  a task as hw.to_json writes it, such as Prompts with corrupted runs
  FILE       one prompt in a line, whose last word stands in it once before:
               Harry Potter went home. Then Harry
             the answer is what followed that word
"""


def add(commands: Any) -> None:
    """Say how the command is called."""
    parser = add_command(
        commands,
        "circuit",
        run,
        help="the circuit of a behaviour, edge by edge, and how much it keeps",
        description=(
            "Score every edge of the model, run circuits of the edges with the largest scores, and say how small a "
            "circuit is that keeps the behaviour, how much it keeps beside random circuits (CPR and CMD as in MIB), "
            "which heads suffice, and how sure its edges are. Writes a NetCDF file and an HTML report beside it. "
            "Stopped or killed, the same command again goes on where it was."
        ),
        examples=f"{EXAMPLES}\n{TASKS}",
    )
    add_model(parser)
    parser.add_argument("--task", default=REPEATED, help="prompts, see below (default: %(default)s)")
    parser.add_argument("--text", metavar="PATH", help="file or folder of text, of --task text")
    parser.add_argument("--n", type=int, default=N, help="prompts that are drawn (default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=LENGTH, help="tokens in the half that repeats (default: %(default)s)"
    )
    parser.add_argument("--context", type=int, help=f"tokens of a prompt from text (default: {CONTEXT})")
    parser.add_argument("--metric", help=f"what is kept (default: {METRIC})")
    parser.add_argument("--estimator", default="exact", help="exact, or how edges are estimated (default: %(default)s)")
    parser.add_argument("--ig-steps", type=int, metavar="N", help="steps of an integrated estimate")
    parser.add_argument("--then-exact", type=int, default=0, metavar="K", help="measure the top K of an estimate")
    parser.add_argument(
        "--source", default="corrupted", help="what other edges carry: corrupted or mean (default: %(default)s)"
    )
    parser.add_argument(
        "--share", type=float, default=0.9, help="share of the behaviour to be kept (default: %(default)s)"
    )
    parser.add_argument("--edges", type=int, metavar="N", help="edges of the circuit (default: as many as are needed)")
    parser.add_argument("--draws", type=int, default=20, help="random circuits of each size (default: %(default)s)")
    parser.add_argument(
        "--resamples", type=int, default=200, help="draws of prompts, for how sure edges are (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (default: %(default)s)")
    parser.add_argument(
        "--out", help="NetCDF file to write (default: results/circuit-MODEL.nc, with what is not a default in its name)"
    )
    parser.add_argument("--plan", action="store_true", help="say what each stage would cost, and run nothing")
    parser.add_argument("--fresh", action="store_true", help="run everything again, whatever is there")
    add_json(parser, "print the figures, the circuit and findings as JSON; with --plan the cost of each stage")


def run(options: argparse.Namespace) -> int:
    """Run the study, write the report, print the summary."""
    started = time.monotonic()
    from ..circuits.edge_scores import check_options
    from ..storage.files import check_writable

    check_options(options.estimator, options.ig_steps, options.then_exact)
    if options.plan:
        quiet_libraries()
        model = open_model(options)
        plan = _study(options, model).plan(model)
        if options.json:
            print_json(asdict(plan))
        else:
            put(plan)
        return 0
    out = Path(options.out or f"results/circuit-{_name(options)}.nc")
    if out.suffix != ".nc":
        raise DeclarationError(f"--out {out}: end it in .nc; the report beside it gets the same name in .html")
    out = check_writable(out)
    check_writable(out.with_suffix(".html"))
    say(f"opening {options.model}")
    from ..circuits.study import STAGES
    from ..report.report import write_report

    quiet_libraries()
    model = open_model(options)
    study = _study(options, model)
    stages = [*STAGES]
    begun: list[str] = []

    def stage(name: str) -> None:
        """Say which stage begins; before the first one, what all will take."""
        if not begun:
            say(study.plan(model).line)
        begun.append(name)
        say(f"{stages.index(name) + 1}/{len(stages)} {STAGES[name]}")

    tree = study.run(model, stage, out=out, resume=not options.fresh)
    if not begun:
        say(f"{shown(out)} holds the whole result already; --fresh runs everything again")
    say("writing the report")
    report = write_report(tree, out.with_suffix(".html"))
    if options.json:
        print_json({"file": str(out), "report": str(report), **_figures(tree)})
        return 0
    _print_summary(tree)
    put(f"\n{shown(out)}  results ({out.stat().st_size / 1e6:.1f} MB)")
    put(f"{shown(report)}  report ({report.stat().st_size / 1e6:.1f} MB)")
    put(f"{time.monotonic() - started:.0f} s in all")
    return 0


def _name(options: argparse.Namespace) -> str:
    """What the file is called by: the model, and what is asked for that is not the default."""
    usual = {"task": REPEATED, "metric": METRIC, "source": "corrupted", "estimator": "exact"}
    asked = [Path(str(getattr(options, name) or usual[name])).stem for name in usual]
    more = [name.replace("*", "-star") for name, known in zip(asked, usual.values(), strict=True) if name != known]
    return "-".join([_stem(options), *more])


def _study(options: argparse.Namespace, model: Model) -> CircuitStudy:
    """The study that the options ask for."""
    from ..circuits.study import CircuitStudy

    names = ("estimator", "source", "share", "draws", "resamples", "seed", "then_exact")
    given = {name: getattr(options, name) for name in names}
    task, others = _task(options, model)
    given["steps"] = options.ig_steps
    return CircuitStudy(task, options.metric or METRIC, n=options.edges, others=others, **given)


def _task(options: argparse.Namespace, model: Model) -> tuple[Any, Any]:
    """The prompts, and others to judge the circuit on; None where they follow from these, or there are none."""
    from ..storage.registry import from_json
    from ..tasks.tasks import RepeatedTokens
    from ..text.recurring import line_prompts, recurring_prompts

    kind = options.task if options.task in (REPEATED, TEXT) else "FILE"
    for name, (usual, kinds) in OF_TASKS.items():
        if (given := getattr(options, name)) != usual and kind not in kinds:
            raise DeclarationError(f"--{name} {given}: it goes with --task {' or '.join(kinds)}")
    if options.task == REPEATED:
        return RepeatedTokens(n=options.n, length=options.length, seed=options.seed), None
    if options.task == TEXT:
        context = CONTEXT if options.context is None else options.context
        size = {"n": options.n, "context": context, "seed": options.seed}
        task = recurring_prompts(model, options.text, **size)
        try:
            return task, recurring_prompts(model, options.text, **size, first=options.n)
        except DeclarationError:  # the text has no more
            return task, None
    path = Path(options.task).expanduser()
    if not path.is_file():
        raise DeclarationError(
            f"--task {options.task}: possible are {REPEATED}, {TEXT}, and a file with a task or prompts"
        )
    if path.suffix != ".json":
        return line_prompts(model, path, options.seed), None
    try:
        task = from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"cannot read {path}: {error}") from error
    except HeadwiseError as error:
        raise DeclarationError(f"--task {path}: {error}; the file holds what hw.to_json(task) writes") from error
    if not hasattr(task, "draw"):
        raise DeclarationError(f"--task {path}: it holds a {type(task).__name__}, no task")
    return task, None


def _figures(tree: xr.DataTree) -> dict[str, Any]:
    """What --json prints of the study."""
    from ..circuits.edges import edges_of

    curve, circuit, nodes = (tree[name].to_dataset() for name in ("curve", "circuit", "nodes"))
    ends = ("", "_low", "_high")
    found = {f"{name}{end}": float(curve[f"{name}{end}"]) for name in ("cpr", "cmd") for end in ends}
    found |= {name: float(curve[name]) for name in ("cpr_log", "cmd_log")}
    kept = {f"{name}{end}": float(circuit[f"{name}{end}"]) for name in ("faithfulness", "complement") for end in ends}
    edges = zip(edges_of(circuit), circuit["score"].values, strict=True)
    sets = {
        str(name): {"heads": str(nodes["heads"].sel(set=name).values).split(), **_of_set(nodes.sel(set=name))}
        for name in nodes["set"].values
    }
    return {
        **found,
        "circuit": {
            "n": int(circuit.attrs["n"]),
            **kept,
            "p": float(circuit["p"]),
            "edges": [{"edge": str(edge), "score": float(score)} for edge, score in edges],
        },
        "heads": sets,
        "jaccard": float(tree["inclusion"]["jaccard"]) if "inclusion" in tree.children else None,
        "findings": json.loads(tree.attrs["conclusion"]),
    }


def _of_set(ds: xr.Dataset) -> dict[str, float]:
    return {name: float(ds[name]) for name in ("faithfulness", "complement", "p")}


def _print_summary(tree: xr.DataTree) -> None:
    """The strongest edges of the circuit as a table, then the conclusion."""
    from rich.table import Table

    from ..catalogue.listing import cell
    from ..circuits.edges import edges_of
    from ..circuits.findings import metric_in_words, score_in_words

    circuit = tree["circuit"].to_dataset()
    order = abs(circuit["score"]).argsort().values[::-1][:SHOWN]
    often = {}
    if "inclusion" in tree.children:
        ds = tree["inclusion"].to_dataset()
        often = dict(zip(edges_of(ds), ds["inclusion"].values, strict=True))
    put(f"{tree.attrs['title']}\n")
    table = Table(box=None)
    for title in ("edge", "score", "chosen again"):
        table.add_column(title, justify="left" if title == "edge" else "right")
    edges = edges_of(circuit)
    for at in order:
        edge = edges[at]
        again = f"{100 * often[edge]:.0f}%" if edge in often else ""
        table.add_row(cell(str(edge)), rounded(circuit["score"].values[at], "+.3f"), again)
    print_table(lambda wide: table, PLAIN_WIDTH)
    which = "all" if len(order) == circuit.sizes["edge"] else f"the {len(order)} strongest of {circuit.sizes['edge']}"
    again = " Chosen again: in how many circuits of prompts drawn again the edge is." if often else ""
    score = score_in_words(circuit["score"], metric_in_words(tree))
    put(fill(f"These are {which} edges of the circuit. {score}{again}"))
    put()
    findings = json.loads(tree.attrs["conclusion"])
    for finding in findings:
        if finding["group"] == "summary":
            put(fill(f"- {finding['text']}"))
    limits = sum(finding["group"] == "limits" for finding in findings)
    put(f"\nThe report has the curve, the graph and all edges, and {limits} limits of what was shown.")
