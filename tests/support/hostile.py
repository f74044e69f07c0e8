"""A folder as somebody hostile would pack it: good results among files that are made to do harm to whom opens them.

`build` makes it by hand, with xarray, netCDF4 and the system alone. What is good says its right numbers; what is bad
has its reason beside it. What lies in `Hostile.foreign` is outside of the folder, and nothing may change it.
"""

import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import netCDF4
import numpy as np
import xarray as xr

TASK = {"type": "RepeatedTokens", "n": 2, "length": 3, "seed": 0, "bos": False, "tokens": None, "score": "repeat"}
TITLE = "\x1b]0;owned\x07\x1b[2J"
"""What sets the title of a terminal, and clears it."""
BIDI = "\u202egpj.exe"
"""Shown from right to left: ``exe.jpg``."""
C1 = "\x9b31m\x85"
"""A control sequence and a new line in one byte each."""
DEEP = "[" * 200_000
"""JSON on which Python's reader runs out of depth."""
ODD = {
    "a whole number": 7,
    "a number": 0.5,
    "not a number": float("nan"),
    "infinite": float("-inf"),
    "several numbers": np.arange(3),
    "no numbers": np.array([], dtype=np.int64),
    "several texts": ["a", "b"],
    "empty": "",
    "text": "abc",
    "5,000 digits": "9" * 5000,
    "a huge whole number": str(10**30),
    "deep JSON": DEEP,
    "half a character in JSON": '{"type": "\\ud800", "repr": "\\ud800", "seed": 1, "headwise": "\\udfff"}',
    "a list in JSON": '["loss", 3, null]',
    "objects in lists in JSON": '[{"group": ["x"], "text": {"a": 1}}, {"group": "summary"}, 5]',
    "other kinds in JSON": '{"type": ["x"], "seed": 1e400, "n": "n", "layers": "x", "headwise": {"a": 1}, "repr": 5}',
    "a number in JSON": "12",
    "null in JSON": "null",
    "year 0": "0000-01-01T00:00:00",
    "an odd zone": "2026-01-01T00:00:00+23:59:59.999999",
    "the last year": "9999-12-31T23:59:59-23:59",
    "letters that steer": f"{TITLE}{BIDI}{C1}",
    "lines": "a\nb\r\nc\td",
}
"""Values that an attribute may have, by what they are."""
SAID = (
    "schema_version", "model", "model_revision", "model_shape", "versions", "created", "task", "metrics",
    "interventions", "base", "seconds", "step", "study", "conclusion", "title", "device", "executed", "estimator",
    "direction", "seconds_by_stage", "float32_deviation", "sites", "run", "question", "estimators", "fingerprint",
    "weight_hash", "long_name", "coordinates",
)  # fmt: skip
"""Attributes at the root that anything reads."""
LOSS = np.array([[2.0, 3.0], [1.0, 4.5]])
"""``loss`` of the good results, the mean over examples by layer and head; 1.0 without intervention."""


@dataclass(frozen=True)
class Hostile:
    """What was built.

    Attributes
    ----------
    folder : Path
    foreign : Path
        A folder beside it, to which links of the folder lead.
    good : dict of str to str
        Path of each good result to its variable whose mean over examples is `LOSS`.
    bad : dict of str to str
        Path of each file that is no result that can be listed, to what it is.
    """

    folder: Path
    foreign: Path
    good: dict[str, str]
    bad: dict[str, str]

    def files(self) -> list[str]:
        """Every path that a command could be given, those of unfinished runs too."""
        return sorted([*self.good, *self.bad, *ODD_BUT_LISTED])

    def untouched(self) -> dict[str, bytes]:
        """What the foreign folder holds, to be compared before and after."""
        return {str(one.relative_to(self.foreign)): one.read_bytes() for one in _files(self.foreign)}


ODD_BUT_LISTED = ("escapes.nc", "huge-index.nc", "huge-variable.nc", "huge-text.nc", "zeros.nc", "corrupt.nc")
"""Files whose attributes are good, so that they are listed, and that hold what must not be believed or read whole."""


