"""One optimizer step and one evaluation: pure functions of arrays that `jax.jit` over a mesh and `jax.pmap` run."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xformers_lab import optimizer
from xformers_lab.config import Config
from xformers_lab.errors import UsageError
from xformers_lab.model import Model
from xformers_lab.nn import backward
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.later import later
from xformers_lab.tasks import Batch, Task
from xformers_lab.train import shaping
from xformers_lab.train.curvature import Estimator, OfPart
from xformers_lab.train.state import TrainState, begun, merge, split

# What a line of metrics.jsonl says of every step.
RESERVED = {"step", "loss", "total", "weight", "grad_norm", "ok", "seconds", "skipped"}


def stream(seed: jax.Array | int, step: jax.Array | int, name: str) -> jax.Array:
    """The random key of one purpose at one step: nothing random is stored, so nothing random is lost."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), zlib.crc32(name.encode()))


def run(model: Model, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, Aux]:
    """The model on a batch, whose arrays are jax's here: a step traces them."""
    told: Any = model.given({"documents": batch.documents, "marked": batch.marked})
    return model(cast(jax.Array, batch.inputs), valid=cast("jax.Array | None", batch.valid), key=key, **told)


def make_objective(
    task: Task, graph: nnx.GraphDef, shape: shaping.Shaping | None = None
) -> Callable[..., tuple[jax.Array, Any]]:
    """-> objective(params, statistics, extra, memory, batch, key) -> what a step differentiates by params and
    statistics, (the new extra and memory, sums over the batch). shape: what the loss has beyond the task's."""

    def objective(params, statistics, extra, memory, batch: Batch, key):
        model = merge(graph, params, extra, memory)
        nnx.update(model, statistics)
        logits, aux = run(model, batch, key)
        loss, weight = task.loss(logits, batch)
        sums = jax.tree.map(lambda value: value * weight, Aux(losses=aux.losses, scalars=aux.scalars))
        predicted = {name: share * task.loss(more, batch)[0] for name, (share, more) in aux.predictions.items()}
        for name, (share, states) in aux.ahead.items():
            losses = loss_ahead(task, model, states, batch)
            predicted |= {f"{name}{place}": share * each for place, each in enumerate(losses, 2)}
        sums |= Aux(losses=predicted)
        total = loss + sum(sums.losses.values())
        total = total if shape is None else total + shape(logits, batch)
        reported = sums.metrics()
        if taken := RESERVED & reported.keys():
            raise UsageError(f'the model reports "{min(taken)}", which metrics have of every step: choose another name')
        totals = {"total": total} if sums.losses or shape is not None else {}
        seeded = total + backward.surrogate_loss(statistics, backward.values(model))
        return seeded, (split(model)[2:], {"loss": loss, "weight": weight} | totals | reported)

    return objective


def loss_ahead(task: Task, model: Model, states: jax.Array, batch: Batch) -> jax.Array:
    """(heads,) the sums over the batch of the losses of heads, of whose states (heads, B, T, D) the model predicts the
    target 1, 2, ... places behind each position. Where none is there, or it is another document's, none is asked for.

    One head after the other, and each anew in the backward pass, so that the logits of one alone are in memory
    (Gloeckle et al., 2024, arXiv 2404.19737, section 2).
    """
    targets, weights = jnp.asarray(batch.targets), jnp.asarray(batch.weights)
    asked = [(later(targets, places), later(weights, places)) for places in range(1, len(states) + 1)]
    if batch.documents is not None:
        # From 1 on: what stands behind the end is of none.
        documents = jnp.asarray(batch.documents) + 1
        own = [later(documents, places) == documents for places in range(1, len(states) + 1)]
        asked = [(targets, weights * same) for (targets, weights), same in zip(asked, own, strict=True)]

    predict = cast(Any, model).predict

    def one(_, head):
        states, (targets, weights) = head
        return None, task.loss(predict(states), dataclasses.replace(batch, targets=targets, weights=weights))[0]

    stacked = jax.tree.map(lambda *heads: jnp.stack(heads), *asked)
    return jax.lax.scan(jax.checkpoint(one, prevent_cse=False), None, (states, stacked))[1]


