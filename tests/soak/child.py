"""What `run.py` asks of headwise, and what its child processes do: a module that the server they fork from imports."""

import ctypes
import faulthandler
import json
import os
import pickle
import re
import resource
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import netCDF4
import numpy as np
import torch
import xarray as xr
from nnsight.schema.config import CONFIG

import headwise as hw
from headwise.interventions import (
    Add,
    Grid,
    Head,
    Knockout,
    Layer,
    MeanAblate,
    Patch,
    PathPatch,
    ResampleAblate,
    Scale,
    ZeroAblate,
)
from headwise.interventions.remote import patience
from headwise.interventions.run import engine
from headwise.metrics import accuracy, induction, kl, logit_diff, loss, prob, rank
from headwise.studies import (
    InductionStudy,
    RepeatedTokens,
    Results,
    capture,
    compare_estimates,
    composition_scores,
    measure,
    summary,
)
from headwise.studies.analyses import induction as study_module
from headwise.studies.cli import main
from headwise.studies.storage.netcdf import alone, write
from tests.support import remote_client
from tests.support.loopback import KEY

TASK = RepeatedTokens(n=4, length=8)
STUDY = InductionStudy(n=4, length=8, draws=3)
HEADS = Grid(lambda layer, head: ZeroAblate(Head(layer, head)), layer=range(2), head=range(8))
NOISED = Grid(
    lambda part, layer, head: Patch(Head(layer, head).site(part), source="corrupted"),
    part=["q", "k", "v"],
    layer=range(2),
    head=range(8),
)
STREAM = Grid(lambda layer, position: Patch(Layer(layer).resid_pre.at(position)), layer=range(2), position=range(16))
SEVERAL = {
    "path": PathPatch(Head(0, 3), Head(1, 2).k),
    "blind": sum(Knockout(Head(1, 2), at, at - 7) for at in range(9, 14)),
    "pair": ZeroAblate(Head(0, 3)) + Patch(Head(1, 2).k, source="corrupted"),
    "push": Add(Layer(1).resid_pre.at(-1), [0.1] * 64),
    "half": Scale(Head(1, 5), 0.5) + MeanAblate(Head(0, 1)),
    "other": ResampleAblate(Head(1, 1)),
}
MEASURED = {
    "heads": (HEADS, [loss, accuracy], {"batch_size": 4}),
    "noised": (NOISED, [logit_diff], {"batch_size": 8}),
    "stream": (STREAM, [logit_diff, loss], {"batch_size": 8}),
    "several": (SEVERAL, [kl, rank, prob], {"per_position": True}),
    "attention": (HEADS, [loss, induction], {"batch_size": 8}),
    "slopes": (NOISED, [logit_diff], {"estimator": "gradient"}),
}
KEPT = (*MEASURED, "study")
"""Requests that take ``out=``."""
ALL = (*KEPT, "capture", "composition", "estimates")
LIMIT = 120.0
"""Seconds after which a child says where it is, and ends."""


def ask(name, model, out=None, **more):
    """One of the requests."""
    if name in MEASURED:
        what, metrics, options = MEASURED[name]
        return measure(model, TASK, what, metrics, out=out, progress=False, **options, **more)
    if name == "study":
        return STUDY.run(model, out=out, **more)
    if name == "capture":
        return capture(model, TASK, [Head(1, 2).pattern, Head(0, 3).k, Layer(1).resid_post])
    if name == "composition":
        return composition_scores(model, draws=5)
    return compare_estimates(model, TASK, NOISED, logit_diff)


def numbers(result):
    """Every variable of a result, as arrays."""
    tree = result if isinstance(result, xr.DataTree) else xr.DataTree(result)
    return {
        f"{node.path}/{name}".lstrip("/"): np.asarray(one)
        for node in tree.subtree
        for name, one in node.to_dataset(inherit=False).variables.items()
    }


def unlike(found, wanted, tolerance=None):
    """In what numbers differ from those that are wanted, bit for bit where there is no tolerance; empty: in nothing."""
    if found.keys() != wanted.keys():
        return f"other variables: {sorted(found.keys() ^ wanted.keys())}"
    for name, right in wanted.items():
        one = found[name]
        if right.dtype.kind not in "fiu" or one.shape != right.shape:
            if one.tolist() != right.tolist():
                return f"{name} is {str(one.tolist())[:80]} and not {str(right.tolist())[:80]}"
        elif tolerance is not None:
            if not np.allclose(one, right, rtol=tolerance, atol=tolerance, equal_nan=True):
                return f"{name} is off by {np.nanmax(np.abs(one - right)):.3g}"
        elif one.dtype != right.dtype or one.tobytes() != right.tobytes():
            return f"{name} is off by {np.nanmax(np.abs(one.astype(float) - right)):.3g}, bit for bit"
    return ""


