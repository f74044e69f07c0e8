"""headwise: declare interventions on a transformer, run them, and get labelled, stored, drawn results.

``import headwise as hw`` costs nothing: names are resolved when they are first used (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import DeclarationError, HeadwiseError, ModelError, ResultError, ServerError, UnknownNameError
    from .interventions.load import load
    from .interventions.models.locate import shipped
    from .interventions.models.model import Model
    from .studies.measuring.capture import capture
    from .studies.measuring.effects import effect, normalized
    from .studies.measuring.measure import measure
    from .studies.storage.files import open_tree, write_netcdf

_WHERE = {
    "DeclarationError": ".errors",
    "HeadwiseError": ".errors",
    "ModelError": ".errors",
    "ResultError": ".errors",
    "ServerError": ".errors",
    "UnknownNameError": ".errors",
    "Model": ".interventions.models.model",
    "load": ".interventions.load",
    "shipped": ".interventions.models.locate",
    "capture": ".studies.measuring.capture",
    "measure": ".studies.measuring.measure",
    "effect": ".studies.measuring.effects",
    "normalized": ".studies.measuring.effects",
    "open_tree": ".studies.storage.files",
    "write_netcdf": ".studies.storage.files",
}

__all__ = [
    "DeclarationError",
    "HeadwiseError",
    "Model",
    "ModelError",
    "ResultError",
    "ServerError",
    "UnknownNameError",
    "capture",
    "effect",
    "load",
    "measure",
    "normalized",
    "open_tree",
    "shipped",
    "write_netcdf",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module(".version", __name__).version()
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
