"""The logistic function, as recurrent cells run it."""

import jax.numpy as jnp


def sigmoid(x):
    """The logistic function by way of tanh, which XLA:CPU runs twice as fast as the function itself."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * x)
