"""What a worker does for a plan: looks whether a config can be on a target, and compiles one of its programs for it."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from xformers_lab import config as configs
from xformers_lab import hardware
from xformers_lab.attention._engine import kernels
from xformers_lab.config import Config
from xformers_lab.errors import Refused, UsageError, contained, ran_out_of_memory
from xformers_lab.layouts import PMAP
from xformers_lab.measure.compiling import compile_clock
from xformers_lab.measure.flops import count_flops
from xformers_lab.model import check_config
from xformers_lab.nn.platform import planned_for
from xformers_lab.plan import collectives, devices, exceeded, roofline
from xformers_lab.plan.rows import PREFILL, TRAIN
from xformers_lab.plan.target import Target
from xformers_lab.supervise.worker import Tell
from xformers_lab.tasks import Task
from xformers_lab.train import decoding, selection
from xformers_lab.train.jobs import Job, prepare
from xformers_lab.train.layout import Layout, jitted_train_step, plan
from xformers_lab.train.mesh import mesh_of
from xformers_lab.train.sizes import bytes_of, on_device
from xformers_lab.train.state import TrainState

GPU = ("cuda",)  # what JAX calls GPUs where it lowers for them


def look(tell: Tell, target: dict, config: dict, program: str) -> None:
    """Raises UsageError where a config cannot be planned for a target; nothing compiles."""
    chosen, where = configs.from_dict(config), Target(**target)
    tell.doing(f"checking the config of {chosen.model.attention} at {chosen.seq_len} tokens")
    with planned_for(where.platform):
        if chosen.train.layout == PMAP:
            raise UsageError(
                "layout=pmap runs one program on each of the devices that are there, and a plan has none: layout=data "
                "shares out the same"
            )
        _placed(where, chosen, check_config(chosen))
        if program != TRAIN:
            job, state = _prepared(where, chosen)
            try:
                decoding.state_bytes(chosen, job.graph, state)
            except Refused as reason:
                raise UsageError(str(reason)) from None


def measure(tell: Tell, target: dict, config: dict, program: str) -> dict:
    """The figures of one program of a config on a target, as `rows.plan` has them, or status and reason where it does
    not compile."""
    chosen, where = configs.from_dict(config), Target(**target)
    tell.doing(f"compiling {chosen.model.attention} at {chosen.seq_len} tokens for {where.name}")
    try:
        with planned_for(where.platform), contained():
            job, state = _prepared(where, chosen)
            subject = _training(job, state) if program == TRAIN else _decoding(where, job, state, program)
            with kernels.noted() as ran:
                row = _measured(where, job, subject)
            return row | {"kernel": kernels.joined(ran)}
    except UsageError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]
        return {"status": "oom" if ran_out_of_memory(error) else "failed", "reason": said}


@dataclasses.dataclass(frozen=True)
class Subject:
    """One program.

    lowered(platforms) lowers it, for others than its devices' where some are given. flops(): of all devices together.
    given: bytes of its arguments on one device, by what they are. tokens: how many it computes. spread: over how many
    devices its work is shared out."""

    lowered: Callable[[tuple[str, ...] | None], jax.stages.Lowered]
    flops: Callable[[], int]
    given: dict[str, int]
    tokens: int
    spread: int


def _placed(target: Target, config: Config, task: Task) -> Layout:
    """The layout of a config on the devices of a target; raises UsageError."""
    count = target.devices(config.train.layout)
    planned, found = plan(config, task, count), devices.of(target, count)
    return dataclasses.replace(planned, mesh=mesh_of(found, planned.mesh.shape)) if len(found) else planned


def _prepared(target: Target, config: Config) -> tuple[Job, TrainState]:
    job = prepare(config, configs.folder(config), lambda config, task: _placed(target, config, task))
    return job, selection.parted(job.target())[0]


def _training(job: Job, state: TrainState) -> Subject:
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    plain, batch = shapes(state), shapes(job.first_batch)
    step = jitted_train_step(job.config, job.task, job.graph, job.tx, job.layout, plain, batch)

    def lowered(platforms: tuple[str, ...] | None) -> jax.stages.Lowered:
        with job.layout.in_use():
            return step.trace(plain, batch).lower(lowering_platforms=platforms)

    placed = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), batch, job.layout.of_batch(batch)
    )
    given = {"parameters": on_device(state.params), "optimizer": on_device(state.opt)}
    given |= {"other": on_device((state.extra, state.memory, state.average, placed))}
    tokens = job.config.train.batch * job.config.seq_len
    # Outside of the mesh in use, as training counts it.
    return Subject(lowered, lambda: count_flops(step, plain, batch), given, tokens, job.layout.mesh.size)


def _decoding(target: Target, job: Job, state: TrainState, program: str) -> Subject:
    found = devices.of(target, 1)
    steps = decoding.steps(job.config, job.graph, state, SingleDeviceSharding(found[0]) if len(found) else None)
    given = {"parameters": bytes_of(steps.variables[0]), "other": bytes_of(steps.variables[1:])}
    if program == PREFILL:
        step, arguments, tokens = steps.prefill, (steps.variables,), job.config.seq_len
    else:
        step, arguments, tokens = steps.token, (steps.variables, steps.cache), 1
        given["cache"] = bytes_of(steps.cache)
    lowered = lambda platforms: step.trace(*arguments).lower(lowering_platforms=platforms)
    return Subject(lowered, lambda: count_flops(step, *arguments), given, tokens, 1)


def _measured(target: Target, job: Job, subject: Subject) -> dict:
    count, mesh = subject.spread, job.layout.mesh
    row: dict[str, Any] = {"devices": count, "memory": _memory(target, count), "bytes": dict(subject.given)}
    row["axes"] = {axis: size for axis, size in mesh.shape.items() if size > 1} if count == mesh.size else {}
    try:
        flops = subject.flops()
    except ValueError:  # a loop of unknown length, an opaque kernel: there is no figure
        flops = None
    row["flops_per_token"] = None if flops is None else flops / subject.tokens
    row["flops_per_device"] = None if flops is None else flops / subject.spread
    if target.platform == "gpu":
        began = time.perf_counter()
        subject.lowered(GPU)
        return row | {"lower_seconds": time.perf_counter() - began}
    given = sum(subject.given.values())
    if row["memory"] is not None and given > row["memory"]:
        return row | {"fits": False, "why": "what the program is given is more than that"}
    with compile_clock() as seconds:
        try:
            compiled = subject.lowered(None).compile()
        except Exception as error:
            if not ran_out_of_memory(error) or (needed := exceeded.needed(str(error), given)) is None:
                raise
            row["bytes"] |= {"activations": needed.activations, "total": needed.total}
            return row | {"fits": False, "why": needed.why, "compile_seconds": seconds()}
        row["compile_seconds"] = seconds()
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say how much memory a program takes"
    row["bytes"] |= _bytes(memory, given)
    row["fits"] = None if row["memory"] is None else row["bytes"]["total"] <= row["memory"]
    row["collectives"] = found = _collectives(compiled)
    moved = given + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
    row["estimate"] = roofline.estimate(
        target.peaks, job.config.model.dtype, row["flops_per_device"], moved, found, subject.tokens
    )
    return row


def _bytes(memory: Any, given: int) -> dict[str, int]:
    """Of one device, as the compiler has them: what is live within the step, results that take no argument's place, the
    program itself, and what arguments take beyond their numbers, for a TPU pads arrays."""
    parts = {
        "activations": memory.temp_size_in_bytes,
        "results": max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        "padding": max(memory.argument_size_in_bytes - given, 0),
        "program": memory.generated_code_size_in_bytes,
    }
    return parts | {"total": given + sum(parts.values())}


def _collectives(compiled: jax.stages.Compiled) -> list[dict] | None:
    """See `collectives.of`; None of a text that cannot be read, which is said and ends nothing."""
    try:
        return collectives.of(compiled.as_text() or "")
    except (ValueError, KeyError, IndexError) as error:
        logging.getLogger(__name__).warning("what devices exchange could not be read (%s)", error)
        return None


def _memory(target: Target, count: int) -> int | None:
    """Bytes of one device: as published, or its share of this machine's."""
    if target.platform == "cpu":
        memory = hardware.memory()
        return None if memory is None else memory // count
    return target.peaks.memory if target.peaks is not None else None
