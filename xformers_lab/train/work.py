"""What a worker does for train and resume, and for eval by several processes, and how it says so."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xformers_lab import config as configs
from xformers_lab.supervise.worker import Tell
from xformers_lab.train import hosts, longer, records, trackers


def run(
    tell: Tell,
    config: dict,
    words: Sequence[str] = (),
    track: Sequence[str] = (),
    place: Mapping[str, Any] | None = None,
) -> dict:
    """Check a config, of which `words` were typed, then train it; -> the record. Raises as `loop.run` does.

    track: names of trackers that show it; place: that of this process among several, as `hosts.meant` gives it.
    """
    with joined(tell, place):
        return _run(tell, config, words, track if hosts.first() else ())


def _run(tell: Tell, config: dict, words: Sequence[str], track: Sequence[str]) -> dict:
    chosen = configs.from_dict(config)
    tell.doing("preparing the data and the config")
    from xformers_lab.model import check_config

    task = hosts.agreed(lambda: check_config(chosen))
    tell.doing("preparing the config", reading=task.reading())
    from xformers_lab.train import initial, loop, otherwise

    hosts.agreed(lambda: otherwise.check(chosen, task))
    hosts.agreed(lambda: initial.check(chosen, task))
    records.typed(words)
    with tracked(tell, chosen, configs.folder(chosen), track) as followers:
        record = loop.run(chosen, **watched(tell, chosen, followers))
        followers.tested(record)
    return record


def resume(
    tell: Tell,
    run_dir: str,
    trust: bool = False,
    from_scratch: bool = False,
    track: Sequence[str] = (),
    words: Sequence[str] = (),
    place: Mapping[str, Any] | None = None,
) -> dict:
    """Go on with the run in a folder, or with the longer one that `words` make of it; -> the record. Raises as
    `loop.resume` and `longer.begin` do. place: as in `run`."""
    with joined(tell, place):
        return _resume(tell, run_dir, trust, from_scratch, track if hosts.first() else (), words)


def _resume(
    tell: Tell, run_dir: str, trust: bool, from_scratch: bool, track: Sequence[str], words: Sequence[str]
) -> dict:
    first = chosen = configs.stored(pathlib.Path(run_dir) / "config.json", trust=trust)
    tell.doing("preparing the data")
    from xformers_lab.model import build_task
    from xformers_lab.train import loop

    reading: list[str] = []
    with contextlib.suppress(Exception):  # it shows again
        reading = build_task(chosen).reading()
    tell.doing("preparing", reading=reading)
    if configs.identity(chosen := longer.asked(first, words)) != configs.identity(first):
        run_dir = str(longer.begin(pathlib.Path(run_dir), first, chosen))
    with tracked(tell, chosen, pathlib.Path(run_dir), track) as followers:
        told = watched(tell, chosen, followers)
        record = loop.resume(run_dir, trust=trust, from_scratch=from_scratch, **told)
        followers.tested(record)
    return record


def evaluate(
    tell: Tell,
    run_dir: str,
    at: Sequence[int],
    asked: Mapping[str, str],
    how: Mapping[str, Any],
    place: Mapping[str, Any],
) -> list[dict]:
    """The rows of `trained.evaluate_at`, which all processes of a place score together; how: its other arguments."""
    with joined(tell, place):
        from xformers_lab.train import trained

        tell.doing("scoring")
        return trained.evaluate_at(run_dir, at, asked, **how, say=lambda line: tell(said=line))


@contextlib.contextmanager
def joined(tell: Tell, place: Mapping[str, Any] | None) -> Iterator[None]:
    """Together with the other processes of the run, if there are any; a worker's driver hears which this one is."""
    if place is None:
        yield
        return
    tell.doing(hosts.WAITING)
    with hosts.joined(configs.Place(**place)):
        tell(process=hosts.process())
        yield


def tracked(
    tell: Tell, config: configs.Config, run_dir: pathlib.Path, track: Sequence[str]
) -> contextlib.AbstractContextManager[trackers.Followers]:
    """The trackers of a run while the `with` lasts; a worker's driver hears where one of them stops."""
    identity = configs.identity(config) if track else ""
    return trackers.following(track, run_dir, identity, configs.to_dict(config), lambda line: tell(said=line))


def watched(tell: Tell, config: configs.Config, followers: trackers.Followers | None = None) -> dict[str, Any]:
    """Callbacks for `loop.run`: a worker's driver hears of every step, trackers too, and the run ends when its driver
    is gone."""

    def progress(step: int, total: int, metrics: dict) -> None:
        if followers is not None:
            followers.observe(metrics)
        tell.doing("training", step=step, total=total, loss=metrics.get("loss"))

    def doing(what: str, step: int) -> None:
        tell.doing(what, step=step, total=config.train.steps)

    return {"progress": progress, "stop": lambda: tell.alone, "doing": doing}
