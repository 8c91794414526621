"""One run trained in a worker, as data: what `xlab train` and `xlab resume` print, and `api` gives as a Run."""

import contextlib
import pathlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab.errors import STOPPED, RunFailed
from xformers_lab.train import records, trackers


def train(
    items: Sequence[configs.Item], *, track: Sequence[str] = (), trust: bool = False, quiet: bool = False
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Train the one config that words or what stands for them say; -> its folder and its record. Raises UsageError,
    and RunFailed, whose exit_code is that of a signal where one had the run stop."""
    words = configs.spelled(items)
    runs = [word.partition("=")[2] for word in words if word.startswith("runs=")]
    records.refuse_if_typed(words, configs.spec.located((runs or ["runs"])[-1], "runs"))
    trackers.require(track)
    config = configs.single(items, trust=trust)
    title = f"{config.task} · {config.model.attention} · {config.seq_len}"
    job = {"stall": config.stall, "config": configs.to_dict(config), "words": words, "track": list(track)}
    folder = configs.folder(config)
    return folder, _ask(title, folder, "train.work.run", job, quiet)


def resume(
    folder: pathlib.Path,
    *,
    stall: Any = None,
    from_scratch: bool = False,
    track: Sequence[str] = (),
    trust: bool = False,
    quiet: bool = False,
    where: str = "",
) -> dict[str, Any]:
    """Go on with the run in a folder; -> its record. stall: in place of the run's own, `where` messages have it. Raises
    as `train` does."""
    records.refuse_if_in_use(folder)
    trackers.require(track)
    own = configs.stored(folder / "config.json", trust=trust).stall
    stall = own if stall is None else configs.typed("stall", stall, where)
    job = {"stall": stall, "run_dir": str(folder), "trust": trust, "from_scratch": from_scratch, "track": list(track)}
    return _ask(f"resuming {folder}", folder, "train.work.resume", job, quiet)


def _ask(title: str, folder: pathlib.Path, what: str, job: dict, quiet: bool) -> dict[str, Any]:
    """Have a worker train, and show how far it is."""
    records.refuse_if_in_use(folder)  # before a worker starts, which takes seconds
    from xformers_lab import progress
    from xformers_lab.supervise.process import Ended, Worker

    with Worker() as worker, progress.steps(title, quiet=quiet) as step:

        def heard(message: dict) -> None:
            for line in (*message.get("reading", ()), *([message["said"]] if "said" in message else [])):
                progress.say(line)
            if "loss" in message:
                step(message["step"], message["total"], message)
            elif "doing" in message:
                step.doing(message["doing"])

        try:
            return worker.ask(what, heard, **job)
        except Ended as ended:
            how = f"interrupted: {ended.reason}" if ended.status == "interrupted" else ended.reason
            saved = f"; go on with xlab resume {folder}" if any(folder.glob("checkpoints/*/MANIFEST.json")) else ""
            error = RunFailed(how if "xlab resume" in how else how + saved)
            error.exit_code = ended.exit_code
            raise error from None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around a call from Python: a signal that had the run stop, and save itself, ends what called it as it would have
    without."""
    try:
        yield
    except RunFailed as error:
        if error.exit_code not in STOPPED:
            raise
        pass_on(error.exit_code - 128)
        raise KeyboardInterrupt(str(error)) from None


def pass_on(number: int) -> None:
    """A signal that a worker's driver heard, once all is saved: whoever ends a process means all of it. Ctrl-C was
    meant for what has ended by now."""
    if number == signal.SIGTERM:
        signal.raise_signal(number)
