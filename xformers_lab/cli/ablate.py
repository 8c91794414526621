"""The command that takes a design apart: ablate."""

import argparse

from xformers_lab.cli import measuring
from xformers_lab.cli.command import Command
from xformers_lab.errors import UsageError


def _ablate(chosen: argparse.Namespace) -> int:
    if not chosen.words:
        raise UsageError("ablate what? For example: xlab ablate base.toml norm=pre,post position=rope,learned seeds=3")
    from xformers_lab.compare import ablate

    plan = ablate.ablation(chosen.words, trust=chosen.trust)
    return measuring.conducted(chosen, plan.cells, plan.varied, plan.study, plan.axes)


COMMANDS = [
    Command(
        "ablate",
        _ablate,
        "swap one choice of a base config at a time, and say which mattered",
        measuring.OF_COMPARE,
        keys=True,
        study=True,
    )
]
