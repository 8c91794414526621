"""Commands that make a run or go on from one: train, resume, eval, generate."""

import argparse
import pathlib

from xformers_lab import config as configs
from xformers_lab import named_run
from xformers_lab.api import supervised
from xformers_lab.cli.command import JSON, TRACK, TRUST, WORDS, Command, answer, argument
from xformers_lab.errors import UsageError
from xformers_lab.terminal import LINES, visible
from xformers_lab.train import hosts, options


def _train(chosen: argparse.Namespace) -> int:
    return _print(chosen, *supervised.train(chosen.words, track=chosen.track, trust=chosen.trust))


def _resume(chosen: argparse.Namespace) -> int:
    how = {"from_scratch": chosen.from_scratch, "track": chosen.track, "trust": chosen.trust}
    where = f"--stall {chosen.stall}"
    return _print(chosen, *supervised.resume(_run_dir(chosen), chosen.words, stall=chosen.stall, where=where, **how))


def _print(chosen: argparse.Namespace, folder: pathlib.Path, record: dict | None) -> int:
    if record is None:  # the first process prints it
        return 0
    from xformers_lab.report import pages, stored

    def page() -> None:
        print(visible(stored.at(folder).summary))
        pages.print_record(record)

    return answer(chosen, record, page)


def _eval(chosen: argparse.Namespace) -> int:
    batches = chosen.batches
    if batches is not None:
        batches = configs.typed("eval_batches", batches, f"--batches {batches}")
    place, words = configs.placed(chosen.words)
    place = hosts.meant(place)
    lengths, asked = _asked(configs.spelled(words))
    folder = _run_dir(chosen)
    from xformers_lab import progress
    from xformers_lab.report import pages
    from xformers_lab.train import trained

    if chosen.beams is None and chosen.texts is not None:
        raise UsageError(f"--texts {chosen.texts}: it is of texts that are generated; give --beams, or leave it out")
    how = {"split": chosen.split, "batches": batches, "trust": chosen.trust, **_set(chosen, ("beams", "texts"))}
    if place.coordinator is None:
        rows = trained.evaluate_at(folder, lengths, asked, **how, say=progress.say)
    else:
        rows = supervised.evaluate(folder, place, lengths, asked, **how)
    if rows is None:  # the first process prints them
        return 0
    if len(rows) > 1:
        return answer(chosen, rows, lambda: pages.print_scores(rows))
    return answer(chosen, rows[0], lambda: pages.print_record(rows[0]))


def _asked(words: list[str]) -> tuple[list[int], dict[str, str]]:
    """The lengths that the words of `eval` name, and the values of options, as text; raises UsageError."""
    lengths: list[int] = []
    values: dict[str, list[str]] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name == "seq_len":
            lengths += configs.axes_of({"seq_len": text}, word)["seq_len"]
            continue
        options.parted(name, f'"{word}"')
        if not text:
            raise UsageError(f'"{word}" has no value')
        values.setdefault(name, []).append(text)
    return list(dict.fromkeys(lengths)), {name: ",".join(texts) for name, texts in values.items()}


def _generate(chosen: argparse.Namespace) -> int:
    folder = _run_dir(chosen)
    from xformers_lab import progress
    from xformers_lab.api import generating
    from xformers_lab.train import trained

    called = lambda name: f"--{name.replace('_', '-')}"
    asked = _set(chosen, (*generating.DRAWING, *generating.SEARCHING, *generating.DRAFTING))
    generating.refuse(chosen.beams, asked, called)  # before the model is loaded, which takes seconds
    config, task, model = trained.load(folder, trust=chosen.trust)
    apart = "\n" if task.source_length else ""  # a source stands in a line of its own
    # One prompt alone is shown as it grows.
    live = chosen.beams is None and len(chosen.prompt) == 1 and not chosen.json
    show = progress.growing(chosen.prompt[0] + apart, task.decode) if live else None
    how = {"new": chosen.new, "beams": chosen.beams, "stop": chosen.stop, "called": called, "on_token": show}
    rows = generating.texts(config.seq_len, task, model, chosen.prompt, **how, **asked)
    if not chosen.json and (said := generating.drafted(rows)):
        progress.say(said)
    if live:
        print("" if rows[0]["tokens"] else visible(chosen.prompt[0] + apart, LINES))
        return 0
    return answer(chosen, rows, lambda: [print(visible(row["prompt"] + apart + row["text"], LINES)) for row in rows])


def _set(chosen: argparse.Namespace, names: tuple[str, ...]) -> dict:
    """Those of the flags that have a value."""
    return {name: value for name in names if (value := getattr(chosen, name)) is not None}


def _run_dir(chosen: argparse.Namespace) -> pathlib.Path:
    """The folder of the run that is named; raises UsageError."""
    return named_run.folder(chosen.run_dir, chosen.runs)


RUN_DIR = argument("run_dir", metavar="RUN", help="its folder, its name, its id or the start of it, or `last`")
RUNS = argument("--runs", path="folder", default=named_run.RUNS, help="the folder of the runs (default: runs)")
LONGER = argument(
    "words",
    nargs="*",
    metavar="key=value",
    help="steps=, warmup= and cooldown= of a longer run, which goes on from this one in a folder of its own; name=, "
    "tags=; of several processes coordinator=, processes=, process=, wait=, as train takes them",
)
STALL = argument("--stall", metavar="SECONDS", help="in place of the run's own stall=")
SCRATCH = argument(
    "--from-scratch", action="store_true", help="begin at step 1 again where checkpoints or lines of metrics are lost"
)
OTHERWISE = argument(
    "words",
    nargs="*",
    metavar="key=value",
    help="seq_len=T or an option of the run's choices, depth.threshold=0.5,0.9; several values give a row each; of "
    "several processes coordinator=, processes=, process=, wait=, as train takes them",
)
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
    argument("--draft", type=int, metavar="LAYERS", help="with --temperature 0: so many first layers propose tokens"),
    argument("--ahead", type=int, help="with --draft: tokens that the other layers then verify at once (default: 4)"),
    argument("--length-penalty", type=float, help="of beam search (default: 0.6)"),
    argument(
        "--stop",
        action="append",
        help="a token at which to stop in place of the task's, spelled as prompts are; may be given many times",
    ),
]
COMMANDS = [
    Command("train", _train, "train one config", [WORDS, TRACK, TRUST, JSON], keys=True, place=True),
    Command(
        "resume",
        _resume,
        "continue a run from its newest checkpoint, steps=N beyond its last step",
        [RUN_DIR, LONGER, STALL, SCRATCH, TRACK, TRUST, RUNS, JSON],
    ),
    Command(
        "eval",
        _eval,
        "score the newest checkpoint of a run",
        [RUN_DIR, OTHERWISE, SPLIT, BATCHES, BEAMS, TEXTS, TRUST, RUNS, JSON],
    ),
    Command(
        "generate",
        _generate,
        "continue prompts with the newest checkpoint of a run",
        [RUN_DIR, *HOW_TO_GENERATE, TRUST, RUNS, JSON],
    ),
]
