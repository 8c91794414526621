"""Small models whose logits token by token are compared with those of the causal pass."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.config import Config, edit
from xformers_lab.model import build_model, build_task


def model_of(attention: str, **changes):
    small = {"seq_len": 20, "dim": 32, "heads": 4, "kv_heads": 2, "layers": 2, "batch": 2}
    config = edit(Config(), task="copy", attention=attention, **(small | changes))
    task = build_task(config)
    return build_model(config, task), jnp.asarray(task.batch("train", 0).inputs[:2])


def by_steps(model, tokens):
    """Logits of the tokens, read five at once, five in turn, and so on; nan where those read at once say nothing."""
    graph, variables = nnx.split(model)
    B, T = tokens.shape

    def run(variables, tokens):
        model = nnx.merge(graph, variables)

        def in_turn(cache, tokens):
            return jax.lax.scan(lambda cache, token: model.step(cache, token)[::-1], cache, tokens.T)

        def at_once(cache, tokens):
            logits, cache = model.step_several(cache, tokens)
            return cache, jnp.full((5, *logits.shape), jnp.nan).at[-1].set(logits)

        part = lambda cache, pair: jax.lax.cond(pair[0] % 2 == 0, at_once, in_turn, cache, pair[1])
        parts = (jnp.arange(T // 5), tokens.reshape(B, -1, 5).swapaxes(0, 1))
        return jax.lax.scan(part, model.init_cache(B, T), parts)[1].reshape(T, B, -1).swapaxes(0, 1)

    return jax.jit(run)(variables, tokens)


def agree(model, tokens):
    with jax.default_matmul_precision("highest"):
        graph, variables = nnx.split(model)
        whole, stepped = (
            jax.jit(lambda v, tokens: nnx.merge(graph, v)(tokens)[0])(variables, tokens),
            by_steps(model, tokens),
        )
        known = np.arange(tokens.shape[1]) % 10 >= 4
        np.testing.assert_allclose(stepped[:, known], whole[:, known], atol=1e-4 * float(jnp.abs(whole).max()))
    assert float(jnp.abs(whole[:, 1:] - whole[:, :-1]).max()) > 1e-3  # positions do differ
