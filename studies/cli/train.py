"""``headwise train``: a training run of PyTorch Lightning, with its studies, from a YAML file."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from ...errors import DeclarationError, HeadwiseError, ResultError
from .shared import add_command, put, quiet_libraries, shown

EXAMPLES = """  headwise train --config run.yaml
  headwise train --config run.yaml trainer.max_steps=2000 seed_everything=1
  headwise train --config run.yaml ckpt_path=last    goes on
  headwise train --config run.yaml --print_config    all options, with defaults
"""
FILE = """the file, as LightningCLI reads it:
  seed_everything: 0
  trainer:
    max_steps: 400
    callbacks:
      - class_path: headwise.StudyCallback
        init_args:
          every_n_train_steps: 50
          out: results/formation.nc
          study:
            class_path: headwise.Sweep
            init_args:
              task:
                class_path: headwise.RepeatedTokens
                init_args: {n: 16, length: 20}
              metrics: [induction, loss]
  model:
    class_path: headwise.CausalLM
    init_args:
      model: {model_type: gpt2, vocab_size: 128, n_positions: 64,
              n_embd: 64, n_layer: 2, n_head: 4}
  data:
    class_path: headwise.RepeatedTokensData
    init_args: {length: 32}
"""


def add(commands: Any) -> None:
    """Say how the command is called."""
    parser = add_command(
        commands,
        "train",
        run,
        help="train a model from a YAML file, and study it meanwhile",
        description=(
            "Train with PyTorch Lightning what a configuration describes: the model, the data, the trainer and its "
            "callbacks. It is LightningCLI, so any LightningModule and LightningDataModule can stand in it. Needs the "
            "extra train."
        ),
        examples=f"{EXAMPLES}\n{FILE}",
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML file, see below")
    parser.add_argument("--print_config", action="store_true", help="print the whole configuration, and train nothing")
    parser.add_argument(
        "values", metavar="NAME=VALUE", nargs="*", help="takes the place of a value of the file: trainer.max_steps=100"
    )


def run(options: argparse.Namespace) -> int:
    """Train what the file describes."""
    if wrong := [one for one in options.values if "=" not in one]:
        raise DeclarationError(f"{wrong[0]}: write a name and its value, such as trainer.max_steps=100")
    if not Path(options.config).is_file():
        raise ResultError(f"there is no file {options.config}")
    try:
        import jsonargparse  # noqa: F401  # what LightningCLI reads files with
    except ImportError:
        raise DeclarationError("train needs jsonargparse: pip install 'headwise[train]'") from None
    quiet_libraries()
    arguments = ["fit", "--config", options.config, *(f"--{one}" for one in options.values)]
    for out in _fit(arguments + ["--print_config"] * options.print_config):
        put(f"{shown(out)}  results ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def _fit(arguments: list[str]) -> list[Path]:
    """Have LightningCLI fit; the files of its studies. What it refuses is one line, and Ctrl-C stops as elsewhere."""
    import lightning as L
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningCLI

    from ..dynamics.callback import StudyCallback

    fitting: list[L.Trainer] = []

    class Fits(LightningCLI):  # type: ignore[misc]
        """Notes the trainer, which is asked afterwards whether it was stopped."""

        def before_fit(self) -> None:
            """Called by LightningCLI."""
            fitting.append(self.trainer)

    strict = {"exit_on_error": False}
    modes: dict[str, Any] = {"subclass_mode_model": True, "subclass_mode_data": True, "save_config_callback": None}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            kinds = {**strict, "fit": strict}
            Fits(L.LightningModule, L.LightningDataModule, parser_kwargs=kinds, args=arguments, **modes)
    except HeadwiseError:
        raise
    except SystemExit as ended:
        if any(trainer.interrupted for trainer in fitting):
            raise KeyboardInterrupt from None
        if ended.code:
            raise
    except (ArgumentError, ImportError, ValueError, TypeError, OSError) as error:
        if fitting:
            raise
        raise DeclarationError(f"{arguments[2]}: {_why(error)}") from error
    written = [Path(one.out) for trainer in fitting for one in trainer.callbacks if isinstance(one, StudyCallback)]
    return [out for out in written if out.is_file()]


def _why(error: Exception) -> str:
    """What jsonargparse says, in a line: the reasons alone, where it tries several types."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line.removeprefix("- ") for line in lines if line.startswith("- ") and "NoneType" not in line]
    return "; ".join(reasons) or " ".join(lines) or type(error).__name__
