"""The command that plans for devices that need not be here: plan."""

import argparse
import sys

from xformers_lab.api import planning
from xformers_lab.cli.command import JSON, TRUST, WORDS, Command, answer, argument
from xformers_lab.plan import target


def _plan(chosen: argparse.Namespace) -> int:
    named: dict[str, list[str]] = {key: [] for key in target.KEYS}
    words = []
    for word in chosen.words:
        key, equals, text = word.partition("=")
        if equals and key in named:
            named[key] = text.split(",")
        else:
            words.append(word)
    targets = target.targets(named["topology"], named["platform"])
    rows, varied, interrupted = planning.planned(
        words,
        targets,
        decode=chosen.decode,
        longest=chosen.longest,
        skip_impossible=chosen.skip_impossible,
        trust=chosen.trust,
        lines=not chosen.json,
    )
    from xformers_lab.report import plans

    code = answer(chosen, rows, lambda: plans.print_plans(rows, varied))
    if interrupted:
        print("interrupted: the rows say what was compiled before", file=sys.stderr)
        return 128 + interrupted
    return code if all(row["status"] in ("ok", "refused") for row in rows) else 5


PLAN = [
    argument("--decode", action="store_true", help="plan decoding, of one sequence on one device, and no training"),
    argument("--longest", action="store_true", help="search for the longest sequence that fits, from seq_len= on"),
    argument("--skip-impossible", action="store_true", help="keep impossible combinations as refused rows"),
]
COMMANDS = [
    Command(
        "plan",
        _plan,
        "what configs would cost on devices that are not here: topology=v5e:4x4 (the extra plan), platform=cpu:8 or "
        "platform=gpu:8; whether they fit, FLOPs, what devices exchange",
        [WORDS, *PLAN, TRUST, JSON],
        keys=True,
    ),
]
