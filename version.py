"""The version of the installed package. Imports nothing of ours."""

from importlib import metadata


def version() -> str:
    """Version of the installed headwise; ``unknown`` where it runs from a folder that was never installed."""
    try:
        return metadata.version("headwise")
    except metadata.PackageNotFoundError:
        return "unknown"


__version__ = version()
