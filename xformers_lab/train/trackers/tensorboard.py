"""Event files of TensorBoard in the folder of the run: `tensorboard --logdir runs` shows all runs beside each other."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

PACKAGE, EXTRA = "tensorboardX", "tensorboard"
FOLDER = "events"


class Tracker:
    """Every step of the run stands once in RUN/events: those of an earlier process are written anew, and its files go,
    since after its last checkpoint it may have taken steps that are taken again."""

    def __init__(self, run_dir: pathlib.Path, identity: str, config: Mapping[str, Any]):
        import tensorboardX  # an extra

        folder = run_dir / FOLDER
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self.writer = tensorboardX.SummaryWriter(str(folder), flush_secs=10)
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", 0)
        self.writer.add_text("id", identity, 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()
