"""What a worker does with one cell of a comparison: checks it, trains it. Whatever goes wrong is its record."""

import contextlib
import functools
from collections.abc import Sequence

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.config import Config
from xformers_lab.errors import BrokenChoice, InUse, LabError, UsageError, in_words, ran_out_of_memory, stopped_by
from xformers_lab.layouts import DATA
from xformers_lab.record import HELD, IMPOSSIBLE
from xformers_lab.supervise.worker import Tell


def check(tell: Tell, config: dict, kit: bool) -> dict:
    """{"status": "ok"}; or IMPOSSIBLE, "refused" (by its kit), "failed" (it is broken), with the reason."""
    cell = configs.from_dict(config)
    tell.doing("preparing the data")
    from xformers_lab.compare.study import unseeded
    from xformers_lab.model import build_task
    from xformers_lab.train import initial, jobs, layout, otherwise, settled

    reading: list[str] = []
    with contextlib.suppress(Exception):  # it shows again; what takes long, and stays, is no part of the check
        reading = build_task(cell).reading()
    tell.doing("checking the config", reading=reading)
    try:
        _possible(unseeded(cell))
        task = build_task(cell)
        otherwise.check(cell, task)
        if settled.record(configs.folder(cell), lambda: task) is None:
            initial.check(cell, task)
            if cell.train.layout == DATA:
                layout.layout_of(cell, task)
            else:  # whether it can be depends on the model
                jobs.prepare(cell, configs.folder(cell))
        for choice in spec.split(cell.model.attention, "+") if kit else ():
            if reason := _refusal(choice, tell):
                return {"status": "refused", "reason": reason}
    except BrokenChoice as error:
        return {"status": "failed", "reason": str(error)}
    except UsageError as error:
        return {"status": IMPOSSIBLE, "reason": str(error)}
    except LabError as error:
        return {"status": "failed", "reason": str(error)}
    except Exception as error:
        return {"status": "failed", "reason": in_words(error)[:500]}
    return {"status": "ok"}


def train(tell: Tell, config: dict, track: Sequence[str] = (), shared: str = "") -> dict:
    """The record of one cell, which trackers may show; a cell that cannot be trained gives a record that says why, one
    that another process trains HELD. shared: why no time is taken of it, in words, where other cells train on this host
    meanwhile. Raises Interrupted."""
    cell = configs.from_dict(config)
    from xformers_lab.measure import speed
    from xformers_lab.train import failures, loop, work

    try:
        with work.tracked(tell, cell, configs.folder(cell), track) as followers, speed.sharing(shared):
            record = loop.run(cell, resume=True, **work.watched(tell, cell, followers))
            followers.tested(record)
        return record
    except loop.Interrupted:
        raise
    except failures.Diverged as error:
        return error.record
    except InUse as error:
        return {"status": HELD, "reason": str(error)}
    except LabError as error:
        return {"status": getattr(error, "status", "failed"), "reason": str(error)}
    except Exception as error:
        return {"status": "oom" if ran_out_of_memory(error) else "failed", "reason": in_words(error)[:500]}
    except BaseException as error:
        if stopped_by(error) is not None:
            raise
        return {"status": "failed", "reason": in_words(error)[:500]}  # the exit of a choice of the user's own


@functools.lru_cache(maxsize=1024)
def _possible(variant: Config) -> None:
    """Raises what `check_config` does; a variant is traced once, whatever seeds its cells have."""
    from xformers_lab.model import check_config

    check_config(variant)


@functools.cache
def _refusal(choice: str, tell: Tell) -> str | None:
    """Why the kit refuses a mechanism."""
    from xformers_lab.check import cache

    if cache.unproven(choice):
        tell.doing(f"checking {choice}", kit=choice)
    return cache.refusal(choice)
