"""A folder of results as a small database: what is there, which of it, and questions over several files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from ...errors import ResultError, UnknownNameError, choices
from ..output.progress import Progress
from ..storage.netcdf import UNFINISHED, Source
from ..storage.reading import Result, open_result, open_variable
from .combine import combine, part
from .conditions import ask, matching
from .entries import Entry, Problem
from .index import PARTS, scan
from .table import rows_of

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = tuple(field.name for field in fields(Entry))
Patterns = str | Sequence[str] | None


class Results:
    """The result files in a folder and the folders below it, one row each.

    The folder is listed when something is asked for the first time, and only attributes are read. A cache in the folder
    (``.headwise-index.json``) makes the next listing quick; it may be deleted at any time.

    Parameters
    ----------
    folder : str or path
    all : bool
        Name NetCDF files that headwise did not write among `problems` too.

    Attributes
    ----------
    folder : Path
    whole : bool
        Whether it holds all results of the folder, not a selection.

    Raises
    ------
    ResultError
        There is no such folder.

    Examples
    --------
    >>> model, task = hw.load("words-2l"), hw.RepeatedTokens(n=4, length=8)
    >>> heads = hw.Grid(lambda layer, head: hw.ZeroAblate(hw.Head(layer, head)), layer=model.layers, head=model.heads)
    >>> for seed in (0, 1):
    ...     task = hw.RepeatedTokens(n=4, length=8, seed=seed)
    ...     ds = hw.measure(model, task, heads, out=f"results/seed-{seed}.nc")
    >>> results = hw.Results("results")
    >>> [(entry.path, entry.model, entry.seed) for entry in results]
    [('seed-0.nc', 'words-2l', 0), ('seed-1.nc', 'words-2l', 1)]
    >>> results.table("loss", where="effect > 5")["name"].tolist()
    ['L0H3', 'L0H3']
    >>> dict(results.combine("seed")["loss"].sizes)
    {'seed': 2, 'layer': 2, 'head': 8, 'example': 4}
    """

    def __init__(self, folder: str | os.PathLike[str], *, all: bool = False) -> None:
        self._all = all
        self.folder = Path(folder).expanduser()
        self._root = self.folder.resolve()
        self._found: tuple[list[Entry], list[Problem]] | None = None
        self.whole = True
        if not self._root.is_dir():
            what = "is a file: open it with open_result" if self._root.exists() else "does not exist"
            raise ResultError(f"the folder {self.folder} {what}")
        if self.folder.suffix == PARTS:
            raise ResultError(f"{self.folder} is {UNFINISHED}")

    def _listing(self) -> tuple[list[Entry], list[Problem]]:
        if self._found is None:
            with Progress("reading", unit="files") as bar:
                self._found = scan(self._root, bar.update)
        return self._found

    @property
    def entries(self) -> list[Entry]:
        """The rows, by path."""
        return list(self._listing()[0])

    @property
    def problems(self) -> list[Problem]:
        """Files of the folder that are called like results and cannot be read as one, each with the reason."""
        return [one for one in self._listing()[1] if self._all or not one.foreign]

    @property
    def frame(self) -> pd.DataFrame:
        """The rows as a DataFrame; ``date`` in UTC, ``seed`` and ``step`` missing where there is none."""
        import pandas as pd

        frame = pd.DataFrame([asdict(entry) for entry in self.entries], columns=list(COLUMNS))
        dates = pd.to_datetime(frame["date"], utc=True, format="ISO8601")
        numbers = {name: frame[name].astype("Int64") for name in ("size", "seed", "step")}
        return frame.assign(date=dates.dt.tz_localize(None), **numbers).astype({"size": "int64"})

    def refresh(self) -> Results:
        """The folder as it is now, all of it."""
        other = Results(self._root, all=self._all)
        other.folder = self.folder
        return other

    def __len__(self) -> int:
        return len(self._listing()[0])

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __getitem__(self, which: int | str) -> Entry:
        return self._entry(which)

    def __contains__(self, path: object) -> bool:
        return any(entry.path == path for entry in self._listing()[0])

    def select(
        self,
        *,
        model: Patterns = None,
        study: Patterns = None,
        task: Patterns = None,
        state: Patterns = None,
        where: str | None = None,
    ) -> Results:
        """The results that match everything that is given; none may.

        Parameters
        ----------
        model, study, task, state : str or sequence of str, optional
            Text in which ``*`` stands for anything: ``model="*gpt2*"``; of several, one must match.
        where : str, optional
            A condition on the columns, such as ``"size > 1e6 and date >= '2026-01-01'"``: see
            `headwise.table`.

        Returns
        -------
        Results
            The same folder with fewer rows.

        Raises
        ------
        DeclarationError, UnknownNameError
            The condition cannot be read, or there is no such column.
        """
        given = {"model": model, "study": study, "task": task, "state": state}
        if where is None and not any(patterns is not None for patterns in given.values()):
            return self
        entries = self.entries
        for name, patterns in given.items():
            if patterns is not None:
                wanted = [patterns] if isinstance(patterns, str) else list(patterns)
                entries = [one for one in entries if any(fnmatchcase(getattr(one, name), each) for each in wanted)]
        selected = self._with(entries)
        if where is None:
            return selected
        keep = matching(selected.frame, where)
        return self._with([entry for entry, kept in zip(entries, keep, strict=True) if kept])

    def _with(self, entries: list[Entry]) -> Results:
        other = Results(self._root, all=self._all)  # the same folder, wherever the process is now
        other.folder = self.folder
        other._found, other.whole = (entries, self._listing()[1]), False
        return other

    def path(self, which: int | str | os.PathLike[str]) -> Path:
        """Where a result of this catalogue lies; `which` as in `open`."""
        return self._place(self._entry(which))

    def _place(self, entry: Entry) -> Path:
        path = self._root / entry.path
        if not path.resolve().is_relative_to(self._root):  # replaced by a link since it was listed
            raise ResultError(f"{entry.path} leads outside of {self.folder}")
        return path

    def open(self, which: int | str | os.PathLike[str]) -> Result:
        """One of the results as plain xarray, read from the file as it is used.

        Parameters
        ----------
        which : int, str or path
            Its place in the list, its path in the folder, or its name where that is the only one of its kind.

        Returns
        -------
        Dataset or DataTree

        Raises
        ------
        UnknownNameError
            No result here is called that; the text lists some that are.
        ResultError
            It lies outside of the folder, is not finished, or cannot be read.
        """
        entry = self._entry(which)
        if entry.state != "complete":
            raise ResultError(f"{entry.path} is not finished: the same call or command again goes on where it stopped")
        return open_result(self._place(entry))

    def _entry(self, which: int | str | os.PathLike[str]) -> Entry:
        entries, problems = self._listing()
        if isinstance(which, int):
            if not -len(entries) <= which < len(entries):
                raise UnknownNameError(f"there is no result {which}: {self.folder} has {len(entries)}")
            return entries[which]
        wanted = self._relative(which)
        same = [one for one in entries if one.path == wanted] or [
            one for one in entries if one.path.endswith(f"/{wanted}") or Path(one.path).stem == wanted
        ]
        if len(same) == 1:
            return same[0]
        if same:
            raise UnknownNameError(f"{wanted!r} could be {choices(one.path for one in same)}")
        for problem in problems:
            if problem.path == wanted:
                raise ResultError(f"{wanted} cannot be read: {problem.reason}")
        paths = [one.path for one in entries]
        near = get_close_matches(wanted, paths, n=10) or paths[:10]
        more = f", and {len(paths) - len(near)} more" if len(paths) > len(near) else ""
        raise UnknownNameError(f"{wanted!r} is no result here: {choices(near) or 'there is none'}{more}")

    def _relative(self, which: str | os.PathLike[str]) -> str:
        """A name as a path in the folder; one that leads outside is refused."""
        given = Path(which)
        try:
            full = (given if given.is_absolute() else self._root / given).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise ResultError(f"{str(given)!r} is no path: {error}") from None
        place = Path(os.path.normpath(given if given.is_absolute() else self._root / given))
        if not full.is_relative_to(self._root):
            raise ResultError(f"{given} lies outside of {self.folder}: only files in it are opened")
        return (place if place.is_relative_to(self._root) else full).relative_to(self._root).as_posix()

    def combine(self, dim: str = "model", *, variable: str | None = None, group: str | None = None) -> xr.Dataset:
        """The results side by side in one dataset, loaded, along a new dim with labels from their attributes.

        Parameters
        ----------
        dim : {"model", "seed", "step"}
            The model's name; the seed of study or task; the step of training at which the model was opened. Seeds and
            steps are sorted as numbers.
        variable : str, optional
            Only this variable and the run without intervention, such as ``"ablation/loss"``.
        group : str, optional
            The group of a study's DataTree, such as ``"ablation"``.

        Raises
        ------
        ResultError
            Coordinates differ: the text names the coordinate, the files and the difference.
        DeclarationError
            Labels repeat or are missing, or the files were not measured in the same way.
        """
        complete, parts = self._complete(), []
        with Progress("reading", unit="files") as bar:
            for number, entry in enumerate(complete):
                bar.update(number, len(complete))
                parts.append((entry, part(self._place(entry), variable, group)))
        return combine(parts, dim)

    def table(
        self,
        variable: str,
        *,
        where: str | None = None,
        sort: str | Sequence[str] | None = None,
        top: int | None = None,
    ) -> pd.DataFrame:
        """A variable of the results as one table: a row for each cell, the mean over ``example``.

        Parameters
        ----------
        variable, where, sort, top
            As for `headwise.table`. Results without the variable are passed over.

        Returns
        -------
        DataFrame
            As for `headwise.table`; with several results, ``file`` and ``model`` come first, then ``step`` where any
            was measured at a step of training.

        Raises
        ------
        UnknownNameError, DeclarationError
            No result has the variable; else as for `headwise.table`.
        """
        import pandas as pd

        complete, pieces, missing = self._complete(), [], []
        steps = any(entry.step is not None for entry in complete)
        with Progress("reading", unit="files") as bar:
            for number, entry in enumerate(complete):
                bar.update(number, len(complete))
                source = Source(self._place(entry))
                try:
                    with source.open():
                        piece = rows_of(*open_variable(source, variable, exact=len(complete) > 1))
                except UnknownNameError as error:
                    missing.append(error)
                    continue
                about: dict[str, Any] = {"file": entry.path, "model": entry.model} if len(complete) > 1 else {}
                if about and steps:
                    about["step"] = pd.array([entry.step] * len(piece), dtype="Int64")
                for place, (column, value) in enumerate(about.items()):
                    if column not in piece.columns:
                        piece.insert(place, column, value)
                pieces.append(piece)
        if not pieces:
            raise missing[0] if missing else UnknownNameError(f"there is no finished result in {self.folder}")
        whole = pd.concat(pieces, ignore_index=True) if len(pieces) > 1 else pieces[0]
        whole.attrs = pieces[0].attrs
        return ask(whole, where=where, sort=sort, top=top)

    def _complete(self) -> list[Entry]:
        return [entry for entry in self._listing()[0] if entry.state == "complete"]

    @property
    def title(self) -> str:
        """How many results there are, in words."""
        from .listing import headline

        return headline(self.entries, self.problems, self.folder, not self.whole)

    def __repr__(self) -> str:
        from .listing import as_text

        return as_text(self.entries, self.problems, self.title)

    def _repr_html_(self) -> str:
        from .listing import as_html

        return as_html(self.entries, self.problems, self.title)