def body(log, work, given):
    """A child: what it says goes to a file, and it ends with a status as a program has it."""
    to = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(to, 1), os.dup2(to, 2), os.close(to)
    faulthandler.enable()
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    try:
        status = globals()[work](*given) or 0
    except hw.errors.HeadwiseError as error:
        print(f"{type(error).__name__}: {error}")
        status = 1
    except KeyboardInterrupt as error:
        print(f"KeyboardInterrupt: {error}")
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 3
    sys.stdout.flush()
    os._exit(status)


def reference(path, library, names):
    """Every request, one after the other: numbers, and what it costs to make each with ``out=``."""
    model, wanted = hw.load("words-2l"), {}
    for name in names:
        wanted[name] = {"numbers": numbers(ask(name, model))}
    kept = [name for name in names if name in KEPT]
    for name in kept:
        begun, passes = time.monotonic(), counted()
        ask(name, hw.load("words-2l"), library / f"{name}.nc")
        wanted[name] |= {"seconds": time.monotonic() - begun, "passes": len(passes)}
    wanted["attrs"] = dict(hw.open_result(library / f"{kept[0]}.nc", load=True).attrs)
    for name in kept:
        wanted[name] |= {how: READ[how](name, library) for how in ("table", "summary")}
    path.write_bytes(pickle.dumps(wanted))


def of_table(name, library):
    variable = next(iter(MEASURED[name][1])).name if name in MEASURED else "ablation/loss"
    return Results(library).table(variable).to_csv()


READ = {
    "lazily": lambda name, library: numbers(hw.open_result(library / f"{name}.nc")),
    "tree": lambda name, library: numbers(hw.open_result(library / f"{name}.nc", load=True)),
    "folder": lambda name, library: numbers(Results(library).open(name)),
    "table": of_table,
    "summary": lambda name, library: str(summary(library / f"{name}.nc")),
}
"""Ways of reading a finished result; each gives what can be compared."""


def counted():
    """A list that grows with every pass that is computed from here on."""
    real, seen = engine.run_part, []

    def run_part(*given, **more):
        seen.append(1)
        return real(*given, **more)

    engine.run_part = run_part
    return seen


def keep(name, out):
    """A request with ``out=``; the last line is the number of passes that it computed."""
    passes = counted()
    ask(name, hw.load("words-2l"), out)
    print(len(passes))


def command(out):
    """The study on the command line."""
    study_module.InductionStudy = partial(InductionStudy, draws=STUDY.draws)
    return main.main(["induction", "--n", str(STUDY.n), "--length", str(STUDY.length), "--out", str(out)])


def listed(folder):
    return main.main(["results", "ls", str(folder)])


def at_server(host):
    """Remote work goes to this server, in several jobs, and is in a hurry."""
    CONFIG.API.HOST, CONFIG.API.APIKEY = host, KEY
    remote_client.in_small_jobs()
    patience.LOST, patience.STILL, patience.GIVE_UP, patience.STANDS = 1.5, 1.0, 20.0, 60.0


def remotely(name, out, host):
    at_server(host)
    ask(name, hw.load("words-2l", remote=True), out)