def make_train_step(
    config: Config, task: Task, graph: nnx.GraphDef, tx: optax.GradientTransformation, axis: str | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """-> train_step(state, batch) -> (state, metrics).

    batch is the whole batch, or under pmap this device's part of it, and `axis` then names the devices. The loss is the
    weighted mean over the whole batch, however it is split over devices or `accumulate` parts: sums are added up and
    divided once. Auxiliary losses and scalars are the mean of the parts', each weighted as its targets are. In the
    metrics "loss" is the task's alone, as an evaluation has it; "total" is what was minimised, where that is more; the
    auxiliaries stand there as `Aux.metrics` names them, the weighted loss of each further prediction among the losses.
    A step whose loss or gradient is not finite, or that would leave a value that is not, changes nothing but `step` and
    `skipped`; texts that begin with it have begun all the same.
    """

    update = optax.with_extra_args_support(tx).update
    objective = make_objective(task, graph, shaping.of(config.train))

    def part(params, extra, memory, batch: Batch, key):
        statistics = backward.values(merge(graph, params, extra, memory))
        differentiate = jax.grad(objective, argnums=(0, 1), has_aux=True)
        (grads, statistics), ((extra, memory), sums) = differentiate(params, statistics, extra, memory, batch, key)
        model = merge(graph, params, extra, memory)
        nnx.update(model, statistics)
        return *split(model)[2:], (grads, sums)

    def training_loss(params, extra, memory, batch: Batch, key):
        return objective(params, backward.values(merge(graph, params, extra, memory)), extra, memory, batch, key)[0]

    def answer(params, extra, memory, batch: Batch, key):
        return run(merge(graph, params, extra, memory), batch, key)[0]

    def curvature_of(state: TrainState, before: Any, batch: Batch, key: jax.Array, weight: jax.Array) -> Estimator:
        """What an update rule may ask for; a pass of its own, of which no other trace is left."""

        def over_batch(of_part: OfPart) -> Any:
            part = lambda extra, *of_batch: (extra, of_batch[0], of_part(extra, *of_batch))
            sums = in_parts(part, state.extra, before, batch, key, config.train.accumulate)[2]
            return sums if axis is None else jax.lax.psum(sums, axis)

        drawn = stream(state.seed, state.step, "curvature")
        return Estimator(task, training_loss, answer, over_batch, state.params, weight, drawn)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        key = stream(state.seed, state.step, "dropout")
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        before = begun(state.memory, batch.fresh)
        of_part = functools.partial(part, state.params)
        extra, memory, sums = in_parts(of_part, state.extra, before, batch, key, config.train.accumulate)
        if axis is not None:
            sums, extra = jax.lax.psum(sums, axis), agree(extra, axis)
        grads, sums = sums
        weight = jnp.maximum(sums.pop("weight"), jnp.finfo(jnp.float32).tiny)
        grads, metrics = jax.tree.map(lambda total: total / weight, (grads, sums))
        norm = optax.tree.norm(grads)
        curved = curvature_of(state, before, batch, key, weight)
        updates, opt = update(grads, state.opt, state.params, rates=state.rates, curvature=curved)
        params = optax.apply_updates(state.params, updates)
        rate, applied = None if state.rates is None else state.rates.ema, state.step + 1 - state.skipped
        average = optimizer.scored(opt, params)
        average = average if rate is None else averaged(state.average, params, rate, applied)
        after = params, extra, memory, opt, average
        ok = jnp.isfinite(metrics.get("total", metrics["loss"])) & jnp.isfinite(norm) & all_finite(after)
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(ok, new, old))
        was = state.params, state.extra, before, state.opt, state.average
        params, extra, memory, opt, average = keep(after, was)
        counts = state.step + 1, state.skipped + ~ok
        state = TrainState(params, extra, memory, opt, *counts, state.seed, state.rates, average)
        return state, metrics | {"grad_norm": norm, "ok": ok}

    return train_step


def averaged(average: Any, params: Any, rate: jax.Array, applied: jax.Array) -> Any:
    """The moving average after the step that gave `params`, the `applied`-th (from 1) that was not skipped: the weights
    of steps t = 1, ... n are in proportion to rate^(n - t) and add up to 1.

    That is m_n = rate m_(n-1) + (1 - rate) params, m_0 = 0, divided by 1 - rate^n (Kingma and Ba, 2015, arXiv
    1412.6980, section 3), kept as the quotient: what the first parameters were leaves no trace.
    """
    share = jnp.minimum((1 - rate) / -jnp.expm1(applied * jnp.log(rate)), 1)
    return jax.tree.map(lambda old, new: ((1 - share) * old + share * new).astype(old.dtype), average, params)


