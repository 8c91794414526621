"""How a step runs over the devices: `jit` over a mesh, or `pmap`; both share the batch out and keep the state whole.

Both compile ahead of time, so that compile time is measured apart and the compiled program can be asked for its memory.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xformers_lab.config import Config
from xformers_lab.errors import UsageError
from xformers_lab.tasks import Batch, Task
from xformers_lab.train.state import TrainState
from xformers_lab.train.step import make_eval_step, make_train_step

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where arrays live, for one config on the devices of this process."""

    kind: str
    mesh: Mesh

    @property
    def whole(self) -> NamedSharding:
        """Every device holds all of it."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def shared(self) -> NamedSharding:
        """The leading axis is shared out over the devices."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    @property
    def of_state(self) -> TrainState:
        """Where each part of a train state lives: memory, (L, B, ...), with the batch, all else on every device."""
        places: dict[str, Any] = {field.name: self.whole for field in dataclasses.fields(TrainState)}
        places["memory"] = NamedSharding(self.mesh, PartitionSpec(None, AXIS))
        return TrainState(**places)

    def place_state(self, state: TrainState) -> TrainState:
        """Copies, never aliases: the step donates its state, and the caller's arrays must outlive it. By way of the
        host, for between devices `may_alias=False` does not keep a replica from aliasing the original."""
        return jax.device_put(jax.device_get(state), self.of_state, may_alias=False)

    def shape_batch(self, batch: Batch) -> Batch:
        """(B, ...) as the step takes it: the same, or (devices, B / devices, ...) for pmap."""
        if self.kind == "jit":
            return batch
        return jax.tree.map(lambda x: x.reshape(self.mesh.size, -1, *x.shape[1:]), batch)

    def place_batch(self, batch: Batch) -> Batch:
        """One whole batch of the host, (B, ...), onto the devices."""
        return jax.device_put(self.shape_batch(batch), self.shared)

    def abstract_state(self, state: TrainState) -> TrainState:
        """Shapes, types and places, as a checkpoint is restored to."""
        on = lambda place, part: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), part)
        return jax.tree.map(on, self.of_state, state)


def layout_of(config: Config) -> Layout:
    """The layout over all devices; raises UsageError where the batch cannot be shared out equally."""
    train, devices = config.train, jax.devices()
    if train.batch % (len(devices) * train.accumulate):
        parts = f" in accumulate={train.accumulate} parts" if train.accumulate > 1 else ""
        step = len(devices) * train.accumulate
        nearest = max(round(train.batch / step), 1) * step
        raise UsageError(
            f"batch={train.batch} cannot be shared out over {len(devices)} devices{parts}: "
            f"it must be divisible by {step}, such as batch={nearest}"
        )
    return Layout(train.layout, Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,)))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step for one shape of state and batch. compile_seconds: tracing, lowering and compiling.
    temp_bytes and peak_bytes: what the compiled program needs beside its arguments and results, and with them, on one
    device. flops: matrix products of the whole batch, exact; None where a kernel hides its inside."""

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
    state,
    batch: Batch,
) -> Compiled:
    """state and batch (of the host) may be arrays or ShapeDtypeStructs; state is donated at every call."""
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    state, batch = shapes(state), shapes(batch)
    given = jax.eval_shape(layout.shape_batch, batch)
    began = time.perf_counter()
    # Counted on the global view, which pmap would show one device's share of.
    counted = step = jax.jit(
        make_train_step(config, task, graph, tx),
        in_shardings=(layout.of_state, layout.shared),
        out_shardings=(layout.of_state, layout.whole),
        donate_argnums=0,
    )
    if layout.kind == "pmap":
        local = make_train_step(config, task, graph, tx, AXIS)
        step = jax.pmap(local, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0)
    compiled = step.lower(state, given).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not tell a program's memory"
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
    given, found = (layout.of_state, layout.shared), (layout.whole, layout.of_state.memory)
    return jax.jit(make_eval_step(task, graph), in_shardings=given, out_shardings=found)


def _flops(step: Callable, state: TrainState, batch: Batch) -> int | None:
    from xformers_lab.measure.flops import count_flops

    try:
        return count_flops(step, state, batch)
    except ValueError:
        return None
