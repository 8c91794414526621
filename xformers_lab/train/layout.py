"""How a step runs over the devices: `jit` over a mesh, `pmap`, or `experts`. All share the batch out. jit and pmap keep
the state whole on every device; experts, which is jit otherwise, shares out an ffn's networks, and with them all that
the optimizer keeps of them.

All compile ahead of time, so that compile time is measured apart and the memory of the compiled program is known.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xformers_lab.config import Config
from xformers_lab.errors import UsageError
from xformers_lab.ffn import EXPERT, Bank
from xformers_lab.model import build_model
from xformers_lab.tasks import Batch, Task
from xformers_lab.train.state import TrainState
from xformers_lab.train.step import make_eval_step, make_train_step

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where arrays live, for one config on the devices of this process.

    banks: the paths of the parameters that are shared out over the axis EXPERT of the mesh."""

    kind: str
    mesh: Mesh
    banks: frozenset[tuple] = frozenset()

    def on(self, *axes: Any) -> NamedSharding:
        """The mesh axes that share out the leading axes of an array."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def whole(self) -> NamedSharding:
        """Every device holds all of it."""
        return self.on()

    @property
    def shared(self) -> NamedSharding:
        """The leading axis is shared out over the devices."""
        return self.on(self.mesh.axis_names)

    @property
    def of_memory(self) -> NamedSharding:
        """Memory, (L, B, ...), lives with the batch."""
        return self.on(None, self.mesh.axis_names)

    def of_state(self, state: TrainState) -> TrainState:
        """Where each array of a train state lives: memory with the batch, banks and the optimizer's moments of them,
        whose paths end in the bank's, by expert, all else on every device."""

        def place(path, leaf):
            keys = keys_of(path)
            shared = any(keys[-len(bank) :] == bank for bank in self.banks)
            return self.on(*[None] * (leaf.ndim - 3), EXPERT) if shared else self.whole

        places = jax.tree_util.tree_map_with_path(place, state)
        return dataclasses.replace(places, memory=jax.tree.map(lambda leaf: self.of_memory, state.memory))

    def in_use(self) -> contextlib.AbstractContextManager:
        """What a model is traced in: what has a partition of its own asks for the mesh."""
        alone = self.kind == "pmap" or self.mesh.size == 1
        return contextlib.nullcontext() if alone else jax.set_mesh(self.mesh)

    def place_state(self, state: TrainState) -> TrainState:
        """Copies, never aliases: the step donates its state, and the caller's arrays must outlive it. By way of the
        host, for between devices `may_alias=False` does not keep a replica from aliasing the original."""
        return jax.device_put(jax.device_get(state), self.of_state(state), may_alias=False)

    def shape_batch(self, batch: Batch) -> Batch:
        """(B, ...) as the step takes it: the same, or (devices, B / devices, ...) for pmap."""
        if self.kind != "pmap":
            return batch
        return jax.tree.map(lambda x: x.reshape(self.mesh.size, -1, *x.shape[1:]), batch)

    def place_batch(self, batch: Batch) -> Batch:
        """One whole batch of the host, (B, ...), onto the devices."""
        return jax.device_put(self.shape_batch(batch), self.shared)

    def abstract_state(self, state: TrainState) -> TrainState:
        """Shapes, types and places, as a checkpoint is restored to."""
        on = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        return jax.tree.map(on, state, self.of_state(state))


def keys_of(path: Sequence[Any]) -> tuple:
    """The keys of the dicts on a pytree path; None for a part that is none."""
    return tuple(getattr(part, "key", None) for part in path)


def layout_of(config: Config) -> Layout:
    """The layout over all devices; raises UsageError where the batch cannot be shared out equally. `sharing` makes the
    one of layout=experts of it, for that takes the model."""
    train, devices = config.train, jax.devices()
    if train.batch % (len(devices) * train.accumulate):
        parts = f" in accumulate={train.accumulate} parts" if train.accumulate > 1 else ""
        step = len(devices) * train.accumulate
        nearest = max(round(train.batch / step), 1) * step
        raise UsageError(
            f"batch={train.batch} cannot be shared out over {len(devices)} devices{parts}: "
            f"it must be divisible by {step}, such as batch={nearest}"
        )
    axes = {AXIS: len(devices)} if train.layout == "pmap" else {AXIS: len(devices), EXPERT: 1}
    return Layout(train.layout, mesh_of(devices, axes))


