import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from xformers_lab.attention import Complexity, Cost, OneHead
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size

# Queries whose weights are computed together.
BLOCK = 256


class Yoso(OneHead):
    """YOSO-E, the expectation of attention by Bernoulli sampling with LSH (Zeng et al., 2021, arXiv 2111.09714).

    out_t = y_t / |y_t|, y_t = sum_s (1 - arccos(q_t . k_s / |q_t| |k_s|) / pi)^bits v_s: the probability that a query
    and a key fall on the same side of `bits` random hyperplanes takes the place of the softmax.

    The paper samples them and is linear in the length, and compares with this form. The derivative is the paper's bound
    bits / 2 times the weight, for the true one has poles.
    Deviations from the paper: no convolution of the values is added.

    Options:
        bits: hyperplanes of one hash
    """

    kind = "full"
    exact = True
    accuracy = "in expectation: no hashes are drawn"
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="every key and value",
        memory_note="per block of queries",
    )

    def __init__(self, size: Size, *, bits: int = 8, rngs: nnx.Rngs):
        if bits < 1:
            raise Refused(f"bits must be at least 1, got {bits}")
        super().__init__(size, rngs=rngs)
        self.bits = bits

    def finished(self, mean):
        return _unit(mean)

    def attend(self, q, k, v, *, valid=None, causal):
        T, S = len(q), len(k)
        q, k = _unit(q), _unit(k)
        block = min(BLOCK, T)
        count = -(-T // block)

        @jax.checkpoint
        def rows(of_block):
            q, at = of_block
            weights = _collide(jnp.dot(q, k.T, preferred_element_type=jnp.float32), self.bits)
            seen = jnp.arange(S) <= at[:, None] if causal else jnp.ones((1, 1), bool)
            weights = jnp.where(seen if valid is None else seen & valid, weights, 0)
            return jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)

        pad = lambda x: jnp.pad(x, ((0, count * block - T), (0, 0))).reshape(count, block, -1)
        out = lax.map(rows, (pad(q), jnp.arange(count * block).reshape(count, block) + S - T))
        return out.reshape(count * block, -1)[:T]

    def reference(self, q, k, v, *, valid=None, causal):
        T, S = len(q), len(k)
        unit = lambda x: x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-24)
        weights = _collide(unit(q) @ unit(k).T, self.bits)
        seen = jnp.tril(jnp.ones((T, S)), S - T) if causal else jnp.ones((T, S))
        return weights * (seen if valid is None else seen * valid) @ v

    def cost(self, T: int, S: int) -> Cost:
        H = self.size.head
        return Cost(flops=4 * T * S * H, memory=max(min(BLOCK, T), H) * S, state=2 * S * H)


def _unit(x):
    """Rows of length 1; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-24)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _collide(cosine, bits: int):
    """The probability that two vectors at this cosine have the same hash of so many bits."""
    return (1 - jnp.arccos(jnp.clip(cosine, -1, 1)) / np.pi) ** bits


@_collide.defjvp
def _bound(bits, primals, tangents):
    weights = _collide(primals[0], bits)
    return weights, bits / 2 * weights * tangents[0]
