"""Commands that make a run or go on from one: train, resume, eval, generate."""

import argparse
import pathlib

from xformers_lab import config as configs
from xformers_lab.api import supervised
from xformers_lab.cli.command import JSON, TRACK, TRUST, WORDS, Command, answer, argument
from xformers_lab.errors import UsageError
from xformers_lab.terminal import LINES, visible


def _train(chosen: argparse.Namespace) -> int:
    _, record = supervised.train(chosen.words, track=chosen.track, trust=chosen.trust)
    return _print(chosen, record)


def _resume(chosen: argparse.Namespace) -> int:
    how = {"from_scratch": chosen.from_scratch, "track": chosen.track, "trust": chosen.trust}
    return _print(
        chosen, supervised.resume(_run_dir(chosen), stall=chosen.stall, where=f"--stall {chosen.stall}", **how)
    )


def _print(chosen: argparse.Namespace, record: dict) -> int:
    from xformers_lab.report import pages

    return answer(chosen, record, lambda: pages.print_record(record))


def _eval(chosen: argparse.Namespace) -> int:
    batches = chosen.batches
    if batches is not None:
        batches = configs.typed("eval_batches", batches, f"--batches {batches}")
    lengths = _lengths(chosen.words)
    folder = _run_dir(chosen)
    from xformers_lab import progress
    from xformers_lab.report import pages
    from xformers_lab.train import trained

    if chosen.beams is None and chosen.texts is not None:
        raise UsageError(f"--texts {chosen.texts}: it is of texts that are generated; give --beams, or leave it out")
    options = {"split": chosen.split, "batches": batches, "trust": chosen.trust, "say": progress.say}
    if len(lengths) > 1:
        if chosen.beams is not None:
            raise UsageError("--beams: texts are generated at one length; give one seq_len, or none")
        rows = trained.evaluate_at(folder, lengths, **options)
        return answer(chosen, rows, lambda: pages.print_lengths(rows))
    options |= _set(chosen, ("beams", "texts"))
    record = trained.evaluate(folder, length=lengths[0] if lengths else None, **options)
    return answer(chosen, record, lambda: pages.print_record(record))


def _lengths(words: list[str]) -> list[int]:
    """The lengths of the words of `eval`; raises UsageError for any other word."""
    lengths: list[int] = []
    for word in words:
        key, equals, text = word.partition("=")
        if key != "seq_len" or not equals:
            raise UsageError(f'"{word}": eval scores a run as it is, at other lengths if asked: seq_len=64,128,256')
        lengths += configs.axes_of({"seq_len": text}, word)["seq_len"]
    return list(dict.fromkeys(lengths))


def _generate(chosen: argparse.Namespace) -> int:
    folder = _run_dir(chosen)
    from xformers_lab import progress
    from xformers_lab.api import generating
    from xformers_lab.train import trained

    called = lambda name: f"--{name.replace('_', '-')}"
    asked = _set(chosen, (*generating.DRAWING, *generating.SEARCHING))
    generating.refuse(chosen.beams, asked, called)  # before the model is loaded, which takes seconds
    config, task, model = trained.load(folder, trust=chosen.trust)
    apart = "\n" if task.source_length else ""  # a source stands in a line of its own
    # One prompt alone is shown as it grows.
    live = chosen.beams is None and len(chosen.prompt) == 1 and not chosen.json
    show = progress.growing(chosen.prompt[0] + apart, task.decode) if live else None
    how = {"new": chosen.new, "beams": chosen.beams, "stop": chosen.stop, "called": called, "on_token": show}
    rows = generating.texts(config.seq_len, task, model, chosen.prompt, **how, **asked)
    if live:
        print("" if rows[0]["tokens"] else visible(chosen.prompt[0] + apart, LINES))
        return 0
    return answer(chosen, rows, lambda: [print(visible(row["prompt"] + apart + row["text"], LINES)) for row in rows])


def _set(chosen: argparse.Namespace, names: tuple[str, ...]) -> dict:
    """Those of the flags that have a value."""
    return {name: value for name in names if (value := getattr(chosen, name)) is not None}


def _run_dir(chosen: argparse.Namespace) -> pathlib.Path:
    """The folder named, or the newest one under --runs for `last`; raises UsageError."""
    folder = pathlib.Path(chosen.run_dir)
    if chosen.run_dir == "last":
        newest_last = sorted(pathlib.Path(chosen.runs).glob("*/*/config.json"), key=lambda path: path.stat().st_mtime)
        if not newest_last:
            raise UsageError(f"no run in {chosen.runs} yet; run xlab train, or name its folder with --runs")
        folder = newest_last[-1].parent
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: no run there (a run's folder holds config.json)")
    return folder


RUN_DIR = argument("run_dir", path="folder", help="the run's folder, or `last` for the newest one")
RUNS = argument("--runs", path="folder", default="runs", help="where `last` looks (default: runs)")
STALL = argument("--stall", metavar="SECONDS", help="in place of the run's own stall=")
SCRATCH = argument(
    "--from-scratch", action="store_true", help="begin at step 1 again where checkpoints or lines of metrics are lost"
)
LENGTHS = argument("words", nargs="*", metavar="seq_len=T", help="tokens per sequence; several give a row each")
SPLIT = argument("--split", choices=("train", "validation", "test"), help="in place of the run's own score=")
BATCHES = argument("--batches", help="in place of the run's own eval_batches=: all, or so many times 32 examples")
BEAMS = argument("--beams", type=int, help="translate: score what is generated too, BLEU and chrF, with so many beams")
TEXTS = argument("--texts", type=int, help="with --beams: of how many examples (default: 100)")
HOW_TO_GENERATE = [
    argument("--prompt", action="append", required=True, help="text (lm) or numbers; may be given many times"),
    argument("--new", type=int, default=64, help="tokens to add (default: 64)"),
    argument("--temperature", type=float, help="0: always the likeliest token (default: 1)"),
    argument("--top-k", type=int, help="draw among the k likeliest tokens"),
    argument("--top-p", type=float, help="draw among the likeliest that add up to p"),
    argument("--min-p", type=float, help="draw among those with p times the best's probability"),
    argument("--seed", type=int, help="of what is drawn (default: 0)"),
    argument("--beams", type=int, help="beam search with so many hypotheses, nothing is drawn"),
    argument("--length-penalty", type=float, help="of beam search (default: 0.6)"),
    argument(
        "--stop",
        action="append",
        help="a token at which to stop in place of the task's, spelled as prompts are; may be given many times",
    ),
]
COMMANDS = [
    Command("train", _train, "train one config", [WORDS, TRACK, TRUST, JSON], keys=True),
    Command(
        "resume",
        _resume,
        "continue a run from its newest checkpoint",
        [RUN_DIR, STALL, SCRATCH, TRACK, TRUST, RUNS, JSON],
    ),
    Command(
        "eval",
        _eval,
        "score the newest checkpoint of a run",
        [RUN_DIR, LENGTHS, SPLIT, BATCHES, BEAMS, TEXTS, TRUST, RUNS, JSON],
    ),
    Command(
        "generate",
        _generate,
        "continue prompts with the newest checkpoint of a run",
        [RUN_DIR, *HOW_TO_GENERATE, TRUST, RUNS, JSON],
    ),
]
