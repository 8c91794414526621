"""Commands that measure models before they train: signals, error."""

import argparse
from collections.abc import Sequence

from xformers_lab import config as configs
from xformers_lab.api import untrained
from xformers_lab.cli.command import JSON, TRUST, WORDS, Command, answer, argument


def _signals(chosen: argparse.Namespace) -> int:
    return _answer(chosen, untrained.signals(*chosen.words, trust=chosen.trust))


def _error(chosen: argparse.Namespace) -> int:
    scales = [configs.spec.coerce(text, float, f"--scale {chosen.scale}") for text in chosen.scale.split(",")]
    return _answer(chosen, untrained.error(*chosen.words, scale=scales, trust=chosen.trust))


def _answer(chosen: argparse.Namespace, rows: Sequence[dict]) -> int:
    from xformers_lab.report import human, listing

    hidden = ("kind", "config")
    word = lambda value: human.significant(value) if isinstance(value, float) else configs.spec.show(value)
    shown = [{key: word(value) for key, value in row.items() if key not in hidden} for row in rows]
    return answer(chosen, rows, lambda: listing.print_listing(shown))


COMMANDS = [
    Command(
        "signals",
        _signals,
        "how large states and gradients are in each layer before training",
        [WORDS, TRUST, JSON],
        keys=True,
    ),
    Command(
        "error",
        _error,
        "how far mechanisms are from softmax attention on the same random heads",
        [
            WORDS,
            argument("--scale", default="1", metavar="S,S", help="of queries and keys of unit variance (default: 1)"),
            TRUST,
            JSON,
        ],
        keys=True,
    ),
]
