"""Variables that the backward pass moves."""

import jax
import jax.numpy as jnp
from flax import nnx


class Backward(nnx.Variable):
    """A float variable, no parameter, whose new value is its gradient: what a layer learns of gradients.

    In training the layer runs a `jax.custom_vjp` that takes its value and returns it unchanged, and writes what it
    returned into the variable. The backward pass hands that function the newest value as the cotangent of what it
    returned, and takes the next one from the cotangent of what it took; layers that run several times hand it on from
    the last run to the first. A forward pass alone leaves it as it was.
    """


def values(model: nnx.Module) -> dict:
    """The variables of a model that its backward pass moves."""
    return nnx.to_pure_dict(nnx.state(model, Backward))


def surrogate_loss(before: dict, after: dict) -> jax.Array | int:
    """() what is added to a loss, so that its gradient to `before` is the next value of these variables; `after`
    are the same after the forward pass. Its own value means nothing."""
    products = jax.tree.map(lambda old, new: jnp.vdot(jax.lax.stop_gradient(old), new), before, after)
    return sum(jax.tree.leaves(products))
