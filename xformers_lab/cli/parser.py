"""Every command as argparse knows it, and the command that was typed."""

import argparse
import textwrap
from typing import NoReturn

from xformers_lab import __version__, terminal
from xformers_lab import config as configs
from xformers_lab.cli import (
    ablate,
    author,
    experiment,
    inspect,
    maps,
    measuring,
    planning,
    running,
    runs,
    scale,
    untrained,
    watch,
)
from xformers_lab.cli.command import Command
from xformers_lab.errors import UsageError, nearest

# In the order of --help. A new command is an entry of one of these lists, beside the function that runs it.
COMMANDS = [
    *inspect.COMMANDS,
    *running.COMMANDS,
    *watch.COMMANDS,
    *measuring.COMMANDS,
    *ablate.COMMANDS,
    *scale.COMMANDS,
    *experiment.COMMANDS,
    *runs.COMMANDS,
    *maps.COMMANDS,
    *untrained.COMMANDS,
    *planning.COMMANDS,
    *author.COMMANDS,
]
ITEM = 27  # columns in front of what an item of a list is
GRAMMAR = """\
Words are key=value; key=a,b,c and key=512..4096:x2 or key=0..4 sweep (compare, bench, plan); @file.toml, @file.yaml,
@file.json or a Python recipe @file.py with configs = [...] bring many at once, later words win.

Choices read name:option=value:option=value, a+b cycles mechanisms over layers, 5*a+b has five of a; a name is a file on
the shelf, a dotted module path, or the path of a .py file of your own. What has , : or + in it stands in brackets,
which a shell wants quoted: "task=lm:path=(notes,old.txt)"."""


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The command and its arguments; words may stand before, between and after flags."""
    parser = _parser()
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is not None and command not in (names := [known.name for known in COMMANDS]):
        parser.error(f'no command "{command}": {nearest(command, names)}')
    chosen, left = parser.parse_known_args(arguments)
    flags = [word for word in left if word.startswith("-")]
    if flags:
        names = [known.name for known in chosen.arguments if known.name.startswith("-")]
        parser.error(f"no flag {flags[0].partition('=')[0]}: {nearest(flags[0].partition('=')[0], names, 'flags')}")
    if left and not hasattr(chosen, "words"):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        chosen.words = [*chosen.words, *left]
    chosen.typed = arguments
    return chosen


def locate(chosen: argparse.Namespace) -> None:
    """Arguments that are paths, with the home folder for ~; what cannot be written is refused before anything runs."""
    for argument in chosen.arguments:
        text = getattr(chosen, argument.attribute)
        if argument.path is None or text is None:
            continue
        path = configs.spec.located(text, argument.shown)
        if argument.path == "folder" and path.is_file():
            raise UsageError(f"{argument.shown} {text}: a file is there; name a folder")
        if argument.path == "file":
            configs.spec.writable(path, f"{argument.shown} {text}")
        setattr(chosen, argument.attribute, str(path))


class _Help(argparse.HelpFormatter):
    """Paragraphs, and lists of indented lines, each wrapped to the terminal's width."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(line for block in text.split("\n\n") for line in [*_filled(block, width), ""]).rstrip()


def _filled(block: str, width: int) -> list[str]:
    """A paragraph in lines of at most `width`, or a list, whose lines are indented: `  NAME  what it is`."""
    lines = block.splitlines()
    if not any(line.startswith(" ") for line in lines):
        return textwrap.wrap(" ".join(lines), width, break_long_words=False, break_on_hyphens=False)
    filled = []
    for line in lines:
        hanging = " " * (ITEM if line[2:ITEM].endswith(" ") and width > 2 * ITEM else 4)
        filled += textwrap.wrap(line, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
    return filled


class _Parser(argparse.ArgumentParser):
    """Its refusals are messages like all others: on one line, not endless, and nothing in them steers a terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(terminal.message(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="xlab",
        description="Which Transformer variant should I use, and what does it cost?",
        epilog="example:\n  xlab compare task=copy attention=full,local:window=16,linear seq_len=64\n\n" + GRAMMAR,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"xformers_lab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        epilog = _keys(command) if command.keys else None
        added = commands.add_parser(
            command.name, help=command.help, description=command.help, epilog=epilog, formatter_class=_Help
        )
        added.set_defaults(run=command.run, arguments=command.arguments)
        for argument in command.arguments:
            added.add_argument(argument.name, **argument.options)
    return parser


def _keys(command: Command) -> str:
    """The grammar of words, and every key that a command takes with its default and help."""
    listed = lambda leaves: configs.help_lines(leaves, ITEM - 3)
    of_study = ["keys of the whole study:", *listed(configs.STUDY), ""] if command.study else []
    of_place = ["", "keys of each of several processes of one run:", *listed(configs.PLACE)] if command.place else []
    return "\n".join([GRAMMAR, "", *of_study, "keys:", *listed(configs.LEAVES | configs.DERIVED), *of_place])
