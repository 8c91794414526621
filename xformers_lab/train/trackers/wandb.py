"""Runs in Weights & Biases, under the id that the laboratory has for them. WANDB_PROJECT, WANDB_MODE and the like are
read as ever."""

import importlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

PACKAGE, EXTRA = "wandb", "wandb"
PROJECT = "xformers_lab"


class Tracker:
    """A run that is resumed goes on where W&B has it: steps that it knows are not sent again."""

    def __init__(self, run_dir: pathlib.Path, identity: str, config: Mapping[str, Any]):
        wandb = importlib.import_module("wandb")  # an extra; `import` might take this file for it
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity,
            name=f"{config.get('task')} {identity}",
            dir=str(run_dir),
            config=dict(config),
            resume="allow",
        )
        known = getattr(self.run, "step", 0)  # the step that W&B would write next
        self.known = known if isinstance(known, int) else 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self.known:
            self.run.log(dict(values), step=step)

    def finish(self) -> None:
        self.run.finish()
