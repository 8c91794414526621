"""How far a mechanism's output is from softmax attention on the same queries, keys and values."""

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab import spec
from xformers_lab.config import Config, seed_of
from xformers_lab.errors import UsageError
from xformers_lab.model import size_of


def error(config: Config, scale: float = 1.0) -> float:
    """|out - full| / |full| (Frobenius) of a mechanism as it is drawn, over a batch of random heads.

    q, k and v (B, T, N, H) are normal with unit variance, q and k times `scale`, so that a score q . k / sqrt(H) has
    the standard deviation scale^2. They are drawn from data_seed, what the mechanism draws (features, projections) from
    init_seed. Causal where the mechanism can be and `model` is auto or causal.

    Raises UsageError where the mechanism cannot be, or needs the layer's input beside q, k and v.
    """
    choice, size, kind = config.model.attention, size_of(config), config.model.model
    built = lambda choice: spec.build(
        "attention", choice, size, rngs=nnx.Rngs(seed_of(config, "init_seed")), where=f"attention={choice}"
    )
    layer, exact = built(choice), built("full")
    if not layer.projects:
        raise UsageError(
            f"attention={choice}: its queries, keys and values are its own, so nothing is compared with full"
        )
    can = layer.accepts("causal") and "causal" not in layer.refusals()
    causal = can and (kind == "auto" or spec.entry("model", spec.parse(kind).name).causal)
    shape = (config.train.batch, size.length, size.heads, size.head)
    draws = jax.random.split(jax.random.key(seed_of(config, "data_seed")), 4)
    q, k, v = (jax.random.normal(draw, shape) * by for draw, by in zip(draws, (scale, scale, 1.0), strict=False))
    mixed = lambda layer: layer.mix(q, k, v, causal=causal, key=draws[3])[0]
    try:
        out, full = mixed(layer), mixed(exact)
    except (TypeError, AttributeError) as error:
        raise UsageError(f"attention={choice}: it does not run on q, k and v alone ({error})") from None
    return float(jnp.linalg.norm(out - full) / jnp.linalg.norm(full))
