"""The command that looks at a run while it trains: watch."""

import argparse
import contextlib
import sys
import time

from xformers_lab import named_run
from xformers_lab.cli.command import Command, argument
from xformers_lab.cli.running import RUN_DIR, RUNS
from xformers_lab.errors import UsageError
from xformers_lab.report.exports import writing
from xformers_lab.terminal import message, visible

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


def _watch(chosen: argparse.Namespace) -> int:
    if not chosen.every > 0:
        raise UsageError(f"--every {chosen.every:g}: more than 0 seconds")
    folder = named_run.folder(chosen.run_dir, chosen.runs)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from xformers_lab.report import live

    console, said = Console(), -PLAIN_EVERY
    screen = Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext()
    now = None
    try:
        with screen as shown:
            for now in live.follow(folder, chosen.every):
                if chosen.report:
                    with writing(chosen.report, "report"):
                        live.write(now, chosen.report, chosen.every)
                if shown is not None:
                    shown.update(Text("\n".join(live.in_text(now, console.width - 1))), refresh=True)
                elif time.monotonic() - said >= PLAIN_EVERY or not now.running:
                    said = time.monotonic()
                    print(visible("  ".join(f"{name} {words}" for name, words in now.facts())), flush=True)
    except KeyboardInterrupt:
        print("watch ends; the run goes on", file=sys.stderr)
        return 130
    if now is not None and now.run.status == "unfinished":
        print(message(f"no process works in it; go on with xlab resume {folder}"), file=sys.stderr)
    return 0


WATCH = [
    argument("--report", path="file", metavar="FILE", help="write the curves as a page too, which reloads itself"),
    argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)"),
]
COMMANDS = [
    Command("watch", _watch, "show the curves of a run while it trains, until it ends", [RUN_DIR, *WATCH, RUNS]),
]
