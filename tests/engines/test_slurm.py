"""SLURM's engine by submitit's own executor, which runs jobs as SLURM would, on this machine."""

import datetime
import itertools
import os
import pathlib
import signal

import pytest
import sweeps

from xformers_lab.cli import main

pytest.importorskip("submitit", reason="needs the extra slurm: make test-engines")

pytestmark = pytest.mark.full
ENGINE = ("--engine", "slurm:cluster=local")


def jobs(runs: pathlib.Path) -> list[int]:
    """The processes that jobs of a folder of runs are."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"submitit.core._submit" in words and str(runs / ".jobs").encode() in words:
            found.append(int(folder.name))
    return found


def test_cells_are_those_of_one_machine_and_timed_ones_come_one_by_one(tmp_path):
    words = ["attention=full,linear", "seed=0,1", "steps=20"]
    here = sweeps.rows(*words, f"runs={tmp_path}/here")
    there = sweeps.rows(*words, *ENGINE, f"runs={tmp_path}/there")
    assert sweeps.parameters(tmp_path / "here") == sweeps.parameters(tmp_path / "there")
    assert [row["metric"] for row in here] == [row["metric"] for row in there]
    assert all(row["tokens_per_second"] > 0 for row in there)
    spans = sorted([datetime.datetime.fromisoformat(row[key]) for key in ("started", "ended")] for row in there)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert not list((tmp_path / "there" / ".jobs").iterdir())  # nothing is left of jobs that ended well


def test_a_job_that_is_killed_is_tried_again(tmp_path):
    running = sweeps.start("seed=0..2", "steps=2000", "save_every=100", "-j", 2, *ENGINE, f"runs={tmp_path}", "--json")
    for _ in range(2):
        sweeps.until(lambda: jobs(tmp_path) and sweeps.steps(tmp_path) > 0)
        os.kill(jobs(tmp_path)[0], signal.SIGKILL)
    _, err = running.communicate(timeout=600)
    assert running.returncode == 0 and "it is tried again" in err, err
    sweeps.once(tmp_path, 3)


def test_jobs_outlive_a_command_that_is_killed_and_the_next_one_takes_their_results(tmp_path):
    words = ["seed=0..2", "steps=600", "save_every=100", "-j", 2, *ENGINE, f"runs={tmp_path}"]
    running = sweeps.start(*words)
    sweeps.until(lambda: sweeps.steps(tmp_path) > 0)
    running.kill()
    running.communicate()
    rows = sweeps.rows(*words)
    assert [row["status"] for row in rows] == ["ok"] * 3
    sweeps.once(tmp_path, 3)


def test_where_there_is_no_slurm_it_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["compare", *sweeps.TINY, "--engine", "slurm:partition=gpu"]) == 2
    assert "no sbatch here" in capsys.readouterr().err and not list(tmp_path.iterdir())
