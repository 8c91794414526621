"""A small model trained, and a mechanism benched, by what `xlab train` and `xlab bench` run."""

import math
from collections.abc import Callable

import jax
import numpy as np

from xformers_lab.bench import cells as bench
from xformers_lab.check.subject import Broken
from xformers_lab.config import Config, edit
from xformers_lab.measure import speed
from xformers_lab.model import build_task
from xformers_lab.train import optimizer, prefetch
from xformers_lab.train.layout import compile_train_step, layout_of
from xformers_lab.train.state import TrainState, init, structure
from xformers_lab.train.step import make_train_step

from .cheap import quick_jit
from .results import repeats, sound

# Of a parameter's gradients, relative to their largest: the two programs add up in another order. Arrays whose
# gradients are all this much smaller than the model's largest are rounding.
SAME, NOTHING = 1e-4, 1e-5


def losses(config: Config, report: Callable[[str], None]) -> list[float]:
    """Of every step of training; raises Broken.

    The first step must repeat itself bit by bit when it is run twice, and its gradients must be those of the same step
    compiled cheaply.
    """
    report("building the model")
    task = build_task(config)
    tx = optimizer.of(config, task)
    graph, start = structure(config, task), init(config, task, tx)
    layout = layout_of(config, task)
    segments = bool(jax.tree.leaves(start.memory))
    batch_of = lambda step: prefetch.checked(task, "train", step, segments)
    report("compiling a training step")
    step = compile_train_step(config, task, graph, tx, layout, start, batch_of(0)).step
    assert isinstance(step, jax.stages.Compiled)
    sound(step, "a training step")
    state, seen = layout.place_state(start), []
    for number in range(config.train.steps):
        report(f"training, step {number + 1} of {config.train.steps}")
        state, metrics = step(state, layout.place_batch(batch_of(number)))
        seen.append(float(metrics["loss"]))
        if not bool(metrics["ok"]) or not math.isfinite(seen[-1]):
            raise Broken(f"the loss or its gradient is not finite in training step {number + 1}")
    report("running the first training step twice")
    first, second = (step(layout.place_state(start), layout.place_batch(batch_of(0))) for _ in range(2))
    repeats(first, second, "the first training step")
    report("running the first training step, compiled cheaply")
    _same_gradients(first[0], quick_jit(make_train_step(config, task, graph, tx))(start, batch_of(0))[0])
    return seen


def _same_gradients(state: TrainState, expected: TrainState) -> None:
    """Of the optimizer's first moments, which after one step are the gradients times a number."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(state.opt), jax.tree.leaves(expected.opt), strict=True)
    moments = {jax.tree_util.keystr(path): (np.asarray(x), np.asarray(y)) for (path, x), y in pairs}
    moments = {name.split(".mu")[1]: pair for name, pair in moments.items() if ".mu" in name}
    size = {name: float(np.abs(right).max(initial=0)) for name, (_, right) in moments.items()}
    for name, (fast, right) in moments.items():
        gap = np.abs(fast - right).max(initial=0)
        if not gap <= SAME * max(size[name], NOTHING / SAME * max(size.values())):
            raise Broken(
                f"the first training step: the gradient of {name} is off by {gap / max(size[name], 1e-30):.1%} of its "
                "largest entry from that of a cheap compilation"
            )


def bench_seconds(config: Config, report: Callable[[str], None]) -> float:
    """Of one forward and backward pass as `xlab bench` runs it; raises Broken where it is not finite.

    With the default batch: rows of all heads and samples together are then as many as make one kernel on CPU (FUSED of
    nn/plan.py).
    """
    report("compiling forward and backward as xlab bench does")
    subject = bench.subject(edit(config, batch=Config().train.batch), "forward+backward")
    compiled, _ = speed.compile_timed(subject.run, subject.params, *subject.shapes)
    sound(compiled, "forward and backward as xlab bench runs it")
    report("running forward and backward as xlab bench does")
    random = np.random.default_rng(0)
    arrays = jax.tree.map(lambda x: random.standard_normal(x.shape, np.float32).astype(x.dtype), subject.shapes)
    call = lambda: compiled(subject.params, *arrays)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(call())):
        raise Broken("forward and backward as xlab bench runs it: not finite")
    timing = speed.interleaved({"call": call}, rounds=1)["call"]
    if isinstance(timing, Exception):
        raise timing
    return timing.seconds_min
