"""The command that looks after stored runs: runs, which lists, compares, tags and deletes them."""

import argparse
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xformers_lab.cli.command import JSON, Command, answer, argument, spelled
from xformers_lab.cli.exports import EXPORTS, export
from xformers_lab.errors import UsageError
from xformers_lab.terminal import message, visible

if TYPE_CHECKING:
    from xformers_lab.report.stored import Run

WHEN = "when"  # also `--sort time`


def selected(chosen: argparse.Namespace, *, least: int = 1) -> "list[Run]":
    """The runs that the words of a command mean, at least so many; raises UsageError. Folders that hold no run are said
    in one line."""
    from xformers_lab.report import stored

    runs = pathlib.Path(chosen.runs)
    picked, odd = stored.chosen(chosen.words, runs)
    if odd:
        from xformers_lab.report import human

        said = human.listing([f"{folder} ({why})" for folder, why in odd.items()], 4)
        print(message(f"left out: {said}"), file=sys.stderr)
    if len(picked) < least:
        which = f"no run of {runs} fits {' '.join(chosen.words)}" if chosen.words else f"no run in {runs}"
        raise UsageError(f"{which}; xlab train makes one, --runs names another folder")
    return picked


def _runs(chosen: argparse.Namespace) -> int:
    verb = chosen.words[0] if chosen.words and chosen.words[0] in VERBS else None
    if verb:
        chosen.words = chosen.words[1:]
    _refuse_unread(chosen, verb)
    return VERBS[verb](chosen)


def _list(chosen: argparse.Namespace) -> int:
    from xformers_lab.report import listing, stored

    columns = None
    if chosen.columns is not None:
        columns = [stored.key_of(name.strip(), f"--columns {chosen.columns}") for name in chosen.columns.split(",")]
    key = stored.key_of(WHEN if chosen.sort == "time" else chosen.sort, f"--sort {chosen.sort}")
    runs = stored.ordered(selected(chosen, least=0), key, reverse=chosen.reverse)
    varied = stored.differing(runs)
    if chosen.json:
        values = [_whole(run) if columns is None else {key: _plain(run.value(key)) for key in columns} for run in runs]
        print(json.dumps(values, indent=2, default=str))
    elif not runs:
        print("no run fits" if chosen.words else "no runs yet")
    elif columns is None:
        listing.print_listing(lines(runs, varied))
    else:
        listing.print_listing([{key: _word(run.value(key)) for key in columns} for run in runs])
    _export(chosen, runs, varied)
    return 0


def _compare(chosen: argparse.Namespace) -> int:
    from xformers_lab.report import stored, table

    runs = selected(chosen)
    varied = stored.differing(runs)
    rows = stored.rows(runs, varied)
    code = answer(chosen, rows, lambda: table.print_rows(rows, varied))
    export(chosen, rows, varied, spelled(chosen))
    return code


def _tag(chosen: argparse.Namespace) -> int:
    if not chosen.words:
        raise UsageError("tag which runs? Name them (xlab runs tag 3f2a --add paper), or filter (task=copy)")
    if chosen.add is None and chosen.remove is None:
        raise UsageError("tag with what? --add paper gives runs a tag, --remove draft takes one, a+b are two")
    from xformers_lab.train import labels

    tags = labels.retag([run.folder for run in selected(chosen)], chosen.add, chosen.remove)
    said = [f"{folder}  {words or 'no tags'}" for folder, words in tags.items()]
    return answer(
        chosen, {str(folder): words for folder, words in tags.items()}, lambda: print("\n".join(map(visible, said)))
    )


def _remove(chosen: argparse.Namespace) -> int:
    if not chosen.words:
        raise UsageError("rm which runs? Name them (xlab runs rm 3f2a), or filter (xlab runs rm task=copy steps=5)")
    from xformers_lab.report import human
    from xformers_lab.train import records

    root = pathlib.Path(chosen.runs)
    folders = [run.folder for run in selected(chosen)]
    sizes = [_refuse_to_delete(folder, root) for folder in folders]
    for folder in folders:
        records.refuse_if_in_use(folder)
    what = f"{len(folders)} run{'s' * (len(folders) > 1)}, {human.size(sum(sizes))}"
    print(message(f"to delete: {what}"), file=sys.stderr)
    for folder, size in zip(folders, sizes, strict=True):
        print(visible(f"  {folder}  {human.size(size)}"), file=sys.stderr)
    if not chosen.yes:
        if not sys.stdin.isatty():
            raise UsageError("nothing was deleted: there is no terminal to ask at, so say --yes")
        print("delete them? y or n: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was deleted", file=sys.stderr)
            return 0
    for folder in folders:
        _delete(folder, root)
    return answer(chosen, [str(folder) for folder in folders], lambda: print(f"deleted: {what}"))


def _refuse_to_delete(folder: pathlib.Path, root: pathlib.Path) -> int:
    """The bytes of a run's folder; raises UsageError where it is not one right under the folder of runs, or is reached
    by a link."""
    if folder.resolve() != root.resolve() / folder.absolute().parent.name / folder.name or folder.is_symlink():
        raise UsageError(
            f"{folder}: is no folder TASK/ID of {root}, or a link leads there; nothing was deleted (--runs names the "
            "folder of runs)"
        )
    files = [folder / name for name in ("config.json", "result.json", "metrics.jsonl")]
    if not files[0].is_file() or not any(file.is_file() for file in files[1:]):
        raise UsageError(f"{folder}: holds no config.json with a result or metrics; nothing was deleted")
    total = 0
    for place, _, names in os.walk(folder):
        total += sum(os.lstat(os.path.join(place, name)).st_size for name in names)
    return total


