"""Run a grid: only missing cells, one at a time, each in a worker process; every cell ends as a row."""

import json
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

from xformers_lab import config as configs
from xformers_lab.config import Config
from xformers_lab.errors import UsageError

# A diverged run would diverge again; anything else that failed may have been the machine's doing.
SETTLED = ("ok", "nan")


def check_cells(cells: list[Config], *, skip_impossible: bool = False) -> dict[Config, str]:
    """Check every cell before any runs. -> why some are impossible; raises UsageError unless these are skipped."""
    from xformers_lab.model import check_config

    refused = {}
    for cell in cells:
        try:
            check_config(cell)
        except UsageError as error:
            refused[cell] = str(error)
    if refused and (not skip_impossible or len(refused) == len(cells)):
        first = next(iter(refused.values()))
        more = f" (and {len(refused) - 1} more of {len(cells)} cells)" if len(refused) > 1 else ""
        mend = "" if len(refused) == len(cells) else "; --skip-impossible keeps them as refused rows"
        raise UsageError(f"{first}{more}{mend}")
    return refused


def stored(cell: Config) -> dict | None:
    """The record of a cell that is settled, or None."""
    path = configs.folder(cell) / "result.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("status") in SETTLED else None


def row(cell: Config, record: dict, varied: list[str]) -> dict:
    """A cell's record with its config and the keys that tell it from the others."""
    shown = dict.fromkeys(["task", "attention", "seq_len", "seed", *varied])
    keys = {key: configs.get(cell, key) for key in shown}
    return {**record, **keys, "kind": "compare", "config": configs.to_dict(cell), "run_dir": str(configs.folder(cell))}


def compare(
    cells: list[Config],
    varied: list[str],
    *,
    refused: dict[Config, str],
    started: Callable[[int, Config], None],
    stepped: Callable[[int, int, float | None], None],
    finished: Callable[[int, dict], None],
) -> tuple[list[dict], bool]:
    """Train every cell that has no settled record. -> the rows in the order of `cells`, and whether it was interrupted.

    started(index, cell), stepped(step, total, loss) and finished(index, row) report progress.
    """
    rows: list[dict] = []
    interrupted = False
    with _Worker() as worker:
        for index, cell in enumerate(cells):
            record = {"status": "refused", "reason": refused[cell]} if cell in refused else stored(cell)
            if record is None and interrupted:
                record = {"status": "interrupted", "reason": "not reached before the interruption"}
            if record is None:
                started(index, cell)
                record = worker.train(cell, stepped)
                interrupted = record["status"] == "interrupted"
                _keep(cell, record)
            rows.append(row(cell, record, varied))
            finished(index, rows[-1])
    return rows, interrupted


def _keep(cell: Config, record: dict) -> None:
    """A cell that failed leaves its reason in its folder, beside whatever else it wrote."""
    path = configs.folder(cell) / "result.json"
    if record["status"] != "interrupted" and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")


class _Worker:
    """The current worker process; a dead one is replaced at the next cell."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed on exit, with the process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()
        self.log.close()

    def train(self, cell: Config, stepped) -> dict:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "xformers_lab.compare.worker"]
            # Its own process group: Ctrl-C reaches the driver alone, which passes it on once.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(configs.to_dict(cell)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._died()
        while True:
            try:
                line = self.process.stdout.readline()
            except KeyboardInterrupt:
                self.process.send_signal(signal.SIGINT)  # it saves, says so, and ends
                continue
            if not line:
                return self._died()
            answer = json.loads(line)
            if "record" in answer:
                return answer["record"]
            stepped(answer["step"], answer["total"], answer["loss"])

    def _died(self) -> dict:
        assert self.process is not None
        code = self.process.wait()
        self.log.seek(0)
        said = self.log.read().strip().splitlines()
        if code == -signal.SIGKILL:
            return {"status": "oom", "reason": "the process was killed (signal 9), most likely for want of memory"}
        return {
            "status": "failed",
            "reason": f"the process ended with {code}: {said[-1][:300] if said else 'no message'}",
        }


def save_table(rows: list[dict], varied: list[str], command: str, runs: str) -> pathlib.Path:
    """Keep the rows of a comparison, so that `xlab report` can draw them again."""
    path = pathlib.Path(runs) / "compare.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"command": command, "varied": varied, "rows": rows}, indent=1) + "\n")
    temporary.replace(path)
    return path
