"""Where, what and how: sites, interventions, grids, and the engine that runs them. Knows no metric and no picture."""

from .edits import Compose, Intervention, MeanAblate, Patch, ResampleAblate, ZeroAblate
from .grid import Grid
from .sites import Component, Head, Layer, Site

__all__ = [
    "Component",
    "Compose",
    "Grid",
    "Head",
    "Intervention",
    "Layer",
    "MeanAblate",
    "Patch",
    "ResampleAblate",
    "Site",
    "ZeroAblate",
]
