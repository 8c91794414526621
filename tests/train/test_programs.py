"""Runs of one process share compiled programs, and nothing else."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from test_train import TASK, tiny
from test_train_devices import COUNTING

from xformers_lab import config as configs
from xformers_lab.config import edit
from xformers_lab.model import build_task
from xformers_lab.train import jobs, loop, programs
from xformers_lab.train.state import init, structure

# Its loss has a number of the seed's in it.
SEEDED = (
    TASK.replace("class Uneven", "class Seeded")
    + """
    def loss(self, logits, batch):
        loss, weight = super().loss(logits, batch)
        return loss * (1 + self.setting.seed), weight
"""
)
RESULTS = ("loss", "metric", "validation", "aux", "skipped")
SHARED = {"seed": 7, "lr": 0.05, "weight_decay": 0.4, "steps": 4, "warmup": 0.5, "clip": 0.01}, {"clip": 0.0}
APART = {"dropout": 0.1}, {"optimizer": "sgd"}, {"schedule": "constant"}, {"attention": "linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("choices")
    for name, text in {"uneven": TASK, "seeded": SEEDED, "counting": COUNTING}.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def compilations(monkeypatch):
    """Of whole programs: a list that grows with each of them."""
    programs.forget()
    made, compile_ = [], jobs.compile_train_step
    monkeypatch.setattr(jobs, "compile_train_step", lambda *args: made.append(args) or compile_(*args))
    yield made
    programs.forget()


@pytest.fixture
def backend():
    """A list that grows with each program that XLA compiles, of an evaluation and of single operations too."""
    compiled = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)


def lines(config) -> list:
    """What every step left, without its time."""
    text = (configs.folder(config) / "metrics.jsonl").read_text()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in text.splitlines()]


@pytest.mark.full
def test_seeds_and_rates_share_one_compilation(folder, tmp_path, compilations, backend):
    base = tiny(str(folder / "uneven.py"), tmp_path / "shared", eval_every=2)
    first, alone = loop.run(base), []
    cells = [edit(base, **changes) for changes in SHARED]
    for cell in cells:
        backend.clear()
        record = loop.run(cell)
        assert backend == [], f"{cell}: something was compiled again"
        assert record["compile_seconds"] == first["compile_seconds"] and record["flops"] == first["flops"]
        assert record["kernel"] == first["kernel"] == "blocks"
        alone.append(record)
    assert len(compilations) == 1
    for cell, shared in zip(cells, alone, strict=True):
        programs.forget()
        apart = edit(cell, runs=str(tmp_path / "alone"))
        record = loop.run(apart)
        assert [record[key] for key in RESULTS] == [shared[key] for key in RESULTS] and lines(apart) == lines(cell)
        assert lines(cell) != lines(base)
    assert len(compilations) == 1 + len(SHARED)


@pytest.mark.full
def test_a_shared_program_gives_what_a_fresh_process_gives(folder, tmp_path, compilations):
    base = tiny(str(folder / "uneven.py"), tmp_path, attention=str(folder / "counting.py"), dropout=0.1, eval_every=2)
    loop.run(base)
    cell = edit(base, seed=3, lr=0.02)
    record = loop.run(cell)
    assert len(compilations) == 1
    apart = edit(cell, runs=str(tmp_path / "fresh"))
    path = tmp_path / "config.json"
    configs.save(apart, path)
    command = [sys.executable, "-m", "xformers_lab", "train", "--json", "--trust", f"@{path}"]
    ran = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    fresh = json.loads(ran.stdout)
    assert [record[key] for key in RESULTS] == [fresh[key] for key in RESULTS] and lines(apart) == lines(cell)


@pytest.mark.full
def test_what_decides_a_program_is_compiled_apart(folder, tmp_path):
    """The structure, the task's loss with the numbers in it, the source of a choice of one's own."""

    def program(**changes):
        config = edit(tiny(str(folder / "uneven.py"), tmp_path), **changes)
        return jobs.prepare(config, tmp_path).program

    programs.forget()
    assert program() is program(seed=1, lr=1.0) is program(eval_every=2, eval_batches=3)
    assert len({id(each) for each in (program(), *(program(**changes) for changes in APART))}) == 1 + len(APART)
    seeded = str(folder / "seeded.py")
    assert program(task=seeded) is program(task=seeded, lr=1.0) is not program(task=seeded, seed=1)
    assert program(task=seeded) is not program()
    own = tmp_path / "own.py"
    own.write_text(COUNTING.replace("Counting", "Own"))
    before = program(attention=str(own))
    assert before is program(attention=str(own), seed=1)
    own.write_text(own.read_text().replace("1 + self.fade", "2 + self.fade"))
    assert program(attention=str(own)) is not before
    programs.forget()


@pytest.mark.full
def test_only_the_last_are_kept(folder, tmp_path, monkeypatch):
    programs.forget()
    monkeypatch.setattr(programs, "MOST", 3)
    of = lambda dim: jobs.prepare(tiny(str(folder / "uneven.py"), tmp_path, dim=dim), tmp_path).program
    first, second = of(2), of(4)
    for dim in range(6, 2 * programs.MOST + 4, 2):
        assert of(2) is first  # used, so it is none of the oldest
        of(dim)
    assert of(2) is first and of(4) is not second
    programs.forget()


@pytest.mark.full
@pytest.mark.parametrize(
    "changes", [{"layout": "pmap"}, {"layout": "pmap", "ema": 0.9}, {"layout": "experts", "ffn": "moe"}], ids=str
)
def test_other_layouts_share_too(folder, tmp_path, compilations, changes):
    base = tiny(str(folder / "uneven.py"), tmp_path, **changes)
    loop.run(base)
    loop.run(edit(base, seed=1, lr=0.1))
    assert len(compilations) == 1


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.9}, {"remat": "full"}, {"accumulate": 2}, {"ema": 0.9, "remat": "dots", "accumulate": 2}],
    ids=str,
)
def test_no_step_compiles_again(folder, tmp_path, compilations, backend, monkeypatch, changes):
    """Whatever it is given: the state that a run begins with, one that a step gave, and one that was scored meanwhile;
    every step uses up the state that it is given."""
    config = tiny(str(folder / "uneven.py"), tmp_path, steps=5, eval_every=2, dropout=0.1, **changes)
    compiled_by, dispatch = [], loop.Log.dispatched

    def dispatched(log, **options):
        compiled_by.append(len(backend))
        return dispatch(log, **options)

    monkeypatch.setattr(loop.Log, "dispatched", dispatched)
    loop.run(config)
    # The evaluation compiles after step 2.
    first, second, third, *rest = compiled_by
    assert len(compilations) == 1 and first == second and set(rest) == {third}
    job = jobs.prepare(config, tmp_path)
    state = job.layout.place_state(init(config, job.task, job.tx))
    job.compiled(state).step(state, job.training_batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt, state.average)))


@pytest.mark.full
def test_the_structure_of_a_mechanism_does_not_depend_on_the_seed(tmp_path):
    """So that its seeds share a program."""
    for name in sorted(
        path.stem for path in pathlib.Path(configs.spec.__file__).with_name("attention").glob("[a-z]*.py")
    ):
        config = edit(configs.Config(), task="copy", attention=name, seq_len=33, dim=16)
        one, other = (structure(each, build_task(each)) for each in (config, edit(config, seed=1)))
        assert one == other and hash(one) == hash(other), name
