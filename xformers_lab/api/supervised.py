"""One run trained in a worker, as data: what `xlab train` and `xlab resume` print, and `api` gives as a Run; and scored
in one, where several processes score it together."""

import contextlib
import dataclasses
import pathlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab.errors import STOPPED, RunFailed, UsageError
from xformers_lab.train import hosts, labels, longer, records, trackers


def train(
    items: Sequence[configs.Item], *, track: Sequence[str] = (), trust: bool = False, quiet: bool = False
) -> tuple[pathlib.Path, dict[str, Any] | None]:
    """Train the one config that words or what stands for them say; -> its folder and its record, None in all processes
    but the first where they say that there are several. Raises UsageError, and RunFailed, whose exit_code is that of a
    signal where one had the run stop."""
    place, items = configs.placed(items)
    place = hosts.meant(place)
    words = configs.spelled(items)
    runs = [word.partition("=")[2] for word in words if word.startswith("runs=")]
    if place.coordinator is None:
        records.refuse_if_typed(words, configs.spec.located((runs or ["runs"])[-1], "runs"))
    trackers.require(track)
    config = configs.single(items, trust=trust)
    title = f"{config.task} · {config.model.attention} · {config.seq_len}"
    job = {"stall": config.stall, "config": configs.to_dict(config), "words": words, "track": list(track)}
    folder = configs.folder(config)
    return folder, _ask(title, folder, "train.work.run", job, place, quiet)


def resume(
    folder: pathlib.Path,
    words: Sequence[configs.Item] = (),
    *,
    stall: Any = None,
    from_scratch: bool = False,
    track: Sequence[str] = (),
    trust: bool = False,
    quiet: bool = False,
    where: str = "",
) -> tuple[pathlib.Path, dict[str, Any] | None]:
    """Go on with the run in a folder; -> the folder of the run as it is then, and its record, as `train`. words: those
    that `longer.asked` takes, and a place; stall: in place of the run's own, `where` messages have it. Raises as
    `train` does."""
    place, items = configs.placed(words)
    place, asked = hosts.meant(place), configs.spelled(items)
    if place.coordinator is None:
        records.refuse_if_in_use(folder)
    trackers.require(track)
    first = configs.stored(folder / "config.json", trust=trust)
    config, title = longer.asked(first, asked), f"resuming {folder}"
    job: dict[str, Any] = {"run_dir": str(folder), "words": asked, "trust": trust, "from_scratch": from_scratch}
    job |= {"stall": first.stall if stall is None else configs.typed("stall", stall, where), "track": list(track)}
    if configs.identity(config) == configs.identity(first):
        if not place.process:  # a launcher's processes all write the same
            labels.write(config, folder)
    elif from_scratch:
        raise UsageError("--from-scratch: a longer run goes on from a checkpoint; xlab train begins at step 1")
    else:
        folder, title = longer.folder(folder, config), f"{title}, to step {config.train.steps}"
    return folder, _ask(title, folder, "train.work.resume", job, place, quiet)


def evaluate(
    folder: pathlib.Path, place: configs.Place, at: Sequence[int], asked: Mapping[str, str], **how: Any
) -> list[dict[str, Any]] | None:
    """What `trained.evaluate_at` gives of the run in a folder, by all processes of a place together, as `hosts.meant`
    gives it; None in all but the first. Raises as that does, and RunFailed where one of them is lost."""
    if how.get("beams") is not None:
        raise UsageError("--beams: one process generates texts; leave out coordinator=, processes= and process=")
    job = {"run_dir": str(folder), "at": list(at), "asked": dict(asked), "how": how}
    return _ask(f"scoring {folder}", folder, "train.work.evaluate", job, place, False, resumed=False)


def _ask(
    title: str,
    folder: pathlib.Path,
    what: str,
    job: dict,
    place: configs.Place,
    quiet: bool,
    resumed: bool = True,
) -> Any:
    """Have a worker do it, and show how far it is, in the first of several processes alone. resumed: whether the run in
    the folder goes on where it ended before."""
    if place.coordinator is None:
        records.refuse_if_in_use(folder)  # before a worker starts, which takes seconds
    else:
        job |= {"place": dataclasses.asdict(place)}
    from xformers_lab import progress
    from xformers_lab.supervise.process import LOST, Ended, Worker

    number = 0  # which process this is, if not the first
    with Worker() as worker, progress.steps(title, quiet=quiet or bool(place.process)) as step:

        def heard(message: dict) -> None:
            nonlocal number
            number = message.get("process", number)
            if number:
                return
            for line in (*message.get("reading", ()), *([message["said"]] if "said" in message else [])):
                progress.say(line)
            if "loss" in message:
                step(message["step"], message["total"], message)
            elif "doing" in message:
                step.doing(message["doing"])

        try:
            record = worker.ask(what, heard, **job)
            return None if number else record
        except RunFailed as ended:
            how = str(ended)
            if isinstance(ended, Ended):
                how = f"interrupted: {ended.reason}" if ended.status == "interrupted" else ended.reason
                if ended.clock.doing == hosts.WAITING and ended.status == "failed":
                    how = hosts.unmet(place)
            elif not how.startswith(LOST):
                raise
            saved = ""
            if resumed and any(folder.glob("checkpoints/*/MANIFEST.json")):
                saved = f"; go on with xlab resume {folder}"
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