def all_finite(tree: Any) -> jax.Array:
    """Whether every number in a tree is finite."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, (jnp.isfinite(leaf).all() for leaf in floats), jnp.array(True))


def in_parts(part: Callable, extra: Any, memory: Any, batch: Batch, key: jax.Array, count: int) -> tuple[Any, Any, Any]:
    """Run part(extra, memory, batch, key) -> (extra, memory, sums) on `count` equal parts, one after the other
    -> extra, memory, added sums."""
    if count == 1:
        return part(extra, memory, batch, key)
    # Sample i goes to part i % count: a batch axis that is split over devices stays so within each part.
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    apart = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, count, *x.shape[2:]), 2, 0)
    memories = jax.tree.map(apart, memory)

    def add(carry, of_part):
        extra, total = carry
        extra, memory, sums = part(extra, *of_part)
        return (extra, jax.tree.map(jnp.add, total, sums)), memory

    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    sums = jax.eval_shape(part, extra, first(memories), first(parts), key)[2]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    keys = jax.random.split(key, count)
    (extra, sums), memories = jax.lax.scan(add, (extra, zeros), (memories, parts, keys))
    return extra, jax.tree.map(lambda x, like: jnp.moveaxis(x, 0, 2).reshape(like.shape), memories, memory), sums


def agree(extra: Any, axis: str) -> Any:
    """One value of the non-parameter variables for all devices: the mean of floats, the largest of everything else."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: jax.lax.pmean(x, axis) if floating(x) else jax.lax.pmax(x, axis), extra)


def make_eval_step(task: Task, graph: nnx.GraphDef, axis: str | None = None) -> Callable[[TrainState, Batch], tuple]:
    """-> eval_step(state, batch) -> {"loss": (sum, weight), "metric": (sum, weight)}, under "scalars" the same of each
    auxiliary scalar, under "tokens" of each figure of tokens for each position, (T,), under "moments" those of the
    metric over examples (see `moments_of`), and where the metric is accuracy under "said" the likeliest answers, shaped
    like the targets; and the state's memory after the batch. Without randomness or other change.
    Rows that are not `counted` leave no trace, but in a scalar that is no mean over tokens."""

    def eval_step(state: TrainState, batch: Batch) -> tuple[dict, Any]:
        model = merge(graph, state.params, state.extra, begun(state.memory, batch.fresh))
        logits, aux = run(model, batch)
        each = jax.vmap(lambda logits, row: task.metric(*jax.tree.map(lambda x: x[None], (logits, row))))(logits, batch)
        sums: dict[str, Any] = {"loss": task.loss(logits, batch), "metric": tuple(part.sum() for part in each)}
        sums["moments"] = moments_of(*each, batch.inputs.shape[1])
        weight = sums["loss"][1]
        sums["scalars"] = {name: (value * weight, weight) for name, value in aux.scalars.items()}
        sums["tokens"] = {name: _known(values, batch.counted) for name, values in aux.tokens.items()}
        sums["scalars"] |= {name: (total.sum(), count.sum()) for name, (total, count) in sums["tokens"].items()}
        sums = sums if axis is None else jax.lax.psum(sums, axis)
        if task.metric_name == "accuracy":
            said = logits.argmax(-1)
            sums["said"] = said if axis is None else jax.lax.all_gather(said, axis, tiled=True)
        return sums, split(model)[3]

    return eval_step


def moments_of(sums: jax.Array, weights: jax.Array, length: int) -> tuple[jax.Array, ...]:
    """Of the metric's sums s (B,) and their weights w (B,), one of each example, both divided by the length so that
    squares stay small: how many w are not 0, and the sums of s, w, ss, sw and ww."""
    s, w = sums / length, weights / length
    return (w != 0).sum(), s.sum(), w.sum(), (s * s).sum(), (s * w).sum(), (w * w).sum()


def _known(values: jax.Array, counted: Any) -> tuple[jax.Array, jax.Array]:
    """The sum over the batch of figures of tokens (B, T), NaN where there is none, and how many they are, both (T,)."""
    known = ~jnp.isnan(values)
    known = known if counted is None else known & jnp.asarray(counted)[:, None]
    return jnp.where(known, values, 0).sum(0), known.sum(0)
