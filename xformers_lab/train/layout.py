"""How a step runs over the devices: one program over a mesh of axes, or `pmap`, a copy of it for each device.

Which axes there are is `xformers_lab/layouts.py`, how many devices each has `mesh.py`, where parameters lie on them
`sharding.py`; whatever else lies anywhere follows from these here. All compile ahead of time, so that compile time is
measured apart and the memory of the compiled program is known.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import optax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from xformers_lab.attention._engine import kernels
from xformers_lab.config import Config
from xformers_lab.errors import UsageError
from xformers_lab.layouts import AXES, DATA, PMAP, ROWS, SEQUENCE
from xformers_lab.measure.compiling import compile_clock
from xformers_lab.tasks import Batch, Task
from xformers_lab.train import hosts
from xformers_lab.train.mesh import divided, mesh_of
from xformers_lab.train.state import TrainState
from xformers_lab.train.step import make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where arrays live, for one config on devices, or on a mesh that is none of devices, where nothing is placed or
    compiled.

    shares: the paths of the parameters that are shared out, as keys of a pure dict, and how."""

    mesh: Mesh
    pmap: bool = False
    shares: tuple[tuple[tuple, PartitionSpec], ...] = ()

    def on(self, *axes: Any) -> NamedSharding:
        """The mesh axes that share out the leading axes of an array."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def whole(self) -> NamedSharding:
        """Every device holds all of it."""
        return self.on()

    @property
    def of_memory(self) -> NamedSharding:
        """Memory, (L, B, ...), lives with the batch."""
        return self.on(None, DATA if self.pmap else ROWS)

    def of_batch(self, batch: Batch) -> Batch:
        """Where each array of a batch as `shape_batch` gives it lives: its sequences over the axes that share these
        out, positions over `sequence`."""
        if self.pmap:
            return jax.tree.map(lambda leaf: self.on(DATA), batch)
        tokens = batch.inputs.shape[:2]
        place = lambda leaf: self.on(ROWS, SEQUENCE) if leaf.shape[:2] == tokens else self.on(ROWS)
        return jax.tree.map(place, batch)

    def of_state(self, state: TrainState) -> TrainState:
        """Where each array of a train state lives: memory with the batch, parameters as `shares` has them, and with
        them the moments of them that an optimizer keeps: what has a parameter's path in its own, and its shape. All
        else is on every device."""
        shares = dict(self.shares)
        shapes = {keys_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}

        def place(path, leaf):
            parts = _parts(keys_of(path))
            return self.on(*next((shares[part] for part in parts if part in shares and shapes[part] == leaf.shape), ()))

        places = jax.tree_util.tree_map_with_path(place, state)
        return dataclasses.replace(places, memory=jax.tree.map(lambda leaf: self.of_memory, state.memory))

    def in_use(self) -> contextlib.AbstractContextManager:
        """What a model is traced in: what has a partition of its own asks for the mesh."""
        if self.pmap or self.mesh.size == 1:
            return contextlib.nullcontext()
        if isinstance(self.mesh, AbstractMesh):
            return jax.sharding.use_abstract_mesh(self.mesh)
        return jax.set_mesh(self.mesh)

    def place_state(self, state: TrainState) -> TrainState:
        """Copies, never aliases: the step donates its state, and the caller's arrays must outlive it. By way of the
        host, for between devices `may_alias=False` does not keep a replica from aliasing the original."""
        return hosts.put(hosts.whole(state), self.of_state(state), may_alias=False)

    def shape_batch(self, batch: Batch) -> Batch:
        """(B, ...) as the step takes it: the same, or (devices, B / devices, ...) for pmap."""
        if not self.pmap:
            return batch
        return jax.tree.map(lambda x: x.reshape(self.mesh.size, -1, *x.shape[1:]), batch)

    def place_batch(self, batch: Batch) -> Batch:
        """One whole batch of the host, (B, ...), onto the devices."""
        shaped = self.shape_batch(batch)
        return hosts.put(shaped, self.of_batch(shaped))

    def abstract_state(self, state: TrainState) -> TrainState:
        """Shapes, types and places, as a checkpoint is restored to."""
        on = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        return jax.tree.map(on, state, self.of_state(state))


def keys_of(path: Sequence[Any]) -> tuple:
    """The keys of the dicts on a pytree path; None for a part that is none."""
    return tuple(getattr(part, "key", None) for part in path)


def _parts(keys: tuple) -> Iterator[tuple]:
    """Every run of keys that follow one another, those that begin first and go on longest before others."""
    for start in range(len(keys)):
        yield from (keys[start:end] for end in range(len(keys), start, -1))


def layout_of(config: Config, task: Task) -> Layout:
    """The layout of a config over all devices; raises UsageError, see `mesh.divided`."""
    devices = jax.devices()
    if config.train.layout == PMAP and hosts.several():
        raise UsageError("layout=pmap is of the devices of one process; use layout=data")
    planned = plan(config, task, len(devices))
    return dataclasses.replace(planned, mesh=mesh_of(devices, planned.mesh.shape))


def plan(config: Config, task: Task, devices: int) -> Layout:
    """The layout of a config over so many devices, whether or not they are there; raises UsageError."""
    sizes, parameters, specs = divided(config, task, devices)
    if config.train.layout == PMAP:
        return Layout(_abstract({DATA: devices}), pmap=True)
    shares = tuple((parameter.keys, where) for parameter, where in zip(parameters, specs, strict=True) if any(where))
    return Layout(_abstract(sizes), shares=shares)


def _abstract(sizes: Mapping[str, int]) -> Mesh:
    # Whatever asks a mesh for shapes takes this as well, though the types of JAX do not say so.
    kinds = (AxisType.Auto,) * len(sizes)
    return cast(Mesh, AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds))


def to_score(config: Config, task: Task) -> Layout:
    """The layout of a config where the devices here allow it, else one device, which a line says: what is only scored
    may be so elsewhere than it was trained."""
    try:
        return layout_of(config, task)
    except UsageError as error:
        logging.getLogger(__name__).warning("scored on one device: %s", error)
        return alone()


def alone() -> Layout:
    """Everything on one device, whatever the config."""
    return Layout(mesh_of(jax.local_devices()[:1], dict.fromkeys(AXES, 1)))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step for one shape of state and batch. compile_seconds: tracing, lowering and compiling. kernel: what
    runs attention over a pattern of positions, None where nothing of the kind runs.
    temp_bytes and peak_bytes: what the compiled program needs beside its arguments and results, and with them, on one
    device. flops: matrix products of the whole batch on one device, exact; None where a kernel hides its inside. More
    devices do a little more where an ffn has experts: each fills up its own blocks, and with layout=experts its rounds.
    """

    step: Callable[[TrainState, Batch], tuple[TrainState, dict]]
    compile_seconds: float
    kernel: str | None
    temp_bytes: int
    peak_bytes: int
    flops: int | None


