"""Trains the cells it is sent, one JSON config per line, and answers with JSON lines: steps, then the cell's record.

A process of its own: whatever a cell does to it (out of memory, a crash in native code), the comparison goes on.
"""

import json
import os
import sys
import time

from xformers_lab import config as configs
from xformers_lab.errors import LabError

EVERY = 0.1  # seconds between progress lines


def run_cell(config: configs.Config, progress) -> dict:
    """The record of one cell; a cell that cannot be trained gives a record that says why."""
    from xformers_lab.train import loop, records

    try:
        return loop.run(config, resume=True, progress=progress)
    except loop.Interrupted:
        raise
    except LabError as error:
        # A run that diverged wrote its own record, with what it measured until then.
        written = records.read_json(configs.folder(config) / "result.json")
        return written or {"status": getattr(error, "status", "failed"), "reason": str(error)}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
        return {"status": "oom" if memory else "failed", "reason": text.strip().splitlines()[0][:500]}


def main() -> int:
    # Whatever a library prints must not mix with the answers.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        config, last = configs.from_dict(json.loads(line)), 0.0

        def progress(step: int, total: int, metrics: dict) -> None:
            nonlocal last
            if time.monotonic() - last > EVERY:
                last = time.monotonic()
                print(json.dumps({"step": step, "total": total, "loss": metrics.get("loss")}), file=replies)

        try:
            record = run_cell(config, progress)
        except LabError as error:  # interrupted: the checkpoint is saved
            reason = str(error).removeprefix("interrupted: ")
            print(json.dumps({"record": {"status": "interrupted", "reason": reason}}), file=replies)
            return error.exit_code
        print(json.dumps({"record": record}), file=replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
