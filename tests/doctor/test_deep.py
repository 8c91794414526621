"""Trials of what a run survives: they hold here, and they notice where something is lost."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from xformers_lab.cli import main
from xformers_lab.doctor import deep
from xformers_lab.doctor.deep import _trial, damage, kills
from xformers_lab.doctor.deep._trial import End, Lost, Trial
from xformers_lab.errors import RunFailed

NEW = {"start_new_session": True}
ALONE = End({"loss": 1.0}, [(1, 2.0)], {"params.kernel": "abc"})


def test_every_file_is_a_trial():
    assert {"damage", "kills", "race", "signals"} <= set(deep.names())


@pytest.mark.full
@pytest.mark.parametrize("name", deep.names())
def test_it_holds_here(name):
    said = []
    (finding,) = deep.examine([name], times=1, say=said.append)
    assert finding["ok"], finding
    assert finding["measured"]["held"] == finding["measured"]["times"] == 1
    assert said[0] == "a run that nothing disturbs" and f"{finding['what']} 1/1: " in said[-1]


@pytest.mark.parametrize("words, part", [
    (["--deep", "kils"], 'no trial "kils": did you mean "kills"?'),
    (["--deep=kills", "--times", "0"], "--times 0: a trial is done once or more often"),
    (["--times", "3"], "write xlab doctor --deep --times N"),
])  # fmt: skip
def test_what_it_cannot_do_is_said_before_anything_runs(words, part, capsys):
    assert main(["doctor", *words]) == 2
    assert part in capsys.readouterr().err


def test_what_is_lost_is_a_finding(tmp_path):
    def disturb(trial, rng, times):
        yield "once"
        raise Lost("the second time")

    finding = Trial(tmp_path, 3, print).of("a trial", 1, disturb)
    assert finding["found"] == "1 of 3: the second time" and finding["ok"] is False
    assert finding["measured"]["held"] == 1 and finding["measured"]["times"] == 3


def test_two_are_tried_at_once_and_told_in_order(monkeypatch):
    """Both have to be under way for either to end, and the first one ends last."""
    both, second = threading.Barrier(2, timeout=60), threading.Event()

    def first(trial, rng, times):
        both.wait()
        assert second.wait(60)
        yield "one"

    def other(trial, rng, times):
        both.wait()
        yield "two"
        trial.say("and more")
        second.set()

    said, modules = [], [SimpleNamespace(WHAT=f.__name__, TIMES=1, disturb=f) for f in (first, other)]
    monkeypatch.setattr(deep, "AT_ONCE", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    findings = deep._side_by_side(Trial(pathlib.Path(), None, said.append), modules)  # pyright: ignore
    assert [finding["found"] for finding in findings] == ["1 of 1: one", "1 of 1: two"]
    assert said == ["first 1/1: one", "other 1/1: two", "and more"]


def test_what_ends_the_trials_ends_their_processes(monkeypatch):
    """As Ctrl-C does, which comes to the main thread while trials wait for processes."""
    processes = []

    def waits(trial, rng, times):
        processes.append(trial.started.start([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, **NEW))
        processes[0].wait(60)
        yield ""

    def ends(trial, rng, times):
        while not processes:
            time.sleep(0.01)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    trial = Trial(pathlib.Path(), None, print)
    modules = [SimpleNamespace(WHAT=f.__name__, TIMES=1, disturb=f) for f in (ends, waits)]
    with pytest.raises(KeyboardInterrupt):
        deep._side_by_side(trial, modules)  # pyright: ignore
    assert processes[0].returncode == -signal.SIGKILL
    with pytest.raises(Lost, match="stopped"):
        trial.start(["show"])


@pytest.mark.parametrize("other, named", [
    (End(ALONE.record, ALONE.losses, {"params.kernel": "abd"}), "params.kernel"),
    (End({"loss": 1.5}, ALONE.losses, ALONE.arrays), "loss"),
    (End(ALONE.record, [(1, 2.0), (1, 2.0)], ALONE.arrays), "a step's loss"),
    (End(ALONE.record, [], ALONE.arrays), "a step's loss"),
])  # fmt: skip
def test_an_end_that_differs_is_noticed(other, named, tmp_path, monkeypatch):
    monkeypatch.setattr(_trial, "end_of", lambda run_dir: other)
    with pytest.raises(Lost, match=named):
        Trial(tmp_path, None, print, ALONE).same(tmp_path)


@pytest.mark.full
def test_a_run_of_another_seed_or_with_harmless_damage_is_noticed(tmp_path, monkeypatch):
    trial = Trial(tmp_path, None, lambda text: None)
    trial.leave_alone()
    monkeypatch.setattr(damage, "_damage", lambda folder, rng: ("touch", folder))
    with pytest.raises(Lost, match=r"touch of .* passed unseen"):
        next(damage.disturb(trial, random.Random(0), 1))
    monkeypatch.setattr(_trial, "RUN", (*_trial.RUN, "data_seed=7"))
    with pytest.raises(Lost, match="it ended otherwise than the run left alone"):
        trial.same(trial.finish(trial.runs("other")))
    monkeypatch.setattr(kills, "SAVE_EVERY", -100)
    with pytest.raises(Lost, match="it has no checkpoint since step"):
        next(kills.disturb(trial, random.Random(0), 1))


def test_a_run_that_does_not_end_at_all_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(_trial, "RUN", ("attention=locla",))
    with pytest.raises(RunFailed, match=r"the run that nothing disturbs: it did not go on \(exit code 2\): .*locla"):
        Trial(tmp_path, None, lambda text: None).leave_alone()
