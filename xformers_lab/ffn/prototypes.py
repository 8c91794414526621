import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.ffn import Activation
from xformers_lab.ffn._experts import Experts, evenness
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Prototypes(Experts):
    """Expert prototyping: experts in groups, each with a router of its own that sends every token to one of its group
    (M6-T, Yang et al., 2021, arXiv 2105.15082).

    y = sum over the k groups of p_e f_e(x), e = argmax p, p = softmax(W_i x) over the experts of group i

    So k experts run for each token, as with ffn=moe:top=k, but each is the best of its own group, found by an argmax
    and no search for the k best. The balance loss of ffn=moe is taken in each group, the mean over the groups. Nothing
    is dropped, and what is computed grows with the tokens times k.
    Deviations from the paper: no capacity; prototypes of the feed-forward sub-layer alone, where the paper's largest
    models have them in attention, too.

    Options:
        experts: how many networks, over all groups
        groups: how many prototypes
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
        groups: int = 2,
        ratio: float = 4.0,
        activation: Activation = "gelu",
        balance: float = 0.01,
        rngs: nnx.Rngs,
    ):
        if not 1 <= groups <= experts or experts % groups:
            raise Refused(f"groups={groups} must divide experts={experts}: each group has as many")
        if balance < 0:
            raise Refused(f"balance is the weight of a loss, at least 0: got {balance:g}")
        self.router = Linear(size.dim, experts, use_bias=False, rngs=rngs)
        super().__init__(size, experts=experts, ratio=ratio, activation=activation, rngs=rngs)
        self.groups, self.balance = groups, balance

    def __call__(
        self, x: jax.Array, *, valid: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        size = self.experts // self.groups
        p = jax.nn.softmax(self.router(x.astype(jnp.float32)).reshape(*valid.shape, self.groups, size))
        mine = jnp.where(valid[..., None], p.argmax(-1), size)
        expert = jnp.where(valid[..., None], mine + size * jnp.arange(self.groups), self.experts)
        of_group = lambda p, sent: evenness(p, sent, 1, valid)
        balance, busiest = jax.vmap(of_group, (2, 1))(p, jax.nn.one_hot(mine, size).sum(1))
        losses, scalars = {"balance": self.balance * size * balance.mean()}, {"busiest_expert": busiest.mean()}
        return self.run_chosen(x, expert, p.max(-1)), Aux(losses=losses, scalars=scalars)
