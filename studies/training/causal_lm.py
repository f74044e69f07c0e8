"""Trains a causal language model with PyTorch Lightning: `CausalLM`, a LightningModule around a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, get_scheduler

from ...errors import DeclarationError, choices, whole
from ...interventions.models.opening import options_of
from ...interventions.models.turns import making
from .muon import MuonAdam

if TYPE_CHECKING:
    from ...interventions.declare.edits import Intervention

SCHEDULES = ("constant", "linear", "cosine")
IGNORED = -100
"""Label of a token that does not enter the loss, as in transformers."""


class CausalLM(L.LightningModule):  # type: ignore[misc]
    """Next-token training of a Hugging Face causal language model, with AdamW.

    A batch is a tensor of token ids ``(example, position)``, or a mapping with ``input_ids`` and, where some tokens
    shall not enter the loss, ``labels`` (those tokens are -100 there), or both as one tensor
    ``(example, 2, position)``. The loss is the mean cross-entropy in nats of the tokens from the second one on; it is
    logged as ``train/loss`` and ``val/loss``.

    Parameters
    ----------
    model : PreTrainedModel, mapping or str
        The model; or its configuration (``{"model_type": "gpt2", "n_layer": 2, ...}``), from which one with random
        weights is made; or a Hub id or folder, whose weights are trained further.
    learning_rate : float
        The largest one.
    weight_decay : float
        Of matrices; vectors (biases, norms) have none.
    betas : (float, float)
        Of AdamW.
    muon_rate : float, optional
        The largest learning rate of Muon (Jordan et al. 2024), for all matrices but embeddings and those that write
        logits. By default AdamW takes these too.
    warmup_steps : int
        Optimiser steps over which the learning rate rises from 0.
    schedule : {"constant", "linear", "cosine"}
        What the learning rate does then, until the last step of training.
    during : Intervention, optional
        Held on the model throughout training and validation, gradients included; possible are `ZeroAblate`, `Add`,
        `Scale`, `ProjectOut` and `Knockout`. `StudyCallback` measures the model without it.

    Raises
    ------
    DeclarationError
        A value is not possible, or `during` cannot be held on this model.

    Examples
    --------
    >>> module = hw.CausalLM.tiny(layers=1, heads=2, width=16, vocabulary=50)
    >>> type(module.model).__name__, module.model.config.n_layer
    ('GPT2LMHeadModel', 1)
    """

    def __init__(
        self,
        model: PreTrainedModel | Mapping[str, Any] | str,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        muon_rate: float | None = None,
        warmup_steps: int = 0,
        schedule: str = "constant",
        during: Intervention | None = None,
    ) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise DeclarationError(f"learning_rate={learning_rate}: give a number above 0")
        if muon_rate is not None and not muon_rate > 0:
            raise DeclarationError(f"muon_rate={muon_rate}: give a number above 0, or None for AdamW alone")
        if schedule not in SCHEDULES:
            raise DeclarationError(f"schedule={schedule!r}: possible are {choices(SCHEDULES)}")
        self.warmup_steps = whole(warmup_steps, "warmup_steps")
        self.learning_rate, self.weight_decay, self.betas, self.schedule = learning_rate, weight_decay, betas, schedule
        self.muon_rate = muon_rate
        self.model = _made(model)
        given = {"learning_rate": learning_rate, "weight_decay": weight_decay, "betas": betas, "muon_rate": muon_rate}
        given |= {"warmup_steps": warmup_steps, "schedule": schedule, "model": self.model.config.to_dict()}
        self.save_hyperparameters(_plain(given))
        self.during = during
        if during is not None:
            from .during import hold

            hold(self.model, during)

    @classmethod
    def tiny(
        cls,
        layers: int = 2,
        heads: int = 4,
        width: int = 64,
        *,
        vocabulary: int = 128,
        context: int = 256,
        seed: int | None = None,
        **options: Any,
    ) -> CausalLM:
        """A small GPT-2 with random weights, without dropout.

        Parameters
        ----------
        layers, heads, width : int
            `width` is that of the residual stream, a multiple of `heads`.
        vocabulary : int
            Token ids.
        context : int
            Tokens of the longest prompt.
        seed : int, optional
            Of the weights; by default they come from torch's generator as it stands.
        **options
            Of `CausalLM`.

        Returns
        -------
        CausalLM

        Raises
        ------
        DeclarationError
            A size is not possible.
        """
        sizes = {"layers": layers, "heads": heads, "width": width, "vocabulary": vocabulary, "context": context}
        for name, value in sizes.items():
            whole(value, name, low=1)
        if width % heads:
            raise DeclarationError(f"width={width} is no multiple of heads={heads}")
        config = {
            "model_type": "gpt2",
            "vocab_size": vocabulary,
            "n_positions": context,
            "n_embd": width,
            "n_layer": layers,
            "n_head": heads,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None),
        }
        if seed is None:
            return cls(config, **options)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls(config, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(example, position, token)`` of token ids ``(example, position)``."""
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits

    def training_step(self, batch: Tensor | Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, in nats."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor | Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the loss of a batch, in nats."""
        self.log("val/loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def loss(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        """The mean cross-entropy of a batch, in nats."""
        if isinstance(batch, Tensor) and batch.ndim == 3:
            batch = dict(zip(("input_ids", "labels"), batch.unbind(1), strict=True))
        tokens = batch if isinstance(batch, Tensor) else batch["input_ids"]
        labels = tokens if isinstance(batch, Tensor) else batch.get("labels", tokens)
        logits = self(tokens)[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    def configure_optimizers(self) -> Any:
        """AdamW, with Muon where it is asked for, and the schedule of the learning rates by optimiser steps."""
        inner = [] if self.muon_rate is None else self._inner()
        taken = {*map(id, inner)}
        parameters = [one for one in self.parameters() if one.requires_grad and id(one) not in taken]
        groups = [
            {"params": [one for one in parameters if one.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], self.learning_rate, (self.betas[0], self.betas[1])
        )
        optimiser: torch.optim.Optimizer = adam
        if self.muon_rate is not None and inner:
            optimiser = MuonAdam(adam, torch.optim.Muon(inner, self.muon_rate, self.weight_decay))
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf") and self.schedule != "constant":
            raise DeclarationError(f"schedule={self.schedule!r} needs an end: give the trainer max_steps or max_epochs")
        steps = None if steps == float("inf") else int(steps)
        schedule = get_scheduler(name, optimiser, self.warmup_steps, steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _inner(self) -> list[nn.Parameter]:
        """Matrices that are neither embeddings nor write logits."""
        outer = [one for one in self.model.modules() if isinstance(one, nn.Embedding)]
        outer += [self.model.get_output_embeddings()]
        ends = {id(weight) for one in outer for weight in one.parameters()}
        return [one for one in self.model.parameters() if one.requires_grad and one.ndim == 2 and id(one) not in ends]


def _made(model: PreTrainedModel | Mapping[str, Any] | str) -> PreTrainedModel:
    """The model that is given, made from its configuration, or opened."""
    if isinstance(model, PreTrainedModel):
        return model
    if isinstance(model, str | Path):
        name = str(model)
        options = options_of(name, name, None, False, tokenizer=False, dtype=torch.float32)
        with making():
            return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    if not isinstance(model, Mapping) or "model_type" not in model:
        raise DeclarationError(
            f"model={model!r}: give a causal language model of transformers, its configuration as a mapping with "
            "model_type, a Hub id or a folder"
        )
    with making():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))


def _plain(value: Any) -> Any:
    """A value as JSON has it, so that a checkpoint holds no object that would have to be unpickled."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
