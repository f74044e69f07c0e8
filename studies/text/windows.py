"""Text cut into windows of token ids. Owns which files are read, where they are cut, and which windows are drawn."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import LARGEST_SEED, MOST_PROMPTS, DeclarationError, whole
from ...interventions.models.locate import locate
from ..tasks.batch import Batch
from ..tasks.tasks import REFERENCE_EXAMPLES, has_no_text

if TYPE_CHECKING:
    from ...interventions.models.model import Model

Array = np.ndarray[Any, Any]
HELD_OUT = "held_out"
"""The folder of a model that holds text which it has not read."""
SHORTEST = 4
"""Tokens of a window at least."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a text: a task, whose every position with a next token is scored.

    Attributes
    ----------
    tokens : array (window, position)
        Token ids.
    files : tuple of str
        The file of each window, its path within the folder that was read.
    starts : array (window,)
        Where each window begins in its file, in tokens.
    texts : array (window, position) of str
        Each token as text.
    others : array (window', position)
        Windows of the text that were not drawn, for mean and resample ablation; where fewer than 32 are left, the
        drawn ones stand after them.
    possible : int
        Windows that the text has.
    sha256 : str
        Of the names and bytes of the files that were read.
    """

    tokens: Array
    files: tuple[str, ...]
    starts: Array
    texts: Array
    others: Array
    possible: int
    sha256: str

    def draw(self, model: Model) -> Batch:
        """The windows as prompts."""
        return _batch(self.tokens)

    def reference(self, model: Model) -> Batch:
        """The other windows as prompts."""
        return _batch(self.others)

    def __repr__(self) -> str:
        size, files = self.tokens.shape, len({*self.files})
        return f"<Windows: {size[0]} of {self.possible}, {size[1]} tokens each, from {files} files, {self.sha256[:16]}>"


def windows(
    model: Model, text: str | os.PathLike[str] | None = None, context: int | None = None, n: int = 32, seed: int = 0
) -> Windows:
    """Cut text into windows that no file's end crosses, and draw some.

    Each file is cut from its start; what is left at its end is not used, and nothing is put in front of a window.

    Parameters
    ----------
    model : Model
        Its tokenizer cuts the text into tokens.
    text : str or path, optional
        A file, or a folder whose files are read, those in folders within it too; names that begin with a dot are left
        out. Left out, the folder ``held_out`` of the model, with text that it has not read.
    context : int, optional
        Tokens of a window; as many as the model reads when left out.
    n : int
        Windows that are drawn, without replacement; all where the text has fewer. Where fewer than 32 are left, the
        drawn ones are among the others too, from which means and resampled values are taken.
    seed : int
        The same seed draws the same windows.

    Returns
    -------
    Windows
        In the order of files, and of places in them.

    Raises
    ------
    DeclarationError
        There is no text, it is no text, the model has no tokenizer or lacks words of it, or it has fewer than two
        windows.
    """
    context = model.shape.context if context is None else context
    context = whole(context, "context, the tokens of a window,", low=SHORTEST)
    if context > model.shape.context:
        raise DeclarationError(f"context={context}: {model.name} reads at most {model.shape.context} tokens")
    n = whole(n, "n, the number of windows,", low=2, high=MOST_PROMPTS)
    seed = whole(seed, "a seed", high=LARGEST_SEED)
    if lacking := has_no_text(model):
        raise DeclarationError(f"{lacking}: text needs one, give hw.load(..., tokenizer=...)")
    place, read = read_text(model, text)
    digest = hashlib.sha256()
    ids = {}
    for name, content in read.items():
        digest.update(f"{len(name)} {name}{len(content)} ".encode() + content.encode())
        ids[name] = np.asarray(_encode(model, content, name), dtype=np.int64)
    cuts = [(name, start) for name, own in ids.items() for start in range(0, len(own) - context + 1, context)]
    if len(cuts) < 2:
        longest = max(ids, key=lambda name: len(ids[name]))
        raise DeclarationError(
            f"{place} has {len(cuts)} windows of {context} tokens, and two are needed: its longest file, {longest}, "
            f"has {len(ids[longest])} tokens; give more text, or a smaller context"
        )
    drawn = np.random.default_rng((seed, 0)).permutation(len(cuts))
    own, rest = sorted(drawn[:n].tolist()), drawn[n : n + max(n, REFERENCE_EXAMPLES)].tolist()
    others = rest if len(rest) >= REFERENCE_EXAMPLES else rest + own

    def rows(some: list[int]) -> Array:
        return np.stack([ids[name][start : start + context] for name, start in (cuts[one] for one in some)])

    tokens = rows(own)
    return Windows(
        tokens,
        tuple(cuts[one][0] for one in own),
        np.asarray([cuts[one][1] for one in own]),
        np.asarray([model.token_text(row.tolist()) for row in tokens], dtype=object),
        rows(others),
        len(cuts),
        digest.hexdigest(),
    )


def read_text(model: Model, text: str | os.PathLike[str] | None) -> tuple[str, dict[str, str]]:
    """Where the text is, and what its files hold, by their names in order.

    Raises
    ------
    DeclarationError
        There is none, or a file is no text.
    """
    path = held_out(model) if text is None else Path(text).expanduser()
    if path is None:
        raise DeclarationError(
            f"{model.name} has no folder {HELD_OUT} with text that it has not read: give text=, a file or a folder of "
            "such text"
        )
    if path.is_file():
        files = {path.name: path}
    elif path.is_dir():
        found = (one for one in sorted(path.rglob("*")) if one.is_file())
        names = ((one.relative_to(path), one) for one in found)
        files = {name.as_posix(): one for name, one in names if not any(part.startswith(".") for part in name.parts)}
    else:
        raise DeclarationError(f"text={str(text)!r}: there is no such file or folder")
    read = {}
    for name, one in files.items():
        try:
            read[name] = one.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DeclarationError(
                f"{one} is no text in UTF-8: give a file of text, or a folder of such files"
            ) from None
        except OSError as error:
            raise DeclarationError(f"cannot read {one}: {error.strerror or error}") from error
    read = {name: content for name, content in read.items() if content.strip()}
    if not read:
        raise DeclarationError(f"{path} holds no text")
    return str(path), read


def held_out(model: Model) -> Path | None:
    """The folder with text that the model has not read, where it has one."""
    if model.source is None:
        return None
    _, where, kind = locate(model.source)
    folder = Path(where) / HELD_OUT
    return folder if kind != "main" and folder.is_dir() else None


def _encode(model: Model, text: str, name: str) -> list[int]:
    """Token ids of a file."""
    ids: list[int] = model.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    unknown = model.tokenizer.unk_token_id
    if unknown is not None and unknown in ids and str(model.tokenizer.unk_token) not in text:
        lacking = [word for word in dict.fromkeys(text.split()) if unknown in model.encode(word)]
        raise DeclarationError(
            f"{name} has {len(lacking)} words that are not in the vocabulary of {model.name}, such as "
            f"{', '.join(map(repr, lacking[:3]))}: give text in its words"
        )
    if ids and max(ids) >= model.shape.vocabulary:
        raise DeclarationError(
            f"{name} has the token id {max(ids)}: {model.name} has 0 to {model.shape.vocabulary - 1}, so its tokenizer "
            "is that of another model"
        )
    return ids


def _batch(tokens: Array) -> Batch:
    scored = np.ones(tokens.shape, dtype=bool)
    scored[:, -1] = False
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    return Batch({"clean": tokens}, np.full(len(tokens), tokens.shape[1]), scored, targets)
