"""How large a config is, before it trains: parameters by part, FLOPs of a token, bytes of training and of decoding.

Everything is counted or planned: the step of training is compiled for shapes alone, and nothing runs. What attention
has of parameters and FLOPs is that of its layers with their projections, cross-attention too.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from xformers_lab import config as configs
from xformers_lab import layouts
from xformers_lab.config import Config
from xformers_lab.errors import Refused
from xformers_lab.measure.flops import flops_by_scope
from xformers_lab.measure.kept import kept_by_scope
from xformers_lab.model import build_model, check_config
from xformers_lab.nn import backward
from xformers_lab.supervise.worker import Tell
from xformers_lab.tasks import Task
from xformers_lab.train import decoding, mesh, parts, selection, shaping, sharding
from xformers_lab.train.jobs import Job, prepare
from xformers_lab.train.layout import layout_of, plan
from xformers_lab.train.state import merge
from xformers_lab.train.step import make_eval_step, make_objective, make_train_step

LAYERS = ("attention", "ffn")  # parts that every layer has, which the model runs under these scopes


def of(config: Config) -> dict:
    """The sizes of a config, as JSON has them.

    parameters: total, and parts with their own; flops_per_token: forward and training, each with its total and its
    parts (None where a kernel hides its inside); training_bytes: parameters, gradients, optimizer, average (of the
    parameters, with ema), other (what else the state holds), activations (temporary buffers of the compiled step beside
    the gradients) and total, on each device; activations and total are None where the layout is for another number of
    devices than are here; decoding_bytes: parameters, cache (what decoding keeps of seq_len tokens of the whole batch)
    and total, or why_not.
    kept_bytes: total, and parts, of the arrays that wait for the backward pass, as differentiation asks for them (see
    `measure.kept`), on all devices together; of one of the parts where a step has several (accumulate). layout:
    devices, here (how many there are), axes with their sizes, and parameters, how each of them lies, see
    `sharding.groups`. batch, seq_len and layers are the config's.

    Raises UsageError where the config cannot be.
    """
    task, here = check_config(config), len(jax.devices())
    devices = layouts.devices_of(config.train.layout, here)
    planned = lambda config, task: layout_of(config, task) if devices == here else plan(config, task, devices)
    job = prepare(config, configs.folder(config), planned)
    state, _ = selection.parted(job.target())
    parameters, kept = on_device(state.params), on_device((state.extra, state.memory))
    training: dict = {"parameters": parameters, "gradients": parameters, "optimizer": on_device(state.opt)}
    training |= {"average": on_device(state.average), "other": kept, "activations": None, "total": None}
    if devices == here:
        training["activations"] = max(job.compiled(state).temp_bytes - parameters, 0)
        training["total"] = sum(size for size in training.values() if size is not None)
    return {
        "layers": config.model.layers,
        "seq_len": config.seq_len,
        "batch": config.train.batch,
        "parameters": _parameters(config, task),
        "flops_per_token": _flops(job, state),
        "training_bytes": training,
        "kept_bytes": _kept(job, state),
        "decoding_bytes": _decoding(job, state, bytes_of(state.params)),
        "layout": _layout(job, devices, here),
    }


def measure(tell: Tell, config: dict) -> dict:
    """`of`, as a worker does it."""
    tell.doing("compiling")
    return of(configs.from_dict(config))


def _parameters(config: Config, task: Task) -> dict:
    counted = parts.parameters(nnx.eval_shape(lambda: build_model(config, task)))
    return {"total": sum(counted.values()), "parts": counted}


def _flops(job: Job, state: Any) -> dict:
    """Of a token, forward and in training."""
    config, tokens = job.config, job.config.train.batch * job.config.seq_len
    passes = {
        "forward": make_eval_step(job.task, job.graph),
        "training": make_train_step(config, job.task, job.graph, job.tx),
    }
    plain = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    arguments = plain(state), plain(job.first_batch)
    counted = {}
    for name, step in passes.items():
        try:
            parts = flops_by_scope(step, *arguments, scopes=LAYERS)
        except ValueError:
            counted[name] = None
            continue
        each = {part: flops / tokens for part, flops in parts.items()}
        counted[name] = {"total": sum(parts.values()) / tokens, "parts": each}
    return counted


def _kept(job: Job, state: Any) -> dict:
    """What attention and the others make for the backward pass."""
    train = job.config.train
    objective, count = make_objective(job.task, job.graph, shaping.of(train)), train.accumulate
    first = lambda x: x[: x.shape[0] // count]
    of_memory = lambda x: x[:, : x.shape[1] // count]

    def loss(params, extra, memory, batch, key):
        memory, batch = jax.tree.map(of_memory, memory), jax.tree.map(first, batch)
        statistics = backward.values(merge(job.graph, params, extra, memory))
        return objective(params, statistics, extra, memory, batch, key)[0]

    plain = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    given = plain((state.params, state.extra, state.memory, job.first_batch))
    parts = kept_by_scope(loss, *given, jax.eval_shape(lambda: jax.random.key(0)), scopes=LAYERS)
    return {"total": sum(parts.values()), "parts": parts}


def _decoding(job: Job, state: Any, parameters: int) -> dict:
    try:
        cache = decoding.state_bytes(job.config, job.graph, state)
    except Refused as reason:
        return {"why_not": str(reason)}
    return {"parameters": parameters, "cache": cache, "total": parameters + cache}


def _layout(job: Job, devices: int, here: int) -> dict:
    """How the parameters of a job lie on its devices."""
    sizes, parameters, specs = mesh.divided(job.config, job.task, devices)
    rows = list(sharding.groups(parameters, specs, sizes))
    axes = {axis: size for axis, size in sizes.items() if size > 1}
    return {"devices": devices, "here": here, "axes": axes, "parameters": rows}


def on_device(tree: Any) -> int:
    """Bytes on one device, of shapes with the places that they have."""
    piece = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape))
    leaves = (leaf for leaf in jax.tree.leaves(tree) if _is_plain(leaf))
    return sum(piece(leaf) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def bytes_of(tree: Any) -> int:
    """Bytes of shapes in all."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree) if _is_plain(leaf))


def _is_plain(leaf: Any) -> bool:
    return not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