def mesh_of(devices: Any, axes: dict[str, int]) -> Mesh:
    """A mesh of devices, a sequence or an array of them, whose axes have these sizes, for XLA to partition over."""
    return Mesh(np.array(devices).reshape(*axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def sharing(layout: Layout, config: Config, task: Task) -> Layout:
    """layout=experts with as many devices on the axis of experts as divide both; any other layout as it is.

    The batch is shared out over both axes. Raises UsageError where there are no experts, or none to each device.
    """
    if layout.kind != "experts":
        return layout
    variables = nnx.state(nnx.eval_shape(lambda: build_model(config, task)), Bank)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(variables))
    if not leaves:
        raise UsageError(
            f"layout=experts shares out the experts of a feed-forward layer, but ffn={config.model.ffn} has none: "
            "use ffn=moe or layout=jit"
        )
    devices, counts = layout.mesh.size, sorted({leaf.shape[-3] for _, leaf in leaves})
    shards = math.gcd(devices, *counts)
    if shards == 1 < devices:
        raise UsageError(
            f"layout=experts cannot share out {' and '.join(map(str, counts))} experts over {devices} devices: give "
            f"ffn a number of experts that has a divisor in common with {devices}, such as {devices}, or use layout=jit"
        )
    mesh = mesh_of(layout.mesh.devices, {AXIS: devices // shards, EXPERT: shards})
    return Layout(layout.kind, mesh, frozenset(keys_of(path) for path, _ in leaves))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step for one shape of state and batch. compile_seconds: tracing, lowering and compiling.
    temp_bytes and peak_bytes: what the compiled program needs beside its arguments and results, and with them, on one
    device. flops: matrix products of the whole batch on one device, exact; None where a kernel hides its inside. More
    devices do a little more where an ffn has experts: each fills up its own blocks, and with layout=experts its rounds.
    """

    step: Callable[[TrainState, Batch], tuple[TrainState, dict]]
    compile_seconds: float
    temp_bytes: int
    peak_bytes: int
    flops: int | None


def compile_train_step(
    config: Config,
    task: Task,
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    layout: Layout,
    state: TrainState,
    batch: Batch,
) -> Compiled:
    """state and batch (of the host) may be arrays or ShapeDtypeStructs; state is donated at every call."""
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    state, batch = shapes(state), shapes(batch)
    shaped = jax.eval_shape(layout.shape_batch, batch)
    places = layout.of_state(state)
    began = time.perf_counter()
    # Counted on the global view, which pmap would show one device's share of, and outside of the mesh in use.
    counted = step = jax.jit(
        make_train_step(config, task, graph, tx),
        in_shardings=(places, layout.shared),
        out_shardings=(places, layout.whole),
        donate_argnums=0,
    )
    if layout.kind == "pmap":
        local = make_train_step(config, task, graph, tx, AXIS)
        step = jax.pmap(local, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0)
    with layout.in_use():
        compiled = step.lower(state, shaped).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say how much memory a program takes"
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        compiled,
        seconds,
        memory.temp_size_in_bytes,
        memory.temp_size_in_bytes + arguments,
        _flops(counted, state, batch),
    )


def compile_eval_step(task: Task, graph: nnx.GraphDef, layout: Layout) -> Callable[[TrainState, Batch], tuple]:
    """Compiled at its first call."""
    if layout.kind == "pmap":
        return jax.pmap(make_eval_step(task, graph, AXIS), axis_name=AXIS, in_axes=(None, 0), out_axes=None)
    # The arrays of a state are where `of_state` has them, which its shapes would have to tell.
    run = jax.jit(make_eval_step(task, graph), out_shardings=(layout.whole, layout.of_memory))

    def score(state: TrainState, batch: Batch) -> tuple:
        with layout.in_use():
            return run(state, batch)

    return score


def _flops(step: Callable, state: TrainState, batch: Batch) -> int | None:
    from xformers_lab.measure.flops import count_flops

    try:
        return count_flops(step, state, batch)
    except ValueError:
        return None
