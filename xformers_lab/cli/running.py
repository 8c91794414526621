"""Commands that make a run or go on from one: train, resume, eval, generate."""

import argparse
import pathlib

from xformers_lab import config as configs
from xformers_lab import named_run
from xformers_lab.cli.command import JSON, TRACK, TRUST, WORDS, Command, answer, argument
from xformers_lab.errors import RunFailed, UsageError
from xformers_lab.terminal import LINES, visible
from xformers_lab.train import labels, longer, records, trackers

# What `generate` draws by, and what it searches by.
DRAWING = ("temperature", "top_k", "top_p", "min_p", "seed")
SEARCHING = ("length_penalty",)


def _train(chosen: argparse.Namespace) -> int:
    runs = [word.partition("=")[2] for word in chosen.words if word.startswith("runs=")]
    records.refuse_if_typed(chosen.words, configs.spec.located((runs or ["runs"])[-1], "runs"))
    trackers.require(chosen.track)
    config = configs.single(chosen.words, trust=chosen.trust)
    title = f"{config.task} · {config.model.attention} · {config.seq_len}"
    job = {"stall": config.stall, "config": configs.to_dict(config), "words": chosen.words, "track": chosen.track}
    return _trained(chosen, title, configs.folder(config), "train.work.run", job)


def _resume(chosen: argparse.Namespace) -> int:
    folder = _run_dir(chosen)
    records.refuse_if_in_use(folder)
    trackers.require(chosen.track)
    first = configs.stored(folder / "config.json", trust=chosen.trust)
    config, stall, title = longer.asked(first, chosen.words), first.stall, f"resuming {folder}"
    job = {"run_dir": str(folder), "words": chosen.words}
    if configs.identity(config) == configs.identity(first):
        labels.write(config, folder)
    elif chosen.from_scratch:
        raise UsageError("--from-scratch: a longer run goes on from a checkpoint; xlab train begins at step 1")
    else:
        title = f"{title}, to step {config.train.steps}"
        folder = longer.folder(folder, config)
    if chosen.stall is not None:
        stall = configs.typed("stall", chosen.stall, f"--stall {chosen.stall}")
    job |= {"stall": stall, "trust": chosen.trust, "from_scratch": chosen.from_scratch, "track": chosen.track}
    return _trained(chosen, title, folder, "train.work.resume", job)


def _trained(chosen: argparse.Namespace, title: str, folder: pathlib.Path, what: str, job: dict) -> int:
    """Have a worker train, and print the record."""
    records.refuse_if_in_use(folder)  # before a worker starts, which takes seconds
    from xformers_lab import progress
    from xformers_lab.report import pages, stored
    from xformers_lab.supervise.process import Ended, Worker

    with Worker() as worker, progress.steps(title) as step:

        def heard(message: dict) -> None:
            for line in (*message.get("reading", ()), *([message["said"]] if "said" in message else [])):
                progress.say(line)
            if "loss" in message:
                step(message["step"], message["total"], message)
            elif "doing" in message:
                step.doing(message["doing"])

        try:
            record = worker.ask(what, heard, **job)
        except Ended as ended:
            how = f"interrupted: {ended.reason}" if ended.status == "interrupted" else ended.reason
            saved = f"; go on with xlab resume {folder}" if any(folder.glob("checkpoints/*/MANIFEST.json")) else ""
            error = RunFailed(how if "xlab resume" in how else how + saved)
            error.exit_code = ended.exit_code
            raise error from None

    def page() -> None:
        print(visible(stored.at(folder).summary))
        pages.print_record(record)

    return answer(chosen, record, page)


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
    from xformers_lab import generate, progress
    from xformers_lab.train import trained

    drawing, searching = _set(chosen, DRAWING), _set(chosen, SEARCHING)
    if chosen.beams is not None and drawing:
        raise UsageError(f"{_flags(drawing)}: beam search draws nothing; leave it out, or leave out --beams")
    if chosen.beams is None and searching:
        raise UsageError(f"{_flags(searching)}: it is of beam search; give --beams, or leave it out")
    seed = drawing.pop("seed", 0)
    sampling = generate.Sampling(**drawing)
    config, task, model = trained.load(folder, trust=chosen.trust)
    try:
        encoded = [task.encode(prompt) for prompt in chosen.prompt]
        stops = [task.encode(text) for text in chosen.stop or ()]
    except ValueError as error:
        raise UsageError(f"--prompt or --stop: {error}") from None
    for text, tokens in zip(chosen.stop or (), stops, strict=True):
        if len(tokens) != 1:
            raise UsageError(f"--stop {text}: it is {len(tokens)} tokens, one is wanted")
    stop = [*task.stop] if chosen.stop is None else [token for tokens in stops for token in tokens]
    apart = "\n" if task.source_length else ""  # a source stands in a line of its own
    prompts, sources = generate.apart(model, encoded, begin=task.begin)
    common = {"new": chosen.new, "length": config.seq_len, "stop": stop}
    if chosen.beams is not None:
        common |= {"beams": chosen.beams} | searching
        pairs = zip(prompts, sources or [None] * len(prompts), strict=True)
        results = [generate.beam_search(model, prompt, source=source, **common) for prompt, source in pairs]
        rows = [{"tokens": tokens, "score": score} for tokens, score in results]
    else:
        live = len(prompts) == 1 and not chosen.json  # one prompt alone is shown as it grows
        show = progress.growing(chosen.prompt[0] + apart, task.decode) if live else None
        common |= {"sources": sources or None, "sampling": sampling, "seed": seed}
        results = generate.generate(model, prompts, on_token=show, **common)
        if live:
            print("" if results[0] else visible(chosen.prompt[0] + apart, LINES))
            return 0
        rows = [{"tokens": tokens} for tokens in results]
    rows = [
        {"prompt": prompt, "text": task.decode(row["tokens"]), **row}
        for prompt, row in zip(chosen.prompt, rows, strict=True)
    ]
    return answer(chosen, rows, lambda: [print(visible(row["prompt"] + apart + row["text"], LINES)) for row in rows])


def _set(chosen: argparse.Namespace, names: tuple[str, ...]) -> dict:
    """Those of the flags that have a value."""
    return {name: value for name in names if (value := getattr(chosen, name)) is not None}


def _flags(names) -> str:
    return " ".join("--" + name.replace("_", "-") for name in names)


def _run_dir(chosen: argparse.Namespace) -> pathlib.Path:
    """The folder of the run that is named; raises UsageError."""
    return named_run.folder(chosen.run_dir, chosen.runs)


RUN_DIR = argument("run_dir", metavar="RUN", help="its folder, its name, its id or the start of it, or `last`")
RUNS = argument("--runs", path="folder", default=named_run.RUNS, help="the folder of the runs (default: runs)")
LONGER = argument(
    "words",
    nargs="*",
    metavar="key=value",
    help="steps= and warmup= of a longer run, which goes on from this one in a folder of its own; name=, tags=",
)
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
        "continue a run from its newest checkpoint, steps=N beyond its last step",
        [RUN_DIR, LONGER, STALL, SCRATCH, TRACK, TRUST, RUNS, JSON],
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