def jitted_train_step(
    config: Config,
    task: Task,
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    layout: Layout,
    state: TrainState,
    batch: Batch,
) -> jax.stages.Wrapped:
    """The step over a mesh, not lowered yet. state: shapes; batch: as `shape_batch` gives it, in shapes."""
    places = layout.of_state(state)
    return jax.jit(
        make_train_step(config, task, graph, tx),
        in_shardings=(places, layout.of_batch(batch)),
        out_shardings=(places, layout.whole),
        donate_argnums=0,
    )


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
    # Counted on the global view, which pmap would show one device's share of, and outside of the mesh in use.
    counted = step = jitted_train_step(config, task, graph, tx, layout, state, shaped)
    if layout.pmap:
        local = make_train_step(config, task, graph, tx, DATA)
        step = jax.pmap(local, axis_name=DATA, in_axes=(None, 0), out_axes=None, donate_argnums=0)
    with layout.in_use(), compile_clock() as seconds, kernels.noted() as ran:
        compiled = step.lower(state, shaped).compile()
        compile_seconds = seconds()
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say how much memory a program takes"
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        compiled,
        compile_seconds,
        kernels.joined(ran),
        memory.temp_size_in_bytes,
        memory.temp_size_in_bytes + arguments,
        _flops(counted, state, batch),
    )


def compile_eval_step(task: Task, graph: nnx.GraphDef, layout: Layout) -> Callable[[TrainState, Batch], tuple]:
    """Compiled at its first call."""
    if layout.pmap:
        return jax.pmap(make_eval_step(task, graph, DATA), axis_name=DATA, in_axes=(None, 0), out_axes=None)
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
