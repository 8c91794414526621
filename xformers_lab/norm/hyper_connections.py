from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size
from xformers_lab.norm import Norm

# Of what is computed from the states, at the start.
SMALL = 0.01
EPSILON = 1e-6


class HyperConnections(Norm):
    """Hyper-connections: several residual streams, which every sub-layer reads, mixes and writes to by weights of its
    own (Zhu et al., 2024, arXiv 2409.19606, equations 2 and 3, 10 to 13).

    Of the streams H (n, D) a sub-layer f gets n(a^T H), and leaves R^T H + b f. At the start all streams are alike, a
    reads one, R is the identity and b is ones, which is pre-LN. With dynamic=true each token adds to a, b and R
    0.01 tanh(H' W), H' being its streams at unit root mean square, W zeros and 0.01 a number that is learned, one for b
    and one for a and R. At the end of the stack streams are added up and normalised.

    Each sub-layer has 2 n + n^2 weights, (2 + n) D more where they are dynamic; streams take n times the memory of one.
    Deviations from the paper: which stream a reads first is drawn for each sub-layer, where the paper counts them.

    Options:
        normaliser: a file of norm/normaliser
        count: residual streams n
        dynamic: whether weights depend on the token, too
    """

    adds = False

    def __init__(
        self, size: Size, *, normaliser: str = "layernorm", count: int = 4, dynamic: bool = True, rngs: nnx.Rngs
    ):
        if not 2 <= count <= 64:
            raise Refused(f"count must be from 2 to 64 streams, got {count}; one alone is norm=pre")
        super().__init__(size, normaliser=normaliser, rngs=rngs)
        self.size, self.streams, self.dynamic = size, count, dynamic
        # Drawn here, for a sub-layer that it is started around has no more random numbers to give.
        self.first = nnx.Variable(jax.random.randint(rngs.params(), (), 0, count))

    def start(self, layer: Any) -> None:
        """Only around a sub-layer is there something to connect, not at the end of the stack."""
        n, D = self.streams, self.size.dim
        param = lambda start: nnx.Param(start, decays=False)
        self.read, self.mix = param(jax.nn.one_hot(self.first[...], n)), param(jnp.eye(n))
        self.write = param(jnp.ones(n))
        if self.dynamic:
            self.read_of, self.write_of = param(jnp.zeros(D)), param(jnp.zeros(D))
            self.mix_of = param(jnp.zeros((D, n)))
            self.size_in, self.size_out = (param(jnp.asarray(SMALL)) for _ in range(2))
        del self.first

    def before(self, x: jax.Array, context: LayerContext) -> jax.Array:
        H = self._apart(x)
        read = self.read[...]
        if self.dynamic:
            read = read + self.size_in[...] * jnp.tanh(_unit(H) @ self.read_of[...])
        return self.normalise(jnp.einsum("...n,...nd->...d", read, H).astype(x.dtype), context)

    def after(self, x: jax.Array, y: jax.Array, context: LayerContext) -> jax.Array:
        H = self._apart(x)
        write, mix = self.write[...], self.mix[...]
        if self.dynamic:
            unit = _unit(H)
            write = write + self.size_out[...] * jnp.tanh(unit @ self.write_of[...])
            mix = mix + self.size_in[...] * jnp.tanh(unit @ self.mix_of[...])
        new = jnp.einsum("...nm,...nd->...md", mix, H) + write[..., None] * y[..., None, :].astype(jnp.float32)
        return new.reshape(x.shape).astype(x.dtype)

    def final(self, x: jax.Array, context: LayerContext) -> jax.Array:
        return self.normalise(self._apart(x).sum(-2).astype(x.dtype), context)

    def _apart(self, x: jax.Array) -> jax.Array:
        """(..., n D) -> (..., n, D) in float32."""
        return x.reshape(*x.shape[:-1], self.streams, -1).astype(jnp.float32)


def _unit(H):
    return H * jax.lax.rsqrt(jnp.square(H).mean(-1, keepdims=True) + EPSILON)
