"""What a HoloViews picture holds, for tests."""

from __future__ import annotations

import holoviews as hv

LAYERS, HEADS = 2, 4


METHODS = ["zero", "mean", "resample"]


def option(element, name, group="plot"):
    return hv.Store.lookup_options("bokeh", element, group).kwargs.get(name)


def of_type(element, kind):
    return [part for part in element if isinstance(part, kind)]


def labelled(element, label):
    (found,) = [part for part in element if part.label == label]
    return found
