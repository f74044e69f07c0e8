"""Where models are found: those that ship, folders, and Hub ids. Imports errors only."""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError

from ...errors import ModelError, choices, first_line

SHIPPED = Path(__file__).resolve().parents[2] / "models"
HUB_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9_][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})?")
"""Ids of the Hub: ``owner/name``, or the name alone of its oldest models, such as ``gpt2``."""


def shipped() -> list[str]:
    """Names of the models that ship with headwise.

    Returns
    -------
    list of str
        Each can be given to `load`.

    Examples
    --------
    >>> hw.shipped()
    ['code-4l', 'words-2l']
    """
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def locate(source: str) -> tuple[str, str, str]:
    """Name, where to load from, and what kind of place that is (``main`` for the Hub)."""
    if source in shipped():
        return source, str(SHIPPED / source), "shipped"
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{source} is a folder without config.json: a model folder holds config.json and weights")
        return folder.resolve().name, str(folder), "local"
    if folder.is_file():
        raise ModelError(f"{source} is a file: give the folder that holds config.json and the weights")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"there is no folder {source}")
    if not HUB_ID.fullmatch(source):
        raise ModelError(
            f"no model is called {source!r}: shipped are {choices(shipped())}; a Hub id is written as there, such as "
            "gpt2 or EleutherAI/pythia-70m; a folder is given by its path"
        )
    return source, source, "main"


def why(name: str, where: str, error: Exception) -> str:
    """Why a model cannot be read, in a line."""
    reason = first_line(error)
    if isinstance(error, UnpicklingError):
        reason = (
            "its weights are a pickle that holds more than tensors, or is broken; reading such a file can run code, so "
            "it was not read: have the weights as safetensors"
        )
    if Path(where).is_dir():
        return f"cannot read the model in {where}: {reason}"
    return (
        f"cannot get {name} from the Hugging Face Hub: {reason}; without the Hub use a local folder or a shipped model "
        f"({choices(shipped())})"
    )
