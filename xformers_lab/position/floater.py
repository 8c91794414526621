import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.errors import Refused
from xformers_lab.nn.embedding import marked
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size
from xformers_lab.position import Position
from xformers_lab.position._waves import waves


class Floater(Position):
    """FLOATER: positions follow a learned dynamical system (Liu et al., 2020, arXiv 2003.09229, equations 3 to 5).

    p(t + delta) = p(t) + the integral of h(tau, p(tau)) over [t, t + delta], p(0) = 0, by `steps` steps of the
    classical Runge-Kutta method, h(tau, p) = W_2 tanh(W_1 p + w tau + b_1) + b_2. To position i what
    position=sinusoidal adds is added and p(i delta), which is 0 at the start, for W_2 and b_2 begin with zeros. As many
    parameters serve any length, and a longer sequence has its first positions as a shorter one has them.
    Positions are solved for one after the other: in training once a step, in decoding anew for every token.
    Deviations from the paper: positions enter before the first layer alone, not all blocks anew; gradients go back
    through the steps of the solver, which are kept, and by no adjoint equation; h's form is this one.

    Options:
        delta: time from one position to the next
        steps: of the solver, from one position to the next
        hidden: numbers of h's hidden layer, none: as many as the model is wide
    """

    embeds = True

    def __init__(self, size: Size, *, delta: float = 0.1, steps: int = 1, hidden: int | None = None, rngs: nnx.Rngs):
        if delta <= 0:
            raise Refused(f"delta is the time between two positions, so it must be above 0, got {delta:g}")
        if steps < 1 or (hidden is not None and hidden < 1):
            raise Refused(f"steps and hidden must be at least 1, got {steps} and {hidden}")
        super().__init__(size, rngs=rngs)
        width = size.dim if hidden is None else hidden
        self.delta, self.steps = delta, steps
        self.first = Linear(size.dim, width, rngs=rngs)
        self.time = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (width,)), decays=False)
        self.last = Linear(width, size.dim, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def flow(self, time: jax.Array, p: jax.Array) -> jax.Array:
        """h: how p (D,) changes at a time ()."""
        return self.last(jnp.tanh(self.first(p) + self.time[...] * time))

    def solved(self, count: int) -> jax.Array:
        """p of the first `count` positions, (count, D) float32."""
        step = self.delta / self.steps

        def onwards(p, number):
            time = number * step
            a = self.flow(time, p)
            b = self.flow(time + step / 2, p + a * step / 2)
            c = self.flow(time + step / 2, p + b * step / 2)
            d = self.flow(time + step, p + c * step)
            return p + (a + 2 * b + 2 * c + d) * step / 6, p

        start = jnp.zeros(self.size.dim, jnp.float32)
        before = lax.scan(onwards, start, jnp.arange(count * self.steps, dtype=jnp.float32))[1]
        return before[:: self.steps]

    def embed(self, x: jax.Array, at: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
        return marked(x, waves(at, self.size.dim) + self.solved(self.size.length)[at])
