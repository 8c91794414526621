"""This laboratory's side of the duels: mechanisms as a model runs them, heads and batch mapped by the lab."""

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab import config as configs
from xformers_lab import cpu_speed, spec
from xformers_lab.model import build_task, gru, lstm
from xformers_lab.nn.size import Size
from xformers_lab.train import optimizer
from xformers_lab.train.layout import compile_train_step, layout_of
from xformers_lab.train.state import init, structure

cpu_speed.keep_memory()  # as every command does


def case(name: str, **options):
    return globals()[name](**options)


def attention(**options):
    return attention_program(**options)[1]


def attention_program(choice="full", N=8, T=1024, H=64, B=1, causal=False, grad=False, dtype="float32"):
    """Forward of `mix`, or forward and backward against a fixed cotangent, on (B, N, T, H): compiled, and its run.

    Both sides get the layout they like best: torch's kernels take (B, N, T, H), and so does the lab's loop over heads.
    """
    mechanism = spec.build("attention", choice, length=T, dim=N * H, heads=N)
    q, k, v, cotangent = (jax.random.normal(key, (B, N, T, H), dtype) for key in jax.random.split(jax.random.key(0), 4))
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    forward = lambda q, k, v: swap(mechanism.mix(swap(q), swap(k), swap(v), causal=causal)[0])
    both = lambda q, k, v: jax.vjp(forward, q, k, v)[1](cotangent)
    program = jax.jit(both if grad else forward).lower(q, k, v).compile()
    return program, lambda: jax.block_until_ready(program(q, k, v))


def layer(choice="full", T=4096, D=512, N=8, B=1, grad=False):
    """A mechanism with its projections on (B, T, D); backward to the input and every parameter."""
    mechanism = spec.build("attention", choice, length=T, dim=D, heads=N)
    graph, params, rest = nnx.split(mechanism, nnx.Param, ...)
    x, cotangent = (jax.random.normal(key, (B, T, D)) for key in jax.random.split(jax.random.key(0)))
    # What is drawn in training is drawn here too.
    key = jax.random.key(1) if grad else None
    # A copy of what is not trained: a mechanism may write to it, and the two passes below are two traces.
    forward = lambda params, x: nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))(x, key=key)[0]
    both = lambda params, x: jax.vjp(forward, params, x)[1](cotangent)
    run = jax.jit(both if grad else forward)
    return lambda: jax.block_until_ready(run(params, x))


def matmul(n=2048):
    a = jnp.ones((n, n))
    run = jax.jit(lambda a: a @ a)
    return lambda: run(a).block_until_ready()


def train_step(**options):
    return train_step_program(**options)[1]


def train_step_program(layers=4, dim=256, heads=4, T=512, B=8):
    """One step of the product's own trainer (AdamW, clipped) on bytes, as `xlab train` runs it: compiled, and a run."""
    config = configs.edit(
        configs.Config(), task="lm", layers=layers, dim=dim, heads=heads, seq_len=T, batch=B, attention="full"
    )
    task = build_task(config)
    layout = layout_of(config, task)
    tx = optimizer.of(config, task)
    batch = task.batch("train", 0)
    state = layout.place_state(init(config, task, tx))
    step = compile_train_step(config, task, structure(config, task), tx, layout, state, batch).step

    def run():
        nonlocal state
        state, metrics = step(state, layout.place_batch(batch))
        return float(metrics["loss"])

    return step, run


def recurrent(kind="lstm", layers=1, B=32, T=128, D=256, grad=False):
    """A stack of cells on (B, T, D), as the baselines run it; backward to the input and every parameter."""
    cell = {"lstm": lstm.Cell, "gru": gru.Cell}[kind]
    stack = nnx.List([cell(Size(T, D, 1), nnx.Rngs(layer)) for layer in range(layers)])
    graph, params = nnx.split(stack)
    x, cotangent = (jax.random.normal(key, (B, T, D)) for key in jax.random.split(jax.random.key(0)))

    def forward(params, x):
        for layer in nnx.merge(graph, params):
            x = layer(x, None)
        return x

    both = lambda params, x: jax.vjp(forward, params, x)[1](cotangent)
    run = jax.jit(both if grad else forward)
    return lambda: jax.block_until_ready(run(params, x))
