"""Muon for the matrices inside a model and AdamW for the rest, as one optimiser: `MuonAdam`."""

from __future__ import annotations

from typing import Any

import torch


class MuonAdam(torch.optim.Optimizer):
    """AdamW for some parameters and Muon for others, as one optimiser: Lightning counts the steps of each.

    Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks.
    """

    def __init__(self, adam: torch.optim.AdamW, muon: torch.optim.Muon) -> None:
        self.parts = (adam, muon)
        super().__init__([*adam.param_groups, *muon.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        """A step of both, after the gradients that `closure` makes."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the states of both."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