def interrupted_writes(seed, folder):
    """Ctrl-C at a random moment of many writes, in one process, which goes on writing."""
    faulthandler.dump_traceback_later(LIMIT / 3, exit=True)  # this takes seconds
    rng, path = Random(seed), folder / "again.nc"
    made = ask("heads", hw.load("words-2l"))
    threads = threading.active_count()
    for _ in range(rng.randint(3, 8)):
        timer = threading.Timer(rng.uniform(0, 0.2), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while timer.is_alive():
                hw.write_netcdf(made, path)
            timer.join()
            hw.write_netcdf(made, path)  # whatever was deferred has been raised by now
            raise RuntimeError("Ctrl-C in a write was never raised")
        except KeyboardInterrupt:
            timer.join()
        hw.write_netcdf(made, path)
        if why := unlike(numbers(hw.open_result(path, load=True)), numbers(made)):
            raise RuntimeError(f"after Ctrl-C in a write: {why}")
    left = [one.name for one in folder.iterdir()], threading.active_count() - threads
    if left != (["again.nc"], 0):
        raise RuntimeError(f"Ctrl-C in a write left {left}")


def limited(name, out, largest):
    """No file may be larger than so many bytes; then they may, and the same call ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the log is a file as well
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    full = refused(name, out)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    os.dup2(log, 1)
    print(full)
    ask(name, hw.load("words-2l"), out)


def filled(name, folder, wanted, room):
    """The same on a disk of our own that has room for so many bytes; the whole result is compared here."""
    if not own_disk(folder):
        print("skipped")
        return
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    size = (folder / "filler").stat().st_size
    os.truncate(folder / "filler", max(0, size - room))
    print(refused(name, folder / "out.nc"))
    (folder / "filler").unlink()
    ask(name, hw.load("words-2l"), folder / "out.nc")
    if why := unlike(numbers(hw.open_result(folder / "out.nc", load=True)), wanted):
        raise RuntimeError(f"after a full disk: {why}")
    if [one.name for one in folder.iterdir()] != ["out.nc"]:
        raise RuntimeError(f"a full disk left {sorted(one.name for one in folder.iterdir())}")


def refused(name, out):
    """``full``, where a request says in a line that it cannot write, and ``fits`` where it can."""
    try:
        ask(name, hw.load("words-2l"), out)
    except hw.errors.HeadwiseError as error:
        if "\n" in str(error) or "cannot write" not in str(error):
            raise RuntimeError(f"a full disk is told so: {error}") from error
        return "full"
    return "fits"


def own_disk(folder, size=4_000_000):
    """Mount a small disk that only this process sees; whether that is allowed."""
    spaces, libc = 0x10000000 | 0x00020000, ctypes.CDLL(None)
    maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    faulthandler.cancel_dump_traceback_later()  # which has a thread, and a process with threads is refused
    allowed = hasattr(libc, "unshare") and libc.unshare(spaces) == 0
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    if not allowed:
        return False
    for name, text in maps.items():
        Path(f"/proc/self/{name}").write_text(text)
    return libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0


CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal would follow."""


def hostile(folder, rng, attrs):
    """Put something into a folder of results that is none, or lies; given the attributes of one."""
    path, begun = folder / f"bad-{rng.random()}.nc", json.dumps(attrs)[:-1]
    lies = ['"step": ' + "9" * 5000, '"model": "\\ud800"', '"seconds": "abc", "model": [1]', '"task": ' + "[" * 100_000]
    how = rng.randrange(9)
    if how == 0:
        path.write_bytes(rng.choice([b"", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + rng.randbytes(5000)]))
    elif how == 1:
        path.symlink_to(rng.choice([path, folder.parent / "none.nc", Path("/etc")]))
    elif how == 2:
        os.mkfifo(path)
    elif how in (3, 4):
        path.with_name(f"{path.name}.parts").mkdir()
        about = path.with_name(f"{path.name}.parts") / "about.json"
        os.mkfifo(about) if how == 3 else about.write_text(f"{begun}, {rng.choice(lies)}}}")
    elif how == 5:
        path.with_name(f"bad-\x1b[31m\u202e{rng.random()}.nc").write_bytes(b"no result")
    elif how == 6:
        with alone(), netCDF4.Dataset(path, "w") as file:  # which is not made for threads; others have processes
            file.setncatts(attrs)
            for dim in ("layer", "head"):
                file.createDimension(dim, 200_000)
            file.createVariable("loss", "f8", ("layer", "head"), chunksizes=(1000, 1000), zlib=True)
    elif how == 7:
        told = {"seed": 1e30, "model": [1, 2, 3], "title": "\x1b]0;x\x07\u202e", "seconds": "abc", "task": "[" * 9000}
        holds = xr.Dataset({"loss": ("x", [1.0], {"long_name": "\x1b[2J"})})
        write(holds.assign_attrs(attrs | dict(rng.sample(list(told.items()), 2))), path)
    else:
        path.mkdir()


if os.environ.get("SOAK_WARM"):  # the server of children has everything imported, and each begins at once
    hw.load("words-2l")
