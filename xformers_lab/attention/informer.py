import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from xformers_lab.attention import Complexity, Cost, OneHead
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.products import products, weighted
from xformers_lab.attention._engine.softmax import MASKED, masked_softmax
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Informer(OneHead):
    """ProbSparse attention of Informer (Zhou et al., 2021, arXiv 2012.07436, algorithm 1).

    The u = factor ceil(ln T) queries whose scores with a sample of as many keys have the largest maximum less mean are
    answered by full softmax attention; every other query, taken to be near uniform, by the mean of the values.

    Deviations from the paper: one sample of keys serves all queries of a head, as in algorithm 1 (the authors' code
    draws one for each query, and divides the sum of its scores by the number of all keys); it takes one key of every
    equal share of those that are no padding. It is drawn anew in every training step, and is fixed by seed in
    evaluation. Padded queries are chosen last. The masked form of the authors' code, whose other queries get the sum of
    the values up to themselves, is refused: a query is measured by keys behind it, and whether it is among the u chosen
    hangs on all later queries, so that its answer would say something of them.

    Options:
        factor: c, sampled keys and chosen queries per logarithm of the length
        seed: draws the sample of evaluation
    """

    kind = "memory compression"
    exact = False
    accuracy = "; with u = T every query is answered in full"
    complexity = Complexity(time="O(T log T H)", memory="O(T log T)")
    refuses: ClassVar = {
        "causal": "which queries are answered in full is decided among all of them, later ones too",
        "cross": "the choice is among the queries that came, and padding is known of the keys alone",
    }

    def __init__(self, size: Size, *, factor: int = 5, seed: int = 0, rngs: nnx.Rngs):
        if factor < 1:
            raise Refused(f"factor must be at least 1, got {factor}")
        super().__init__(size, rngs=rngs)
        self.factor, self.seed = factor, seed

    def _count(self, length: int) -> int:
        return min(length, self.factor * max(1, math.ceil(math.log(length))))

    def attend(self, q, k, v, *, valid=None, bias=None, key=None):
        if q.shape[0] != k.shape[0]:
            raise Refused(
                f"informer takes as many queries as keys, got {q.shape[0]} and {k.shape[0]}: "
                "it chooses among the queries, so that a part of them would be answered in another way"
            )
        return jax.checkpoint(self._attend)(q, k, v, valid, bias, key)

    def _attend(self, q, k, v, valid, bias, key):
        T, scale = q.shape[0], q.shape[1] ** -0.5
        at = jnp.arange(T)
        sample = self._sample(valid, T, key)
        # Scaled last, so that the choice does not depend on how a half precision rounds.
        s = jnp.dot(lax.stop_gradient(q), lax.stop_gradient(k)[sample].T, preferred_element_type=jnp.float32) * scale
        measure = _measure(s if bias is None else s + bias(at[:, None], sample[None]), valid)
        top = lax.top_k(lax.stop_gradient(measure), self._count(T))[1]
        s = products(q[top] * scale, k)
        s = s if bias is None else s + bias(top[:, None], at[None])
        exact = weighted(masked_softmax(s if valid is None else jnp.where(valid, s, MASKED)), v)
        if valid is None:
            mean = v.mean(0, dtype=jnp.float32)
        else:
            mean = jnp.where(valid[:, None], v, 0).sum(0) / _number(valid)
        mean, exact = mean.astype(v.dtype), exact.astype(v.dtype)
        return jnp.broadcast_to(mean, v.shape).at[top].set(exact, unique_indices=True)

    def _sample(self, valid, T: int, key):
        """Positions of the sampled keys: one of each equal share of those that are valid."""
        count = self._count(T)
        chance = np.random.default_rng(self.seed).random(count) if key is None else jax.random.uniform(key, (count,))
        place = (np.arange(count) + chance) / count
        if valid is None:
            return jnp.minimum(place * T, T - 1).astype(jnp.int32)
        rank = jnp.floor(place * valid.sum()).astype(jnp.int32)
        return jnp.minimum(jnp.searchsorted(jnp.cumsum(valid), rank + 1), T - 1)

    def reference(self, q, k, v, *, valid=None, bias=None, key=None):
        T = q.shape[0]
        if k.shape[0] != T:
            raise Refused("informer takes as many queries as keys")
        s, sample = scores(q, k, bias), self._sample(valid, T, key)
        measure = lax.stop_gradient(s[:, sample].max(1) - s[:, sample].mean(1))
        valid = jnp.ones(T, bool) if valid is None else valid
        measure, at = jnp.where(valid, measure, MASKED), jnp.arange(T)
        ahead = (measure > measure[:, None]) | ((measure == measure[:, None]) & (at < at[:, None]))
        chosen = ahead.sum(1) < self._count(T)
        p = jnp.where(chosen[:, None], masked_softmax(s, valid), masked_softmax(jnp.zeros((T, T)), valid))
        return (p @ v).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H, u = self.size.head, self._count(S)
        return Cost(flops=6 * u * S * H, memory=S * max(u, H), state=0)

    @staticmethod
    def limit(length: int):
        return {"factor": length}


def _measure(s, valid):
    """How far from uniform the weights of each query are: (T, samples) -> (T,); padded queries are last."""
    measure = s.max(1) - s.mean(1)
    return measure if valid is None else jnp.where(valid, measure, MASKED)


def _number(valid):
    return jnp.maximum(valid.sum(), 1)
