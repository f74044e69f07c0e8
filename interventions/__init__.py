"""Where, what and how: sites, interventions, grids, and the engine that runs them. Knows no metric and no picture."""

from .declare.components import Component
from .declare.edits import Compose, Intervention, MeanAblate, Patch, ResampleAblate, ZeroAblate
from .declare.grid import Grid
from .declare.paths import PathPatch
from .declare.sites import Head, Layer, Site
from .declare.steering import Add, Knockout, Scale

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
