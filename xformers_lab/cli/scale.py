"""The command that asks what size changes: scale."""

import argparse
import sys

from xformers_lab.api import scaling
from xformers_lab.cli import measuring
from xformers_lab.cli.command import JSON, TRACK, TRUST, Command, answer, argument, spelled
from xformers_lab.cli.exports import EXPORTS, export
from xformers_lab.compare.scaling import AXES, SCORES, Scale, parted
from xformers_lab.errors import UsageError
from xformers_lab.terminal import visible


def _scale(chosen: argparse.Namespace) -> int:
    words, fitted = parted(chosen.words)
    scale = Scale.read(**fitted)
    if not words:
        raise UsageError(
            "scale what? For example: xlab scale task=lm attention=full,linear dim=32,48,64,96 seeds=3; "
            "xlab scale runs fits what is stored there"
        )
    if scaling.is_stored(words[0]):
        return _stored(chosen, words, scale)
    cells, varied, asked = scaling.study(words, scale, trust=chosen.trust)
    chosen.no_baselines, chosen.range_control = True, False  # these have one size
    become = lambda table: scaling.ScaleTable.of(table, scale)
    return measuring.conducted(chosen, cells, varied, asked, become=become)


def _stored(chosen: argparse.Namespace, words: list[str], scale: Scale) -> int:
    from rich.console import Console

    if chosen.dry_run:
        raise UsageError("--dry-run: nothing trains where stored runs are fitted; leave it out")
    table = scaling.stored(words[0], words[1:], scale, spelled(chosen))
    if not any(fit.curves for fit in table.fits()):
        raise UsageError(f"{words[0]}: {' '.join(table.verdict().split())}")
    code = answer(chosen, table.plain(), lambda: table.draw(Console()))
    if chosen.report:
        print(visible(f"report: {table.report(chosen.report)}"), file=sys.stderr)
    export(chosen, table.rows, table.varied, table.command, table.fits())
    return code


OF_COMPARE = [one for one in measuring.COMPARE if one.name not in ("--no-baselines", "--range-control")]
OF_FIT = f"x={'|'.join(AXES)}, what losses are set against (params); y={'|'.join(SCORES)} (loss); by=KEY,KEY, the keys "
OF_FIT += "that name variants, all others varying the size (by default dim, layers, heads and kv_heads vary it)"
COMMANDS = [
    Command(
        "scale",
        _scale,
        "fit losses over sizes, and say where the curves of variants cross",
        [
            argument(
                "words",
                nargs="*",
                metavar="key=value",
                help=f"as compare takes them, with three sizes or more, say dim=32,48,64,96; and {OF_FIT}. Or a folder "
                "of runs, with filters or without, or a comparison's .json file: what is stored there is fitted",
            ),
            *OF_COMPARE,
            TRACK,
            TRUST,
            *EXPORTS,
            JSON,
        ],
        keys=True,
        study=True,
    )
]
