import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention.full import Full
from xformers_lab.errors import Refused
from xformers_lab.nn.absent import Same
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.size import Size

# The least variance of the votes for a capsule, of votes whose variance is near 1.
LEAST = 1e-4


class Capsules(Full):
    """Attention whose heads are aggregated by routing (Li et al., 2019, arXiv 1904.03100).

    In the place of a projection of all heads, head h casts a vote v_hn = W_hn o_h for every output capsule n, whose
    concatenation the layer gives. Shares c_hn, of each head a softmax over capsules, all alike at first, change in
    `rounds` by how well votes agree:
        routing=simple: u_n = sum_h c_hn v_hn / sum_h c_hn, and the logit of c_hn grows by
            u_n . v_hn / sqrt(C), C channels of a capsule
        routing=em: capsules are Gaussians of mean u_n as above and of variances s_n; c_hn is in proportion to a_n times
            the density of v_hn (the geometric mean of its channels' own), a_n = sigmoid(mean over channels of (b_n -
            (log s_n / 2 + d_n) sum_h c_hn)), b and d learned; the layer gives a_n u_n
    W has as many parameters as the projection has for which it stands. Routing looks at one position alone.
    Deviations from the paper: votes are of what heads give, with no layer in between; products are divided by
        sqrt(C), and where the paper adds up over channels, a_n and densities have means, so that shares are no less
        soft in wide capsules.

    Options:
        routing: simple: by dot products; em: by expectation and maximisation
        rounds: how often shares are found, the first time all alike
        capsules: how many there are; none: as many as heads
    """

    kind = "multi-head"
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        time_note=" and O(T H D) for the votes",
        memory="O(S)",
        decoding="every key and value",
        memory_note="per row of blocks, and O(T D) for the votes",
    )

    def __init__(
        self,
        size: Size,
        *,
        routing: Literal["simple", "em"] = "em",
        rounds: int = 3,
        capsules: int | None = None,
        rngs: nnx.Rngs,
    ):
        count = size.heads if capsules is None else capsules
        if rounds < 1:
            raise Refused(f"rounds must be at least 1, got {rounds}")
        if count < 1 or size.dim % count:
            raise Refused(f"capsules={count} do not divide dim={size.dim}, whose channels they share")
        super().__init__(size, rngs=rngs)
        self.out = Same()
        self.routing, self.rounds = routing, rounds
        draw = nnx.initializers.normal(size.head**-0.5)
        shape = (size.heads, size.head, count, size.dim // count)
        self.votes = nnx.Param(draw(rngs.params(), shape), decays=True)
        if routing == "em":
            self.active, self.price = (nnx.Param(jnp.zeros(count), decays=False) for _ in range(2))

    def scale_init(self, share: float) -> None:
        scale_init(share, self.value, self.votes)

    def finished(self, mean):
        # In float32 whatever the model computes in: shares are exponentials of products of votes.
        v = jnp.einsum("btnh,nhmc->btnmc", mean.astype(jnp.float32), self.votes[...].astype(jnp.float32))
        routed = self._by_density(v) if self.routing == "em" else self._by_agreement(v)
        return routed.reshape(mean.shape)

    def _by_agreement(self, v):
        """Votes (B, T, N, M, C) -> capsules (B, T, M, C)."""
        logits = jnp.zeros(v.shape[:-1])
        u = _mean(jax.nn.log_softmax(logits), v)
        for _ in range(self.rounds - 1):
            logits = logits + (u[:, :, None] * v).sum(-1) * v.shape[-1] ** -0.5
            u = _mean(jax.nn.log_softmax(logits), v)
        return u

    def _by_density(self, v):
        """Votes (B, T, N, M, C) -> capsules (B, T, M, C)."""
        u, active, density = self._fitted(jnp.full(v.shape[:-1], -math.log(v.shape[-2])), v)
        for _ in range(self.rounds - 1):
            u, active, density = self._fitted(jax.nn.log_softmax(jax.nn.log_sigmoid(active)[:, :, None] + density), v)
        return jax.nn.sigmoid(active)[..., None] * u

    def _fitted(self, shares, v):
        """Of capsules that have votes v by shares, given as logarithms: their means, the logits of their activations,
        and the logarithm of every vote's density, a mean over channels, but for what is the same of all."""
        u = _mean(shares, v)
        apart = (v - u[:, :, None]) ** 2
        variance = _mean(shares, apart) + LEAST
        active = self.active[...] - ((jnp.log(variance) / 2).mean(-1) + self.price[...]) * jnp.exp(shares).sum(2)
        return u, active, -(apart / variance[:, :, None] + jnp.log(variance)[:, :, None]).mean(-1) / 2


def _mean(shares, v):
    """The mean (B, T, M, C) of votes by shares, given as logarithms (B, T, N, M), however small those of a capsule
    are."""
    return (jax.nn.softmax(shares, 2)[..., None] * v).sum(2)
