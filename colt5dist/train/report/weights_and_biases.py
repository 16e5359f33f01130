"""The numbers of a run in Weights & Biases, where `monitor.wandb` asks for it."""

import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from colt5dist.errors import ConfigError, first_line

PROJECT = "colt5dist"
"""Project of the runs where the environment variable WANDB_PROJECT names none."""


def check_wandb() -> None:
    """Check that Weights & Biases can be written to.

    Raises:
        ConfigError: the package is not installed.
    """
    if find_spec("wandb") is None:
        raise ConfigError(
            "monitor.wandb: the package wandb is not installed; pip install wandb, or set monitor.wandb=false"
        )


class WeightsAndBiases:
    """One run of Weights & Biases, with the keys of metrics.jsonl; its own environment variables apply.

    Args:
        run_dir: folder of the run; wandb's own files go there.
        run_id: id of the run: a later start of the run goes on with the same one.
        settings: the resolved configuration.

    Raises:
        ConfigError: the package is missing, or refuses, for instance because nobody is logged in.
    """

    def __init__(self, run_dir: Path, run_id: str, settings: Mapping[str, Any]) -> None:
        check_wandb()
        import wandb

        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=run_id,
                name=os.environ.get("WANDB_NAME", run_dir.name),
                dir=run_dir,
                config=dict(settings),
                resume="allow",
                allow_val_change=True,
                settings=wandb.Settings(console="off"),  # the console stays the run's own
            )
        except (wandb.Error, OSError, ValueError) as error:
            about = " ".join(str(error).partition("For further information")[0].split())  # pydantic adds an address
            raise ConfigError(
                f"monitor.wandb: {type(error).__name__}: {about}; run `wandb login`, set WANDB_MODE=offline, or "
                "monitor.wandb=false"
            ) from None

    def log(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write the numbers of a step. A step that wandb has seen before a resumption or a rollback keeps its numbers.

        Args:
            step: number of the step.
            values: numbers by key; those that are None are left out.
        """
        self._try(lambda run: run.log({key: value for key, value in values.items() if value is not None}, step=step))

    def finish(self, *, failed: bool) -> None:
        """End the run, and wait until it is written; a second call does nothing."""
        self._try(lambda run: run.finish(exit_code=int(failed)))
        self._run = None

    def _try(self, write: Callable[[Any], object]) -> None:
        """Write, unless an earlier attempt failed: what fails is one warning, and the training goes on."""
        if self._run is None:
            return
        try:
            write(self._run)
        except Exception as error:  # whatever the package or its service raises
            self._run = None
            print(f"WARNING: monitor.wandb: {first_line(error)}; nothing more is written there", file=sys.stderr)
