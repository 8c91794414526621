"""What a study decided, kept in a file: solved widths, times of a probe, cut steps, tuned values. The same words again
land on the same cells, though the clock says something else and a failed run might end well."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab import files
from xformers_lab.config import Config, Study
from xformers_lab.errors import RunFailed

FOLDER = "studies"  # beside the runs


class Kept:
    """The decisions of one study, by section and key; each is written as soon as it is made."""

    def __init__(self, path: pathlib.Path):
        """What another run of the study left there; a file that cannot be read counts as none."""
        self.path, self.values = path, {}
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            return
        if isinstance(values, dict) and all(isinstance(section, dict) for section in values.values()):
            self.values = values

    def get(self, section: str, key: str) -> Any:
        """A decision, None where it was not made yet."""
        return self.values.get(section, {}).get(key)

    def put(self, section: str, key: str, value: Any) -> Any:
        """Keep a decision -> the decision; raises RunFailed where it cannot be written."""
        self.values.setdefault(section, {})[key] = value
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.replace_text(self.path, json.dumps(self.values, indent=1) + "\n")
        except OSError as error:
            raise RunFailed(f"{self.path}: cannot be written ({error.strerror})") from None
        return value


def kept(origins: Sequence[Config], study: Study, more: Sequence[Any]) -> Kept:
    """The file of a study: named by its configs, its keys, and what else decides which cells it has."""
    about = [[configs.identity(origin) for origin in origins], dataclasses.asdict(study), list(more)]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    return Kept(pathlib.Path(origins[0].runs) / FOLDER / f"{name}.json")
