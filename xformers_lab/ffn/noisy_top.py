import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.errors import Refused
from xformers_lab.ffn import Activation
from xformers_lab.ffn._experts import Experts, evenness
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

# Keeps what the noise is divided by away from 0.
LEAST = 0.01


class NoisyTop(Experts):
    """Noisy top-k gating: a mixture of experts whose router adds learned noise to its scores before it chooses
    (Shazeer et al., 2017, arXiv 1701.06538).

    y = sum over the k experts with the largest H_e of G_e f_e(x), G = softmax of those k
    H_e = (W x)_e + n s_e, n drawn from N(0, 1), s_e = softplus((V x)_e); in evaluation H = W x

    Two losses even out the experts of a batch, each the squared coefficient of variation of one figure for each expert:
    importance, the sum of G_e over the tokens; and load, the sum of the probabilities that another draw of expert e's
    noise alone, those of the others as they fell, would choose it, Phi(((W x)_e - the k-th largest H of the others) /
    s_e). W and V begin at 0, so that at first all experts are as likely. Nothing is dropped, and what is computed grows
    with the tokens times k.
    Deviations from the paper: one level of experts, not a hierarchy; f_e has the `activation` of other sub-layers and
    no sigmoid behind it; s_e has 0.01 added, as the authors' code has. A batch in parts, by accumulate= or layout=pmap,
    is evened out part by part.

    Options:
        experts: how many networks
        top: networks per token
        ratio: hidden width of one expert over model width
        activation: between the layers
        importance: weight of the loss on the sums of gates
        load: weight of the loss on how many tokens an expert is likely to get
    """

    documents_apart = True

    def __init__(
        self,
        size: Size,
        *,
        experts: int = 8,
        top: int = 2,
        ratio: float = 4.0,
        activation: Activation = "relu",
        importance: float = 0.1,
        load: float = 0.1,
        rngs: nnx.Rngs,
    ):
        if not 1 <= top < experts:
            raise Refused(f"top={top} must be from 1 to {experts - 1}: all of experts={experts} leaves no choice")
        if importance < 0 or load < 0:
            raise Refused(f"importance and load are weights of losses, at least 0: got {importance:g} and {load:g}")
        super().__init__(size, experts=experts, ratio=ratio, activation=activation, rngs=rngs)
        none = nnx.initializers.zeros
        self.router = Linear(size.dim, experts, use_bias=False, kernel_init=none, rngs=rngs)
        self.noise = Linear(size.dim, experts, use_bias=False, kernel_init=none, rngs=rngs)
        self.top, self.importance, self.load = top, importance, load

    def __call__(
        self, x: jax.Array, *, valid: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        exact = x.astype(jnp.float32)
        clean, losses = self.router(exact), {}
        noisy = clean
        if key is not None:
            spread = jax.nn.softplus(self.noise(exact)) + LEAST
            noisy = clean + spread * jax.random.normal(key, clean.shape)
            likely = jnp.where(valid[..., None], chance(clean, noisy, spread, self.top), 0)
            losses["load"] = self.load * variation(likely.sum((0, 1)))
        score, expert = lax.top_k(noisy, self.top)
        weight = jnp.where(valid[..., None], jax.nn.softmax(score), 0)
        expert = jnp.where(valid[..., None], expert, self.experts)
        of_expert = jax.nn.one_hot(expert, self.experts)
        gates = (of_expert * weight[..., None]).sum(2)
        losses["importance"] = self.importance * variation(gates.sum((0, 1)))
        busiest = evenness(gates, of_expert.sum((1, 2)), self.top, valid)[1]
        return self.run_chosen(x, expert, weight), Aux(losses=losses, scalars={"busiest_expert": busiest})


def chance(clean: jax.Array, noisy: jax.Array, spread: jax.Array, top: int) -> jax.Array:
    """(..., E), how likely each of E is among the `top` largest of clean + spread n if its own n alone were drawn
    again, where `noisy` is what was drawn."""
    best = lax.top_k(noisy, top + 1)[0]
    least, next_best = best[..., top - 1 : top], best[..., top:]
    # The top-th largest of the others: one that is among the largest itself does not count.
    others = jnp.where(noisy >= least, next_best, least)
    return jax.scipy.stats.norm.cdf((clean - others) / spread)


def variation(x: jax.Array) -> jax.Array:
    """(E,) -> (), the squared coefficient of variation: variance over squared mean."""
    return x.var() / jnp.maximum(x.mean() ** 2, jnp.finfo(jnp.float32).tiny)
