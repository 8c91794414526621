"""This laboratory's side of the duels: mechanisms as a model runs them, heads and batch mapped by the lab."""

from typing import Any

import _gpt2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab import config as configs
from xformers_lab import cpu_speed, spec
from xformers_lab.bench import cells
from xformers_lab.generate import generate
from xformers_lab.model import build_model, build_task, gru, lstm
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


def of_bench(direction, choice, T=4096, N=8, D=256, B=8):
    """One pass of `xlab bench`; "read" is a sum over the state that its pass "decode" reads."""
    words = [f"attention={choice}", f"seq_len={T}", "model=decoder", f"heads={N}", f"dim={D}", f"batch={B}"]
    (config,), _ = configs.sweep(words)
    one = cells.subject(config, "decode" if direction == "read" else direction)
    if direction == "read":
        state = jax.tree.map(lambda shape: jnp.ones(shape.shape, shape.dtype), one.shapes[0])
        total = jax.jit(lambda state: sum(leaf.sum(dtype=jnp.float32) for leaf in jax.tree.leaves(state)))
        return lambda: total(state).block_until_ready()
    call = cells.caller(jax.jit(one.run, donate_argnums=(1,) if one.keeps else ()), one, {})
    return lambda: jax.block_until_ready(call())


def gpt2():
    """Greedy generation by the GPT-2 of _gpt2.py."""
    model, prompts = _gpt2_model(), _gpt2.prompts().tolist()
    return lambda: generate(model, prompts, new=_gpt2.NEW, length=_gpt2.LENGTH)


def gpt2_logits() -> list:
    """Its logits of the prompts."""
    return np.asarray(_gpt2_model()(jnp.asarray(_gpt2.prompts()))[0]).tolist()


def _gpt2_model():
    """It, as a decoder of choices on the shelves."""
    w, D = {name.removeprefix("transformer."): array for name, array in _gpt2.weights().items()}, _gpt2.DIM
    config = configs.edit(
        configs.Config(), task="lm", model="decoder:tied=true", attention="full", position="learned",
        norm="pre:normaliser=layernorm", ffn="mlp:activation=gelu", seq_len=_gpt2.LENGTH, layers=_gpt2.LAYERS, dim=D,
        heads=_gpt2.HEADS,
    )  # fmt: skip
    model: Any = build_model(config, build_task(config))
    layers = lambda name: np.stack([w[f"h.{layer}.{name}"] for layer in range(_gpt2.LAYERS)])

    def put(module, **arrays):
        for name, array in arrays.items():
            assert getattr(module, name).shape == array.shape, f"{name}: {getattr(module, name).shape}, {array.shape}"
            setattr(module, name, nnx.Param(jnp.asarray(array)))

    # Its embeddings are added as they are, not brought to one size (see nn/embedding.py).
    put(model.embedding, embedding=w["wte.weight"])
    put(model.position, table=w["wpe.weight"])
    model.embedding.share, model.embedding.scale, model.position.scale = 1.0, 1.5**0.5, 1.5**0.5
    block = model.stack.periods[0]
    for name, kernel in zip(("query", "key", "value"), np.split(layers("attn.c_attn.weight"), 3, -1), strict=True):
        put(getattr(block.attention, name), kernel=kernel)
    put(block.attention.out, kernel=layers("attn.c_proj.weight"))
    put(block.ffn.up, kernel=layers("mlp.c_fc.weight"), bias=layers("mlp.c_fc.bias"))
    put(block.ffn.down, kernel=layers("mlp.c_proj.weight"), bias=layers("mlp.c_proj.bias"))
    for norm in (block.attention_norm.norm, block.ffn_norm.norm, model.final.norm):
        norm.epsilon = 1e-5  # its scales are 1 and its shifts 0, as at the start
    return model
