"""Time named cases side by side: one process per side, every case once per round in random order, ratio of minima.

The machines are shared and noisy; a minimum over interleaved rounds is the figure least touched by neighbours, and the
spread (maximum over minimum) says how much to trust it. Building and compiling are timed apart.
"""

import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys

from xformers_lab import hardware

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
SHORT = 0.04  # seconds: shorter cases are repeated within a round until they last this long


class Side:
    """One worker process with its own interpreter."""

    def __init__(self, module: str, python: str = sys.executable):
        self.process = subprocess.Popen(
            [python, str(HERE / "_worker.py"), module],
            cwd=HERE,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, **request) -> dict:
        """The answer to a request that must succeed."""
        answer = self.tried(**request)
        if "error" in answer:
            raise SystemExit(f"{answer['error']} on {request}")
        return answer

    def tried(self, **request) -> dict:
        """The answer to a request, {"error": ...} where it failed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self.process.wait()} on {request}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def duel(cases: dict[str, tuple[Side, str, dict]], rounds: int) -> dict[str, dict]:
    """Times {label: (side, name, options)}; -> {label: {min, median, max, first}} in seconds."""
    records: dict[str, dict] = {}
    for label, (side, name, options) in cases.items():
        first = side.ask(open=label, name=name, options=options)["first"]
        once = side.ask(time=label, repeat=1)["seconds"]
        records[label] = {"first": first, "repeat": max(1, round(SHORT / once)), "times": []}
    for round_ in range(rounds):
        order = list(cases)
        random.Random(round_).shuffle(order)
        for label in order:
            answer = cases[label][0].ask(time=label, repeat=records[label]["repeat"])
            records[label]["times"].append(answer["seconds"])
    for record in records.values():
        times = record.pop("times")
        record.update(min=min(times), median=statistics.median(times), max=max(times))
    return records


def machine() -> dict:
    """What the figures were measured on."""
    return {
        "cpu": hardware.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def place(name: str, target: str = "", folder: pathlib.Path = RESULTS) -> pathlib.Path:
    """Where the results of a benchmark are: on this machine, or planned for a target, whichever machine plans."""
    label = "-".join("".join(c if c.isalnum() else " " for c in (target or hardware.processor()).lower()).split())
    return folder / f"{name}.{label}.json"


def keep(
    name: str,
    rows: list[dict],
    rounds: int | None = None,
    about: dict[str, str] | None = None,
    *,
    planned: dict[str, str] | None = None,
    folder: pathlib.Path = RESULTS,
) -> pathlib.Path:
    """Write rows with what they hold for to <folder>/<name>.<cpu or target>.json, and as a table to .md; -> the first.

    about: what decides the figures beside this machine. planned: where nothing was timed, the "target", and the
    versions of what planned for it."""
    if planned is None:
        host, path = machine() | (about or {}), place(name, folder=folder)
        found = {"machine": host, "rounds": rounds}
        others = [f"{key} {text}" for key, text in host.items() if key not in machine()]
        times = [] if rounds is None else [f"{rounds} rounds"]
        python = ", ".join([f"Python {host['python']}", *others])
        more = "; ".join([f"{host['cpu']}, {host['cores']} cores, {host['system']}, {python}", *times]) + "."
    else:
        found, path = {"planned": planned}, place(name, planned["target"], folder)
        more = f"Planned for {', '.join(f'{key} {text}' for key, text in planned.items())}."
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(more, rows))
    return path


def table(head: str, rows: list[dict]) -> str:
    """Rows as a Markdown page for people, a column for each key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[key.replace("_", " ") for key in keys], ["---"] * len(keys)]
    lines += [[_word(row.get(key)) for key in keys] for row in rows]
    return "\n".join([head, "", *(f"| {' | '.join(cells)} |" for cells in lines), ""])


def _word(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def save(name: str, rows: list[dict], rounds: int) -> None:
    """`keep`, and print a table."""
    path = keep(name, rows, rounds)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([str(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"kept in {path.relative_to(HERE.parent)}")
