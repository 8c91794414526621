"""The command that shows where a trained model looks: maps."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from xformers_lab import config as configs
from xformers_lab.cli.command import JSON, TRUST, Command, argument, spelled
from xformers_lab.cli.running import SPLIT
from xformers_lab.cli.runs import RUN, RUNS, selected
from xformers_lab.errors import LabError, UsageError
from xformers_lab.report.exports import writing
from xformers_lab.terminal import message, visible

if TYPE_CHECKING:
    from xformers_lab.attention_maps.maps import AttentionMaps
    from xformers_lab.report.stored import Run


def _maps(chosen: argparse.Namespace) -> int:
    if not chosen.words:
        raise UsageError("maps of which run? Name one or several: xlab maps last --text ...; xlab runs lists them")
    if chosen.text is not None and (chosen.example is not None or chosen.split is not None):
        raise UsageError("--text and --example are two inputs: give one")
    layers, heads = (_numbers(chosen, name) for name in ("layers", "heads"))
    picked = selected(chosen)
    shown: list[AttentionMaps] = []
    refused: list[tuple[Run, str, UsageError]] = []
    for run, name in zip(picked, _names(picked), strict=True):
        try:
            shown += [one.only(layers, heads) for one in _of_run(chosen, run, name)]
        except UsageError as reason:
            if len(picked) == 1:
                raise
            refused.append((run, name, reason))
    for run, _, reason in refused:
        print(message(f"{run.folder}: {reason}"), file=sys.stderr)
    if not shown:
        raise UsageError("no run has a map")
    _print(chosen, shown)
    _write(chosen, shown, [(name, str(reason)) for _, name, reason in refused])
    return 5 if refused else 0


def _of_run(chosen: argparse.Namespace, run: "Run", name: str) -> "list[AttentionMaps]":
    """The maps of a run, of every part; raises UsageError where there is none."""
    from xformers_lab.attention_maps import reading
    from xformers_lab.train import trained

    try:
        config, task, model = trained.load(run.folder, trust=chosen.trust)
    except UsageError:
        raise
    except LabError as error:  # a damaged checkpoint, say: the others are drawn all the same
        raise UsageError(str(error)) from None
    if chosen.text is not None:
        return reading.parts_of_text(model, task, chosen.text, name=name)
    split = chosen.split or config.train.score
    return reading.of_example(model, task, reading.example(config, task, split, chosen.example or 0), name=name)


def _names(picked: "list[Run]") -> list[str]:
    """What tells the runs apart in the words of a report, with the id where that is not enough."""
    from xformers_lab.report import rows, stored

    varied = stored.differing(picked)
    names = [rows.series({**run.leaves, "name": None}, varied) for run in picked]
    return [name if names.count(name) == 1 else f"{name} · {run.id}" for name, run in zip(names, picked, strict=True)]


def _numbers(chosen: argparse.Namespace, key: str) -> list[int] | None:
    """The numbers of --layers or --heads, "1,3" or "1..4"; None where all are meant. Raises UsageError."""
    text = getattr(chosen, key)
    return None if text is None else list(dict.fromkeys(configs.axes_of({key: text}, f"--{key} {text}")[key]))


def _print(chosen: argparse.Namespace, shown: "list[AttentionMaps]") -> None:
    from xformers_lab.attention_maps import table
    from xformers_lab.report import listing

    if chosen.json:
        rows = [{"run": one.name, "part": one.part, **row} for one in shown for row in table.heads(one)]
        print(json.dumps(rows, indent=2))
        return
    columns = table.columns(shown)
    name = lambda one: {"run": one.title} if len(shown) > 1 else {}
    listing.print_listing([name(one) | row for one in shown for row in table.texts(one, columns)])
    print()
    for one in shown:
        print(visible(f"{one.title}: {table.summary(one)}"))
    notes = dict.fromkeys(note for one in shown for note in one.notes)
    implied = [one.title for one in shown if any(one.implied)]
    for note in [*notes, *([f"effective weights, since there are no scores: {', '.join(implied)}"] if implied else [])]:
        print(visible(f"note: {note}"))
    print(table.BRIEFLY)


def _write(chosen: argparse.Namespace, shown: "list[AttentionMaps]", refused: list[tuple[str, str]]) -> None:
    if chosen.report is not None:
        from xformers_lab.attention_maps import page

        with writing(chosen.report, "page"):
            page.write(shown, chosen.report, command=spelled(chosen), refused=refused)
        print(visible(f"page: {chosen.report}"), file=sys.stderr)
    if chosen.figures is not None:
        from xformers_lab.report import figures

        with writing(chosen.figures, "figures"):
            paths = figures.write_pictures(((["maps", one.title], one.svg()) for one in shown), chosen.figures)
        print(visible(f"figures: {len(paths)} files in {chosen.figures}"), file=sys.stderr)


COMMANDS = [
    Command(
        "maps",
        _maps,
        "where the heads of trained runs look, head by head and side by side: attention maps",
        [
            RUN,
            argument("--text", help="the text to look at, as prompts are spelled; of an encoder-decoder the source"),
            argument(
                "--example", type=int, metavar="N", help="in place of a text: example N of the split (default: 0)"
            ),
            SPLIT,
            argument("--layers", metavar="N,N", help="these layers alone, from 1: 1,3 or 1..4 (default: all)"),
            argument("--heads", metavar="N,N", help="these heads alone, from 1 (default: all)"),
            argument("--report", path="file", metavar="FILE", help="write the interactive page, one offline HTML file"),
            argument(
                "--figures", path="folder", metavar="DIR", help="write the maps of each run into a folder, SVG and PDF"
            ),
            TRUST,
            RUNS,
            JSON,
        ],
    ),
]
