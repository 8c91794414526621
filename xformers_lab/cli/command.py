"""What a command declares of itself, beside the function that runs it, and what such functions share."""

import argparse
import dataclasses
import json
import shlex
from collections.abc import Callable
from typing import Any, Literal

from xformers_lab.train import trackers


@dataclasses.dataclass(frozen=True)
class Argument:
    """A flag or a positional argument, with the options that argparse gets for it.

    path: "folder" of one that names a folder, "file" of one that names a file to write: one that cannot be written is
    refused before anything runs.
    """

    name: str
    options: dict[str, Any]
    path: Literal["folder", "file"] | None = None

    @property
    def attribute(self) -> str:
        """Where the parsed arguments hold it."""
        return self.options.get("dest") or self.name.lstrip("-").replace("-", "_")

    @property
    def shown(self) -> str:
        """How messages call it."""
        return self.name if self.name.startswith("-") else self.name.upper()


@dataclasses.dataclass(frozen=True)
class Command:
    """run: from the parsed arguments to the exit code; keys: whether its --help tells the grammar of words, and every
    key of a config; study: and of a study; place: and of a place among several processes."""

    name: str
    run: Callable[[argparse.Namespace], int]
    help: str
    arguments: list[Argument]
    keys: bool = False
    study: bool = False
    place: bool = False


def argument(name: str, *, path: Literal["folder", "file"] | None = None, **options: Any) -> Argument:
    """An `Argument`, its options as argparse's `add_argument` takes them."""
    return Argument(name, options, path)


WORDS = argument("words", nargs="*", metavar="key=value")
JSON = argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")
TRACK = argument(
    "--track",
    action="append",
    default=[],
    choices=trackers.names(),
    help="show every step there too (an extra); may be given many times",
)
TRUST = argument("--trust", action="store_true", help="run code outside the package that a file names")


def answer(chosen: argparse.Namespace, value: Any, table: Callable[[], object]) -> int:
    """Print the value as JSON with --json, else let `table` print it; -> exit code 0."""
    if chosen.json:
        print(json.dumps(value, indent=2, default=str))
    else:
        table()
    return 0


def spelled(chosen: argparse.Namespace) -> str:
    """The command as it was typed."""
    return shlex.join(["xlab", *chosen.typed])
