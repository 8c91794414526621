"""Does what it is asked, one JSON line each, and answers with JSON lines: what it says on the way, then the answer.

{"do": "check", "config": ..., "kit": true} checks a cell, {"do": "train", "config": ...} trains it. A process of its
own: whatever a cell does to it (out of memory, a crash in native code), the comparison goes on. SIGTERM ends it at
once, or, while it trains, has it save first.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable

from xformers_lab import config as configs
from xformers_lab import spec
from xformers_lab.errors import BrokenChoice, LabError, UsageError, in_words

EVERY = 0.1  # seconds between progress lines


def check_cell(config: configs.Config, kit: bool, say: Callable[..., None]) -> dict:
    """{"status": "ok"}; or "impossible", "refused" (by its kit), "failed" (it is broken), with the reason."""
    from xformers_lab.model import check_config
    from xformers_lab.train import layout, loop

    try:
        task = check_config(config)
        if loop.settled(configs.folder(config), lambda: task) is None:
            if config.train.layout == "jit":
                layout.layout_of(config)
            else:  # whether it can be depends on the model
                loop.prepare(config, configs.folder(config))
        for choice in spec.split(config.model.attention, "+") if kit else ():
            if reason := _refusal(choice, say):
                return {"status": "refused", "reason": reason}
    except BrokenChoice as error:
        return {"status": "failed", "reason": str(error)}
    except UsageError as error:
        return {"status": "impossible", "reason": str(error)}
    except Exception as error:
        return {"status": "failed", "reason": in_words(error)[:500]}
    return {"status": "ok"}


def run_cell(config: configs.Config, progress, stop: Callable[[], bool]) -> dict:
    """The record of one cell; a cell that cannot be trained gives a record that says why."""
    from xformers_lab.train import loop

    try:
        return loop.run(config, resume=True, progress=progress, stop=stop)
    except loop.Interrupted as error:
        return {"status": "interrupted", "reason": str(error).removeprefix("interrupted: ")}
    except loop.Diverged as error:
        return error.record
    except LabError as error:
        return {"status": getattr(error, "status", "failed"), "reason": str(error)}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
        return {"status": "oom" if memory else "failed", "reason": in_words(error)[:500]}


@functools.cache
def _refusal(choice: str, say: Callable[..., None]) -> str | None:
    """Why the kit refuses a mechanism. The package's own are checked by its tests, and here only looked up."""
    from xformers_lab.check import remembered

    outside = spec.digest("attention", choice) is not None
    if outside and remembered.known(choice) is None:
        say(text=f"checking {choice}")
    return remembered.refusal(choice, anew=outside)


def main() -> int:
    # Whatever a library prints must not mix with the answers.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    alone, last = False, 0.0

    def say(**said) -> None:
        nonlocal alone
        try:
            print(json.dumps(said), file=replies)
        except BrokenPipeError:  # the driver is gone: what trains saves itself
            alone = True

    def progress(step: int, total: int, metrics: dict) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            say(step=step, total=total, loss=metrics.get("loss"))

    for line in sys.stdin:
        asked = json.loads(line)
        config = configs.from_dict(asked["config"])
        if asked["do"] == "check":
            answer = check_cell(config, asked["kit"], say)
        else:
            answer = run_cell(config, progress, lambda: alone)
        say(answer=answer)
        if answer["status"] == "interrupted":
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