def said(**more):
    """Root attributes as headwise writes them."""
    return {
        "Conventions": "headwise",
        "schema_version": "1",
        "model": "small",
        "model_revision": "main",
        "model_shape": json.dumps({"layers": 2, "heads": 2}),
        "versions": json.dumps({"headwise": "0.1.0", "numpy": "2.0"}),
        "created": "2026-03-04T05:06:07+00:00",
        "seconds": "12.5",
        "task": json.dumps(TASK),
        "metrics": json.dumps(["loss"]),
        "interventions": json.dumps({"type": "ZeroAblate"}),
        "base": "clean",
        "estimator": "exact",
    } | more


def measured(**more):
    """A measurement by hand, whose ``loss`` is `LOSS`."""
    spread = np.array([-0.25, 0.25])
    return xr.Dataset(
        {
            "loss": (("layer", "head", "example"), LOSS[..., None] + spread, {"units": "nat", "long_name": "loss"}),
            "baseline_loss": (("run", "example"), [1 + spread, 5 + spread], {"units": "nat", "long_name": "loss"}),
            "role": (("layer", "head"), np.array([["a", "b"], ["a", "c"]], dtype=object)),
        },
        coords={"layer": [0, 1], "head": [0, 1], "example": [0, 1], "run": ["clean", "corrupted"]},
        attrs=said(**more),
    )


def studied(**more):
    """A study by hand: the same measurement in the group ``ablation``, and other groups."""
    words = xr.Dataset({"prob": ("example", [0.5, 0.25])}, attrs={"long_name": "plain words"})
    tree = xr.DataTree.from_dict({"/ablation": measured(), "/words": words, "/words/inner": words})
    study = json.dumps({"type": "OwnStudy", "n": 2, "seed": 0})
    tree.attrs = said(study=study, title="A study", **more)
    return tree


def build(place, *, large=False):
    """Make the folder below `place`; `large` files take seconds more: very many groups, an attribute of 200 MB.

    Returns
    -------
    Hostile
        Files that the system cannot make (a FIFO on Windows) are left out.
    """
    folder, foreign = Path(place) / "results", Path(place) / "foreign"
    folder.mkdir(parents=True)
    (foreign / "deep").mkdir(parents=True)
    (foreign / "letters.txt").write_text("not yours")
    (foreign / "deep" / "more.bin").write_bytes(bytes(range(256)))
    measured().to_netcdf(foreign / "outside.nc")
    bad: dict[str, str] = {}
    good = _good(folder)
    _links(folder, foreign, bad)
    _special(folder, bad)
    _damaged(folder, bad)
    _huge(folder, bad, large)
    _odd(folder, bad)
    _unfinished(folder, foreign, bad)
    _escapes(folder, bad)
    return Hostile(folder, foreign, good, bad)


def _good(folder):
    measured().to_netcdf(folder / "good.nc")
    studied(model="other").to_netcdf(folder / "study.nc")
    (folder / "below").mkdir()
    measured(step=100).to_netcdf(folder / "below" / "good.nc")
    return {"good.nc": "loss", "study.nc": "ablation/loss", "below/good.nc": "loss"}


def _links(folder, foreign, bad):
    for name, to in {
        "outside.nc": foreign / "outside.nc",
        "zero.nc": Path("/dev/zero"),
        "nothing.nc": folder / "is-not-there",
        "loop-a.nc": folder / "loop-b.nc",
        "loop-b.nc": folder / "loop-a.nc",
        "itself.nc": folder / "itself.nc",
    }.items():
        with suppress(OSError, NotImplementedError):
            (folder / name).symlink_to(to)
            bad[name] = "a link"


def _special(folder, bad):
    (folder / "folder.nc").mkdir()
    bad["folder.nc"] = "a folder"
    with suppress(AttributeError, OSError):
        os.mkfifo(folder / "fifo.nc")
        bad["fifo.nc"] = "a FIFO"
    with suppress(AttributeError, OSError):
        os.mkfifo(folder / ".headwise-index.json")
    with suppress(AttributeError, OSError), socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(folder)  # the names of sockets are short
        try:
            one.bind("socket.nc")
            bad["socket.nc"] = "a socket"
        finally:
            os.chdir(here)


