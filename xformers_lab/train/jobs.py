"""What a config stands for: its task, model, optimizer, layout over the devices, and compiled programs."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable

import jax
import optax
from flax import nnx

from xformers_lab import config as configs
from xformers_lab.config import Config, edit
from xformers_lab.errors import UsageError
from xformers_lab.model import build_task
from xformers_lab.tasks import Batch, Task
from xformers_lab.train import optimizer, prefetch, programs, selection
from xformers_lab.train.layout import Compiled, Layout, compile_train_step, layout_of
from xformers_lab.train.state import TrainState, abstract, merge, shapes

_HOW_READ = "reading"  # of what a task says of its data


def prepare(config: Config, run_dir: pathlib.Path, place: Callable[[Config, Task], Layout] = layout_of) -> "Job":
    """All that a run needs but its state, on the devices that `place` gives it; raises UsageError where its layout over
    them cannot be."""
    configs.refuse_selection(config)
    configs.refuse_schedule(config)
    configs.refuse_heads(config)
    task = build_task(config)
    layout = place(config, task)
    parts = shapes(config, task)
    graph, *_, memory = parts
    segments = bool(jax.tree.leaves(memory))
    if segments and config.train.layout == "pmap":
        raise UsageError(
            "layout=pmap keeps the whole state on every device, what it remembers of texts too: layout=data"
        )
    details = {
        "config": configs.decisive(config),
        "data": json.loads(json.dumps(identifying(task.describe()), default=str)),
        "tokenizer": task.tokenizer,
    }
    about = {"config": configs.identity(config), "data": fingerprint(task), "details": details}
    return Job(
        config,
        run_dir,
        task,
        graph,
        optimizer.build(config.train, optimizer.roles(merge(*parts))),
        layout,
        about,
        segments,
        functools.cache(lambda batch: build_task(edit(config, batch=batch, data_seed=0))),
    )


def identifying(described: dict) -> dict:
    """What tells data from others, of what a task says of them: all but how they were read."""
    return {key: value for key, value in described.items() if key != _HOW_READ}


def fingerprint(task: Task) -> str:
    text = json.dumps(identifying(task.describe()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a config stands for: everything that does not change while it trains.

    segments: whether batches follow one another, for what the model remembers to carry over; rebuilt: the task with
    another size of batch, and data_seed=0.
    """

    config: Config
    run_dir: pathlib.Path
    task: Task
    graph: nnx.GraphDef
    tx: optax.GradientTransformation
    layout: Layout
    about: dict
    segments: bool
    rebuilt: Callable[[int], Task]

    @functools.cached_property
    def first_batch(self) -> Batch:
        """That of the first step, on the host."""
        return prefetch.checked(self.task, "train", 0, self.segments)

    @functools.cached_property
    def program(self) -> programs.Program:
        return programs.of(self.config, self.task, self.graph, self.layout, self.first_batch)

    def compiled(self, state: TrainState) -> Compiled:
        """The step of training, for states like this one."""
        step = (self.config, self.task, self.graph, self.tx, self.layout, state, self.first_batch)
        return self.program.trained(lambda: compile_train_step(*step))

    def target(self) -> TrainState | selection.Kept:
        """What a checkpoint holds, in shapes."""
        state = self.layout.abstract_state(abstract(self.config, self.task, self.tx))
        best = selection.Best(state.params, state.extra, state.step)
        return selection.kept(state, best if self.config.train.select == "best" else None)

    def training_batch(self, step: int) -> Batch:
        return self.layout.place_batch(prefetch.checked(self.task, "train", step, self.segments))
