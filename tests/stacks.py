"""Small models of a depth, and their layers one by one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.config import Config, edit
from xformers_lab.model import build_model, build_task

SMALL = {"task": "copy", "seq_len": 12, "dim": 16, "heads": 2, "layers": 4, "batch": 3}


def model_of(depth: str, **changes) -> Any:
    config = edit(Config(), depth=depth, **(SMALL | changes))
    task = build_task(config)
    return build_model(config, task), jnp.asarray(task.batch("train", 0).inputs)


def layer(stacked, number: int):
    graph, variables = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[number], variables))


def halves(block, context):
    """The two sub-layers of a block of pre-normalisation, as functions of the residual stream."""
    attend = lambda x: block.attention(
        block.attention_norm.norm(x), valid=context.valid, causal=block.causal, position=context.position
    )[0]
    return attend, lambda x: block.ffn(block.ffn_norm.norm(x))[0]


def gradients(model, loss):
    """What `loss(model)` is and its gradient by every parameter."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    value, grads = jax.jit(jax.value_and_grad(lambda params: loss(nnx.merge(graph, params, rest))))(params)
    return value, nnx.to_pure_dict(grads)