def _damaged(folder, bad):
    (folder / "text.nc").write_text("layer,head\n0,1\n")
    (folder / "empty.nc").write_bytes(b"")
    whole = (folder / "good.nc").read_bytes()
    (folder / "truncated.nc").write_bytes(whole[: len(whole) // 2])
    (folder / "signature.nc").write_bytes(whole[:8] + b"\xff" * 4000)
    (folder / "classic.nc").write_bytes(b"CDF\x01" + b"\xff" * 4000)
    with (folder / "sparse.nc").open("wb") as file:
        file.truncate(10 * 2**30)
    (folder / "unreadable.nc").write_bytes(whole)
    (folder / "unreadable.nc").chmod(0)
    names = ("text", "empty", "truncated", "signature", "classic", "sparse", "unreadable")
    bad |= {f"{name}.nc": name for name in names}
    if os.access(folder / "unreadable.nc", os.R_OK):  # who may read everything
        del bad["unreadable.nc"]
        (folder / "unreadable.nc").unlink()
    ds = measured()
    ds.to_netcdf(folder / "corrupt.nc", encoding={"loss": {"fletcher32": True, "chunksizes": (2, 2, 2)}})
    whole, chunk = (folder / "corrupt.nc").read_bytes(), ds["loss"].values.tobytes()
    assert whole.count(chunk) == 1
    # listed, as its description is whole; its one chunk is not
    (folder / "corrupt.nc").write_bytes(whole.replace(chunk, chunk[:8] + b"\xff" + chunk[9:]))


def _huge(folder, bad, large):
    def file(name):
        made = netCDF4.Dataset(folder / name, "w")
        made.setncatts(said())
        made.createVariable("small", "f8", ())[...] = 3.0
        return made

    with file("huge-variable.nc") as one:  # 298 GiB in 20 kB
        one.createDimension("layer", 200_000)
        one.createDimension("head", 200_000)
        one.createVariable("loss", "f8", ("layer", "head"), zlib=True, chunksizes=(100, 100))
    with file("huge-index.nc") as one:
        one.createDimension("layer", 10**11)
        one.createVariable("layer", "f8", ("layer",), zlib=True, chunksizes=(1000,))
        one.createDimension("name", 10**10)
        one.createVariable("name", str, ("name",), chunksizes=(1000,))
    with file("huge-text.nc") as one:
        one.createDimension("row", 10**7)
        one.createDimension("letters", 10**6)
        one.createVariable("loss", "S1", ("row", "letters"), zlib=True, chunksizes=(100, 1000))
    with file("zeros.nc") as one:  # 32 MB in a few kB, which is no harm
        one.createDimension("example", 4_000_000)
        one.createVariable("loss", "f8", ("example",), zlib=True, chunksizes=(1_000_000,))[:] = 0.0
    with file("deep-groups.nc") as one:
        group = one
        for _ in range(10_000):
            group = group.createGroup("g")
    with file("many-groups.nc") as one:
        for number in range(100_000 if large else 6_000):
            one.createGroup(f"g{number}")
    bad |= {"deep-groups.nc": "groups in groups", "many-groups.nc": "very many groups"}
    with (folder / "a-gigabyte.nc").open("wb") as begun:
        begun.write(b"\x89HDF\r\n\x1a\n")
        begun.truncate(2**30)
    bad["a-gigabyte.nc"] = "nothing behind its signature"
    if large:
        with file("huge-attribute.nc") as one:
            one.setncattr("title", "x" * 200_000_000)


def with_attribute(source, target, name, value):
    """Copy a result, with another attribute at its root; `False` where NetCDF does not take the value."""
    Path(target).write_bytes(Path(source).read_bytes())
    try:
        with netCDF4.Dataset(target, "a") as file:
            if name in file.ncattrs():
                file.delncattr(name)
            file.setncattr(name, value)
    except (ValueError, TypeError, RuntimeError, UnicodeError, AttributeError):
        Path(target).unlink()
        return False
    return True


REFUSED = {
    "schema_version": "several numbers",
    "model": "several texts",
    "created": "year 0",
    "versions": "deep JSON",
    "task": "a list in JSON",
    "step": "5,000 digits",
    "study": "deep JSON",
}
"""Attributes that no listing can take: the file is no result, for a reason that names the attribute."""


def _odd(folder, bad):
    (folder / "odd").mkdir()
    for name, value in REFUSED.items():
        path = f"odd/{name}.nc"
        if with_attribute(folder / "good.nc", folder / path, name, ODD[value]):
            bad[path] = f"{name} is {value}"
    seed = json.dumps(TASK | {"seed": 10**30})
    with_attribute(folder / "good.nc", folder / "odd" / "seed.nc", "task", seed)
    bad["odd/seed.nc"] = "its seed is 10**30"


def _unfinished(folder, foreign, bad):
    def parts(name, about=None):
        made = folder / f"{name}.nc.parts"
        made.mkdir()
        if about is not None:
            (made / "about.json").write_text(about)
        return made

    bad["linked.nc.parts"] = "a link"
    try:
        (folder / "linked.nc.parts").symlink_to(foreign, target_is_directory=True)
    except (OSError, NotImplementedError):
        del bad["linked.nc.parts"]
    whole = parts("whole", json.dumps(said()))
    (whole / "pass-0.nc").write_bytes(b"\x00" * 100)
    letters = parts("letters")
    (letters / "letters.txt").write_text("not yours")
    (letters / "inner").mkdir()
    (letters / "inner" / "more.txt").write_text("not yours")
    parts("deep", DEEP)
    parts("number", "12")
    parts("half", json.dumps(said(model="\ud800")))
    parts("steps", json.dumps(said()).replace('"base"', f'"step": {"9" * 5000}, "base"'))
    parts("seeds", json.dumps(said(task=TASK | {"seed": 10**30})))
    parts("kinds", json.dumps(said(model=["a"], created={"a": 1}, task=[1])))
    (parts("inside") / "about.json").mkdir()
    with (parts("sparse") / "about.json").open("wb") as file:
        file.truncate(2**30)
    for name in ("letters", "deep", "number", "half", "steps", "seeds", "kinds", "inside", "sparse"):
        bad[f"{name}.nc.parts"] = name
    with suppress(AttributeError, OSError):
        os.mkfifo(parts("fifo") / "about.json")
        bad["fifo.nc.parts"] = "about.json is a FIFO"
    with suppress(OSError, NotImplementedError):
        (parts("zero") / "about.json").symlink_to("/dev/zero")
        bad["zero.nc.parts"] = "about.json is a link to a device"


def _escapes(folder, bad):
    """Letters that steer a terminal: in names, and in whatever a file says."""
    odd = f"{TITLE}{BIDI}{C1}"
    ds = measured(title=odd, model=odd, device=odd, base="clean", question=odd)
    for name in ("loss", "baseline_loss"):
        ds[name].attrs |= {"long_name": odd, "units": odd}
    ds["role"] = (("layer", "head"), np.array([[odd, "b"], ["a", f"{odd}c"]], dtype=object), {"comment": odd})
    ds["loss_effect_low"] = (("layer", "head"), LOSS - 1.5, {"comment": odd})
    ds["loss_effect_high"] = (("layer", "head"), LOSS - 0.5, {"comment": odd})
    ds.to_netcdf(folder / "escapes.nc")
    for number, name in enumerate([f"{TITLE.replace('/', '')}.nc", f"{BIDI}.nc", "a\nb.nc", "\x9bc.nc"]):
        with suppress(OSError, ValueError):
            path = folder / name
            path.write_text(f"no result {number}")
            bad[name] = "steers a terminal"
    with suppress(OSError, ValueError):
        path = os.fsencode(folder) + b"/\xff\xfe.nc"
        with open(path, "wb") as file:
            file.write((folder / "good.nc").read_bytes())
        bad["\ufffd\ufffd.nc"] = "its name is not UTF-8"


def _files(folder):
    return sorted(one for one in folder.rglob("*") if one.is_file())
