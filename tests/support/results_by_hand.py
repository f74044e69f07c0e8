"""Results written by hand, with values and attributes that a test can state."""

import json

import numpy as np
import xarray as xr

from headwise.studies.storage.provenance import SCHEMA

TASK = {"type": "RepeatedTokens", "n": 2, "length": 3, "seed": 0, "bos": False, "tokens": None, "score": "repeat"}


def attributes(model="small", seed=0, **more):
    """Root attributes as headwise writes them."""
    return {
        "Conventions": "headwise",
        "schema_version": SCHEMA,
        "model": model,
        "model_revision": "main",
        "versions": json.dumps({"headwise": "0.1.0", "numpy": "2.0"}),
        "created": "2026-03-04T05:06:07+00:00",
        "task": json.dumps(TASK | {"seed": seed}),
        "metrics": json.dumps(["loss"]),
        "interventions": json.dumps({"type": "ZeroAblate"}),
        "base": "clean",
    } | more


def measured(loss=((2.0, 3.0),), layers=(0,), **said):
    """A measurement by hand: ``loss(layer, head)``, one example; 1.0 without intervention."""
    values = np.asarray(loss)[..., None]
    return xr.Dataset(
        {
            "loss": (("layer", "head", "example"), values, {"units": "nat", "long_name": "next-token cross-entropy"}),
            "baseline_loss": (("run", "example"), [[1.0], [5.0]], {"units": "nat"}),
        },
        coords={"layer": list(layers), "head": range(values.shape[1]), "example": [0], "run": ["clean", "corrupted"]},
        attrs=attributes(**said),
    )


def studied(**said):
    """A study by hand, with its measurement in the group ``ablation``."""
    study = json.dumps({"type": "InductionStudy", "n": 2, "seed": said.get("seed", 0)})
    tree = xr.DataTree.from_dict({"/ablation": measured(**said), "/words": xr.Dataset({"prob": ("example", [0.5])})})
    tree.attrs = attributes(**{name: value for name, value in said.items() if name not in ("loss", "layers")}) | {
        "study": study,
        "title": "A study",
    }
    return tree


def unfinished(folder, name, **about):
    parts = folder / f"{name}.parts"
    parts.mkdir(parents=True)
    (parts / "about.json").write_text(json.dumps(attributes() | about))
    (parts / "pass-0.nc").write_bytes(b"\x00" * 100)
    return parts


def paths(results):
    return [entry.path for entry in results]
