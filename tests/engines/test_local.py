"""Cells side by side on this machine, and what signals leave of a sweep: nothing is lost, nothing done twice."""

import json
import os
import random
import signal
import time

import pytest
import sweeps

from xformers_lab.config import stored
from xformers_lab.errors import InUse
from xformers_lab.train import records


@pytest.mark.full
def test_cells_side_by_side_are_the_same_but_have_no_times(tmp_path):
    words = ["attention=full,linear", "seed=0,1", "steps=20"]
    alone = sweeps.rows(*words, f"runs={tmp_path}/alone")
    beside = sweeps.rows(*words, "-j", 2, f"runs={tmp_path}/beside")
    assert sweeps.parameters(tmp_path / "alone") == sweeps.parameters(tmp_path / "beside")
    times = ("tokens_per_second", "seconds_median", "seconds_min", "seconds_ratio", "compile_seconds")
    times += ("prefill_seconds", "token_seconds", "eval_tokens_per_second")
    for one, other in zip(alone, beside, strict=True):
        assert [one[key] for key in ("id", "metric", "loss", "flops")] == [
            other[key] for key in ("id", "metric", "loss", "flops")
        ]
        assert all(one[key] for key in times) and not any(other.get(key) for key in times)
        assert other["untimed"] == "up to 2 cells trained at once (-j 2)" and "untimed" not in one
        assert other["state_bytes"] == one["state_bytes"]
    lines = [line for path in tmp_path.glob("beside/copy/*/metrics.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 80 and not any(json.loads(line).get("seconds") for line in lines)
    report = (tmp_path / "beside" / "report.html").read_text()
    assert "No times, since cells beside one another disturb them: up to 2 cells trained at once" in report


@pytest.mark.full
def test_an_interrupt_saves_every_cell_that_runs(tmp_path):
    words = ["seed=0..3", "steps=100000", "-j", 2, f"runs={tmp_path}", "--json"]
    running = sweeps.start(*words)
    sweeps.until(lambda: sum(1 for path in tmp_path.glob("copy/*/metrics.jsonl") if path.read_text()) == 2)
    running.send_signal(signal.SIGINT)
    rows = sweeps.finished(running, 130)
    assert [row["status"] for row in rows] == ["interrupted"] * 4
    assert sum("saved at step" in row["reason"] for row in rows) == 2
    assert len(list(tmp_path.glob("copy/*/checkpoints/*/MANIFEST.json"))) == 2


@pytest.mark.full
def test_what_a_killed_command_left_saves_itself_and_lets_go_of_its_run(tmp_path):
    running = sweeps.start("steps=100000", f"runs={tmp_path}")
    sweeps.until(lambda: sweeps.steps(tmp_path) > 0)
    running.kill()
    running.communicate()
    (folder,) = tmp_path.glob("copy/*")

    def free() -> bool:
        try:
            records.refuse_if_in_use(folder)
        except InUse:
            return False
        return True

    sweeps.until(free, 60.0)
    taken = sweeps.steps(tmp_path)
    time.sleep(1.0)
    (saved,) = folder.glob("checkpoints/*/MANIFEST.json")
    assert sweeps.steps(tmp_path) == taken == int(saved.parent.name) < stored(folder / "config.json").train.steps


def killed(tmp_path, *, cells: int, kills: int, jobs: int, seed: int) -> tuple[int, int]:
    """(kills, calls) of a sweep whose command is ended by SIGKILL at moments that are drawn, until it ends; what was
    finished at each kill is afterwards as it was."""
    words = [f"seed=0..{cells - 1}", "steps=30", "save_every=10", f"runs={tmp_path}", "-j", jobs]
    draw, done, calls = random.Random(seed), 0, 0
    before: dict[str, str] = {}
    while True:
        running, calls = sweeps.start(*words, "--json"), calls + 1
        if done < kills:
            # Wherever it is: importing, checking, with a cell just begun or just finished.
            goal, until = sweeps.steps(tmp_path) + draw.randint(0, 60), time.monotonic() + draw.uniform(5, 60)
            while running.poll() is None and sweeps.steps(tmp_path) < goal and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.5))
            if running.poll() is None:
                os.kill(running.pid, signal.SIGKILL)
                running.communicate()
                done += 1
                now = sweeps.results(tmp_path)
                assert now.items() >= before.items(), "a finished cell ran again"
                before = now
                continue
        rows = sweeps.finished(running)
        break
    assert [row["status"] for row in rows] == ["ok"] * cells
    assert sweeps.results(tmp_path).items() >= before.items() and len(sweeps.results(tmp_path)) == cells
    sweeps.once(tmp_path, cells)
    return done, calls


@pytest.mark.full
def test_a_command_that_is_killed_three_times_loses_no_cell(tmp_path):
    assert killed(tmp_path, cells=6, kills=3, jobs=2, seed=1)[0] == 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_command_that_is_killed_twenty_times_loses_no_cell(tmp_path, jobs):
    done, calls = killed(tmp_path, cells=30, kills=20, jobs=jobs, seed=jobs)
    assert done == 20 and calls == 21
