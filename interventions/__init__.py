"""Where, what and how: sites, interventions, grids, and the engine that runs them. Knows no metric and no picture."""

from .components import Component
from .edits import Compose, Intervention, MeanAblate, Patch, ResampleAblate, ZeroAblate
from .grid import Grid
from .paths import PathPatch
from .sites import Head, Layer, Site
from .steering import Add, Knockout, Scale

__all__ = [
    "Add",
    "Component",
    "Compose",
    "Grid",
    "Head",
    "Intervention",
    "Knockout",
    "Layer",
    "MeanAblate",
    "Patch",
    "PathPatch",
    "ResampleAblate",
    "Scale",
    "Site",
    "ZeroAblate",
]