def _delete(folder: pathlib.Path, root: pathlib.Path) -> None:
    """Delete a run's folder and no more: links in it are deleted, not followed. No other process may begin in it
    meanwhile."""
    from xformers_lab.train import records

    with records.locked(folder):
        _refuse_to_delete(folder, root)  # it may have become another since the user was asked
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be deleted whole ({error.strerror}: {error.filename})") from None


def _export(chosen: argparse.Namespace, runs: "Sequence[Run]", varied: list[str]) -> None:
    if any(getattr(chosen, name.attribute) is not None for name in EXPORTS):
        from xformers_lab.report import stored

        export(chosen, stored.rows(runs, varied), varied, spelled(chosen))


def lines(runs: "Sequence[Run]", varied: Sequence[str]) -> list[dict]:
    """The runs as a terminal shows them: what each is, what differs, how it ended, what it scored."""
    from xformers_lab.report import human

    keys = ["task", *(key for key in ("model",) if key in varied), "attention"]
    keys += [key for key in varied if key not in (*keys, "seq_len", "seed")]
    lines = []
    for run in runs:
        metric, name = human.number(run.record.get("metric")), run.record.get("metric_name")
        damage = run.damage
        lines.append(
            {
                "id": run.id,
                **{key: _word(run.value(key)) for key in ("name", "tags") if any(each.value(key) for each in runs)},
                **{key: _word(run.value(key)) for key in keys},
                "seq_len": _word(run.value("seq_len")),
                "seed": _word(run.value("seed")),
                "status": "not believed" if damage else run.progress,
                "metric": human.NONE if metric is None else f"{human.score(metric)} {name or ''}".rstrip(),
                "when": _word(run.value("when")),
                "folder": _word(run.value("folder")) + (f" ({damage})" if damage else ""),
            }
        )
    return lines


def _whole(run: "Run") -> dict[str, Any]:
    """A run as JSON has it, the same keys for every run."""
    keys = ("id", "status", "damage", "reason", "step", "metric_name", "metric", "metric_interval", "higher_is_better")
    keys += ("started", "ended", "git", "summary")
    about = {key: run.damage if key == "damage" else _plain(run.value(key)) for key in keys}
    return {**about, "when": _plain(run.value("when")), "folder": str(run.folder), "config": run.leaves}


def _plain(value: Any) -> Any:
    return value.isoformat(timespec="seconds") if hasattr(value, "isoformat") else value


def _word(value: Any) -> str:
    """A value as people read it: what commands take for a key of the config, times in the zone of the machine."""
    from xformers_lab.config import spec
    from xformers_lab.report import human

    if hasattr(value, "isoformat"):
        return value.astimezone().strftime("%Y-%m-%d %H:%M")
    if isinstance(value, dict | list):
        text = json.dumps(value)
        return human.plain(text if len(text) <= 60 else text[:57] + "...")
    return human.plain(f"{value:.6g}" if isinstance(value, float) else spec.show(value))


def _refuse_unread(chosen: argparse.Namespace, verb: str | None) -> None:
    """Raises UsageError at a flag that the verb does not read."""
    given = {
        "list": {"--sort": chosen.sort != WHEN, "--reverse": chosen.reverse, "--columns": chosen.columns is not None},
        "tag": {"--add": chosen.add is not None, "--remove": chosen.remove is not None},
        "rm": {"--yes": chosen.yes},
        "exports": {flag.name: getattr(chosen, flag.attribute) is not None for flag in EXPORTS},
    }
    read = {None: ("list", "exports"), "compare": ("exports",), "tag": ("tag",), "rm": ("rm",)}[verb]
    unread = {name: said for kind, flags in given.items() if kind not in read for name, said in flags.items()}
    if flags := [name for name, said in unread.items() if said]:
        raise UsageError(
            f"{', '.join(flags)}: {f'xlab runs {verb}' if verb else 'the list of runs'} does not read it; leave it out"
        )


VERBS = {None: _list, "compare": _compare, "tag": _tag, "rm": _remove}
RUN = argument(
    "words",
    nargs="*",
    metavar="RUN or key=value",
    help="a run's folder, its name, its id or the start of it, or `last`; and filters: task=lm tags=draft status=ok",
)
RUNS = argument("--runs", path="folder", default="runs", help="folder of the runs (default: runs)")
VERB_OR_RUN = argument(
    "words",
    nargs="*",
    metavar="RUN or key=value",
    help="which runs: a folder, a name, an id or the start of it, or `last`; and filters: task=lm tags=draft "
    "status=ok. `compare` before them prints their table, `tag` changes their tags, `rm` deletes them",
)
LIST = [
    argument("--sort", metavar="KEY", default=WHEN, help="in rising order of a key, say metric (default: when)"),
    argument("--reverse", action="store_true", help="in falling order"),
    argument("--columns", metavar="KEY,KEY", help="show these keys of the config or the record"),
    argument("--add", metavar="TAG+TAG", help="tag: give the runs these tags"),
    argument("--remove", metavar="TAG+TAG", help="tag: take these tags from the runs"),
    argument("--yes", action="store_true", help="rm: do not ask"),
]
COMMANDS = [
    Command(
        "runs", _runs, "list, filter, compare, tag and delete stored runs", [VERB_OR_RUN, RUNS, *LIST, *EXPORTS, JSON]
    ),
]
