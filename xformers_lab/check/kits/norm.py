"""Residual placements; see inside.py for the rest."""

import jax
import jax.numpy as jnp
import numpy as np

from xformers_lab import spec
from xformers_lab.check import inside
from xformers_lab.check.subject import Broken
from xformers_lab.check.tiny import Inside
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size


def subject(choice: str) -> Inside:
    return Inside("norm", choice, {"norm": choice})


def declared(subject: Inside) -> None:
    """A placement whose `after` does more than add says so, for a reversible stack takes back what it added."""
    size = Size(4, dim=8, heads=2, layers=2)
    placed = spec.build("norm", subject.asked["norm"], size)
    placed.start(spec.build("ffn", "mlp", size))
    x, other, y = jax.random.normal(jax.random.key(0), (3, 2, 4, 8))
    x, other = placed.widened(x), placed.widened(other)
    added, elsewhere = (placed.after(stream, y, LayerContext()) - stream for stream in (x, other))
    if placed.adds and not np.allclose(added, elsewhere, atol=1e-5):
        raise Broken(
            "its `after` does more than add to x what comes of y: write `adds = False` in its class, or define `branch`"
        )


def silence(subject: Inside) -> None:
    """Rows of zeros, which have no variance to divide by, give finite values and gradients."""
    size = Size(4, dim=8, heads=2, layers=2)
    placed = spec.build("norm", subject.asked["norm"], size)
    placed.start(spec.build("ffn", "mlp", size))

    def around(x, y):
        x = placed.widened(x)
        x = placed.after(x, placed.before(x, LayerContext()) + y, LayerContext())
        return (x if placed.final is None else placed.final(x, LayerContext())).sum()

    zeros = jnp.zeros((2, 4, 8))
    value, grads = jax.value_and_grad(around, (0, 1))(zeros, zeros)
    if not all(np.isfinite(leaf).all() for leaf in (value, *grads)):
        raise Broken("rows of zeros give a value or gradient that is not finite: add a small number under the root")


PROPERTIES = [*inside.PROPERTIES, declared, silence]
