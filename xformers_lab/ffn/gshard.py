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


class Gshard(Experts):
    """GShard: a mixture of experts that sends each token to its best expert, and to its second in proportion to that
    one's weight (Lepikhin et al., 2020, arXiv 2006.16668).

    y = g_1 f_1(x) + r g_2 f_2(x), g_i = p_i / (p_1 + p_2), p = softmax(W x)
    r = 1 if 2 g_2 > u, u drawn from [0, 1) for each token, else 0; in evaluation r = 1

    A second expert with nearly no weight is left out; one that weighs as much as the first always runs. The balance
    loss is E sum_e (share of tokens that have e first)(mean p_e) in each sequence. Nothing is dropped, and what is
    computed grows with twice the tokens.
    Deviations from the paper: no capacity, so there is no order in which tokens fill an expert up; r = 1 in evaluation,
    which draws nothing.

    Options:
        experts: how many networks
        ratio: hidden width of one expert over model width
        activation: between the layers
        balance: weight of the balance loss
    """

    documents_apart = True

    def __init__(
        self,
        size: Size,
        *,
        experts: int = 8,
        ratio: float = 4.0,
        activation: Activation = "relu",
        balance: float = 0.01,
        rngs: nnx.Rngs,
    ):
        if experts < 2:
            raise Refused(f"experts must be at least 2, a first and a second, got {experts}")
        if balance < 0:
            raise Refused(f"balance is the weight of a loss, at least 0: got {balance:g}")
        self.router = Linear(size.dim, experts, use_bias=False, rngs=rngs)
        super().__init__(size, experts=experts, ratio=ratio, activation=activation, rngs=rngs)
        self.balance = balance

    def __call__(
        self, x: jax.Array, *, valid: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        p = jax.nn.softmax(self.router(x.astype(jnp.float32)))
        best, expert = lax.top_k(p, 2)
        weight = best / best.sum(-1, keepdims=True)
        runs = jnp.broadcast_to(valid[..., None], expert.shape)
        if key is not None:
            second = 2 * weight[..., 1] > jax.random.uniform(key, valid.shape)
            runs = runs.at[..., 1].set(valid & second)
        expert = jnp.where(runs, expert, self.experts)
        first = jax.nn.one_hot(expert[..., 0], self.experts).sum(1)
        balance, busiest = evenness(p, first, 1, valid)
        seconds = runs[..., 1].sum() / jnp.maximum(valid.sum(), 1)
        losses = {"balance": self.balance * self.experts * balance}
        scalars = {"busiest_expert": busiest, "second_experts": seconds}
        return self.run_chosen(x, expert, weight), Aux(losses=losses, scalars=scalars)
