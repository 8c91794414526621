"""The command line. Nothing here imports jax before it must: `xlab --help` answers at once."""

import argparse
import json
import os
import pathlib
import shlex
import sys
import traceback

from xformers_lab import __version__
from xformers_lab import config as configs
from xformers_lab.errors import LabError, UsageError

WORDS = """\
Words are key=value; key=a,b,c and key=512..4096:x2 or key=0..4 sweep (compare, bench); @file.toml, @file.yaml,
@file.json or a Python recipe @file.py with configs = [...] bring many at once, later words win.
Choices read name:option=value:option=value, a+b cycles mechanisms over layers; a name is a file on the shelf, a dotted
module path, or the path of a .py file of your own. What has , : or + in it stands in brackets, which a shell wants
quoted: "task=lm:path=(notes,old.txt)"."""


# What `bench --pass` may say.
BENCH_PASSES = {
    "forward": ("forward",),
    "both": ("forward", "forward+backward"),
    "decode": ("prefill", "decode"),
}
# What `generate` draws by, and what it searches by.
DRAWING = ("temperature", "top_k", "top_p", "min_p", "seed")
SEARCHING = ("length_penalty",)
# Arguments that are paths, with the flag that gives each; and those of files that a command writes.
PATHS = {"runs": "--runs", "run_dir": "RUN_DIR", "report": "--report", "out": "--out", "svg": "--svg"}
PATHS |= {"folder": "--folder"}
WRITTEN = ("report", "out", "svg")
# Columns of `list attention` that JSON alone has: a terminal has no room, and `show NAME` has all of one choice.
HIDDEN = ("memory", "bias", "options")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; -> its exit code (0 ok, 1 our bug, 2 usage, 3 run failed, 4 integrity, 5 some cells failed)."""
    chosen = _parsed(sys.argv[1:] if arguments is None else arguments)
    try:
        _locate(chosen)
        return chosen.run(chosen)
    except LabError as error:
        print(f"xlab {chosen.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"xlab {chosen.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception:
        traceback.print_exc()
        print("xlab: this is a bug of the laboratory, not of your input; the lines above say where", file=sys.stderr)
        return 1


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """The command and what it was given; words may stand before, between and after flags."""
    parser = _parser()
    chosen, left = parser.parse_known_args(arguments)
    flags = [word for word in left if word.startswith("-")]
    if flags or (left and not hasattr(chosen, "words")):
        parser.error(f"unrecognized arguments: {' '.join(flags or left)}")
    if left:
        chosen.words = [*chosen.words, *left]
    chosen.given = arguments
    return chosen


def _locate(chosen) -> None:
    """Paths given with flags, with the home folder for ~; what cannot be written is refused before anything runs."""
    for name, flag in PATHS.items():
        if (text := getattr(chosen, name, None)) is None:
            continue
        path = configs.spec.located(text, flag)
        if name in WRITTEN:
            if path.is_dir():
                raise UsageError(f"{flag} {text}: a folder is there; name a file")
            above = next(folder for folder in path.absolute().parents if folder.exists())
            if not above.is_dir():
                raise UsageError(f"{flag} {text}: {above} is no folder")
        setattr(chosen, name, str(path))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xlab",
        description="Which Transformer variant should I use, and what does it cost?",
        epilog="example: xlab compare task=copy attention=full,local:window=16,linear seq_len=64,128\n\n" + WORDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xformers_lab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, help, *, words=None, keys=False):
        epilog = WORDS + ("\n\nkeys:\n" + _keys() if keys else "") if words == "words" else None
        added = commands.add_parser(
            name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        added.set_defaults(run=run)
        if words:
            added.add_argument("words", nargs="*", metavar="key=value" if words == "words" else words)
        return added

    def printed(added):
        added.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")

    printed(command("doctor", _doctor, "versions, devices, and a self-test of a few seconds"))

    added = command("list", _list, "the choices on a shelf, or the shelves")
    added.add_argument(
        "shelf", nargs="?", help="attention, position, norm, normaliser, ffn, depth, memory, model, task"
    )
    printed(added)

    added = command(
        "show",
        _show,
        "what a choice is, with its options and drawing; or a whole config, resolved",
        words="NAME or key=value",
    )
    added.add_argument("--svg", metavar="FILE", help="write the drawing of a pattern of attention there")
    printed(added)

    added = command("train", _train, "train one config", words="words", keys=True)
    printed(added)

    added = command("resume", _resume, "continue a run from its newest checkpoint")
    added.add_argument("run_dir", help="the run's folder, or `last` for the newest one")
    added.add_argument("--runs", default="runs", help="where `last` looks (default: runs)")
    printed(added)

    added = command("eval", _eval, "score the newest checkpoint of a run")
    added.add_argument("run_dir", help="the run's folder, or `last` for the newest one")
    added.add_argument("--split", default="test", choices=("train", "validation", "test"))
    added.add_argument("--batches", type=int, default=None, help="number of batches (default: the run's eval_batches)")
    added.add_argument("--runs", default="runs", help="where `last` looks (default: runs)")
    printed(added)

    added = command("generate", _generate, "continue prompts with the newest checkpoint of a run")
    added.add_argument("run_dir", help="the run's folder, or `last` for the newest one")
    added.add_argument("--prompt", action="append", required=True, help="text (lm) or numbers; may be given many times")
    added.add_argument("--new", type=int, default=64, help="tokens to add (default: 64)")
    added.add_argument("--temperature", type=float, help="0: always the likeliest token (default: 1)")
    added.add_argument("--top-k", type=int, help="draw among the k likeliest tokens")
    added.add_argument("--top-p", type=float, help="draw among the likeliest that add up to p")
    added.add_argument("--min-p", type=float, help="draw among those with p times the best's probability")
    added.add_argument("--seed", type=int, help="of what is drawn (default: 0)")
    added.add_argument("--beams", type=int, help="beam search with so many hypotheses, nothing is drawn")
    added.add_argument("--length-penalty", type=float, help="of beam search (default: 0.6)")
    added.add_argument(
        "--stop",
        action="append",
        help="a token at which to stop in place of the task's, spelled as prompts are; may be given many times",
    )
    added.add_argument("--runs", default="runs", help="where `last` looks (default: runs)")
    printed(added)

    added = command(
        "bench", _bench, "time attention mechanisms over lengths: speed, FLOPs, memory", words="words", keys=True
    )
    added.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    added.add_argument(
        "--pass",
        dest="passes",
        choices=tuple(BENCH_PASSES),
        default="both",
        help="which passes to time; decode: reading a context of seq_len into a cache, and one token behind it",
    )
    added.add_argument(
        "--no-check", action="store_true", help="time mechanisms without their conformance check, and say so"
    )
    added.add_argument("--report", metavar="FILE", help="write the figures as one offline HTML file")
    printed(added)

    added = command(
        "compare", _compare, "train a grid of configs and report accuracy, speed and memory", words="words", keys=True
    )
    added.add_argument("--report", metavar="FILE", help="where the HTML goes (default: RUNS/report.html)")
    added.add_argument("--skip-impossible", action="store_true", help="keep impossible combinations as refused rows")
    added.add_argument(
        "--no-check", action="store_true", help="train mechanisms of your own without their conformance check"
    )
    printed(added)

    added = command("report", _report, "draw the last comparison again as one offline HTML file")
    added.add_argument("--runs", default="runs", help="folder of the runs (default: runs)")
    added.add_argument("--out", metavar="FILE", help="where the HTML goes (default: RUNS/report.html)")
    printed(added)

    added = command("new", _new, "write a commented skeleton of your own mechanism")
    added.add_argument("shelf", help="attention, position, ffn, ...")
    added.add_argument("name", help="its name: the file will be NAME.py")
    added.add_argument("--folder", default=".", help="where to write it (default: here)")

    added = command(
        "check", _check, "run the kit of its shelf on choices, NAME or SHELF/NAME (none: all attention)", words="NAME"
    )
    added.add_argument("--deep", action="store_true", help="many more shapes")
    printed(added)
    return parser


def _keys() -> str:
    """Every key with its default and help, for --help."""
    lines = []
    for name, (_, field, _) in configs.LEAVES.items():
        lines.append(f"  {name + '=' + configs.spec.show(field.default):24s} {field.metadata['help']}")
    return "\n".join(lines)


# ---- looking -----------------------------------------------------------------------------------------------------


def _list(chosen) -> int:
    from xformers_lab import catalogue
    from xformers_lab.report import pages

    rows = catalogue.shelf(chosen.shelf) if chosen.shelf else catalogue.shelves()
    hidden = HIDDEN if chosen.shelf == "attention" else ()
    shown = [{key: row[key] for key in row if key not in hidden} for row in rows]
    return _print(chosen, rows, lambda: pages.print_table(shown))


def _show(chosen) -> int:
    from xformers_lab import catalogue
    from xformers_lab.report import pages

    if not chosen.words:
        raise UsageError("show what? A name (xlab show local), or a config (xlab show task=copy attention=local)")
    name, *rest = chosen.words
    if "=" in name.partition(":")[0] or name.startswith("@"):
        if chosen.svg:
            raise UsageError("--svg draws one mechanism: name it (xlab show bigbird seq_len=1024 --svg bigbird.svg)")
        config = configs.single(chosen.words)
        rows = catalogue.resolved(config)
        return _print(chosen, {row["key"]: row["value"] for row in rows}, lambda: pages.print_table(rows))
    page = catalogue.page(name, rest)
    if chosen.svg:
        if "svg" not in page:
            raise UsageError(f"--svg: no fixed pattern says what {name} looks at, so there is nothing to draw")
        try:
            pathlib.Path(chosen.svg).write_text(page["svg"])
        except OSError as error:
            raise UsageError(f"--svg {chosen.svg}: cannot write there ({error.strerror})") from None
    return _print(chosen, page, lambda: pages.print_page(page))


def _doctor(chosen) -> int:
    from xformers_lab import doctor
    from xformers_lab.report import pages

    findings = doctor.examine()
    code = _print(chosen, findings, lambda: pages.print_table(findings))
    return code if all(finding["ok"] for finding in findings) else 3


# ---- running -----------------------------------------------------------------------------------------------------


def _train(chosen) -> int:
    config = configs.single(chosen.words)
    from xformers_lab import progress
    from xformers_lab.model import check_config

    check_config(config)
    from xformers_lab.train import loop

    with progress.steps(f"{config.task} · {config.model.attention} · {config.seq_len}") as step:
        record = loop.run(config, progress=step)
    return _trained(chosen, record)


def _resume(chosen) -> int:
    folder = _run_dir(chosen)
    from xformers_lab import progress
    from xformers_lab.train import loop

    with progress.steps(f"resuming {folder}") as step:
        record = loop.resume(folder, progress=step)
    return _trained(chosen, record)


def _trained(chosen, record: dict) -> int:
    from xformers_lab.report import pages

    return _print(chosen, record, lambda: pages.print_record(record))


def _eval(chosen) -> int:
    if chosen.batches is not None and chosen.batches < 1:
        raise UsageError(f"--batches {chosen.batches}: at least 1")
    folder = _run_dir(chosen)
    from xformers_lab.report import pages
    from xformers_lab.train import loop

    record = loop.evaluate(folder, split=chosen.split, batches=chosen.batches)
    return _print(chosen, record, lambda: pages.print_record(record))


def _generate(chosen) -> int:
    folder = _run_dir(chosen)
    from xformers_lab import generate, progress
    from xformers_lab.train import loop

    drawing, searching = _given(chosen, DRAWING), _given(chosen, SEARCHING)
    if chosen.beams is not None and drawing:
        raise UsageError(f"{_flags(drawing)}: beam search draws nothing; leave it out, or leave out --beams")
    if chosen.beams is None and searching:
        raise UsageError(f"{_flags(searching)}: it is of beam search; give --beams, or leave it out")
    seed = drawing.pop("seed", 0)
    sampling = generate.Sampling(**drawing)
    config, task, model = loop.load(folder)
    try:
        given = [task.encode(prompt) for prompt in chosen.prompt]
        stops = [task.encode(text) for text in chosen.stop or ()]
    except ValueError as error:
        raise UsageError(f"--prompt or --stop: {error}") from None
    for text, tokens in zip(chosen.stop or (), stops, strict=True):
        if len(tokens) != 1:
            raise UsageError(f"--stop {text}: it is {len(tokens)} tokens, one is wanted")
    stop = [*task.stop] if chosen.stop is None else [token for tokens in stops for token in tokens]
    apart = "\n" if task.source_length else ""  # a source stands in a line of its own
    prompts, sources = generate.apart(model, given, begin=task.begin)
    common = {"new": chosen.new, "length": config.seq_len, "stop": stop}
    if chosen.beams is not None:
        common |= {"beams": chosen.beams} | searching
        pairs = zip(prompts, sources or [None] * len(prompts), strict=True)
        found = [generate.beam_search(model, prompt, source=source, **common) for prompt, source in pairs]
        rows = [{"tokens": tokens, "score": score} for tokens, score in found]
    else:
        live = len(prompts) == 1 and not chosen.json  # one prompt alone is shown as it grows
        show = progress.growing(chosen.prompt[0] + apart, task.decode) if live else None
        common |= {"sources": sources or None, "sampling": sampling, "seed": seed}
        found = generate.generate(model, prompts, on_token=show, **common)
        if live:
            print()
            return 0
        rows = [{"tokens": tokens} for tokens in found]
    rows = [
        {"prompt": prompt, "text": task.decode(row["tokens"]), **row}
        for prompt, row in zip(chosen.prompt, rows, strict=True)
    ]
    return _print(chosen, rows, lambda: [print(row["prompt"] + apart + row["text"]) for row in rows])


def _given(chosen, names: tuple[str, ...]) -> dict:
    """Those of the flags that were given."""
    return {name: value for name in names if (value := getattr(chosen, name)) is not None}


def _flags(names) -> str:
    return " ".join("--" + name.replace("_", "-") for name in names)


def _bench(chosen) -> int:
    if chosen.rounds < 1:
        raise UsageError(f"--rounds {chosen.rounds}: at least 1")
    words = [word for word in chosen.words if word != "mode=decode"]
    chosen.passes = chosen.passes if words == chosen.words else "decode"
    cells, varied = configs.sweep(words)
    from xformers_lab import progress
    from xformers_lab.measure import bench
    from xformers_lab.report import table

    passes = BENCH_PASSES[chosen.passes]
    with progress.words(quiet=chosen.json) as tell:
        rows = bench.bench(cells, rounds=chosen.rounds, passes=passes, check=not chosen.no_check, progress=tell)
    code = _print(chosen, rows, lambda: table.print_rows(rows, [*varied, "pass"]))
    if chosen.report:
        path, title = pathlib.Path(chosen.report), "What the mechanisms cost"
        _write_report(rows, [*varied, "pass"], _command(chosen), path, title)
        print(f"report: {path}", file=sys.stderr)
    if any(row["status"] == "interrupted" for row in rows):
        print("interrupted: the rows say what was measured before", file=sys.stderr)
        return 130
    return code if all(row["status"] == "ok" for row in rows) else 5


def _compare(chosen) -> int:
    if not chosen.words:
        raise UsageError("compare what? For example: xlab compare task=copy attention=full,linear seq_len=64,128")
    cells, varied = configs.sweep(chosen.words)
    from xformers_lab import progress
    from xformers_lab.compare import process, run
    from xformers_lab.report import table

    with process.Worker() as worker:
        told = lambda text: print(text, file=sys.stderr, flush=True)
        found = run.check_cells(
            cells, worker, skip_impossible=chosen.skip_impossible, kit=not chosen.no_check, told=told
        )
        done = sum(cell not in found and run.stored(cell) is not None for cell in cells)
        print(f"{len(cells)} cells, {done} already done", file=sys.stderr, flush=True)
        with progress.cells(len(cells), varied, quiet=chosen.json) as tell:
            callbacks = {"started": tell.started, "stepped": tell.stepped, "finished": tell.finished}
            rows = run.compare(cells, varied, worker, found=found, **callbacks)
    code = _print(chosen, rows, lambda: table.print_rows(rows, varied))
    saved = run.save_table(rows, varied, _command(chosen), cells[0].runs)
    report = _write_report(rows, varied, _command(chosen), pathlib.Path(chosen.report or saved.parent / "report.html"))
    print(f"report: {report}", file=sys.stderr)
    if worker.stopped:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 128 + worker.stopped
    return code if all(row["status"] == "ok" for row in rows) else 5


def _report(chosen) -> int:
    path = pathlib.Path(chosen.runs) / "compare.json"
    try:
        saved = json.loads(path.read_text())
        rows, varied, command = saved["rows"], saved["varied"], saved["command"]
    except FileNotFoundError:
        raise UsageError(f"{path}: no comparison there yet; run xlab compare, or name its folder with --runs") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not a saved comparison ({type(error).__name__}: {error}); run xlab compare again"
        ) from None
    out = _write_report(rows, varied, command, pathlib.Path(chosen.out or path.parent / "report.html"))
    return _print(chosen, {"report": str(out), "rows": len(rows)}, lambda: print(f"report: {out}"))


def _write_report(
    rows: list[dict],
    varied: list[str],
    command: str,
    path: pathlib.Path,
    title: str = "Which variant, and what it costs",
) -> pathlib.Path:
    from xformers_lab.report import html

    try:
        html.write_report(rows, varied, path, title=title, command=command)
    except OSError as error:
        raise UsageError(f"{path}: cannot write the report there ({error.strerror})") from None
    return path


def _new(chosen) -> int:
    from xformers_lab.check import new, run

    path = new.new(chosen.shelf, chosen.name, chosen.folder)
    print(f"wrote {path}")
    if chosen.shelf == "attention":
        print(f"next: xlab check {path}, then xlab compare task=copy attention=full,{path}")
    elif chosen.shelf in run.kits():
        print(f"next: xlab check {chosen.shelf}/{path}")
    return 0


def _check(chosen) -> int:
    spec, found = configs.spec, []
    for word in chosen.words or ["attention"]:
        found += [(word, name) for name in spec.names(word)] if word in spec.SHELVES else [spec.home(word)]
    for shelf, name in found:
        spec.resolve(shelf, name)  # a misspelt name is found before the kit runs
    from xformers_lab import progress
    from xformers_lab.check import remembered, run
    from xformers_lab.report import pages

    reports = []
    with progress.items("check", len(found), quiet=chosen.json) as tell:
        for shelf, name in found:
            tell(name)
            report = run.check(name, shelf, deep=chosen.deep).to_dict()
            reports.append(remembered.keep(name, report) if shelf == "attention" else report)
    _print(chosen, reports, lambda: pages.print_checks(reports))
    return 0 if all(report["passed"] for report in reports) else 1


# ---- shared ------------------------------------------------------------------------------------------------------


def _print(chosen, value, table) -> int:
    if chosen.json:
        print(json.dumps(value, indent=2, default=str))
    else:
        table()
    return 0


def _command(chosen) -> str:
    return shlex.join(["xlab", *chosen.given])


def _run_dir(chosen) -> pathlib.Path:
    """The folder named, or the newest one under --runs for `last`; raises UsageError."""
    folder = pathlib.Path(chosen.run_dir)
    if chosen.run_dir == "last":
        found = sorted(pathlib.Path(chosen.runs).glob("*/*/config.json"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UsageError(f"no run in {chosen.runs} yet; run xlab train, or name its folder with --runs")
        folder = found[-1].parent
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: no run there (a run's folder holds config.json)")
    return folder
